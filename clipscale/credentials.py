"""Credentials: `${VARIABLE}` is filled in where an address is opened, and nowhere else; secrets in configurations are refused.

What is saved, logged and reported is the address as it was written, with the variable's name. `redacted` is the last door before a
terminal or a file: libraries put whole addresses into their errors.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from clipscale.errors import ConfigError, DataError

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_LOOKS_LIKE = {
    "an access key of AWS": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a token of Hugging Face": re.compile(r"\bhf_[A-Za-z0-9]{16,}\b"),
    "a token of GitHub": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})\b"),
    "a key of Google": re.compile(r"\bAIza[\w-]{35}"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----[^-]*"),
    "a password in an address": re.compile(r"(?:(?<=://)|(?<=:/))(?!/)[^/\s@:]*:(?!\d+(?:/|$))(?!\$\{\w+\}@)[^\s@]+(?=@)"),
    "a signature or token in an address": re.compile(
        r"(?<=[?&])(?:x-amz-(?:signature|credential|security-token)|sig|sas|token|access_token|api_?key|password|secret)"
        r"=(?!\$\{\w+\}(?:[&\s]|$))[^&\s]+",
        re.IGNORECASE,
    ),
}
_SECRET_NAME = re.compile(r"secret|password|passwd|token|authorization|credential|account_key|api_?key|sas|(?:^|_)key$", re.IGNORECASE)
_NO_SECRET = re.compile(r"(?:Bearer|Basic)?\s*|anon|cloud|google_default|cache|browser|.*\.json", re.IGNORECASE)  # the words are gcsfs's
_SHORTEST = 4  # a value that is shorter is no secret, and stands in every other word

# Which variables this process has filled in. Of the process, because any of its threads may be the one whose error has to be redacted.
_filled: set[str] = set()


def filled_in(text: str) -> str:
    """The text with each ${VARIABLE} replaced by the environment's. What comes back belongs in no attribute, message or file.

    Raises:
        DataError: a variable is not set, or empty.
    """

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not os.environ.get(name):
            raise DataError(f"{text}: the environment variable {name} is not set; export it on every machine before the command starts")
        _filled.add(name)
        return os.environ[name]

    return _VARIABLE.sub(value, text)


def options_filled_in(options: Any) -> Any:
    """The same of every text in nested mappings and lists."""
    if isinstance(options, Mapping):
        return {name: options_filled_in(value) for name, value in options.items()}
    if isinstance(options, list):
        return [options_filled_in(value) for value in options]
    return filled_in(options) if isinstance(options, str) else options


def redacted(text: str) -> str:
    """The text with the name of every filled-in variable in place of its value, and what looks like a secret left out."""
    values = {os.environ.get(name, ""): name for name in _filled}
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= _SHORTEST:
            text = _spellings(value).sub(f"${{{values[value]}}}", text)
    for what, pattern in _LOOKS_LIKE.items():
        text = pattern.sub(f"({what})", text)
    return text


def _spellings(value: str) -> re.Pattern[str]:
    """Each sign as it is or as addresses spell it: libraries decode what they are given, and encode it again."""
    coded = [(re.escape(sign), "".join(f"%{byte:02x}" for byte in sign.encode())) for sign in unquote(value)]
    return re.compile("".join(f"(?:{sign}|(?i:{code}))" for sign, code in coded))


def refuse_literal_secrets(settings: Mapping[str, Any]) -> None:
    """
    Raises:
        ConfigError: a setting holds a secret itself; names every such setting, and repeats none.
    """
    found = list(_literal_secrets(settings, ""))
    if found:
        raise ConfigError(
            "the configuration holds secrets, which would be saved beside every checkpoint:\n"
            + "\n".join(f"  {line}" for line in found)
            + "\nput each into an environment variable and write ${VARIABLE} in its place; and replace the secret if others saw it"
        )


def _literal_secrets(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _literal_secrets(str(name), f"{path}.(a name)".lstrip("."))
            yield from _literal_secrets(inner, f"{path}.{redacted(str(name))}".lstrip("."))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _literal_secrets(inner, f"{path}.{number}")
    elif isinstance(value, str) and (what := _secret_in(value, name=path.rpartition(".")[2], in_options=".options." in path)):
        yield f"{path}: {what}"


def _secret_in(value: str, *, name: str, in_options: bool) -> str | None:
    """What kind of secret a text holds."""
    if in_options and _SECRET_NAME.search(name) and not _NO_SECRET.fullmatch(_VARIABLE.sub("", value)):
        return f"a value of its own for '{name}'"
    return next((what for what, pattern in _LOOKS_LIKE.items() if pattern.search(value)), None)
