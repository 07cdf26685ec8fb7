"""The page of a data set: what it holds at a glance, and samples to look at and listen to; one file that needs no other."""

from __future__ import annotations

import base64
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.ImageFile import ImageFile

from clipscale.data.shards import DatasetIndex, Sample, aside, open_dataset, speech_suffix
from clipscale.errors import DataError, ShardError
from data_tools.describe import Description, Spread, Texts, duration

_THUMBNAIL = 360  # pixels of the longer side
_MAX_SOUND_BYTES = 3_000_000
_BARS = 24
_LINES = 12  # of a table of values

_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --text: #1d1d1b; --quiet: #6b6b66; --line: #e3e3de; --bar: #3d6fb4; }
@media (prefers-color-scheme: dark) {
  :root { --page: #17181a; --card: #212326; --text: #e8e8e5; --quiet: #9a9a95; --line: #34363a; --bar: #7aa7e6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 36px 0 12px; }
.quiet { color: var(--quiet); } .row { display: flex; flex-wrap: wrap; gap: 12px; }
.tile, .card, figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 18px; min-width: 130px; } .tile b { display: block; font-size: 22px; font-weight: 600; }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr)); }
.card { overflow: hidden; } .card img { width: 100%; height: 210px; object-fit: contain; background: var(--page); display: block; }
.card audio { width: calc(100% - 16px); margin: 8px 8px 0; } .card div { padding: 10px 14px 12px; overflow-wrap: anywhere; }
.card p { margin: 0 0 4px; } .card small, .chip { color: var(--quiet); font-size: 12.5px; } .card p + p { font-size: 13.5px; }
figure { margin: 0; padding: 12px 16px; } figcaption { font-size: 13.5px; } svg { width: 100%; height: 90px; display: block; }
.short { align-items: start; } svg rect { fill: var(--bar); } .ends { display: flex; justify-content: space-between; font-size: 12px; }
table { border-collapse: collapse; width: 100%; } td { padding: 3px 12px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } td { overflow-wrap: anywhere; }
"""


def write_page(description: Description, page: Path, *, num_samples: int) -> None:
    """Write the page to `page`, whole or not at all.

    Raises:
        DataError: `page` cannot be written.
        ShardError: a sidecar cannot be read.
    """
    sections = [*_summary(description), *_spreads(description.spreads), *_tables(description), *_samples(description.url, num_samples)]
    title = escape(f"{Path(description.url).name or description.url}: a clipscale data set")
    html = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><main>{''.join(sections)}</main></body></html>\n"
    )
    temporary = aside(page)
    try:
        temporary.write_text(html, "utf-8")
        temporary.replace(page)
    except OSError as error:
        raise DataError(f"page {page}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _summary(description: Description) -> Iterator[str]:
    totals = description.totals
    tiles = {
        "samples": f"{totals['samples']:,.0f}",
        "shards": f"{description.shards:,}",
        "megabytes": f"{totals['tar_bytes'] / 1e6:,.1f}",
        "images": f"{totals['images']:,.0f}",
        "recordings": f"{totals['recordings']:,.0f}",
        "of sound": duration(totals["seconds"]) if totals["seconds"] else "0",
        "captions": f"{totals['captions']:,.0f}",
        "different captions": f"{description.captions.distinct:,}",
        "duplicate media": f"{description.duplicates.extra:,}",
    }
    shown = {name: value for name, value in tiles.items() if value != "0" or name == "duplicate media"}
    yield f"<h1>{escape(Path(description.url).name or description.url)}</h1><p class='quiet'>{escape(description.url)}</p>"
    yield "<div class='row'>" + "".join(f"<div class='tile'><b>{value}</b>{name}</div>" for name, value in shown.items()) + "</div>"


def _spreads(spreads: Sequence[Spread]) -> Iterator[str]:
    charts = [_histogram(spread) for spread in spreads if len(spread.values) > 1]
    constant = "; ".join(spread.line() for spread in spreads if len(spread.values) == 1)
    if spreads:
        yield f"<h2>Sizes and lengths</h2><div class='grid'>{''.join(charts)}</div><p class='quiet'>{escape(constant)}</p>"


def _histogram(spread: Spread) -> str:
    """Bars with their counts as tooltips; whole numbers of few values get a bar each."""
    low, high = float(spread.values[0]), float(spread.values[-1])
    whole = bool((spread.values == np.rint(spread.values)).all()) and high - low < _BARS
    edges = np.arange(low - 0.5, high + 1.5) if whole else np.linspace(low, high, _BARS + 1)
    counts, _ = np.histogram(spread.values, edges, weights=spread.counts)
    step, most = 240 / len(counts), counts.max()
    bars = "".join(
        f"<rect x='{place * step + 0.5:.2f}' y='{88 - 86 * count / most:.2f}' width='{step - 1:.2f}' height='{86 * count / most + 1:.2f}'>"
        f"<title>{_range(edges, place, whole)} {escape(spread.unit)}: {count:,.0f}</title></rect>"
        for place, count in enumerate(counts)
        if count
    )
    middle = f"half of them at most {spread.middle:,.4g}"
    return (
        f"<figure><figcaption>{escape(spread.name)} <span class='quiet'>({escape(spread.unit)}; {middle})</span></figcaption>"
        f"<svg viewBox='0 0 240 90' preserveAspectRatio='none' role='img' aria-label='{escape(spread.line(), quote=True)}'>{bars}</svg>"
        f"<div class='ends quiet'><span>{low:,.4g}</span><span>{high:,.4g}</span></div></figure>"
    )


def _range(edges: np.ndarray, place: int, whole: bool) -> str:
    return f"{edges[place] + 0.5:g}" if whole else f"{edges[place]:,.4g} to {edges[place + 1]:,.4g}"


def _tables(description: Description) -> Iterator[str]:
    counts = {**description.fields, "slots": Texts(len(description.slots), description.slots.most_common(_LINES))}
    if description.repeated_captions():
        counts["captions"] = description.captions
    tables = [_table(name, texts) for name, texts in counts.items() if texts.distinct]
    if tables:
        yield f"<h2>Values</h2><div class='grid short'>{''.join(tables)}</div>"
    if description.duplicates.groups:
        lines = "".join(f"<tr><td>{escape(' = '.join(keys[:8]))}</td></tr>" for keys in description.duplicates.groups[:20])
        yield f"<h2>Samples with the same media</h2><figure><table>{lines}</table></figure>"


def _table(name: str, texts: Texts) -> str:
    lines = "".join(f"<tr><td>{escape(value)}</td><td class='number'>{number:,}</td></tr>" for value, number in texts.common[:_LINES])
    more = f"<p class='quiet'>and {texts.distinct - _LINES:,} more</p>" if texts.distinct > _LINES else ""
    title = f"{escape(name)} <span class='quiet'>({texts.distinct:,} different)</span>"
    return f"<figure><figcaption>{title}</figcaption><table>{lines}</table>{more}</figure>"


def _samples(url: str, num_samples: int) -> Iterator[str]:
    index = open_dataset(url)
    cards = [_card(sample) for sample in _spread_out(index, num_samples)]
    if cards:
        of = f"{len(cards)} of {index.totals['samples']:,.0f}, evenly spread"
        yield f"<h2>Samples <span class='quiet'>{of}</span></h2><div class='grid'>{''.join(cards)}</div>"


def _spread_out(index: DatasetIndex, num_samples: int) -> Iterator[Sample | ShardError]:
    ends = np.cumsum(index.samples)
    total = int(ends[-1])
    for place in np.unique(np.linspace(0, total - 1, min(num_samples, total)).astype(np.int64)):
        shard = int(np.searchsorted(ends, place, side="right"))
        yield from index.read(shard, [int(place - (ends[shard] - index.samples[shard]))])


def _card(sample: Sample | ShardError) -> str:
    if isinstance(sample, ShardError):
        return f"<div class='card'><div><p>cannot be read</p><small>{escape(str(sample))}</small></div></div>"
    media = (_image(sample.image) if sample.image else "") + (_sound(sample.speech) if sample.speech else "")
    captions = "".join(f"<p>{escape(caption)}</p>" for caption in sample.captions[:5])
    known = {name: value for name, value in sample.record.items() if name != "captions" and value not in sample.captions}
    about = escape(sample.key) + "".join(_known(*item) for item in known.items())
    return f"<div class='card'>{media}<div>{captions}<small>{about}</small></div></div>"


def _known(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f" · {escape(name)}: {escape(text[:120])}"


def _image(data: bytes) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the thumbnail shows what the warning would say
            return _thumbnail(Image.open(io.BytesIO(data), formats=["JPEG", "PNG", "WEBP"]))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return f"<div><small>the image cannot be shown: {escape(str(error))}</small></div>"


def _thumbnail(picture: ImageFile) -> str:
    picture.draft("RGB", (_THUMBNAIL, _THUMBNAIL))  # JPEG: decode no more than is shown
    visible = ImageOps.exif_transpose(picture).convert("RGBA")
    visible.thumbnail((_THUMBNAIL, _THUMBNAIL))
    canvas = Image.new("RGB", visible.size, "white")
    canvas.paste(visible, mask=visible)
    stream = io.BytesIO()
    if max(canvas.size) < 64:  # scanned digits and icons: every pixel counts
        canvas.save(stream, "PNG")
        return f"<img alt='' style='image-rendering:pixelated' src='data:image/png;base64,{_base64(stream.getvalue())}'>"
    canvas.save(stream, "JPEG", quality=82)
    return f"<img alt='' src='data:image/jpeg;base64,{_base64(stream.getvalue())}'>"


def _sound(data: bytes) -> str:
    if len(data) > _MAX_SOUND_BYTES:
        return f"<div><small>the recording is too long for this page: {len(data) / 1e6:.1f} MB</small></div>"
    return f"<audio controls preload='metadata' src='data:audio/{speech_suffix(data)};base64,{_base64(data)}'></audio>"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
