"""The report: what a page shows of a run folder, that data cannot break out of it, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from html_tree import Node, Page
from making_data import encoded, write_dataset
from PIL import Image
from rich.console import Console

from clipscale.data.shards import ShardWriter, read_member, write_index
from clipscale.errors import RunFolderError
from clipscale.evaluators import Confusion, Evaluation, Example, Figure, Group, Item
from clipscale.report import report_table, write_report

HOSTILE = """<img src=x onerror=alert(1)></script><b a="' &amp; https://example.org/x.js"""


def page_of(folder: Path) -> Node:
    return Page(write_report(folder).read_text(encoding="utf-8")).root


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def evaluations(data: Path, word: str = "zero") -> dict[str, Evaluation]:
    """An evaluation with everything in it; `word` stands wherever text from data can stand."""
    query = Item("speech", "000001", str(data), f"{word} spoken")
    results = [
        Item("image", "000002", str(data), f"scan of {word}", 0.75, True),
        Item("image", "000003", str(data), "scan of one", 0.5, False),
    ]
    prompts = [Item("text", "", "", f"a scan of {word}", 0.25, True)]
    return {
        f"digits {word}": Evaluation(
            name=word,
            kind=word,
            figures=[
                Figure(f"top1 {word}", 0.9375, 1600, 0.925, 0.95, f"wilson {word}", 1500, 0.1),
                Figure("image_to_text_median_rank", 2.0, 1600, 1.0, 3.0, "cluster bootstrap by speaker", unit="rank"),
            ],
            confusion=Confusion(f"label {word}", [word, "one"], [[7, 3], [0, 10]]),
            groups={f"speaker {word}": [Group(f"voice {word}", 10, 8, 0.49, 0.94)]},
            examples=[Example(query, results), Example(results[0], prompts)],
            warnings=[f"two classes are called {word}"],
            provenance={"data": {f"x/{word}": {"samples": 10, word: [word]}}},
        )
    }


def make_run(tmp: Path, word: str = "zero", steps: int = 80) -> Path:
    """A run that was stopped half way and resumed, with an evaluation."""
    data, run = write_dataset(tmp / "data", [4], speech=True), tmp / "runs" / "demo"
    run.mkdir(parents=True)
    kinds = {f"image_text{word}": ["image", "text"], "speech_text": ["speech", "text"]}
    config = {
        "name": f"demo {word}",
        "steps": steps,
        "towers": {"image": {"name": word, "width": 64}, "text": "bare"},
        "pair_kinds": {
            kind: {
                "modalities": pair,
                "objective": {"name": "clip"},
                "global_batch": 64,
                "sources": {word: {"name": "shards", "url": word}},
            }
            for kind, pair in kinds.items()
        },
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    machine = {"versions": {word: "1.0"}, "commit": f"c0ffee{word}", "dirty": True, "seed": 7, "world": 2, "device": "cpu"}
    machine |= {"command": ["clipscale", "train", word], "started": "2026-01-02T03:04:05Z"}
    (run / "environment.json").write_text(json.dumps(machine))
    measured = {"scale": 14.0, "x_to_y_top1": 0.5, "y_to_x_top1": 0.4, "mean_positive": 0.3, "hardest_negative": 0.2}
    write_lines(
        run / "metrics.jsonl",
        [
            {
                "step": step,
                "samples": 128 * step,
                "lr": 1e-3 * step / steps,
                "grad_norm": 2.0,
                "loss": 8.0 / step,
                "bad_samples": step // 50,
                "bad_by_source": {word: {f"broken {word}": step // 50}},
                "kinds": {kind: {"loss": 4.0 / step, **measured} for kind in kinds},
            }
            for step in range(1, steps + 1)
        ],
    )
    write_lines(
        run / "timings.jsonl",
        [{"step": step, "seconds": 0.5, "samples_per_second": 256.0, **measured_speed()} for step in range(1, steps + 1)],
    )
    happened = [("started", 0), ("checkpoint", 40), ("stopped", 40), ("resumed", 40), ("checkpoint", steps), ("finished", steps)]
    write_lines(run / "events.jsonl", [{"event": event, "step": step, "time": word, "detail": word} for event, step in happened])
    write_evaluation(run, evaluations(data, word))
    return run


def measured_speed() -> dict[str, Any]:
    """What a step of two ranks tells: 0.5 seconds, of them 0.002 for preparation."""
    phases = {"data": 0.05, "prepare": 0.002, "encode": 0.248, "contrast": 0.0, "backward": 0.15, "communication": 0.05}
    longest = {name: 1.5 * seconds for name, seconds in phases.items()}
    memory = {"memory_bytes": 3 * 2**30, "peak_bytes": {"encode": 2**30, "backward": 3 * 2**30}}
    return {"mfu": 0.4, "tflops_per_second": 400.0, "phases": phases, "phases_longest": longest, **memory}


def write_evaluation(folder: Path, results: dict[str, Evaluation]) -> None:
    (folder / "evaluation.json").write_text(json.dumps({name: result.to_json() for name, result in results.items()}))


# --- the page is one file and holds what was measured --------------------------------------------------------------


def test_page_asks_the_network_for_nothing_even_when_data_name_addresses(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, HOSTILE))
    addressed = {"src", "href", "srcset", "poster", "action", "data", "background", "xlink:href"}
    for node in page.all():
        assert all(value.startswith(("data:", "#")) for name, value in node.attributes.items() if name in addressed), node
    assert not re.search(r"url\(|@import", "".join(style.text for style in page.all("style")))


def test_text_from_data_adds_no_element_and_no_attribute(tmp_path: Path) -> None:
    def shape(word: str, folder: str) -> tuple[Counter[str], set[str]]:
        nodes = page_of(make_run(tmp_path / folder, word)).all()
        return Counter(node.tag for node in nodes), {name for node in nodes for name in node.attributes}

    assert shape(HOSTILE, "hostile") == shape("harmless", "harmless")


def test_hostile_text_is_shown_as_it_is(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, HOSTILE))
    places = ["h1", "th", "td", "li", "pre", "dd", "title"]
    assert [tag for tag in places if not any(HOSTILE in node.text for node in page.all(tag))] == []
    assert any(HOSTILE in node.attributes.get("data-tip", "") for node in page.all("g"))


def test_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    (script,) = page.all("script")
    policy = next(meta.attributes["content"] for meta in page.all("meta") if meta.attributes.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy.split("; ")


def test_every_link_leads_to_an_id_that_is_there_once(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, HOSTILE))
    ids = Counter(node.attributes["id"] for node in page.all() if "id" in node.attributes)
    links = [node.attributes["href"][1:] for node in page.all("a")]
    assert links
    assert set(links) <= set(ids)
    assert set(ids.values()) == {1}


def test_every_figure_stands_with_value_interval_and_n(tmp_path: Path) -> None:
    (table,) = page_of(make_run(tmp_path)).all("table", "figures")
    rows = [[cell.text for cell in row.all("td")][:4] for row in table.all("tr")[1:]]
    assert rows == [
        ["top-1 zero", "0.938", "0.925 – 0.950", "1\u202f600"],
        ["image → text median rank", "2", "1 – 3", "1\u202f600"],
    ]


def test_interval_is_drawn_from_its_low_to_its_high_end(tmp_path: Path) -> None:
    (table,) = page_of(make_run(tmp_path)).all("table", "figures")
    (interval,) = table.all("line", "interval")
    assert (interval.attributes["x1"], interval.attributes["x2"]) == ("92.50%", "95.00%")
    (value,) = table.all("circle", "value")
    assert value.attributes["cx"] == "93.75%"
    (chance,) = table.all("line", "chance")
    assert chance.attributes["x1"] == "10.00%"


def test_examples_hold_the_samples_own_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    page, data = page_of(run), tmp_path / "data"
    pictures = [base64.b64decode(image.attributes["src"].removeprefix("data:image/png;base64,")) for image in page.all("img")]
    assert pictures == [read_member(data, key, ("png",))[1] for key in ("000002", "000003", "000002")]
    (player,) = page.all("audio")
    sound = base64.b64decode(player.attributes["src"].removeprefix("data:audio/flac;base64,"))
    assert sound == read_member(data, "000001", ("flac",))[1]


def test_right_and_wrong_results_are_told_apart_without_colour(tmp_path: Path) -> None:
    card = page_of(make_run(tmp_path)).all("article")[0]
    assert [sign.text for sign in card.all("b")] == ["✓", "✗"]


def test_confusion_cells_say_how_often_each_class_was_taken_for_which(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    told = [cell.attributes["data-tip"] for cell in page.all("g") if "data-tip" in cell.attributes]
    assert told == ["zero → zero: 7 of 10 (70.0 %)", "zero → one: 3 of 10 (30.0 %)", "one → one: 10 of 10 (100.0 %)"]
    (mistakes,) = page.all("div", "mistakes")
    assert [cell.text for cell in mistakes.all("td")] == ["zero", "one", "3", "30.0 %"]


def test_resumption_is_marked_on_every_chart_where_it_happened(tmp_path: Path) -> None:
    charts = page_of(make_run(tmp_path, steps=81)).all("figure", "chart")
    assert len(charts) == 11
    for chart in charts:
        (line,) = chart.all("line", "event")
        assert line.attributes["x1"] == "48.75%"  # step 40 on an axis from 1 to 81
        assert [name.text for name in chart.all("text", "mark")] == ["resumed"]
        assert [triangle.attributes["x"] for triangle in chart.all("svg", "checkpoint")] == ["48.75%", "100.00%"]


def test_page_says_what_was_run_and_where(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    for expected in (
        "finished",
        "seed 7",
        "2 ranks on cpu",
        "started 2026-01-02 03:04:05 UTC",
        "c0ffeezero, with changes",
        "clipscale train zero",
    ):
        assert expected in page.text
    tiles = {tile.all("dt")[0].text: tile.all("dd")[0].text for tile in page.all("dl", "tiles")[0].children}
    assert tiles["Steps"] == "80of 80"
    assert tiles["Pairs seen"].startswith("10\u202f240")
    assert tiles["Time in steps"] == "40 s10.0 % waiting for data"
    assert tiles["Throughput"] == "256pairs / s, median; MFU 40.0 %"
    assert tiles["Memory"] == "3 GiBpeak, resident"


def test_time_and_memory_are_shown_by_phase(tmp_path: Path) -> None:
    (section,) = [node for node in page_of(make_run(tmp_path)).all("section") if node.attributes.get("id") == "throughput"]
    charts = {chart.all("h3")[0].text: chart for chart in section.all("figure", "chart")}
    split = charts["Where the time goesseconds a step"]
    named = ["data0.05", "encode0.248", "backward0.15", "communication0.05", "other0.002"]
    assert [item.text for item in split.all("li")] == named, "what took less than a hundredth is told as other"
    assert len(split.all("path", "area")) == len(named)
    assert [item.text for item in charts["Model FLOPs utilisation% of a device's best"].all("li")] == ["MFU40"]
    assert [item.text for item in charts["Peak memory by phaseGiB, resident"].all("li")] == ["encode1", "backward3"]
    (phases,) = section.all("table")
    rows = {cells[0].text: [cell.text for cell in cells[1:]] for row in phases.all("tr")[1:] if (cells := row.all("td"))}
    assert rows["backward"] == ["0.15 s", "30.0 %", "0.23 s", "3 GiB"]
    assert rows["prepare"] == ["0.002 s", "0.4 %", "0.003 s", ""]
    assert "contrast" not in rows, "it took no time"


def test_unreadable_samples_are_told_by_source_and_reason(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path, "photos", steps=120))
    (table,) = [node for node in page.all("details") if node.text.startswith("Unreadable samples")]
    assert [[cell.text for cell in row.all("td")] for row in table.all("tbody")[0].all("tr")] == [["photos", "broken photos", "2"]]


def test_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_report_json_holds_figures_and_last_numbers(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_report(run)
    summary = json.loads((run / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert summary["evaluations"]["digits zero"]["figures"][0]["value"] == 0.9375
    assert summary["last"]["kinds.speech_text.loss"] == 0.05
    assert summary["seconds_in_steps"] == 40.0


def test_terminal_table_shows_the_figures(tmp_path: Path) -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report_table(make_run(tmp_path, "[red]zero")))
    shown = console.export_text()
    for expected in ("digits [red]zero", "top-1 [red]zero", "0.938", "0.925 – 0.950", "1\u202f600"):
        assert expected in shown


def test_terminal_table_cuts_nothing_off_on_eighty_columns(tmp_path: Path) -> None:
    word = "a_name_as_long_as_people_like_to_give_to_their_evaluations"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report_table(make_run(tmp_path, word)))
    shown = console.export_text()
    assert "…" not in shown
    assert "0.925 – 0.950" in shown


def test_terminal_table_shows_the_last_step_when_nothing_was_evaluated(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "evaluation.json").unlink()
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report_table(run))
    assert re.search(r"kinds\.speech_text\.loss\s+│\s+0\.05 ", console.export_text())


def test_reporting_needs_no_torch() -> None:
    program = "import sys, clipscale.report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- folders that are not whole ------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["timings.jsonl", "evaluation.json", "environment.json", "events.jsonl", "config.yaml"])
def test_one_file_may_be_missing(tmp_path: Path, missing: str) -> None:
    run = make_run(tmp_path)
    (run / missing).unlink()
    page = page_of(run)
    assert len(page.all("figure", "chart")) == (7 if missing == "timings.jsonl" else 11)
    assert bool(page.all("table", "figures")) == (missing != "evaluation.json")


def test_an_evaluation_alone_is_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "checked later"
    folder.mkdir()
    write_evaluation(folder, evaluations(write_dataset(tmp_path / "data", [4], speech=True)))
    page = page_of(folder)
    assert page.all("h1")[0].text == "checked later"
    assert len(page.all("img")) == 3
    assert page.all("figure", "chart") == []


def test_a_last_line_cut_short_by_a_kill_is_left_out_silently(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for name in ("metrics", "timings", "events"):
        with (run / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 81, "loss": 0.')
    page = page_of(run)
    assert [warning.text for warning in page.all("p", "warning")] == ["two classes are called zero"]
    assert json.loads(page.all("figure", "chart")[0].attributes["data-chart"])["high"] == 80


def test_a_damaged_line_inside_is_left_out_and_told(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[4] = lines[4][:20]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert page_of(run).all("p", "warning")[0].text == "metrics.jsonl: left out what could not be read: line 5"


def test_when_the_data_are_gone_the_page_says_so_and_keeps_the_text(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.rmtree(tmp_path / "data")
    page = page_of(run)
    assert page.all("img") == page.all("audio") == []
    assert page.all("p", "warning")[0].text.startswith("4 pictures or recordings of the examples are not shown: ")
    assert "scan of one" in page.all("article")[0].text


def test_large_pictures_are_made_small(tmp_path: Path) -> None:
    data = tmp_path / "large"
    data.mkdir()
    with ShardWriter(data, "000000") as writer:
        writer.write("000002", captions=["large"], image=encoded(Image.effect_noise((900, 300), 80).convert("RGB")))
    write_index(data, [writer.info])
    item = Item("image", "000002", str(data), "large")
    write_evaluation(tmp_path, {"one": Evaluation("one", "retrieval", [], examples=[Example(item, [])])})
    (image,) = page_of(tmp_path).all("img")
    small = Image.open(io.BytesIO(base64.b64decode(image.attributes["src"].partition("base64,")[2])))
    assert small.size == (320, 107)
    assert (image.attributes["width"], image.attributes["height"]) == ("320", "107")


def test_a_run_that_has_just_begun_is_a_page(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: early\nsteps: 10\n")
    page = page_of(tmp_path)
    assert "clipscale run" in page.text
    assert "running, or interrupted" in page.text
    assert page.all("figure", "chart") == []


def test_one_step_is_drawn_as_a_dot(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 5.0}])
    (path,) = page_of(tmp_path).all("path", "line")
    assert path.attributes["d"] == "M5000 5000h1"


def test_of_a_step_taken_twice_the_later_line_holds(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 4.0}])
    chart = json.loads(page_of(tmp_path).all("figure", "chart")[0].attributes["data-chart"])
    assert chart["lines"] == [{"steps": [1, 2], "values": ["5", "4"]}]


@pytest.mark.parametrize(
    ("file", "text", "told"),
    [
        (None, "", "there is no such folder"),
        ("notes.txt", "hello", r"holds neither a run nor an evaluation .* it holds notes\.txt"),
        ("evaluation.json", "{", r"evaluation\.json is damaged"),
        ("evaluation.json", '{"digits": {"name": "digits", "n": NaN}}', "NaN is not a number in JSON"),
        ("evaluation.json", '{"digits": {"name": "digits"}}', "does not hold evaluations as clipscale writes them"),
        ("config.yaml", "- a list", r"config\.yaml should hold a mapping, it holds list"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_and_nothing_is_written(tmp_path: Path, file: str | None, text: str, told: str) -> None:
    folder = tmp_path / "folder"
    if file is not None:
        folder.mkdir()
        (folder / file).write_text(text)
    with pytest.raises(RunFolderError, match=told) as raised:
        write_report(folder)
    assert raised.value.exit_code == 2
    assert not (folder / "report.html").exists()


def test_a_run_of_many_steps_stays_a_small_page(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [{"step": step, "loss": step % 97} for step in range(1, 20_001)])
    page = page_of(tmp_path)
    (strong,) = page.all("figure", "chart")[0].all("path", "line")
    assert 1000 < strong.attributes["d"].count("L") < 2000
    assert write_report(tmp_path).stat().st_size < 200_000
