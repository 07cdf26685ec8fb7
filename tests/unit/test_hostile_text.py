"""Whatever text data hold, the pages that show it stay text: nothing runs, nothing is asked of the network, and the text is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from html_tree import Node, Page
from making_data import png
from test_report import make_run
from tiny import tiny_run

from clipscale.config import Run, validate
from clipscale.preview import html_page, survey
from clipscale.report import write_report
from clipscale.run_model import build_model
from data_tools.build import build
from data_tools.describe import describe
from data_tools.packing import Packing
from data_tools.page import write_page
from data_tools.rows import Row

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<body onload=alert(1)>",
    "\"><script src='https://example.org/x.js'></script>",
    "' autofocus onfocus='alert(1)",
    '" onmouseover="alert(1)',
    "</title><script>alert(1)</script>",
    "</style><style>*{background:url(https://example.org/x)}</style>",
    "</textarea><iframe src=https://example.org></iframe>",
    "<a href='javascript:alert(1)'>look</a>",
    "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "<base href=https://example.org/>",
    "<!-- ",
    "--> <b>x</b>",
    "]]><b>x</b>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "<<b>>",
    "{{7*7}} ${7*7} <%= 7*7 %>",
]
TAGS = {"iframe", "object", "embed", "form", "base", "a", "textarea"}


def dangers(page: Node, *, scripts: int) -> list[str]:
    """What in a page could run or leave it."""
    found = [node.tag for node in page.all() if node.tag in TAGS and not node.attributes.get("href", "x").startswith("#")]
    found += [f"{len(page.all('script'))} scripts"] if len(page.all("script")) != scripts else []
    for node in page.all():
        found += [f"{node.tag} {name}" for name in node.attributes if name.startswith("on")]
        found += [
            f"{node.tag} {name}={value[:40]}"
            for name, value in node.attributes.items()
            if name in ("src", "href", "action", "srcset") and not value.startswith(("data:", "#"))
        ]
        found += [f"meta {node.attributes}"] if node.attributes.get("http-equiv", "").lower() == "refresh" else []
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples whose caption, label and note are hostile."""
    folder = tmp_path_factory.mktemp("hostile") / "set"
    rows = [Row(f"{number}", png(number), None, (text,), {"label": text, "note": text}) for number, text in enumerate(HOSTILE)]
    build(rows, folder, packing=Packing(samples_per_shard=30), workers=1)
    return folder


def test_the_preview_of_a_run_shows_hostile_captions_as_text(dataset: Path, tmp_path: Path) -> None:
    settings = tiny_run(tmp_path, dataset)
    settings["pair_kinds"]["image_text"]["sources"] = {text: {"name": "shards", "url": str(dataset), "weight": 1.0} for text in HOSTILE[:3]}
    run = validate(Run, settings)
    model = build_model(run)
    html = html_page(run, model, survey(run, model, measure_s=0.01))
    page = Page(html).root
    assert not dangers(page, scripts=0)
    shown = {node.text for node in page.all("p", class_="text")}
    assert len(shown) > 4  # a batch of 12 from three sources of the same 20 samples
    assert shown <= {text.strip() for text in HOSTILE}
    assert all(text in page.text for text in HOSTILE[:3])


def test_the_description_of_a_data_set_shows_hostile_records_as_text(dataset: Path, tmp_path: Path) -> None:
    write_page(describe(str(dataset)), tmp_path / "set.html", num_samples=len(HOSTILE))
    page = Page((tmp_path / "set.html").read_text(encoding="utf-8")).root
    assert not dangers(page, scripts=0)
    assert not [text for text in HOSTILE if text not in page.text]


@pytest.mark.parametrize("text", HOSTILE)
def test_the_report_of_a_run_shows_hostile_names_as_text(text: str, tmp_path: Path) -> None:
    """`make_run` puts the text wherever text from data, settings or machines can stand."""
    html = write_report(make_run(tmp_path, word=text, steps=2)).read_text(encoding="utf-8")
    page = Page(html).root
    assert not dangers(page, scripts=1)
    assert page.text.count(text) > 10
    policy = next(node.attributes["content"] for node in page.all("meta") if node.attributes.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[\w+/=]+'", policy)


def test_dangers_would_be_seen() -> None:
    page = "<p onclick='x'><a href='javascript:x'>y</a><img src='https://x'></p><script>x</script>"
    assert len(dangers(Page(page).root, scripts=0)) == 5
