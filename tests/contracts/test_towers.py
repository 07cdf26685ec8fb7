"""What every tower promises, whoever wrote it; a new tower is tested as soon as its file is there."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from small_models import write_tokenizer
from torch import Tensor, nn
from torch.testing import assert_close

from clipscale.errors import RequestError
from clipscale.inputs import ImageInput, Input, SpeechInput
from clipscale.model import build_encoders
from clipscale.settings import part_names
from clipscale.towers import Tower
from clipscale.towers._module import TowerModule

EXAMPLES = Path(__file__).parent / "towers"

# transformers' WavLM gives torch a boolean padding mask beside a float position bias
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask:UserWarning")


def examples() -> list[Any]:
    """(name, settings) of every tower, several where a file lists several."""
    found = []
    for name in part_names("clipscale.towers"):
        file = EXAMPLES / f"{name}.yaml"
        listed = yaml.safe_load(file.read_text()) if file.exists() else [{}]
        found += [pytest.param((name, settings), id=f"{name}-{number}") for number, settings in enumerate(listed)]
    return found


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=examples())
def settings(request: pytest.FixtureRequest, small_tokenizer: Path) -> dict[str, Any]:
    for architecture in (EXAMPLES / "architectures").glob("*.json"):
        open_clip.add_model_config(architecture)
    name, own = request.param
    own = {key: str(small_tokenizer) if value == "TOKENIZER" else value for key, value in own.items()}
    return {"name": name, **own}


@pytest.fixture(scope="module")
def built(settings: dict[str, Any]) -> TowerModule:
    return build(settings)


@pytest.fixture
def module(built: TowerModule) -> TowerModule:
    """A copy that a test may change."""
    return copy.deepcopy(built)


def build(settings: dict[str, Any], *, seed: int = 0, **more: Any) -> TowerModule:
    tower = Tower.model_validate({**settings, **more})
    return build_encoders({tower.modality: tower}, embed_dim=8, pair_kinds={}, seed=seed).tower(tower.modality)


CAPTIONS = ["a cat", "two dogs run over the wide green field at night", "seven"]
SHARES = [0.4, 1.0, 0.07]
"""Of the longest recording, how long each of three is."""


def feed(spec: Input) -> dict[str, Tensor]:
    """Three unequal samples as `spec` wants them; what stands behind a recording's end is noise that must not be heard."""
    generator = torch.Generator().manual_seed(1)
    if isinstance(spec, ImageInput):
        return {"pixels": torch.randn(3, 3, spec.size, spec.size, generator=generator)}
    if isinstance(spec, SpeechInput):
        size = (
            int(spec.max_seconds * spec.sample_rate)
            if spec.features == "waveform"
            else int(spec.max_seconds * spec.sample_rate) // spec.hop
        )
        length = torch.tensor([int(share * size) for share in SHARES])
        if spec.features == "waveform":
            return {"waveform": torch.randn(3, size, generator=generator), "length": length}
        return {"mel": torch.randn(3, spec.num_mels, size, generator=generator), "length": length}
    return spec.tokenize(CAPTIONS)


def alone(spec: Input, inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sample of `inputs` without its padding."""
    one = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
    if isinstance(spec, ImageInput) or (isinstance(spec, SpeechInput) and spec.pad_to_max):
        return one
    end = int(one["length"]) if isinstance(spec, SpeechInput) else int(one["mask"].sum())
    return {name: tensor[..., :end] if name != "length" else tensor for name, tensor in one.items()}


def loss(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Something to differentiate that depends on every feature."""
    features = module(inputs)
    return (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum()


def test_features_are_one_finite_vector_per_sample(module: TowerModule) -> None:
    features = module.eval()(feed(module.input))
    assert features.shape == (3, module.embed_dim)
    assert features.isfinite().all()
    assert not torch.equal(features[0], features[1])


def test_a_sample_alone_gives_what_it_gives_in_a_padded_batch(module: TowerModule) -> None:
    module.eval()
    inputs = feed(module.input)
    together = module(inputs)
    for row in range(3):
        # other shapes take other kernels, whose fp32 sums differ in the last digits
        assert_close(module(alone(module.input, inputs, row))[0], together[row], rtol=1e-4, atol=1e-5)


def test_a_sample_of_zeros_gives_finite_features_and_gradients(module: TowerModule) -> None:
    inputs = {name: torch.zeros_like(tensor) for name, tensor in feed(module.input).items()}
    if "mask" in inputs:
        inputs["mask"][:, 0] = 1
    loss(module, inputs).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in module.parameters())


def test_gradient_reaches_every_parameter_that_trains(module: TowerModule) -> None:
    loss(module.train(), feed(module.input)).backward()
    idle = [name for name, parameter in module.named_parameters() if parameter.requires_grad and parameter.grad is None]
    assert idle == []


def test_locking_leaves_nothing_to_train_and_no_dropout(module: TowerModule) -> None:
    module.lock(unlocked_blocks=0)
    module.train()
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not any(part.training for name, part in module.named_modules() if name)


def test_unlocked_blocks_train_with_what_stands_after_them(module: TowerModule) -> None:
    last = {id(parameter) for parameter in parameters([module.blocks()[-1], *module.after_blocks()])}
    before = {name: parameter.clone() for name, parameter in module.named_parameters() if id(parameter) not in last}
    module.lock(unlocked_blocks=1)
    module.train()
    loss(module, feed(module.input)).backward()
    trained = {id(parameter) for parameter in module.parameters() if parameter.grad is not None}
    assert trained == last
    assert before
    assert module.blocks()[-1].training
    assert not module.blocks()[0].training or len(module.blocks()) == 1


def test_more_unlocked_blocks_than_there_are_is_refused(settings: dict[str, Any], built: TowerModule) -> None:
    count = len(built.blocks())
    with pytest.raises(RequestError, match=f"unlocked_blocks {count + 1} is more than the {count} blocks"):
        build(settings, locked=True, unlocked_blocks=count + 1)


def test_the_same_seed_builds_the_same_weights(settings: dict[str, Any], built: TowerModule) -> None:
    again = build(settings).state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in built.state_dict().items())


def test_blocks_hold_most_of_the_weights_beside_embeddings(module: TowerModule) -> None:
    blocks, after = parameters(module.blocks()), parameters(module.after_blocks())
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    everything = sum(parameter.numel() for parameter in module.parameters() if id(parameter) not in embeddings)
    assert len(module.blocks()) >= 2
    assert sum(parameter.numel() for parameter in blocks if id(parameter) not in embeddings) >= everything / 2
    assert not {id(parameter) for parameter in blocks} & {id(parameter) for parameter in after}


def test_recomputing_changes_neither_gradients_nor_names_and_keeps_dropout(settings: dict[str, Any], built: TowerModule) -> None:
    plain, recomputed = copy.deepcopy(built).train(), build(settings, recompute=True).train()
    inputs = feed(plain.input)
    once, again = count_runs(plain.blocks()[0]), count_runs(recomputed.blocks()[0])
    for module in (plain, recomputed):
        torch.manual_seed(3)
        loss(module, inputs).backward()
    assert again() > once()
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    gradients = dict(recomputed.named_parameters())
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            assert_close(gradients[name].grad, parameter.grad)


def test_settings_survive_being_written_and_read(settings: dict[str, Any]) -> None:
    tower = Tower.model_validate(settings)
    assert Tower.model_validate(tower.model_dump(mode="json")) == tower


def parameters(parts: list[Any]) -> list[nn.Parameter]:
    return [parameter for part in parts for parameter in ([part] if isinstance(part, nn.Parameter) else part.parameters())]


def count_runs(block: nn.Module) -> Callable[[], int]:
    """How often any one part of the block has run so far; recomputing stops early, so that some run once less."""
    runs: Counter[nn.Module] = Counter()
    for part in block.modules():
        part.register_forward_hook(lambda part, *_: runs.update([part]))
    return lambda: max(runs.values())


def test_the_meta_device_holds_the_same_names_and_shapes(built: TowerModule, settings: dict[str, Any]) -> None:
    """Ranks that are sent their weights build there: what differs would be filled wrongly, or not at all."""
    with torch.device("meta"):
        bare = build(settings)

    def described(module: TowerModule) -> dict[str, Any]:
        tensors = [*module.named_parameters(), *module.named_buffers()]
        return {name: (tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors}

    assert described(bare) == described(built)
    assert {tensor.device.type for tensor in (*bare.parameters(), *bare.buffers())} == {"meta"}
    mine, theirs = bare.input, built.input
    assert {name: value for name, value in vars(mine).items() if name != "tokenize"} == {
        name: value for name, value in vars(theirs).items() if name != "tokenize"
    }
    elsewhere = [name for _, module in built.named_modules() for name, value in vars(module).items() if isinstance(value, Tensor)]
    assert not elsewhere, "tensors that are neither parameters nor buffers would not be sent"
