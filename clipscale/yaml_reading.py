"""YAML as configuration reads it: plain data without tags, 3e-4 as a number, no repeated keys, and aliases that stay within reason."""

from __future__ import annotations

import re
from typing import Any

import yaml

from clipscale.errors import ConfigError

_MOST_VALUES = 100_000
"""Values that a text may hold with every alias written out; large recipes have a few hundred."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 3e-4 as a number and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"repeated key {', '.join(repeated)}", node.start_mark)
        return dict(super().construct_mapping(node, deep=deep))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, *, place: str) -> Any:
    """The one document of a text.

    Raises:
        ConfigError: it is no YAML, has a tag that is no plain value's, or holds too much; names `place`.
    """
    try:
        loader = _Loader(text)  # it looks for characters that no YAML holds
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, counted={}, inside=set())
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that no calendar has
        raise ConfigError(f"{place}: not readable as YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{place}: not readable as YAML: nested too deeply") from None


def _count(node: yaml.Node, *, counted: dict[int, int], inside: set[int]) -> int:
    """Values that a node holds, with every alias written out; each node is looked at once.

    Raises:
        ConstructorError: there are too many, or the node holds itself.
    """
    if id(node) in counted:
        return counted[id(node)]
    if id(node) in inside:
        raise yaml.constructor.ConstructorError(None, None, "an alias that holds itself", node.start_mark)
    inside.add(id(node))
    children = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
    total = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(_count(child, counted=counted, inside=inside) for child in children)
    if total > _MOST_VALUES:
        what = f"more than {_MOST_VALUES:,} values with every alias written out"
        raise yaml.constructor.ConstructorError(None, None, what, node.start_mark)
    inside.discard(id(node))
    counted[id(node)] = total
    return total
