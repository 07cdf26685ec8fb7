"""The commands: train, eval, export, plan, report, data, demo, doctor, config, parts."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from clipscale.credentials import redacted
from clipscale.errors import ClipscaleError, ConfigError
from clipscale.signals import LAUNCHER, end_with_launcher

if TYPE_CHECKING:
    from clipscale.config import Run

app = typer.Typer(
    name="clipscale",
    help="Contrastive pretraining of image, speech and text encoders, exact at any scale.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


class _CheckpointUnlessNamed(TyperGroup):
    """`clipscale eval RUN ...` is `clipscale eval checkpoint RUN ...`: only the other commands of the group are named."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] == "--help")
        return super().parse_args(context, args if named or not args else ["checkpoint", *args])


evaluation = typer.Typer(
    name="eval",
    help="Evaluate a checkpoint (`clipscale eval CHECKPOINT ...`), or compare two evaluations.",
    cls=_CheckpointUnlessNamed,
    no_args_is_help=True,
)
app.add_typer(evaluation)

Layers = Annotated[
    list[str], typer.Argument(metavar="FILE... [KEY.PATH=VALUE...]", help="YAML files, laid over each other left to right, then overrides.")
]
PART_KINDS = {
    "objectives": "clipscale.objectives",
    "towers": "clipscale.towers",
    "sources": "clipscale.data.sources",
    "engines": "clipscale.engines",
    "optimizers": "clipscale.optim",
    "evaluators": "clipscale.evaluators",
    "rows": "data_tools.rows",
}


@app.command()
def train(
    layers: Layers,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Write a checkpoint after this step and end; the same command goes on from it.")
    ] = None,
    stop_after_minutes: Annotated[
        float | None, typer.Option(min=0, help="The same once so many minutes have passed: a little less than the machine is yours for.")
    ] = None,
    check_only: Annotated[bool, typer.Option("--check", help="Only check that it could start: settings, data, folder, model.")] = False,
    ranks: Annotated[int, typer.Option(min=1, help="With --check: the number of processes it would be launched with.")] = 1,
) -> None:
    """Train, from the newest checkpoint if the run folder holds one. Several processes: launch/torchrun.sh train ..."""
    end_with_launcher()
    run = _load(layers)
    from clipscale import train as training

    if check_only:
        from clipscale.run_model import check_model

        training.check(run, world=ranks)
        check_model(run)
        return
    from clipscale.parallel.mesh import start, stop

    mesh = start(run.device, timeout_s=run.timeout_s)
    outcome = training.train(run, mesh, stop_after=stop_after, stop_after_minutes=stop_after_minutes)
    stop(mesh)
    if mesh.is_main:
        print(f"{run.run_folder}: {outcome.ended} at step {outcome.step} of {run.steps}", file=sys.stderr)
    told = LAUNCHER in os.environ  # by a file; torchrun would start ranks anew that end with anything but 0
    _leave(0 if outcome.signal is None or told else 128 + outcome.signal)


@evaluation.command("checkpoint")
def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A run folder (its newest whole checkpoint) or one checkpoint folder, or the address of either in a store; an open_clip "
            "checkpoint (.pt, .safetensors, or a folder with open_clip_config.json); or a Hugging Face folder (CLIP, SigLIP, CLAP)."
        ),
    ],
    layers: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE...] [KEY.PATH=VALUE...]", help="Layers over the run's own settings.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for evaluation.json and evaluation.csv; default: the run folder.")] = None,
    average: Annotated[bool, typer.Option("--average", help="Evaluate the weights' moving average (optimizer.average_decay).")] = False,
    architecture: Annotated[
        str | None, typer.Option(help="open_clip's name of what a .pt or .safetensors file holds, where nothing beside it tells.")
    ] = None,
) -> None:
    """Run the evaluations of a run, or of the files given, on a checkpoint. Several processes: launch/torchrun.sh eval ..."""
    end_with_launcher()
    from clipscale.evaluate import evaluate_checkpoint
    from clipscale.parallel.mesh import start, stop

    files, overrides = _split(layers or [])
    mesh = start("auto", timeout_s=600.0)
    folder = evaluate_checkpoint(
        checkpoint,
        mesh,
        files=[Path(file) for file in files],
        overrides=overrides,
        output=output,
        average=average,
        architecture=architecture,
    )
    stop(mesh)
    if mesh.is_main:
        _print_table(folder)
    _leave(0)


@evaluation.command("compare")
def compare_evaluations(
    a: Annotated[Path, typer.Argument(help="A folder with an evaluation: the one to compare with.")],
    b: Annotated[Path, typer.Argument(help="Another one, of the same evaluations on the same data.")],
    output: Annotated[Path | None, typer.Option(help="Folder for comparison.json and comparison.html; default: only the table.")] = None,
    max_drop: Annotated[
        float | None, typer.Option(min=0, max=1, help="End with 1 if a headline of B is shown to be lower by more than this, 0.005 say.")
    ] = None,
    certainly: Annotated[
        bool, typer.Option("--certainly", help="With --max-drop: end with 1 unless every headline is shown not to be lower by more.")
    ] = False,
) -> None:
    """Compare two evaluations row by row: differences with paired intervals, McNemar's test, and the rows that flipped."""
    from clipscale.comparison import compare, dropped, write
    from clipscale.comparison.table import print_comparison

    if certainly and max_drop is None:
        raise ConfigError("--certainly says how --max-drop is decided; give --max-drop too")
    found = compare(a, b)
    print_comparison(found)
    if output is not None:
        print(write(found, output))
    if max_drop is not None and (failed := dropped(found, at_most=max_drop, certainly=certainly)):
        named = ", ".join(f"{change.evaluation} ({change.figure}) by {-change.difference:.4f}" for change in failed)
        print(f"clipscale: more than the {max_drop} that is allowed {'may be' if certainly else 'is'} lost: {named}", file=sys.stderr)
        _leave(1)


@app.command()
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A run folder (its newest whole checkpoint) or one checkpoint folder, here or in a store."),
    ],
    output: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    to: Annotated[Literal["open_clip", "huggingface"], typer.Option(help="Which library loads it.")],
    pair_kind: Annotated[str | None, typer.Option(help="Whose temperature is taken, where several have images and texts.")] = None,
    average: Annotated[bool, typer.Option("--average", help="Export the weights' moving average (optimizer.average_decay).")] = False,
) -> None:
    """Write a model for open_clip or Hugging Face transformers, and check that it gives the same embeddings there."""
    from clipscale.export import export as write

    library: Literal["open_clip", "hugging_face"] = "hugging_face" if to == "huggingface" else "open_clip"
    print(write(checkpoint, output, to=library, pair_kind=pair_kind, average=average))


@app.command()
def plan(
    layers: Layers,
    nodes: Annotated[int, typer.Option(help="Nodes to run on; fewer, by powers of two, are told beside them.")] = 1,
    gpu: Annotated[str | None, typer.Option(help="A GPU of the catalogue or a YAML file of your own; default: h100, or cpu.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="Ranks of a node; default: 8 GPUs, or 1 rank on the CPU.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write every figure here.")] = None,
    page: Annotated[Path | None, typer.Option(help="Also write one self-contained HTML page here.")] = None,
) -> None:
    """What a run will need, before it runs: memory, bytes between ranks, time, cost, what would fit. Reads no data."""
    run = _load(layers)
    from rich.console import Console

    from clipscale.planning.command import make, show, write

    name = gpu or ("cpu" if run.device == "cpu" else "h100")
    made = make(run, nodes=nodes, gpu=name, gpus_per_node=gpus_per_node)
    show(made, Console())
    write(made, json_file=json_file, page=page)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="A run folder, or a folder that holds an evaluation.json.")]) -> None:
    """Write one self-contained HTML page of a run: curves, evaluation, examples, settings."""
    from clipscale.report import write_report

    path = write_report(folder)
    print(path)


@app.command()
def data(
    layers: Layers,
    page: Annotated[Path | None, typer.Option(help="Where to write the page; default: NAME.data.html, here.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long to read each pair kind for its speed.")] = 3.0,
) -> None:
    """What a run will read: the mix, epochs, padding, speed in one process; and a page with its first samples."""
    run = _load(layers)
    from rich.console import Console

    from clipscale.preview import html_page, print_summary, survey, write_page
    from clipscale.run_model import build_model

    model = build_model(run)
    kinds = survey(run, model, measure_s=seconds)
    place = page or Path(f"{run.name}.data.html")
    write_page(place, html_page(run, model, kinds))
    print_summary(kinds, Console())
    print(place)


@app.command()
def demo(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE...]", help="Settings over configs/demo.yaml; name=again trains afresh."),
    ] = None,
) -> None:
    """Make data, build shards, train on 2 ranks, stop, resume, evaluate and report: the whole system, small."""
    from clipscale.demo.story import tell

    page = tell(overrides or [])
    _print_table(page.parent)
    print(page)


@app.command()
def doctor(
    layers: Annotated[
        list[str] | None, typer.Argument(metavar="[FILE...] [KEY.PATH=VALUE...]", help="A run, whose data and first step are checked too.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only what takes a moment; the image's health check.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the findings into this file.")] = None,
) -> None:
    """Check whether this machine is fit for training: versions, GPUs, memory, disk, speed between ranks, data, one step of a run."""
    run = _load(layers) if layers else None
    from clipscale.doctor import examine, print_findings, write_json
    from clipscale.parallel.mesh import start, stop

    mesh = start("cpu" if run is not None and run.device == "cpu" else "auto", timeout_s=60.0)
    findings = examine(run, mesh, quick=quick)
    stop(mesh)
    if mesh.is_main:
        print_findings(findings)
        if json is not None:
            write_json(json, findings)
    _leave(1 if any(finding.state == "problem" for finding in findings) else 0)


@app.command()
def config(layers: Layers) -> None:
    """Print the settings that files and overrides come to, every default included."""
    from clipscale.config import to_yaml

    print(to_yaml(_load(layers)), end="")


@app.command()
def parts(kind: Annotated[str, typer.Argument(help=f"One of: {', '.join(PART_KINDS)}.")]) -> None:
    """List the parts of a kind, with what each one is."""
    from clipscale.settings import did_you_mean, part_summaries

    if kind not in PART_KINDS:
        raise ConfigError(f"there is no kind of part '{kind}'{did_you_mean(kind, PART_KINDS)}; known: {', '.join(PART_KINDS)}")
    summaries = part_summaries(PART_KINDS[kind])
    width = max(len(name) for name in summaries)
    for name, summary in summaries.items():
        print(f"{name:{width}}  {summary}")


def _load(layers: list[str]) -> Run:
    from clipscale.config import load_run

    files, overrides = _split(layers)
    if not files:
        raise ConfigError("no configuration file was given, only overrides; see configs/ for some")
    return load_run(files, overrides)


def _split(layers: list[str]) -> tuple[list[str], list[str]]:
    """Files and overrides; an override has '=' and is no file."""
    overrides = [layer for layer in layers if "=" in layer and not Path(layer).exists()]
    return [layer for layer in layers if layer not in overrides], overrides


def _print_table(folder: Path) -> None:
    from rich.console import Console

    from clipscale.report import report_table

    Console().print(report_table(folder))


def _leave(status: int) -> NoReturn:
    """End the command; one of several ranks ends at once, without the interpreter's teardown.

    Gloo's threads outlive their process group now and then, and the teardown then aborts a process whose work is done
    ("terminate called without an active exception"; half of all runs on a loaded machine).
    """
    if "WORLD_SIZE" not in os.environ:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main() -> None:
    """Run a command; errors made for users become one message and their exit code."""
    try:
        app()
    except ClipscaleError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank raises the same; one says it
            print(f"clipscale: {redacted(str(error))}", file=sys.stderr)
        _leave(error.exit_code)
    except Exception:  # a mistake of ours or of a library's: its traceback is what helps, and may hold what a variable was filled in with
        print(redacted(traceback.format_exc()), file=sys.stderr, end="")
        _leave(1)
