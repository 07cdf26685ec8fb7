"""Settings and parts: strictness, finding a part by its name, and what a mistake is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError, create_model

from clipscale.settings import Part, Settings, part_names, part_summaries

KIND = '''"""Shapes."""
from typing import ClassVar
from clipscale.settings import Part

class Shape(Part):
    folder: ClassVar[str] = "shapes_for_tests"
'''
CIRCLE = '''"""Circle: one radius.

More.
"""
from shapes_for_tests import Shape

class Circle(Shape):
    radius: float = 1.0
'''
OUTSIDE = '''"""A lab's own shape."""
from shapes_for_tests import Shape

class Star(Shape):
    points: int = 5
'''


@pytest.fixture(scope="module")
def shape(tmp_path_factory: pytest.TempPathFactory) -> type[Part]:
    """A kind of part with one part in its folder, and one outside it."""
    place = tmp_path_factory.mktemp("parts")
    package = place / "shapes_for_tests"
    package.mkdir()
    (package / "__init__.py").write_text(KIND)
    (package / "circle.py").write_text(CIRCLE)
    (package / "_shared.py").write_text("x = 1\n")
    (place / "lab").mkdir()
    (place / "lab" / "star.py").write_text(OUTSIDE)
    sys.path.insert(0, str(place))
    from shapes_for_tests import Shape  # type: ignore[import-not-found]

    return Shape  # type: ignore[no-any-return]


def drawing(shape: type[Part]) -> type[Settings]:
    """A settings class with a field that takes any shape."""
    return create_model("Drawing", __base__=Settings, title=(str, ""), shape=(shape, ...))


def mistakes(settings: type[Settings], data: dict[str, object]) -> dict[str, str]:
    """Path -> message of everything that is wrong."""
    with pytest.raises(ValidationError) as caught:
        settings.model_validate(data)
    return {".".join(map(str, line["loc"])): line["msg"] for line in caught.value.errors()}


def test_a_part_is_found_by_its_file_name_alone_or_with_settings(shape: type[Part]) -> None:
    by_name = drawing(shape).model_validate({"shape": "circle"})
    with_settings = drawing(shape).model_validate({"shape": {"name": "circle", "radius": 2.5}})
    assert by_name.model_dump(serialize_as_any=True)["shape"] == {"name": "circle", "radius": 1.0}
    assert with_settings.model_dump(serialize_as_any=True)["shape"] == {"name": "circle", "radius": 2.5}


def test_a_dotted_name_reaches_a_part_outside_the_package_and_survives_a_round_trip(shape: type[Part]) -> None:
    made = drawing(shape).model_validate({"shape": {"name": "lab.star", "points": 7}})
    dumped = made.model_dump(serialize_as_any=True)
    assert dumped["shape"] == {"name": "lab.star", "points": 7}
    assert drawing(shape).model_validate(dumped).model_dump(serialize_as_any=True) == dumped


def test_the_folder_is_the_table_and_files_with_an_underscore_are_not_parts(shape: type[Part]) -> None:
    assert part_names(shape.folder) == ["circle"]
    assert part_summaries(shape.folder) == {"circle": "Circle: one radius."}


def test_an_unknown_part_names_the_one_it_resembles(shape: type[Part]) -> None:
    assert "did you mean 'circle'" in mistakes(drawing(shape), {"shape": {"name": "cirlce"}})["shape"]


def test_every_mistake_is_told_at_once_each_with_its_path(shape: type[Part]) -> None:
    found = mistakes(drawing(shape), {"titel": "x", "title": 3, "shape": {"name": "circle", "radus": 1, "radius": "wide"}})
    assert set(found) == {"titel", "title", "shape.radus", "shape.radius"}
    assert "did you mean 'title'" in found["titel"]
    assert "did you mean 'radius'" in found["shape.radus"]


def test_settings_never_change(shape: type[Part]) -> None:
    made = drawing(shape).model_validate({"shape": "circle"})
    with pytest.raises(ValidationError, match="frozen"):
        made.title = "other"  # type: ignore[attr-defined]


@pytest.mark.parametrize(("value", "why"), [("3", "a text is no number"), (True, "nor is a truth value"), (float("nan"), "nor is nan")])
def test_wrong_types_are_refused(shape: type[Part], value: object, why: str) -> None:
    assert "shape.radius" in mistakes(drawing(shape), {"shape": {"name": "circle", "radius": value}}), why


def test_a_module_with_two_parts_is_refused(shape: type[Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other_lab").mkdir()
    (tmp_path / "other_lab" / "two_shapes.py").write_text(OUTSIDE + "\nclass Moon(Shape):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "exactly one part" in mistakes(drawing(shape), {"shape": {"name": "other_lab.two_shapes"}})["shape"]
