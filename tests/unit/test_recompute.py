"""How a tower's blocks run: what is made again in the backward pass, what is kept, and what compilation leaves as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_memory import kept_bytes
from pydantic import ValidationError
from torch import Tensor, nn
from torch.testing import assert_close

from clipscale.errors import RequestError
from clipscale.model import build_encoders
from clipscale.towers import Tower
from clipscale.towers._module import TowerModule

MIB = 2**20
SPEECH = {"name": "log_mel_transformer", "width": 32, "layers": 5, "heads": 4, "num_mels": 8, "max_seconds": 0.5, "dropout": 0.1}


def tower(**changes: Any) -> TowerModule:
    """Five blocks of attention and perceptron, with dropout."""
    made = Tower.model_validate({**SPEECH, **changes})
    return build_encoders({"speech": made}, embed_dim=8, pair_kinds={}, seed=0).tower("speech").train()


def rows(count: int = 2) -> dict[str, Tensor]:
    return {"mel": torch.randn(count, 8, 48, generator=torch.Generator().manual_seed(1)), "length": torch.full((count,), 48)}


def runs(module: TowerModule, inputs: dict[str, Tensor]) -> list[int]:
    """How often each block's first layer runs in a forward and a backward pass."""
    counts = [0] * len(module.blocks())
    layers = [next(part for part in block.modules() if isinstance(part, nn.LayerNorm)) for block in module.blocks()]
    hooks = [
        layer.register_forward_pre_hook(lambda *_, place=place: counts.__setitem__(place, counts[place] + 1))
        for place, layer in enumerate(layers)
    ]
    module(inputs).sum().backward()
    for hook in hooks:
        hook.remove()
    return counts


def gradients(module: TowerModule, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    torch.manual_seed(4)
    module(inputs).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [(False, [1, 1, 1, 1, 1]), (True, [2, 2, 2, 2, 2]), ({"every": 2}, [2, 1, 2, 1, 2]), ({"every": 9}, [2, 1, 1, 1, 1])],
)
def test_every_nth_block_runs_again(settings: Any, expected: list[int]) -> None:
    assert runs(tower(recompute=settings), rows()) == expected


@pytest.mark.parametrize(
    "settings", [True, {"every": 2}, {"part": "attention"}, {"part": "attention", "every": 3}, {"keep_mb": 1}], ids=str
)
def test_no_choice_changes_a_gradient(settings: Any) -> None:
    """Dropout is on. A budget is filled by what earlier passes measured, so the second and third pass are compared too."""
    plain, made_again = tower(), tower(recompute=settings)
    for inputs in (rows(32), rows(32), rows(7)):
        expected, found = gradients(plain, inputs), gradients(made_again, inputs)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert_close(found[name], gradient, rtol=0, atol=0)


def test_attention_alone_is_made_again_and_less_is_kept_than_without() -> None:
    def kept(settings: Any) -> int:
        module = tower(recompute=settings)
        return kept_bytes(lambda: module(rows(64)))

    attention = tower(recompute={"part": "attention"})
    assert runs(attention, rows()) == [1] * 5, "the norm before attention is kept"
    assert kept(True) < kept({"part": "attention"}) < kept(False)


def test_a_budget_keeps_the_last_blocks_that_fit() -> None:
    module, inputs = tower(), rows(256)
    everything = kept_bytes(lambda: module(inputs))
    nothing = kept_bytes(lambda: tower(recompute=True)(inputs))
    block = (everything - nothing) / 5
    assert block > 4 * MIB
    module = tower(recompute={"keep_mb": int(2.5 * block / MIB)})
    passes = [runs(module, inputs) for _ in range(3)]
    assert passes == [[2, 2, 2, 2, 1], [2, 2, 2, 1, 1], [2, 2, 2, 1, 1]]
    assert kept_bytes(lambda: module(inputs)) - nothing <= 2.5 * block
    assert runs(module, rows(512)) == [2, 2, 2, 2, 1], "twice the rows hold twice as much"
    assert runs(module, rows(64)) == [1, 1, 1, 1, 1]
    with torch.no_grad():
        assert kept_bytes(lambda: module(inputs)) < MIB


def test_a_tower_without_attention_is_refused() -> None:
    made = Tower.model_validate({"name": "conv_image", "recompute": {"part": "attention"}})
    with pytest.raises(RequestError, match=r"recompute\.part attention: this tower's blocks .* have none; set part: block"):
        build_encoders({"image": made}, embed_dim=8, pair_kinds={}, seed=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute:UserWarning")  # torch's compiler on its own parts
def test_compiled_blocks_make_the_same_gradients_draw_the_same_dropout_and_are_compiled_once() -> None:
    plain, compiled = tower(layers=3), tower(layers=3, compile=True, recompute=True)
    torch._dynamo.utils.counters.clear()
    expected, found = gradients(plain, rows()), gradients(compiled, rows())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "three blocks of one kind"
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for name, gradient in expected.items():
        assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_attention_of_a_compiled_block_cannot_be_made_again_alone() -> None:
    with pytest.raises(ValidationError, match="a compiled block is one piece"):
        tower(compile=True, recompute={"part": "attention"})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(RequestError, match=r"needs a C\+\+ compiler, and there is none"):
        tower(compile=True)
