"""Split: which samples go into which part of a data set; by a keyed hash, by conditions, or by a list of keys."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from clipscale.data.shards import open_dataset
from clipscale.errors import ConfigError, DataError
from clipscale.settings import did_you_mean
from data_tools.expressions import Condition
from data_tools.reshard import Choice, Values, sample_values

_HEAD = 64  # samples whose fields a condition may name


def split_choices(dataset: str, parts: Sequence[str], *, by: str, seed: int) -> dict[str, Choice]:
    """The choice of each part, by its name; `parts` are NAME=FRACTION, or NAME=condition.

    Raises:
        ConfigError: a part that cannot be understood, or fractions of more than the whole.
    """
    texts: dict[str, str] = {}
    for part in parts:
        name, found, text = part.partition("=")
        if not found or not re.fullmatch(r"[\w-]+", name) or name in texts:
            raise ConfigError(f"--part {part}: give each part a name of its own and what belongs to it: train=0.9, or long='seconds > 3'")
        texts[name] = text.strip()
    fractions = [_fraction(text) for text in texts.values()]
    if all(fraction is not None for fraction in fractions):
        return _by_fractions(list(texts), [fraction or 0.0 for fraction in fractions], by=by, seed=seed)
    if any(fraction is not None for fraction in fractions):
        raise ConfigError("parts are all fractions or all conditions")
    if by != "key":
        raise ConfigError(f"--by {by}: goes with fractions, not with conditions")
    conditions = [_condition(dataset, f"--part {name}", text) for name, text in texts.items()]
    return {
        name: Choice(partial(_first_is, conditions, place), "records", f"part {name}: the first that holds of {list(texts.values())}")
        for place, name in enumerate(texts)
    }


def _fraction(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _by_fractions(names: list[str], fractions: list[float], *, by: str, seed: int) -> dict[str, Choice]:
    if not all(0 < fraction <= 1 for fraction in fractions) or sum(fractions) > 1 + 1e-9:
        raise ConfigError(f"the fractions of the parts must be more than 0 and add up to at most 1, not {' + '.join(map(str, fractions))}")
    about = f"of {dict(zip(names, fractions, strict=True))} by {by}, seed {seed}"
    needs = "keys" if by == "key" else "records"
    return {
        name: Choice(partial(_falls_into, place, fractions, by, seed), needs, f"part {name} {about}")  # type: ignore[arg-type]
        for place, name in enumerate(names)
    }


def _falls_into(place: int, fractions: list[float], by: str, seed: int, values: Values) -> bool:
    value = values.get(by)
    if value in (None, ""):
        raise DataError(f"sample '{values['key']}' has no '{by}' to split by; split by another field, or first leave such samples out")
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return part_of(text, fractions, seed=seed) == place


def part_of(value: str, fractions: Sequence[float], *, seed: int) -> int | None:
    """The part that a value falls into, by a keyed hash: it depends on the value, the seed and the fractions alone; None: into none."""
    digest = hashlib.blake2b(value.encode(), digest_size=8, key=f"clipscale split {seed}".encode()).digest()
    place, end = int.from_bytes(digest, "little") / 2**64, 0.0
    for part, fraction in enumerate(fractions):
        end += fraction
        if place < end:
            return part
    return len(fractions) - 1 if end >= 1 - 1e-9 else None


def _first_is(conditions: Sequence[Condition], place: int, values: Values) -> bool:
    return next((number for number, condition in enumerate(conditions) if condition.holds(values)), None) == place


def filter_choice(dataset: str, where: str | None, without: Path | None) -> Choice:
    """The samples that fulfil a condition and are not on a list of keys.

    Raises:
        ConfigError: it is no condition, or names a field that the first samples do not have.
        DataError: the list cannot be read, or names a key that the data set does not have.
    """
    condition = None if where is None else _condition(dataset, "--where", where)
    listed = set[str]() if without is None else _keys(dataset, without)
    digest = hashlib.sha256("\n".join(sorted(listed)).encode()).hexdigest() if listed else ""
    about = f"where {where}, without {len(listed)} keys {digest}" if condition or listed else ""
    return Choice(partial(_wanted, condition, listed) if about else None, "records" if condition else "keys", about)


def _wanted(condition: Condition | None, listed: set[str], values: Values) -> bool:
    return values["key"] not in listed and (condition is None or condition.holds(values))


def _condition(dataset: str, option: str, text: str) -> Condition:
    try:
        condition = Condition(text)
    except ValueError as error:
        raise ConfigError(f"{option} {text}: {error}") from None
    head = list(islice(sample_values(open_dataset(dataset), 0, records=True), _HEAD))
    known = sorted({name for values in head for name in values})
    for name in condition.names:
        if name not in known:
            raise ConfigError(f"{option} {text}: there is no field '{name}'{did_you_mean(name, known)} (there are: {', '.join(known)})")
    return condition


def _keys(dataset: str, path: Path) -> set[str]:
    try:
        listed = {line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--without {path}: cannot be read: {error}") from error
    index, unknown = open_dataset(dataset), set(listed)
    for shard in range(len(index.shards)):
        unknown -= set(index.sidecar(shard).columns["key"].tolist())
    if unknown:
        raise DataError(f"--without {path}: {len(unknown):,} of its keys are not in {dataset}, for instance '{min(unknown)}'")
    return listed
