"""Prompt templates that open_clip ships, by name."""

from __future__ import annotations

from typing import Literal

TemplateList = Literal["openai_imagenet", "simple_imagenet"]
"""OpenAI's 80 ImageNet templates, or the 7 that score best (Radford et al. 2021, notebook "Prompt Engineering for ImageNet")."""


def open_clip_templates(name: TemplateList) -> list[str]:
    """The templates of one list, with `{}` where the class goes."""
    import open_clip  # takes seconds; only who names a list pays for it

    lists = {"openai_imagenet": open_clip.OPENAI_IMAGENET_TEMPLATES, "simple_imagenet": open_clip.SIMPLE_IMAGENET_TEMPLATES}
    return [template("{}") for template in lists[name]]
