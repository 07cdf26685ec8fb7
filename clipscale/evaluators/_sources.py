"""Checks of an evaluation's data that read no sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipscale.errors import DataError

if TYPE_CHECKING:
    from clipscale.data.sources import Source
    from clipscale.inputs import Modality

_COUNTED_AS = {"image": "images", "speech": "recordings"}


def check_source(source: Source, modality: Modality) -> None:
    """Refuse a data set in which not every sample has the modality; texts every sample has.

    Raises:
        DataError: it is missing, incomplete or empty, or samples lack the modality.
    """
    opened = source.open()
    samples = int(opened.totals["samples"])
    having = int(opened.totals[_COUNTED_AS[modality]]) if modality in _COUNTED_AS else samples
    if having < samples:
        raise DataError(f"{opened.url}: must hold {modality} to be evaluated, but {samples - having} of its {samples} samples have none")
