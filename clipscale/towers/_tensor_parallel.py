"""How the blocks of each family of towers are cut over tensor ranks: which layers by columns, which by rows, by how many heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from open_clip.transformer import Attention
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from clipscale.errors import RequestError
from clipscale.parallel.tensor_parallel import ColumnLinear, Region, RowLinear, packed_order
from clipscale.towers._packed_attention import OpenClipAttention, TorchAttention


@dataclass(frozen=True)
class Split:
    """Layers of a block that are cut together; all names are paths from the block."""

    columns: tuple[str, ...]
    """nn.Linear layers cut by their outputs, or one attention module with packed weights that is cut as a whole."""
    row: str = ""
    """The nn.Linear layer that follows, cut by its inputs."""
    inside: str = ""
    """A module in which nothing else may have parameters: they would see some heads only."""
    heads: str = ""
    """Where the number of heads stands; without it, the hidden units of the columns are cut."""
    counts: tuple[str, ...] = ()
    """Whole numbers that the block's own code reads and that must be those of a part."""
    packed: bool = False
    """The rows of the columns are those of query, key and value, one after the other."""
    dropouts: tuple[str, ...] = ()
    """Dropout between columns and row: modules or probabilities."""


def _projections(path: str, names: str, row: str, *, heads: str, dropout: str = "dropout") -> Split:
    columns = tuple(f"{path}.{name}" for name in names.split())
    counted = f"{path}.{heads}"
    return Split(columns, row, inside=path, heads=counted, counts=(counted,), dropouts=(f"{path}.{dropout}",))


KNOWN = (
    _projections("attention", "query key value", "attention.output", heads="heads"),  # ours
    _projections("attention.self", "query key value", "attention.output.dense", heads="num_attention_heads"),  # BERT and its kin
    _projections("attention", "q_lin k_lin v_lin", "attention.out_lin", heads="n_heads"),  # DistilBERT
    _projections("self_attn", "q_proj k_proj v_proj", "self_attn.out_proj", heads="num_heads"),  # CLIP, SigLIP, Whisper
    _projections("attention", "q_proj k_proj v_proj", "attention.out_proj", heads="num_heads"),  # wav2vec 2.0, HuBERT
    Split(  # timm
        ("attn.qkv",),
        "attn.proj",
        inside="attn",
        heads="attn.num_heads",
        counts=("attn.num_heads", "attn.attn_dim"),
        packed=True,
        dropouts=("attn.attn_drop",),
    ),
    Split(("attn",), heads="attn.num_heads", packed=True),  # open_clip
    Split(("mlp.0",), "mlp.2", inside="mlp"),  # ours
    Split(("intermediate.dense",), "output.dense"),  # BERT
    Split(("ffn.lin1",), "ffn.lin2", inside="ffn"),  # DistilBERT
    Split(("mlp.fc1",), "mlp.fc2", inside="mlp", dropouts=("mlp.drop1",)),  # CLIP, SigLIP, timm
    Split(("fc1",), "fc2", dropouts=("activation_dropout",)),  # Whisper
    Split(
        ("feed_forward.intermediate_dense",),
        "feed_forward.output_dense",
        inside="feed_forward",
        dropouts=("feed_forward.intermediate_dropout",),
    ),
    Split(("mlp.c_fc",), "mlp.c_proj", inside="mlp"),  # open_clip
)


def known_splits(block: nn.Module) -> list[Split]:
    """How a block can be cut, as far as its family is known."""
    return [split for split in KNOWN if _fits(block, split)]


def _fits(block: nn.Module, split: Split) -> bool:
    if not split.row:
        return _is_packed_attention(_find(block, split.columns[0]))
    layers = [_find(block, path) for path in (*split.columns, split.row)]
    return all(isinstance(layer, nn.Linear) for layer in layers) and (not split.heads or isinstance(_find(block, split.heads), int))


def _is_packed_attention(module: Any) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight is not None and module.bias_k is None and module.batch_first
    return isinstance(module, Attention) and not [name for name, _ in module.named_parameters() if "_proj" not in name]


def check_splits(blocks: Sequence[nn.Module], splits: Sequence[Sequence[Split]], *, ranks: int) -> None:
    """Refuse blocks that `ranks` tensor ranks cannot share.

    Raises:
        RequestError: says what there is to cut, and how many ranks would fit.
    """
    if not any(splits):
        kinds = ", ".join(sorted({type(block).__name__.removeprefix("FSDP") for block in blocks})) or "none"
        raise RequestError(f"no way is known to cut its blocks ({kinds}) over tensor ranks; 1 fits")
    sizes: dict[str, int] = {}
    for block, own in zip(blocks, splits, strict=True):
        for split in own:
            _check_inside(block, split)
            sizes[f"{_size(block, split)} {'heads' if split.heads else 'hidden units'}"] = _size(block, split)
    common = math.gcd(*sizes.values())
    if common % ranks:
        fitting = ", ".join(str(count) for count in range(1, common + 1) if common % count == 0)
        raise RequestError(f"its blocks have {' and '.join(sizes)}, which {ranks} tensor ranks do not divide; these do: {fitting}")


def _check_inside(block: nn.Module, split: Split) -> None:
    if not split.inside:
        return
    cut = {path.removeprefix(f"{split.inside}.") for path in (*split.columns, split.row)}
    others = sorted({name.rpartition(".")[0] or name for name, _ in block.get_submodule(split.inside).named_parameters()} - cut)
    if others:
        raise RequestError(f"{type(block).__name__}.{split.inside} has {', '.join(others)}, which tensor ranks would see a part of; 1 fits")


def _size(block: nn.Module, split: Split) -> int:
    size = _find(block, split.heads) if split.heads else _find(block, split.columns[0]).out_features
    assert isinstance(size, int)
    return size


def cut_block(block: nn.Module, splits: Sequence[Split], mesh: DeviceMesh) -> dict[str, Tensor]:
    """Put cut layers in the place of whole ones; the order of rows of those parameters that are packed, by path."""
    orders: dict[str, Tensor] = {}
    for split in splits:
        region = Region(mesh, random=any(_probability(_find(block, path)) > 0 for path in split.dropouts))
        for path in split.columns:
            orders |= _cut_columns(block, path, split, region)
        if split.row:
            _replace(block, split.row, RowLinear(block.get_submodule(split.row), region))  # type: ignore[arg-type]
        for path in split.counts:
            owner, _, name = path.rpartition(".")
            setattr(block.get_submodule(owner), name, _find(block, path) // mesh.size())
    return orders


def _cut_columns(block: nn.Module, path: str, split: Split, region: Region) -> dict[str, Tensor]:
    whole: Any = block.get_submodule(path)
    if isinstance(whole, nn.Linear):
        _replace(block, path, ColumnLinear(whole, region))
        names = ("weight", "bias")
    else:
        kind = TorchAttention if isinstance(whole, nn.MultiheadAttention) else OpenClipAttention
        made = kind(whole, region)
        region.random = made.dropout > 0
        _replace(block, path, made)
        names = ("in_proj_weight", "in_proj_bias")
    if not split.packed:
        return {}
    rows = len(getattr(whole, names[0]))
    order = packed_order(rows, pieces=3, ranks=region.mesh.size())
    return {f"{path}.{name}": order for name in names if getattr(whole, name) is not None}


def _replace(block: nn.Module, path: str, module: nn.Module) -> None:
    owner, _, name = path.rpartition(".")
    old = block.get_submodule(path)
    assert "forward" not in vars(old), f"{path} is cut before its forward is replaced"
    module.train(old.training)
    setattr(block.get_submodule(owner), name, module)


def _find(block: nn.Module, path: str) -> Any:
    """What stands at a path from a block; None when nothing does."""
    found: Any = block
    for step in path.split("."):
        found = getattr(found, step, None)
    return found


def _probability(dropout: Any) -> float:
    return float(dropout.p if isinstance(dropout, nn.Dropout) else dropout or 0.0)
