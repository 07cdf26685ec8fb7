"""HTML as a tree, for tests that ask what a page holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"img", "link", "meta"}


@dataclass
class Node:
    tag: str
    attributes: dict[str, str] = field(default_factory=dict)
    children: list[Node] = field(default_factory=list)
    own_text: list[str] = field(default_factory=list)

    def all(self, tag: str = "", class_: str = "") -> list[Node]:
        """Every element below this one, in document order, that fits."""
        found = []
        for child in self.children:
            fits = (not tag or child.tag == tag) and (not class_ or class_ in child.attributes.get("class", "").split())
            found += [*([child] if fits else []), *child.all(tag, class_)]
        return found

    @property
    def text(self) -> str:
        return "".join([*self.own_text, *(child.text for child in self.children)])


class Page(HTMLParser):
    """A page as a tree; refuses end tags that close nothing."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Node("document")
        self._open = [self.root]
        self.feed(html)
        self.close()
        assert self._open == [self.root]

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        node = Node(tag, {name: value or "" for name, value in attributes})
        self._open[-1].children.append(node)
        if tag not in VOID:
            self._open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].own_text.append(data)
