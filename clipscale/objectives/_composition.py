"""Composition: one objective and further ones, weighted and added up, as `{name: clip, add: [{name: uniformity, weight: 0.5}]}`.

Every part is asked what it needs, and everything is asked for once: all parts reduce their terms in the same sweeps over the same
logits. Each is shown only what it would see alone: its own terms, views and numbers, and logits without a bias that only another asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Self, TypeVar

import torch
from pydantic import Field, ModelWrapValidatorHandler, SerializationInfo, field_validator, model_serializer, model_validator
from torch import Tensor

from clipscale.objectives import MAIN, Block, Need, Objective, Own, Product, Row, Side, Terms, View
from clipscale.settings import Settings, part_name

Value = TypeVar("Value")


class Added(Settings):
    """An objective and its weight; in a configuration the weight stands among the objective's own settings."""

    objective: Objective
    weight: float = Field(default=1.0, gt=0.0)
    """Factor of the objective's loss in the sum."""

    @model_validator(mode="wrap")
    @classmethod
    def _weight_among_settings(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if isinstance(value, cls) or (isinstance(value, dict) and "objective" in value):
            return handler(value)
        weight = {}
        if isinstance(value, dict) and "weight" in value:
            weight = {"weight": value["weight"]}
            value = {key: setting for key, setting in value.items() if key != "weight"}
        return handler({"objective": Objective.model_validate(value), **weight})

    @model_serializer(mode="plain")
    def _beside_its_settings(self, info: SerializationInfo) -> dict[str, Any]:
        return {**self.objective.model_dump(mode=info.mode), "weight": self.weight}


def compose(value: Mapping[str, Any]) -> Objective:
    """What `{name: ..., add: [...]}` says; the first objective alone when nothing is added."""
    first = Objective.model_validate({key: setting for key, setting in value.items() if key != "add"})
    return Composition(first=first, add=value["add"]) if value["add"] else first


class Composition(Objective):
    """A sum of objectives over the same batch."""

    first: Objective
    """The objective that the others are added to."""
    add: tuple[Added, ...] = Field(strict=False)
    """Further objectives, each with its weight."""

    @model_serializer(mode="plain")
    def _with_name(self, info: SerializationInfo) -> dict[str, Any]:  # type: ignore[override]  # the parts have names, this has none
        return {**self.first.model_dump(mode=info.mode), "add": [added.model_dump(mode=info.mode) for added in self.add]}

    @field_validator("add", mode="before")
    @classmethod
    def _is_a_list(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise ValueError(f"it must be a list, as in [uniformity, {{name: alignment, weight: 0.5}}]; it is {value!r}")
        return value

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        if len({part.groups for part in self.parts}) > 1:
            raise ValueError(f"{self._names()} cut the batch into different groups; only objectives with the same groups can be added")
        if {"guide", "first_guide"} <= self.needs:
            raise ValueError(f"{self._names()} take their weights from different towers; only objectives with the same guide can be added")
        if len({part.centres_guide for part in self.parts if {"guide", "first_guide"} & part.needs}) > 1:
            raise ValueError(f"{self._names()} differ in `centre`; only objectives with the same guide can be added")
        return self

    def _names(self) -> str:
        return " and ".join(f"'{part_name(type(part))}'" for part in self.parts)

    @property
    def parts(self) -> tuple[Objective, ...]:
        return (self.first, *(added.objective for added in self.add))

    @property
    def init_bias(self) -> float | None:  # type: ignore[override]  # a constant of other classes, here the parts'
        return next((part.init_bias for part in self.parts if part.init_bias is not None), None)

    @property
    def takes_extras(self) -> bool:  # type: ignore[override]
        return all(part.takes_extras for part in self.parts)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset[Need]().union(*(part.needs for part in self.parts))

    @property
    def views(self) -> tuple[View, ...]:
        return _once(view for part in self.parts for view in part.views)

    @property
    def products(self) -> tuple[Product, ...]:
        return _once(product for part in self.parts for product in part.products)

    @property
    def numbers(self) -> tuple[str, ...]:
        return _once(number for part in self.parts for number in part.numbers)

    @property
    def groups(self) -> int:
        return self.first.groups

    @property
    def centres_guide(self) -> bool:
        return any(part.centres_guide for part in self.parts)

    def derived_numbers(self, views: Mapping[View, Tensor]) -> dict[str, Tensor]:
        return self._of_all(lambda part, _: part.derived_numbers({view: views[view] for view in part.views}))

    def terms(self, block: Block) -> Terms:
        return self._of_all(lambda part, place: part.terms(_block_for(part, place, block)))

    def later_sweeps(self) -> tuple[Callable[[Block], Terms], ...]:
        most = max(len(part.later_sweeps()) for part in self.parts)
        return tuple(partial(self._later_terms, sweep) for sweep in range(most))

    def _later_terms(self, sweep: int, block: Block) -> Terms:
        def terms(part: Objective, place: int) -> Terms:
            return part.later_sweeps()[sweep](_block_for(part, place, block)) if sweep < len(part.later_sweeps()) else {}

        return self._of_all(terms)

    def statistics(self, own: Own) -> dict[str, Tensor]:
        return self._of_all(lambda part, place: part.statistics(_own_for(part, place, own)))

    def row_sums(self, rows: Mapping[Side, Row]) -> dict[str, Tensor]:
        return self._of_all(lambda part, place: part.row_sums(_rows_for(part, place, rows)))

    def pair_loss(self, rows: Mapping[Side, Row]) -> Tensor:
        losses = [part.pair_loss(_rows_for(part, place, rows)) for place, part in enumerate(self.parts)]
        return torch.stack([weight * loss for weight, loss in zip(self._weights(), losses, strict=True)]).sum(0)

    def batch_loss(self, statistics: Mapping[str, Tensor], *, count: int) -> Tensor | None:
        losses = [
            part.batch_loss(own, count=count) if (own := _own_names(place, statistics)) else None for place, part in enumerate(self.parts)
        ]
        weighted = [weight * loss for weight, loss in zip(self._weights(), losses, strict=True) if loss is not None]
        return torch.stack(weighted).sum() if weighted else None

    def _weights(self) -> tuple[float, ...]:
        return (1.0, *(added.weight for added in self.add))

    def _of_all(self, ask: Callable[[Objective, int], Mapping[str, Value]]) -> dict[str, Value]:
        """What every part answers, under names that begin with the part's place."""
        answers = [(place, ask(part, place)) for place, part in enumerate(self.parts)]
        return {f"{place}.{name}": value for place, answer in answers for name, value in answer.items()}


def _once(items: Iterable[Value]) -> tuple[Value, ...]:
    """The same items, each at its first place only."""
    return tuple(dict.fromkeys(items))


def _own_names(place: int, named: Mapping[str, Value]) -> dict[str, Value]:
    """What belongs to one part, under the names it gave."""
    return {name.removeprefix(f"{place}."): value for name, value in named.items() if name.startswith(f"{place}.")}


def _numbers_for(part: Objective, place: int, numbers: Mapping[str, Value]) -> dict[str, Value]:
    return {name: numbers[name] for name in part.numbers if name in numbers} | _own_names(place, numbers)


def _plain(part: Objective, logits: Mapping[Product, Tensor], bias: Tensor | None) -> dict[Product, Tensor]:
    """Logits as the part would get them alone: without a bias that only another part asks for."""
    if bias is None or "bias" in part.needs:
        return dict(logits)
    return {product: logit - bias if product == MAIN else logit for product, logit in logits.items()}


def _block_for(part: Objective, place: int, block: Block) -> Block:
    known = {product: block.products[product] for product in part.products if product in block.products}
    return replace(
        block,
        products=_plain(part, known, block.bias),
        bias=block.bias if "bias" in part.needs else None,
        numbers=_numbers_for(part, place, block.numbers),
        reduced=_own_names(place, block.reduced),
    )


def _own_for(part: Objective, place: int, own: Own) -> Own:
    return replace(
        own,
        views={view: own.views[view] for view in part.views},
        pairs=_plain(part, _pairs_of(part, own.pairs), own.bias),
        numbers=_numbers_for(part, place, own.numbers),
        bias=own.bias if "bias" in part.needs else None,
    )


def _rows_for(part: Objective, place: int, rows: Mapping[Side, Row]) -> dict[Side, Row]:
    return {
        side: replace(
            row,
            pairs=_plain(part, _pairs_of(part, row.pairs), row.bias),
            reduced=_own_names(place, row.reduced),
            statistics=_own_names(place, row.statistics),
            numbers=_numbers_for(part, place, row.numbers),
            bias=row.bias if "bias" in part.needs else None,
        )
        for side, row in rows.items()
    }


def _pairs_of(part: Objective, pairs: Mapping[Product, Tensor]) -> dict[Product, Tensor]:
    """The own logits of the part's views, in the order in which it names them."""
    return {pair: logit for pair, logit in pairs.items() if set(pair) <= set(part.views)}
