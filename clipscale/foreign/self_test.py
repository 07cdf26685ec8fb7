"""The self-test of a loaded model: what every right encoder does, whatever it has learned, and a wrongly loaded one does not.

Each check has been somebody's lost week: text pooled at the wrong token gives every caption one vector; padding that is attended
to changes a caption with its neighbours in the batch; weights of another precision or another activation give noise in bf16.

b samples, D width of the shared space.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipscale.errors import RequestError
from clipscale.inputs import ImageInput, SpeechInput, TextInput
from clipscale.model import Prepared, prepare

if TYPE_CHECKING:
    from clipscale.inputs import Input, Modality
    from clipscale.model import Encoders

CAPTIONS = ["a cat", "a dog", "two dogs run at night", "two dogs run at noon"]
SAME_COSINE = 1 - 1e-4
"""Cosine from which on two embeddings of one sample count as the same; fp32 on other batch sizes reaches 1 - 1e-6."""
BF16_COSINE = 0.9
"""bf16 keeps 3 digits a layer; deep, right models stay above 0.98."""
APART = 1e-6
"""Largest difference of two embeddings from which on they count as different."""


def check_model(model: Encoders, *, name: str) -> None:
    """Encode a few made-up samples of each modality, alone and together, in fp32 and in bf16.

    Raises:
        RequestError: names every check that failed, and what it usually means.
    """
    problems = [problem for modality in model.modalities for problem in _problems(model, modality)]
    if problems:
        raise RequestError(f"{name} was loaded, but does not behave as an encoder does:\n" + "\n".join(problems))


def _problems(model: Encoders, modality: Modality) -> list[str]:
    spec = model.inputs()[modality]
    fed = _samples(spec)

    def encode(samples: Prepared) -> Tensor:
        with torch.no_grad():
            return model.encode(modality, prepare(modality, spec, samples))

    samples = fed(range(4))
    together = encode(samples)
    if not together.isfinite().all() or (together.norm(dim=1) - 1).abs().max() > 1e-3:
        return [f"- {modality}: embeddings are not finite vectors of length 1; weights are missing or damaged"]
    problems = []
    if any((together[first] - together[second]).abs().max() < APART for first, second in _different(samples)):
        problems.append(f"- {modality}: different samples get the same embedding; the wrong token is pooled, or weights are missing")
    alone = torch.cat([encode(fed([number])) for number in range(4)])
    if (alone * together).sum(1).min() < SAME_COSINE:
        problems.append(f"- {modality}: a sample's embedding changes with its neighbours in the batch; padding is not masked")
    if not torch.equal(encode(samples), together):
        problems.append(f"- {modality}: the same samples get another embedding each time; dropout is on, or something is drawn at random")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = encode(samples)
    if not (coarse * together).sum(1).min() >= BF16_COSINE:
        problems.append(f"- {modality}: embeddings in bf16 are not those in fp32; values overflow or cancel, as with wrong weights")
    return problems


def _different(samples: Prepared) -> list[tuple[int, int]]:
    """Pairs of samples that the tower can tell apart: a small vocabulary makes the same tokens of two captions."""
    fed = next(iter(samples.values()))
    return [(first, second) for first in range(4) for second in range(first) if not torch.equal(fed[first], fed[second])]


def _samples(spec: Input) -> Callable[[range | list[int]], Prepared]:
    """Four samples as they come from storage, and how to batch some of them."""
    if isinstance(spec, TextInput):
        return lambda numbers: spec.tokenize([CAPTIONS[number] for number in numbers])
    generator = torch.Generator().manual_seed(0)
    if isinstance(spec, ImageInput):
        pixels = torch.randint(0, 256, (4, 3, spec.size, spec.size), generator=generator, dtype=torch.uint8)
        return lambda numbers: {"pixels": pixels[list(numbers)]}
    assert isinstance(spec, SpeechInput)
    return lambda numbers: _recordings(spec, list(numbers))


def _recordings(spec: SpeechInput, numbers: list[int]) -> Prepared:
    """Noise of unequal lengths, padded with zeros to the longest of the batch."""
    lengths = torch.tensor([int(spec.sample_rate * min(spec.max_seconds, 0.5 + 0.3 * number)) for number in numbers])
    waveform = torch.zeros(len(numbers), int(lengths.max()))
    for row, number in enumerate(numbers):
        noise = torch.randn(int(lengths[row]), generator=torch.Generator().manual_seed(number))
        waveform[row, : lengths[row]] = 0.1 * noise
    return {"waveform": waveform, "length": lengths}
