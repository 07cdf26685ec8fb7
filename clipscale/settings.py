"""Settings: strict, frozen configuration classes; and Part: one such class per file, found by the file's name.

A Part *is* its configuration. `objective: {name: clip, label_smoothing: 0.1}` in YAML becomes
`clipscale.objectives.clip.Clip(label_smoothing=0.1)`: the folder is the table of names, and a dotted module name
(`name: my_lab.objectives.ours`) reaches a part outside the package.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError


class Settings(BaseModel):
    """Base of every configuration class: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _suggest_known_names(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            lines = [_with_suggestion(line, list(cls.model_fields)) for line in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(error.title, lines) from None


def _with_suggestion(line: ErrorDetails, known: list[str]) -> InitErrorDetails:
    """The same error, except that an unknown setting of this very class names the setting it resembles."""
    message = line["msg"]
    if line["type"] == "extra_forbidden" and len(line["loc"]) == 1:
        message = f"there is no such setting{did_you_mean(str(line['loc'][0]), known)}; known: {', '.join(known)}"
    plain = message.replace("{", "(").replace("}", ")")  # pydantic would read braces as a template
    return InitErrorDetails(type=PydanticCustomError("setting", plain), loc=line["loc"], input=line["input"])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """', did you mean ...?' when a known name resembles this one, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean '{close[0]}'?" if close else ""


class Part(Settings):
    """Base of each kind of part; the kind's own base class names the package its parts live in.

    A direct subclass with `folder` set is a *kind* (Objective, Tower, ...): a field annotated with it accepts a part's
    name, a mapping with `name` and the part's settings, or an instance. Every other subclass is a part.
    """

    folder: ClassVar[str] = ""
    default: ClassVar[str] = ""
    """The kind's part that a mapping without a name means; '': there is none, a name must be given."""

    @model_validator(mode="wrap")
    @classmethod
    def _find_by_name(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not _is_kind(cls) or isinstance(value, cls):
            return handler(value)
        if isinstance(value, str):
            value = {"name": value}
        if cls.default and isinstance(value, dict):
            value = {"name": cls.default, **value}
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            names = ", ".join(part_names(cls.folder))
            raise PydanticCustomError("part_name", "needs a 'name', one of: {names}", {"names": names})
        part: type[Self] = find_part(cls, value["name"])
        return part.model_validate({key: setting for key, setting in value.items() if key != "name"})

    @model_serializer(mode="wrap")
    def _with_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"name": part_name(type(self)), **handler(self)}


PartKind = TypeVar("PartKind", bound=Part)


def _is_kind(cls: type[Part]) -> bool:
    return "folder" in cls.__dict__


def part_names(folder: str) -> list[str]:
    """Names of the parts in package `folder`, sorted; found without importing them."""
    return sorted(path.stem for path in _part_files(folder))


def part_summaries(folder: str) -> dict[str, str]:
    """First docstring line of every part in package `folder`, by name; read without importing them."""
    return {path.stem: (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0] for path in _part_files(folder)}


def _part_files(folder: str) -> list[Path]:
    spec = importlib.util.find_spec(folder)
    places = spec.submodule_search_locations if spec is not None else None
    assert places, f"{folder} is not a package"
    return sorted(path for place in places for path in Path(place).glob("*.py") if not path.stem.startswith("_"))


def part_name(part: type[Part]) -> str:
    """The name under which configuration finds this part."""
    folder = next(base.folder for base in part.__mro__ if issubclass(base, Part) and base.folder)
    package, _, name = part.__module__.rpartition(".")
    return name if package == folder else part.__module__


def find_part(kind: type[PartKind], name: str) -> type[PartKind]:
    """The part called `name`: a file of the kind's folder, or a dotted module name outside it."""
    known = part_names(kind.folder)
    if "." not in name and name not in known:
        message = f"there is no '{name}' in {kind.folder}{did_you_mean(name, known)}; known: {', '.join(known)}"
        raise PydanticCustomError("part_name", message)
    module_name = name if "." in name else f"{kind.folder}.{name}"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        raise PydanticCustomError("part_name", "module '{name}' cannot be imported: {why}", {"name": name, "why": str(error)}) from None
    parts = [item for item in vars(module).values() if isinstance(item, type) and issubclass(item, kind) and not _is_kind(item)]
    found = [part for part in parts if part.__module__ == module.__name__ and not part.__name__.startswith("_")]
    if len(found) != 1:
        names = [part.__name__ for part in found]
        raise PydanticCustomError("part_name", f"module '{module_name}' must hold exactly one part, it holds {names}")
    return found[0]
