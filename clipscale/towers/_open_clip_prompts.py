"""Prompt templates and class names that open_clip ships, by name."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

TemplateList = Literal["openai_imagenet", "simple_imagenet"]
"""OpenAI's 80 ImageNet templates, or the 7 that score best (Radford et al. 2021, notebook "Prompt Engineering for ImageNet")."""


def open_clip_templates(name: TemplateList) -> list[str]:
    """The templates of one list, with `{}` where the class goes."""
    import open_clip  # takes seconds; only who names a list pays for it

    lists = {"openai_imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple_imagenet": open_clip.SIMPLE_IMAGENET_TEMPLATES}
    return [template("{}") for template in lists[name]]


ClassList = Literal["imagenet", "imagenet_a", "imagenet_r"]
"""The 1000 classes of ImageNet-1k (also of V2 and Sketch), or the 200 of ImageNet-A or ImageNet-R."""


def open_clip_classes(name: ClassList) -> dict[str, str]:
    """open_clip's words for the classes of one list, by WordNet id, in the order of these ids.

    Which classes A and R have is timm's lists; the words are those of OpenAI's notebook, of which two pairs are the same.
    """
    import open_clip  # see above

    words = dict(zip(imagenet_ids(), open_clip.IMAGENET_CLASSNAMES, strict=True))
    return words if name == "imagenet" else {number: words[number] for number in _ids(name)}


def imagenet_ids() -> list[str]:
    """The WordNet ids of ImageNet-1k; the place in this list is a class's number."""
    return _ids("imagenet")


def _ids(name: ClassList) -> list[str]:
    return (files("timm") / "data" / "_info" / f"{name}_synsets.txt").read_text(encoding="utf-8").split()
