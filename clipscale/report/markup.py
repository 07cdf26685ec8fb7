"""Markup: HTML built from elements, escaped by construction.

A plain string is data and is escaped wherever it is put; only `Markup` is taken as it is, and only `element` makes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Markup(str):
    """HTML that needs no more escaping."""

    __slots__ = ()


Child = Markup | str | int | None | Iterable["Child"]
Attribute = str | int | float | bool | None

_VOID = frozenset({"img", "link", "meta"})


def element(tag: str, *children: Child, **attributes: Attribute) -> Markup:
    """`<tag attributes>children</tag>`, all of it escaped.

    In attribute names `_` stands for `-` and a last `_` is dropped (`class_`); None and False leave an attribute out.
    """
    shown = "".join(_attribute(name, value) for name, value in attributes.items())
    if tag in _VOID:
        return Markup(f"<{tag}{shown}>")
    return Markup(f"<{tag}{shown}>{join(children)}</{tag}>")


def _attribute(name: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(str(value))}"'


def join(children: Child) -> Markup:
    """Children one after the other; strings among them escaped, None left out."""
    if children is None:
        return Markup("")
    if isinstance(children, Markup):
        return children
    if isinstance(children, str | int):
        return Markup(escape(str(children)))
    return Markup("".join(join(child) for child in children))
