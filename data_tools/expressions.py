"""Conditions on rows, written like Python: `width >= 256 and lang == "en" and len(caption) > 10`.

Only what is listed here is understood; nothing is evaluated by Python. A text that is compared with a number is read as a number. A
comparison with a column that is empty or not there, or with a text that is no number, is not fulfilled; `x is None` asks for it.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

Values = Mapping[str, Any]
_Term = Callable[[Values], Any]

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
_FUNCTIONS: dict[str, tuple[int, Callable[..., Any]]] = {
    "len": (1, len),
    "words": (1, lambda text: len(str(text).split())),
    "lower": (1, lambda text: str(text).lower()),
    "number": (1, lambda text: _number(text)),
    "startswith": (2, lambda text, start: str(text).startswith(start)),
    "endswith": (2, lambda text, end: str(text).endswith(end)),
    "matches": (2, lambda text, pattern: re.search(pattern, str(text)) is not None),
}
_MAX_LENGTH = 10_000


class Condition:
    """A condition that a row fulfils or not."""

    def __init__(self, text: str) -> None:
        """Understand the condition.

        Raises:
            ValueError: it is not one, or uses something that is not understood.
        """
        self.text = text
        self.names: list[str] = []
        """The columns it asks for."""
        if len(text) > _MAX_LENGTH:
            raise ValueError(f"it has more than {_MAX_LENGTH} characters")
        try:
            self._holds = self._term(ast.parse(text.strip(), mode="eval").body)
        except SyntaxError as error:
            raise ValueError(f"it cannot be read: {error.msg}, at character {error.offset}") from None
        except RecursionError:
            raise ValueError("it is nested too deeply") from None

    def holds(self, values: Values) -> bool:
        """Whether a row with these values fulfils it."""
        try:
            return bool(self._holds(values))
        except (TypeError, ValueError, ArithmeticError):
            return False

    def _term(self, node: ast.expr) -> _Term:
        match node:
            case ast.Constant(value=value) if value is None or isinstance(value, str | int | float):
                return lambda _: value
            case ast.Name(id=name):
                return self._column(name)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                terms = [self._term(item) for item in items]
                return lambda values: [term(values) for term in terms]
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                term = self._term(operand)
                return lambda values: not term(values)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                term = self._term(operand)
                return lambda values: -_number(term(values))
            case ast.BoolOp(op=ast.And(), values=parts):
                terms = [self._guarded(part) for part in parts]
                return lambda values: all(term(values) for term in terms)
            case ast.BoolOp(values=parts):
                terms = [self._guarded(part) for part in parts]
                return lambda values: any(term(values) for term in terms)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                return self._arithmetic(_ARITHMETIC[type(op)], self._term(left), self._term(right))
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self._comparisons(left, ops, others)
            case ast.Call(func=ast.Name(id="column"), args=[ast.Constant(value=str(name))], keywords=[]):
                return self._column(name)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
                return self._call(name, arguments)
        raise ValueError(
            f"'{ast.unparse(node)[:60]}' is not understood; there are names of columns (or column('a name')), texts, numbers, lists, "
            f"and or not, == != < <= > >=, in, is None, + - * / %, and {', '.join(_FUNCTIONS)}"
        )

    def _column(self, name: str) -> _Term:
        self.names.append(name)
        return lambda values: values.get(name)

    def _guarded(self, node: ast.expr) -> _Term:
        """A part of `and` and `or`, which is not fulfilled where it cannot be told."""
        term = self._term(node)

        def part(values: Values) -> bool:
            try:
                return bool(term(values))
            except (TypeError, ValueError, ArithmeticError):
                return False

        return part

    def _arithmetic(self, function: Callable[[Any, Any], Any], left: _Term, right: _Term) -> _Term:
        return lambda values: function(_number(left(values)), _number(right(values)))

    def _call(self, name: str, arguments: list[ast.expr]) -> _Term:
        count, function = _FUNCTIONS[name]
        if len(arguments) != count:
            raise ValueError(f"{name} takes {count} argument{'s' if count > 1 else ''}, here it has {len(arguments)}")
        if name == "matches" and isinstance(arguments[1], ast.Constant):
            try:
                re.compile(str(arguments[1].value))
            except re.error as error:
                raise ValueError(f"{ast.unparse(arguments[1])} is no regular expression: {error}") from None
        terms = [self._term(argument) for argument in arguments]

        def call(values: Values) -> Any:
            given = [term(values) for term in terms]
            if any(value is None for value in given):
                raise ValueError("an empty column")
            return function(*given)

        return call

    def _comparisons(self, left: ast.expr, ops: list[ast.cmpop], others: list[ast.expr]) -> _Term:
        terms = [self._term(node) for node in (left, *others)]
        tests = [_comparison(op) for op in ops]

        def compare(values: Values) -> bool:
            given = [term(values) for term in terms]
            return all(test(one, other) for test, one, other in zip(tests, given, given[1:], strict=False))

        return compare


def _comparison(op: ast.cmpop) -> Callable[[Any, Any], bool]:
    match op:
        case ast.Is():
            return lambda one, other: _empty(one) and _empty(other)
        case ast.IsNot():
            return lambda one, other: not (_empty(one) and _empty(other))
        case ast.In():
            return lambda one, other: one is not None and _contains(other, one)
        case ast.NotIn():
            return lambda one, other: one is not None and other is not None and not _contains(other, one)
    function = _COMPARISONS[type(op)]

    def compare(one: Any, other: Any) -> bool:
        if one is None or other is None:
            return False
        if isinstance(one, str) != isinstance(other, str) and not isinstance(one, list) and not isinstance(other, list):
            one, other = _number(one), _number(other)
        return bool(function(one, other))

    return compare


def _empty(value: Any) -> bool:
    return value is None or value == ""


def _contains(many: Any, one: Any) -> bool:
    if isinstance(many, str):
        return str(one) in many
    return any(item == one or (isinstance(item, str) != isinstance(one, str) and str(item) == str(one)) for item in many)


def _number(value: Any) -> Any:
    """A number as it stands, a text as the number that it holds; a ValueError or TypeError when it holds none."""
    return float(value) if isinstance(value, str) else value + 0
