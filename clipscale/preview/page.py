"""The page of a preview: figures in tables, and the first samples with what augmentation makes of them; one file, no network."""

from __future__ import annotations

import base64
import io

import numpy as np
import soundfile
import torch
from PIL import Image
from torch import Tensor

from clipscale.config import Run
from clipscale.data.random_numbers import splitmix64
from clipscale.data.sample import Batch
from clipscale.inputs import ImageInput, Input, Modality, SpeechInput
from clipscale.model import Encoders, prepare
from clipscale.preview.survey import KindSurvey
from clipscale.report.axis import count, number
from clipscale.report.markup import Markup, element
from clipscale.report.page import page_head
from clipscale.report.tables import table

SHOWN = 12
"""Samples of each pair kind on the page."""
_VIEWS = 3
"""How often each one is augmented."""


def html_page(run: Run, model: Encoders, kinds: list[KindSurvey]) -> str:
    """The whole page."""
    body = element(
        "body",
        element(
            "header",
            element("p", "clipscale data", class_="eyebrow"),
            element("h1", run.name),
            element("p", f"{count(run.steps)} steps · seed {run.seed}", class_="subtitle"),
            element("nav", [element("a", kind.name, href=f"#{kind.name}") for kind in kinds]),
        ),
        element("main", [_section(run, model, kind) for kind in kinds]),
        element("footer", f"Made by clipscale data from the settings of {run.name}"),
    )
    return f"<!doctype html>\n{element('html', page_head(f'{run.name}: data'), body, lang='en')}\n"


def _section(run: Run, model: Encoders, kind: KindSurvey) -> Markup:
    about = (
        f"{' + '.join(kind.modalities)} · {count(kind.batches)} global batches of {count(kind.global_batch)} · read, decoded and collated: "
        f"{number(kind.samples_per_second)} samples / s in one process (over {count(kind.rows_read)} samples)"
    )
    return element(
        "section",
        element("h2", kind.name),
        element("p", about, class_="note"),
        sources_table(kind),
        _weight_changes(kind),
        _padding(kind),
        element("h3", "The first samples"),
        element("p", _legend(run, kind), class_="note"),
        element("div", _cards(run, model, kind.first[0]), class_="cards"),
        id=kind.name,
        class_="preview",
    )


def sources_table(kind: KindSurvey) -> Markup:
    """Every source with its part in the run."""
    rows = [
        (
            element("span", source.name, element("small", source.url), class_="line"),
            count(source.shards),
            "not known" if source.samples is None else count(source.samples),
            f"{source.weight:g}",
            "not known" if source.rows is None else count(source.rows),
            "not known" if source.epochs is None else f"{source.epochs:.2f}",
            f"{kind.milliseconds[source.name]:.2f}" if source.name in kind.milliseconds else "",
        )
        for source in kind.sources
    ]
    columns = ("Source", "Shards", "Samples", "Weight", "Rows in the run", "Epochs", "Milliseconds a row")
    return table(columns, rows, numbers=range(1, 7))


def _weight_changes(kind: KindSurvey) -> Markup | None:
    if not kind.weight_changes:
        return None
    rows = [(count(batch), ", ".join(f"{name} {weight:g}" for name, weight in new.items())) for batch, new in kind.weight_changes.items()]
    return element("div", element("h4", "Weights that change"), table(("From global batch", "Weights"), rows), class_="short")


def _padding(kind: KindSurvey) -> Markup | None:
    if not kind.padding:
        return None
    rows = [("none" if batches == 1 else count(batches), f"{share:.1%}") for batches, share in kind.padding.items()]
    columns = ("bucket_batches", f"Padding {kind.padding_of}")
    return element("div", element("h4", "Padding"), table(columns, rows, numbers=(1,)), class_="short")


def _legend(run: Run, kind: KindSurvey) -> str:
    augmented = {"image": run.augment.image, "speech": run.augment.speech}
    changed = [modality for modality in kind.modalities if augmented.get(modality) is not None]
    first = "As decoded for the tower" + (f", then as the first {_VIEWS} epochs may augment it." if changed else "; nothing is augmented.")
    return first + (" Recordings: log-mel frames, low notes below." if "speech" in kind.modalities else "")


def _cards(run: Run, model: Encoders, batch: Batch) -> list[Markup]:
    specs = model.inputs()
    views = {modality: _views(run, modality, specs[modality], batch) for modality in ("image", "speech") if modality in batch.inputs}
    reasons = {bad.key: bad.reason for bad in batch.bad}
    cards = []
    for row in range(min(SHOWN, len(batch.keys))):
        if not batch.valid[row]:
            told = element("p", f"cannot be read: {reasons.get(batch.keys[row], '')}", class_="text")
            cards.append(element("div", told, element("small", batch.keys[row]), class_="card"))
            continue
        pictures = [element("div", [_picture(view[row]) for view in shown], class_="views") for shown in views.values() if shown]
        player = _player(batch, row, specs.get("speech")) if "speech" in batch.inputs else None
        cards.append(
            element(
                "div", pictures, player, element("p", batch.captions[row], class_="text"), element("small", batch.keys[row]), class_="card"
            )
        )
    return cards


def _views(run: Run, modality: Modality, spec: Input, batch: Batch) -> list[list[np.ndarray]]:
    """Grey or coloured pictures of the first rows: as they are, then augmented some times, each a list over rows."""
    inputs = {name: tensor[:SHOWN] for name, tensor in batch.inputs[modality].items()}
    augment = {"image": run.augment.image, "speech": run.augment.speech}[modality]
    seeds = batch.seeds[:SHOWN]
    shown = [_pictures(prepare(modality, spec, inputs), spec)]
    for _ in range(_VIEWS if augment is not None else 0):
        shown.append(_pictures(prepare(modality, spec, inputs, augment=augment, seeds=seeds), spec))
        seeds = splitmix64(seeds)
    return [view for view in shown if view]


def _pictures(prepared: dict[str, Tensor], spec: Input) -> list[np.ndarray]:
    if isinstance(spec, ImageInput):
        mean, std = (torch.tensor(values)[None, :, None, None] for values in (spec.mean, spec.std))
        pixels = ((prepared["pixels"].cpu() * std + mean).clamp(0, 1) * 255).round().byte()
        return [picture.permute(1, 2, 0).numpy() for picture in pixels]
    if "mel" not in prepared:
        return []
    return [_mel_picture(mel[:, : max(int(frames), 1)]) for mel, frames in zip(prepared["mel"].cpu(), prepared["length"], strict=True)]


def _mel_picture(mel: Tensor) -> np.ndarray:
    low, high = float(mel.min()), float(mel.max())
    grey = ((mel - low) / max(high - low, 1e-6) * 255).byte().numpy()
    return grey[::-1].copy()


def _picture(pixels: np.ndarray) -> Markup:
    file = io.BytesIO()
    picture = Image.fromarray(pixels)
    picture.thumbnail((224, 224))
    picture.save(file, "PNG")
    coarse = "coarse" if max(picture.size) <= 64 else None
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
    return element("img", src=address, alt="", width=picture.width, height=picture.height, class_=coarse)


def _player(batch: Batch, row: int, spec: Input | None) -> Markup:
    assert isinstance(spec, SpeechInput)
    speech, file = batch.inputs["speech"], io.BytesIO()
    wave = speech["waveform"][row, : int(speech["length"][row])].numpy()
    soundfile.write(file, wave, spec.sample_rate, format="FLAC")
    address = f"data:audio/flac;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
    return element("audio", controls=True, preload="metadata", src=address, aria_label=batch.captions[row])
