"""Export: a checkpoint becomes a folder that open_clip or transformers loads, with the same embeddings.

What is written is loaded again by its library and encodes a few samples; a folder whose embeddings differ is not left behind.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from clipscale import checkpoints
from clipscale.config import Run, read_yaml, validate
from clipscale.errors import RequestError, RunError, RunFolderError
from clipscale.foreign import open_foreign
from clipscale.foreign.self_test import CAPTIONS
from clipscale.run_model import build_model

if TYPE_CHECKING:
    from collections.abc import Mapping

    from clipscale.inputs import Modality
    from clipscale.model import Encoders
    from clipscale.towers._to_open_clip import Trained

Library = Literal["open_clip", "hugging_face"]
LARGEST_DIFFERENCE = 1e-5
"""Of any component of an embedding of length 1; folding two matrices into one changes the last bits of fp32."""


def export(address: str | Path, output: Path, *, to: Library, pair_kind: str | None = None, average: bool = False) -> Path:
    """Write a run's newest whole checkpoint, or one checkpoint folder, for another library; returns `output`.

    Args:
        address: Of either, here or in a store.
        output: A folder that does not exist yet.
        pair_kind: Of which pair kind the temperature is taken; None: the only one of images and texts.
        average: Take the weights' moving average.

    Raises:
        RequestError: the other library cannot hold the model, and why; nothing is written.
        RunError: what was written does not give the same embeddings; it is removed.
    """
    if output.exists():
        raise RunFolderError(f"{output} is there already; give a folder that is not")
    run, model = _read(address, average=average)
    kind = _pair_kind(run, pair_kind)
    aside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        _write(_trained(run, model.eval(), kind), aside, to=to)
        _compare(model, _loaded(aside, to))
        aside.rename(output)
    except OSError as error:
        raise RunFolderError(f"{output} cannot be written: {error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return output


def _read(address: str | Path, *, average: bool) -> tuple[Run, Encoders]:
    """The run's settings and its trained model."""
    with checkpoints.Opening() as opening:
        saved = opening.load(opening.find(address))
        run = validate(Run, read_yaml(saved.folder / "config.yaml"))
        model = build_model(run)
        checkpoints.load_weights(model, saved.averaged() if average else saved.tensors["model"])
    return run, model


def _pair_kind(run: Run, wanted: str | None) -> str:
    """The pair kind that is exported.

    Raises:
        RequestError: there is none of images and texts, or several and none was named.
    """
    fitting = [name for name, kind in run.pair_kinds.items() if set(kind.modalities) == {"image", "text"}]
    if wanted is not None and wanted not in fitting:
        raise RequestError(f"pair kind '{wanted}' is none of images and texts; such are: {', '.join(fitting) or 'none'}")
    if not fitting:
        kinds = ", ".join(f"{name} ({' and '.join(kind.modalities)})" for name, kind in run.pair_kinds.items())
        raise RequestError(f"only models of images and texts can be exported; this one was trained on {kinds}")
    if wanted is None and len(fitting) > 1:
        raise RequestError(f"{len(fitting)} pair kinds have a temperature of their own; give --pair-kind, one of {', '.join(fitting)}")
    return wanted or fitting[0]


def _trained(run: Run, model: Encoders, kind: str) -> Trained:
    from clipscale.towers._to_open_clip import Trained

    pair: tuple[Modality, Modality] = ("image", "text")
    bias = model.bias.get(kind)
    return Trained(
        image=run.towers["image"],
        text=run.towers["text"],
        modules={modality: model.tower(modality) for modality in pair},
        projections={modality: model.projections[modality].get_parameter("weight").detach() for modality in pair},
        scale=model.log_scale[kind].exp().item(),
        bias=None if bias is None else bias.item(),
    )


def _write(trained: Trained, folder: Path, *, to: Library) -> None:
    if to == "open_clip":
        from clipscale.towers._to_open_clip import write_open_clip

        write_open_clip(trained, folder)
    else:
        from clipscale.towers._to_hugging_face import write_hugging_face

        write_hugging_face(trained, folder)


def _loaded(folder: Path, library: Library) -> Encoders:
    try:
        return open_foreign(folder).model
    except RequestError as error:
        raise RequestError(f"{library} cannot hold this model; what was written does not load: {error}") from error


@torch.no_grad()
def _compare(model: Encoders, exported: Encoders) -> None:
    """Hold the exported model against the one it was made of.

    Raises:
        RunError: an embedding differs.
    """
    size = model.inputs()["image"].size  # type: ignore[union-attr]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    differences = {"image": _difference(*(one.encode("image", {"pixels": pixels}) for one in (model, exported)))}
    texts = [one.encode("text", one.inputs()["text"].tokenize(CAPTIONS)) for one in (model, exported)]  # type: ignore[union-attr]
    differences["text"] = _difference(*texts)
    _check_differences(differences)


def _difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


def _check_differences(differences: Mapping[str, float]) -> None:
    wrong = [f"{modality} by {difference:.1e}" for modality, difference in differences.items() if not difference <= LARGEST_DIFFERENCE]
    if wrong:
        raise RunError(f"the exported model's embeddings differ: {', '.join(wrong)}; nothing was kept. Please report this architecture")
