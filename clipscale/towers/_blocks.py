"""Finding the repeated blocks inside other libraries' models, and what stands after them."""

from __future__ import annotations

from torch import nn

FINAL_NORMS = {"final_layer_norm", "final_norm", "final_layernorm", "ln_f", "norm"}
"""Names under which some architectures register the last norm before their blocks."""


def largest_block_list(model: nn.Module) -> str:
    """Where the module list with the most parameters is, as a dotted path; '' when there is none."""
    lists = {name: _size(module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)}
    return max(lists, key=lambda name: lists[name]) if lists else ""


def standing_after(model: nn.Module, path: str) -> list[nn.Module | nn.Parameter]:
    """Modules that the ancestors of the module at `path` registered after it, and their final norms."""
    after: list[nn.Module | nn.Parameter] = []
    ancestor = model
    for step in path.split("."):
        children = dict(ancestor.named_children())
        later = list(children)[list(children).index(step) + 1 :]
        behind = [child for name, child in children.items() if name != step and (name in later or name in FINAL_NORMS)]
        after += [child for child in behind if not isinstance(child, nn.Embedding)]  # relative positions: every block uses them
        ancestor = children[step]
    return after


def flatten_stages(stages: nn.Module) -> list[nn.Module]:
    """Stages of a hierarchical model to its blocks: sequences are opened one level deep, the rest taken as it stands."""
    blocks: list[nn.Module] = []
    for stage in stages.children():
        for part in stage.children() if _holds_sequence(stage) else [stage]:
            inside = list(part.children()) if isinstance(part, (nn.Sequential, nn.ModuleList)) and _holds_modules(part) else [part]
            blocks += [block for block in inside if _size(block)]
    return blocks


def _holds_sequence(stage: nn.Module) -> bool:
    return isinstance(getattr(stage, "blocks", None), (nn.Sequential, nn.ModuleList)) or isinstance(stage, nn.Sequential)


def _holds_modules(sequence: nn.Module) -> bool:
    return any(True for child in sequence.children() for _ in child.children())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
