"""What an objective may ask of the engine, each ability with an objective written here and its textbook form: any ranks, any grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from clipscale.contrast import ContrastSettings, Pairs, contrastive_loss
from clipscale.errors import ClipscaleError
from clipscale.objectives import Block, LogSumExp, Max, Objective, Own, Product, Row, Sum, Terms, View, softplus
from clipscale.objectives.clip import Clip
from clipscale.objectives.cwcl import Cwcl
from clipscale.objectives.siglip import Siglip
from clipscale.parallel.mesh import Mesh

Data = dict[str, Tensor]


class OwnTemperature(Clip):
    """Every pair divides its rows by a temperature of its own, and gradients reach it."""

    takes_extras: ClassVar[bool] = False

    @property
    def numbers(self) -> tuple[str, ...]:
        return ("temperature",)

    def terms(self, block: Block) -> Terms:
        rows, columns = block.numbers["temperature"]
        out = block.left_out()
        return {"negatives": [LogSumExp(block.logits / rows, out, "x"), LogSumExp(block.logits / columns, out, "y")]}

    def row_loss(self, row: Row) -> Tensor:
        return row.numbers["temperature"] * softplus(row["negatives"] - row.positive / row.numbers["temperature"])


def own_temperature(data: Data) -> Tensor:
    logits, t = data["scale"] * data["x"] @ data["y"].T, data["temperature"]
    rows, columns = logits / t[:, None], logits.T / t[:, None]
    return sum((t * (side.logsumexp(1) - side.diagonal())).mean() for side in (rows, columns))


class WithinAndAcross(Objective):
    """Negatives of both modalities that have another label, for x alone; y pays its hardest negative."""

    @property
    def products(self) -> tuple[Product, ...]:
        return (("x", "y"), ("x", "x"))

    @property
    def numbers(self) -> tuple[str, ...]:
        return ("label",)

    def terms(self, block: Block) -> Terms:
        rows, columns = block.numbers["label"]
        same = rows == columns
        parts = [LogSumExp(block.logits, same, "x"), LogSumExp(block.products["x", "x"], same, "x")]
        return {"negatives": parts, "hardest": Max(block.logits, same, "y")}

    def row_loss(self, row: Row) -> Tensor:
        return softplus((row["negatives"] if row.side == "x" else row["hardest"]) - row.positive)


def within_and_across(data: Data) -> Tensor:
    same = data["label"][:, None] == data["label"]
    across, within = (data["scale"] * data["x"] @ data[name].T for name in ("y", "x"))
    pair = across.diagonal()
    negatives = torch.cat([across.masked_fill(same, -torch.inf), within.masked_fill(same, -torch.inf)], 1).logsumexp(1)
    hardest = across.masked_fill(same, -torch.inf).amax(0)
    return (functional.softplus(negatives - pair) + functional.softplus(hardest - pair)).mean()


class Focused(Objective):
    """Two sweeps: entries above their row's mean, softly; uses the scale itself."""

    def terms(self, block: Block) -> Terms:
        return {"total": Sum(block.logits), "number": Sum(torch.ones_like(block.logits))}

    def later_sweeps(self) -> tuple[Callable[[Block], Terms], ...]:
        return (self._above,)

    def _above(self, block: Block) -> Terms:
        (rows, columns), (row_count, column_count) = block.reduced["total"], block.reduced["number"]
        return {
            "above": [
                Sum(softplus((block.logits - rows / row_count) / block.scale), None, "x"),
                Sum(softplus((block.logits - columns / column_count) / block.scale), None, "y"),
            ]
        }

    def row_loss(self, row: Row) -> Tensor:
        return row["above"] / row.count - row.positive / row.scale.sqrt()


def focused(data: Data) -> Tensor:
    logits = data["scale"] * data["x"] @ data["y"].T
    total = torch.zeros((), dtype=torch.float64)
    for side in (logits, logits.T):
        above = functional.softplus((side - side.mean(1, keepdim=True)) / data["scale"]).mean(1)
        total = total + (above - side.diagonal() / data["scale"].sqrt()).mean()
    return total


class Decorrelated(Objective):
    """No logits at all: a penalty on the cross-correlation of all pairs, and a pair's distance relative to the mean distance."""

    @property
    def products(self) -> tuple[Product, ...]:
        return ()

    def terms(self, block: Block) -> Terms:  # noqa: ARG002 - it reduces nothing
        return {}

    def statistics(self, own: Own) -> dict[str, Tensor]:
        distance = (own.views["x"] - own.views["y"]).square().sum()
        return {"correlation": own.views["x"].T @ own.views["y"], "distance": distance}

    def pair_loss(self, rows: Mapping[Any, Row]) -> Tensor:
        row = rows["x"]
        return (2 - 2 * row.positive / row.scale) * row.count / row.statistics["distance"] * (row.positive / row.scale)

    def batch_loss(self, statistics: Mapping[str, Tensor], *, count: int) -> Tensor:
        correlation = statistics["correlation"] / count
        return (correlation - torch.eye(len(correlation), dtype=correlation.dtype)).square().sum()


def decorrelated(data: Data) -> Tensor:
    count = len(data["x"])
    correlation = data["x"].T @ data["y"] / count
    cosine = (data["x"] * data["y"]).sum(1)
    mean = (data["x"] - data["y"]).square().sum() / count
    return (correlation - torch.eye(len(correlation), dtype=torch.float64)).square().sum() + ((2 - 2 * cosine) / mean * cosine).mean()


class Volume(Objective):
    """Three modalities at once: an anchor x, and the volume it spans with another pair's y and z (GRAM-like)."""

    @property
    def views(self) -> tuple[View, ...]:
        return ("x", "y", "z")

    @property
    def products(self) -> tuple[Product, ...]:
        return (("x", "y"), ("x", "z"))

    @property
    def numbers(self) -> tuple[str, ...]:
        return ("yz",)

    def terms(self, block: Block) -> Terms:
        first, second = (block.products["x", other] / block.scale for other in ("y", "z"))
        angle = block.numbers["yz"][1]
        determinant = 1 + 2 * first * second * angle - first**2 - second**2 - angle**2
        return {"negatives": LogSumExp(-block.scale * determinant, block.left_out())}

    def row_loss(self, row: Row) -> Tensor:
        first, second, angle = row.pairs["x", "y"] / row.scale, row.pairs["x", "z"] / row.scale, row.numbers["yz"]
        determinant = 1 + 2 * first * second * angle - first**2 - second**2 - angle**2
        return softplus(row["negatives"] + row.scale * determinant) / 2


def volume(data: Data) -> Tensor:
    first, second, angle = data["x"] @ data["y"].T, data["x"] @ data["z"].T, data["yz"]
    logits = -data["scale"] * (1 + 2 * first * second * angle - first**2 - second**2 - angle**2)
    targets = torch.arange(len(logits))
    return (functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2


def clip_with_extras(data: Data) -> Tensor:
    logits = data["scale"] * data["x"] @ torch.cat([data["y"], data["extra_y"]]).T
    columns = data["scale"] * data["y"] @ torch.cat([data["x"], data["extra_x"]]).T
    targets = torch.arange(len(logits))
    smooth = {"label_smoothing": 0.2}
    return (functional.cross_entropy(logits, targets, **smooth) + functional.cross_entropy(columns, targets, **smooth)) / 2


def siglip_with_extras(data: Data) -> Tensor:
    logits = data["scale"] * data["x"] @ data["y"].T + data["bias"]
    sign = 2 * torch.eye(len(logits), dtype=torch.float64) - 1
    rows = data["scale"] * data["x"] @ data["extra_y"].T + data["bias"]
    columns = data["scale"] * data["y"] @ data["extra_x"].T + data["bias"]
    extras = functional.softplus(rows).sum() + functional.softplus(columns).sum()
    return (functional.softplus(-sign * logits).sum() + extras / 2) / len(logits)


class Unbiased(Siglip):
    """Sigmoid loss; the mean square of the pairs' logits without their bias; the square of a mean of terms, each with its pair's number."""

    one_sweep: ClassVar[bool] = False
    takes_extras: ClassVar[bool] = False

    @property
    def numbers(self) -> tuple[str, ...]:
        return ("temperature",)

    def statistics(self, own: Own) -> dict[str, Tensor]:
        return {"squares": (own.pairs["x", "y"] - own.bias).square().sum()}

    def row_sums(self, rows: Mapping[Any, Row]) -> dict[str, Tensor]:
        row = rows["y"]
        return {"mean": (row["negatives"] * row.numbers["temperature"] * (row.positive - row.bias) / row.scale).sum() / row.count}

    def batch_loss(self, statistics: Mapping[str, Tensor], *, count: int) -> Tensor:
        return statistics["squares"] / count + statistics["mean"].square()


def unbiased(data: Data) -> Tensor:
    logits = data["scale"] * data["x"] @ data["y"].T
    sign = 2 * torch.eye(len(logits), dtype=torch.float64) - 1
    negatives = (functional.softplus(logits + data["bias"]) * (sign < 0)).sum(0)
    mean = (negatives * data["temperature"] * (data["x"] * data["y"]).sum(1)).mean()
    return functional.softplus(-sign * (logits + data["bias"])).sum() / len(logits) + logits.diagonal().square().mean() + mean.square()


class Grouped(Clip):
    """Negatives of the own half only."""

    takes_extras: ClassVar[bool] = False

    @property
    def groups(self) -> int:
        return 2


def grouped(data: Data) -> Tensor:
    logits = data["scale"] * data["x"] @ data["y"].T
    half = len(logits) // 2
    targets = torch.arange(half)
    parts = [logits[:half, :half], logits[half:, half:]]
    return sum((functional.cross_entropy(part, targets) + functional.cross_entropy(part.T, targets)) / 4 for part in parts)


CASES: dict[str, tuple[Objective, Callable[[Data], Tensor]]] = {
    "own_temperature": (OwnTemperature(), own_temperature),
    "within_and_across": (WithinAndAcross(), within_and_across),
    "focused": (Focused(), focused),
    "decorrelated": (Decorrelated(), decorrelated),
    "volume": (Volume(), volume),
    "clip_with_extras": (Clip(label_smoothing=0.2), clip_with_extras),
    "siglip_with_extras": (Siglip(), siglip_with_extras),
    "unbiased": (Unbiased(), unbiased),
    "grouped": (Grouped(), grouped),
}
SIZES = {1: [12], 2: [5, 7], 4: [3, 0, 5, 4], 5: [3, 3, 3, 3, 0], 6: [2, 2, 2, 2, 2, 2]}
EXTRAS = {
    1: ([4], [5]),
    2: ([4, 0], [2, 3]),
    4: ([1, 0, 3, 0], [2, 1, 0, 2]),
    5: ([4, 0, 0, 0, 0], [1] * 5),
    6: ([1] * 4 + [0] * 2, [0, 0, 5, 0, 0, 0]),
}
LEAVES = ("x", "y", "z", "extra_x", "extra_y", "temperature", "yz", "scale", "bias")


def make_data() -> Data:
    draw = torch.Generator().manual_seed(3)

    def unit(rows: int) -> Tensor:
        return functional.normalize(torch.randn(rows, 8, generator=draw, dtype=torch.float64), dim=1)

    data = {"x": unit(12), "extra_x": unit(4), "extra_y": unit(5)}
    data |= {name: functional.normalize(unit(12) + data["x"], dim=1) for name in ("y", "z")}
    data |= {"temperature": torch.linspace(0.5, 2, 12, dtype=torch.float64), "yz": torch.linspace(-0.5, 0.5, 12, dtype=torch.float64)}
    data |= {
        "label": torch.arange(12) % 5,
        "scale": torch.tensor(8.0, dtype=torch.float64),
        "bias": torch.tensor(-3.0, dtype=torch.float64),
    }
    return data


def share(mesh: Mesh, tensor: Tensor, sizes: list[int]) -> Tensor:
    start = sum(sizes[: mesh.rank])
    return tensor[start : start + sizes[mesh.rank]].clone()


def own_data(mesh: Mesh, sizes: list[int]) -> Data:
    data, extras = make_data(), dict(zip(("extra_x", "extra_y"), EXTRAS[mesh.world], strict=True))
    own = {name: tensor.clone() if tensor.ndim == 0 else share(mesh, tensor, extras.get(name, sizes)) for name, tensor in data.items()}
    return {name: tensor.requires_grad_() if name in LEAVES else tensor for name, tensor in own.items()}


def compute(mesh: Mesh, name: str, settings: ContrastSettings, sizes: list[int]) -> dict[str, Any]:
    objective, own = CASES[name][0], own_data(mesh, sizes)
    extras = {key: own[key] for key in ("extra_x", "extra_y")} if name.endswith("extras") else {}
    numbers = {key: own[key] for key in ("temperature", "yz", "label")}
    pairs = Pairs(own["x"], own["y"], views={"z": own["z"]}, numbers=numbers, **extras)
    loss = contrastive_loss(objective, pairs, own["scale"], own["bias"], settings=settings, mesh=mesh).loss
    loss.backward()
    return {"loss": loss.item(), **{key: None if own[key].grad is None else own[key].grad.tolist() for key in LEAVES}}


@pytest.mark.parametrize(("name", "world"), [(name, world) for name in CASES for world in SIZES if (name, world) != ("grouped", 5)])
@pytest.mark.parametrize(
    "settings",
    [ContrastSettings(method="dense"), ContrastSettings(tile_rows=2, tile_columns=3), ContrastSettings(tile_rows=4, cache_bytes=0)],
    ids=["dense", "tiles", "no_cache"],
)
def test_any_ranks_give_the_textbook_loss_and_every_gradient(ranks, name, world, settings):
    objective, textbook = CASES[name]
    sizes = [12 // world] * world if objective.groups > 1 else SIZES[world]
    data = {key: tensor.requires_grad_() if key in LEAVES else tensor for key, tensor in make_data().items()}
    expected = textbook(data)
    wanted = dict(zip(LEAVES, torch.autograd.grad(expected, [data[key] for key in LEAVES], allow_unused=True), strict=True))
    answers = ranks(world)(compute, name, settings, sizes)
    for answer in answers:
        assert answer["loss"] == pytest.approx(expected.item(), rel=1e-12)
    for key, gradient in wanted.items():
        if gradient is None or not gradient.any():
            continue
        parts = [torch.tensor(answer[key], dtype=torch.float64) for answer in answers]
        found = sum(parts) if gradient.ndim == 0 else torch.cat([part.reshape(-1, *gradient.shape[1:]) for part in parts])
        assert (found - gradient).abs().max() <= 1e-11 * gradient.abs().max(), key


def locked(mesh: Mesh, leaf: str) -> list[Any]:
    own = own_data(mesh, SIZES[mesh.world])
    for key in ("x", "y", "scale"):
        own[key].requires_grad_(key == leaf)
    loss = contrastive_loss(Clip(), Pairs(own["x"], own["y"]), own["scale"], settings=ContrastSettings(), mesh=mesh).loss
    loss.backward()
    return own[leaf].grad.tolist()


@pytest.mark.parametrize("leaf", ["x", "y", "scale"])
def test_what_alone_wants_a_gradient_gets_the_same(ranks, leaf):
    data = make_data()
    leaves = data[leaf].requires_grad_()
    logits = data["scale"] * data["x"] @ data["y"].T
    targets = torch.arange(12)
    ((functional.cross_entropy(logits, targets) + functional.cross_entropy(logits.T, targets)) / 2).backward()
    found = [torch.tensor(part, dtype=torch.float64) for part in ranks(4)(locked, leaf)]
    found = sum(found) if leaf == "scale" else torch.cat([part.reshape(-1, 8) for part in found])
    torch.testing.assert_close(found, leaves.grad, rtol=1e-11, atol=1e-14)


def refused(mesh: Mesh, what: str) -> str:
    own = own_data(mesh, SIZES[mesh.world])
    x, y, scale = own["x"].detach(), own["y"].detach(), own["scale"].detach()
    calls: dict[str, tuple[Objective, Pairs]] = {
        "extras": (Cwcl(), Pairs(x, y, guide_y=y, extra_y=own["extra_y"])),
        "view": (Volume(), Pairs(x, y)),
        "number": (OwnTemperature(), Pairs(x, y)),
        "width": (Clip(), Pairs(x, y, extra_y=own["extra_y"][:, :3] if mesh.rank else own["extra_y"])),
        "groups": (Grouped(), Pairs(x, y)),
    }
    objective, pairs = calls[what]
    try:
        contrastive_loss(objective, pairs, scale, settings=ContrastSettings(), mesh=mesh)
    except ClipscaleError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("what", "world", "said"),
    [
        ("extras", 2, "objective Cwcl takes no extra samples, extra_y was given"),
        ("view", 2, "objective Volume needs embeddings of a view 'z'; there are x, y"),
        ("number", 2, "objective OwnTemperature needs a number 'temperature' of every pair; there are none"),
        ("width", 2, "rank 1 of 2: extra_y is torch.float64 [3, 3]; it must be torch.float64 [samples, 8]"),
        ("groups", 5, "2 groups of negatives do not fit 5 ranks"),
    ],
)
def test_what_cannot_be_computed_is_refused_on_every_rank(ranks, what, world, said):
    answers = ranks(world)(refused, what)
    assert len(set(answers)) == 1
    assert said in answers[0]
