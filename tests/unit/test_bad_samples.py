"""Bad samples: counted by source and reason, and a budget that says what was wrong and where."""

from __future__ import annotations

import json

import pytest

from clipscale.data.bad_samples import MOST_REASONS, BadSampleBudget, reason_class
from clipscale.data.sample import BadSample
from clipscale.errors import ShardError

BAD = BadSample("k7", "photos", "the png picture is damaged: image file is truncated (3 bytes not processed)", "shard 000001, sample 7")


def test_the_budget_stops_a_run_with_a_list_of_what_was_wrong_and_where() -> None:
    BadSampleBudget(max_fraction=0.001).count([True] * 9999 + [False], [BAD])
    with pytest.raises(ShardError, match=r"11 of 11 samples could not be read; allowed are 0.10%") as stopped:
        BadSampleBudget(max_fraction=0.001).count([False] * 11, [BAD] * 11)
    assert "\n  photos: 11 × the png picture is damaged: image file is truncated\n" in str(stopped.value)
    assert "\n  photos, shard 000001, sample 7: 'k7': the png picture is damaged: image file is truncated (3 bytes" in str(stopped.value)
    budget = BadSampleBudget(max_fraction=1.0, max_in_a_row=5)
    budget.count([False] * 4 + [True] + [False] * 4, [BAD] * 8)
    with pytest.raises(ShardError, match="5 samples in a row could not be read"):
        budget.count([False], [BAD])


def test_a_resumed_budget_goes_on_counting() -> None:
    once, again = BadSampleBudget(max_fraction=1.0, max_in_a_row=5), BadSampleBudget(max_fraction=1.0, max_in_a_row=5)
    once.count([True, False, False, False], [BAD] * 3)
    again.take_up(json.loads(json.dumps(once.state())))
    assert again.reasons == {"photos": {"the png picture is damaged: image file is truncated": 3}}
    with pytest.raises(ShardError, match="5 samples in a row"):
        again.count([False, False], [BAD] * 2)


@pytest.mark.parametrize(
    ("reason", "counted_as"),
    [
        ("/data/a/000001.tar: sample 'k7' is not the one that was written (its checksum differs)",
         "sample is not the one that was written"),
        ("s3://bucket/x/0001.tar: the file ends inside sample 'a_b'", "the file ends inside sample"),
        ("the picture has 70000 x 70000 pixels; at most 64,000,000 are read", "the picture has x pixels; at most are read"),
        ("every caption is empty", "every caption is empty"),
        ("'x' (y)", "unknown"),
    ],
)  # fmt: skip
def test_reasons_are_counted_without_what_belongs_to_one_sample(reason: str, counted_as: str) -> None:
    assert reason_class(reason) == counted_as


def test_reasons_stay_few() -> None:
    budget = BadSampleBudget(max_fraction=1.0, max_in_a_row=1000)
    names = "abcdefghijklmnopqrst"
    budget.count([False] * len(names), [BadSample("k", "photos", f"broken in way {name}") for name in names])
    assert len(budget.reasons["photos"]) == MOST_REASONS + 1
    assert budget.reasons["photos"]["other reasons"] == len(names) - MOST_REASONS
