"""Speech intent: what does a spoken command ask for, told by the intents' names alone?

Zero-shot speech-to-intent as in CWCL (Srinivasa et al. 2023, arXiv:2309.14580): an utterance belongs to the intent whose
name lies closest. `by_name` ranks the intents whole. `by_slots` answers each slot (action, object, location, ...) by itself
and is right when all are: a slot value's vector is the mean over the names of the intents that have it, so that the
words around it are those of real commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from clipscale.data.sources import Source
from clipscale.errors import DataError
from clipscale.evaluators import Evaluation, Evaluator, Example, Figure, Item
from clipscale.evaluators._embed import Rows, embed_prompts, embed_rows
from clipscale.evaluators._prompts import Templates, duplicate_words, fill, in_order
from clipscale.evaluators._scoring import classify, hits_at, nearest
from clipscale.evaluators._sources import check_source
from clipscale.evaluators._summary import Clusters, confusion, example_rows, group_hits, macro_f1_figure, provenance, share, with_rows
from clipscale.inputs import Modality

if TYPE_CHECKING:
    from torch import Tensor

    from clipscale.model import Encoders
    from clipscale.parallel.mesh import Mesh

_RESULTS_SHOWN = 3


@dataclass(frozen=True)
class Intents:
    """The intents an utterance may have; in this order everywhere."""

    ids: list[str]
    names: list[str]
    """In words, as they go into templates."""
    slots: list[dict[str, str]]
    """Slot -> value of each intent; empty dictionaries when the records have no slots."""

    def values(self, slot: str) -> list[str]:
        """The values of one slot, sorted."""
        return in_order([own[slot] for own in self.slots])


class SpeechIntent(Evaluator):
    """Accuracy and macro-F1 of intents by name, and accuracy by slots."""

    source: Source
    """The utterances; every record holds the intent, its name and, for `by_slots`, its slots."""
    field: str = "intent"
    """The record field that says which intent it is."""
    name_field: str = "intent_name"
    """The record field with the intent in words; the same words for the same intent."""
    slots_field: str = "slots"
    """The record field with a mapping from slot to value; `by_slots` is left out where no record has it."""
    templates: Templates = ["{}"]
    """What is said of an intent: a list with `{}` for its name."""
    slot_templates: Templates | None = None
    """Put the bare slot values into these templates instead of taking the mean over intents' names."""
    cluster: str | None = "speaker"
    """Utterances that share this record field are not independent, and the intervals say so; ignored where no record has it."""
    batch_size: int = Field(default=256, gt=0)

    def modalities(self) -> set[Modality]:
        return {"speech", "text"}

    def check(self) -> None:
        check_source(self.source, "speech")

    def evaluate(self, model: Encoders, mesh: Mesh) -> Evaluation:
        rows = embed_rows(model, mesh, self.source, "speech", batch_size=self.batch_size)
        labels = rows.field(self.field)
        intents = self._intents(rows, labels)
        place = {intent: index for index, intent in enumerate(intents.ids)}
        truth = torch.tensor([place[label] for label in labels], device=mesh.device)
        prompts = [fill(self.templates, name) for name in intents.names]
        classifier = embed_prompts(model, mesh, prompts, batch_size=self.batch_size)
        scored = classify(rows.embeddings, classifier, truth)
        clusters = Clusters.by_field(rows, self.cluster)
        true, answer, hits = truth.cpu().numpy(), scored.predicted.cpu().numpy(), hits_at(scored.rank, 1)
        figures = [
            share("by_name_accuracy", hits, clusters, chance=1 / len(intents.ids)),
            macro_f1_figure("by_name_macro_f1", true, answer, clusters),
        ]
        if all(intents.slots):
            figures += self._by_slots(model, mesh, rows.embeddings, intents, truth, clusters)
        of_rows: dict[str, Any] = {"keys": rows.keys, "truths": labels, "modality": "speech", "source": rows.source}
        groups = {self.field: group_hits(labels, hits, intents.ids)}
        if clusters.by != "row":
            groups[clusters.by] = group_hits(clusters.of_row, hits)
        return Evaluation(
            name="speech_intent",
            kind="speech_intent",
            figures=[
                *with_rows(figures[:2], answers=[intents.ids[place] for place in answer.tolist()], **of_rows),
                *with_rows(figures[2:], answers=[""] * len(rows), **of_rows),  # slots are several answers
            ],
            confusion=confusion(self.field, intents.ids, true, answer),
            groups=groups,
            examples=_examples(rows, classifier, intents, true),
            warnings=[f"several intents are called '{name}'; nothing can tell them apart" for name in duplicate_words(intents.names)],
            provenance=provenance(self, [rows], prompts),
        )

    def _intents(self, rows: Rows, labels: list[str]) -> Intents:
        """The intents in the data, with one name and one set of slots each."""
        names = _one_each(rows, labels, rows.field(self.name_field), self.name_field)
        with_slots = any(self.slots_field in record for record in rows.records)
        slots = [_as_text(values) for values in rows.values(self.slots_field, dict)] if with_slots else [{} for _ in labels]
        own = _one_each(rows, labels, slots, self.slots_field)
        ids = in_order(labels)
        known = list(dict.fromkeys(slot for intent in ids for slot in own[intent]))
        filled = [{slot: own[intent].get(slot, "none") for slot in known} for intent in ids]
        return Intents(ids, [names[intent] for intent in ids], filled)

    def _by_slots(
        self, model: Encoders, mesh: Mesh, embeddings: Tensor, intents: Intents, truth: Tensor, clusters: Clusters
    ) -> list[Figure]:
        """All slots right, then each by itself."""
        figures, every = [], np.ones(len(truth), dtype=np.int64)
        chance = 1.0
        for slot in intents.slots[0]:
            values = intents.values(slot)
            prompts = [self._slot_prompts(intents, slot, value) for value in values]
            of_intent = torch.tensor([values.index(own[slot]) for own in intents.slots], device=truth.device)
            classifier = embed_prompts(model, mesh, prompts, batch_size=self.batch_size)
            hits = hits_at(classify(embeddings, classifier, of_intent[truth]).rank, 1)
            figures.append(share(f"by_slots_{slot}_accuracy", hits, clusters, chance=1 / len(values)))
            every &= hits
            chance /= len(values)
        return [share("by_slots_accuracy", every, clusters, chance=chance), *figures]

    def _slot_prompts(self, intents: Intents, slot: str, value: str) -> list[str]:
        if self.slot_templates is not None:
            return fill(self.slot_templates, value)
        having = [name for name, own in zip(intents.names, intents.slots, strict=True) if own[slot] == value]
        return [prompt for name in having for prompt in fill(self.templates, name)]


def _one_each(rows: Rows, labels: Sequence[str], values: Sequence[Any], field: str) -> dict[str, Any]:
    """The value of every intent, the same in all its records."""
    of_intent: dict[str, Any] = {}
    for key, label, value in zip(rows.keys, labels, values, strict=True):
        if of_intent.setdefault(label, value) != value:
            raise DataError(
                f"{rows.source}: sample '{key}': intent '{label}' has {field} {value!r} here and {of_intent[label]!r} in an earlier one; "
                "an intent needs one for all its samples"
            )
    return of_intent


def _as_text(values: dict[str, Any]) -> dict[str, str]:
    return {slot: str(value) for slot, value in values.items()}


def _examples(rows: Rows, classifier: Tensor, intents: Intents, truth: NDArray[np.int64]) -> list[Example]:
    chosen = example_rows(rows.keys)
    scores, places = nearest(rows.embeddings[chosen], classifier, _RESULTS_SHOWN)
    return [
        Example(
            Item("speech", rows.keys[row], rows.source, rows.captions[row][0]),
            [Item("text", "", "", intents.names[place], score, bool(place == truth[row])) for score, place in zip(*best, strict=True)],
        )
        for row, best in zip(chosen, zip(scores.tolist(), places.tolist(), strict=True), strict=True)
    ]
