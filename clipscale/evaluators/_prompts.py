"""Prompts: classes put into words."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from clipscale.towers._open_clip_prompts import TemplateList, open_clip_templates


def _has_a_place(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError(f"template '{template}' needs one pair of braces, where the class goes")
    return template


Template = Annotated[str, AfterValidator(_has_a_place)]
Templates = TemplateList | Annotated[list[Template], Field(min_length=1)]
"""A list of templates, or the name of one that open_clip ships."""


def fill(templates: Templates, words: str) -> list[str]:
    """Every template with the class's words in it."""
    known = open_clip_templates(templates) if isinstance(templates, str) else templates
    return [template.replace("{}", words) for template in known]


def normalise_caption(text: str) -> str:
    """What makes two captions the same text: letters and digits in order, whatever the case, punctuation and spacing."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = "".join(" " if unicodedata.category(letter)[0] in "PZC" and letter not in "'’" else letter for letter in folded)
    return " ".join(kept.replace("’", "'").split())


def duplicate_words(words: Sequence[str]) -> list[str]:
    """Words that several classes share, so that nothing can tell these classes apart."""
    return sorted(text for text, times in Counter(map(normalise_caption, words)).items() if times > 1)


def in_order(labels: Sequence[str]) -> list[str]:
    """Distinct labels, sorted; as numbers when all are."""
    distinct = set(labels)
    return sorted(distinct, key=int) if all(label.isdecimal() for label in distinct) else sorted(distinct)
