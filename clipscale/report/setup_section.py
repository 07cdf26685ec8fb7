"""What was run, and where: pair kinds, towers, every setting, versions, commit, seed, command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from clipscale.report.axis import count
from clipscale.report.markup import Markup, element
from clipscale.report.records import RunRecords
from clipscale.report.tables import definitions, plain, table


def setup_section(run: RunRecords) -> Markup | None:
    """Configuration and environment; None when neither was recorded."""
    if not run.config and not run.environment:
        return None
    return element(
        "section",
        element("h2", "Setup"),
        _pair_kinds(run.config.get("pair_kinds") or {}),
        _towers(run.config.get("towers") or {}),
        _environment(run.environment),
        _configuration(run.config),
        id="setup",
    )


def _pair_kinds(kinds: Mapping[str, Any]) -> Markup | None:
    if not kinds:
        return None
    columns = ("Kind", "Modalities", "Objective", "Global batch", "Sources")
    rows = [
        (
            name,
            " + ".join(map(str, kind.get("modalities", ()))),
            _part(kind.get("objective")),
            _size(kind.get("global_batch")),
            _sources(kind.get("sources")),
        )
        for name, kind in kinds.items()
    ]
    return element("div", element("h3", "Pair kinds"), table(columns, rows, numbers=(3,)))


def _size(value: Any) -> str:
    return count(value) if isinstance(value, int) else ""


def _sources(sources: Any) -> list[Markup]:
    """Each data set's name, its address small below it."""
    if not isinstance(sources, Mapping):
        return []
    addresses = {name: source.get("url", "") if isinstance(source, Mapping) else source for name, source in sources.items()}
    return [element("span", name, element("small", str(address)), class_="line") for name, address in addresses.items()]


def _part(part: Any) -> Markup | str:
    """A part's name, and its settings small beside it."""
    if not isinstance(part, Mapping):
        return plain(part)
    settings = [f"{key} {plain(value)}" for key, value in part.items() if key != "name" and value not in (None, [], {})]
    return element("span", str(part.get("name", "")), element("small", ", ".join(settings)))


def _towers(towers: Mapping[str, Any]) -> Markup | None:
    if not towers:
        return None
    rows = [(modality, _part(tower)) for modality, tower in towers.items()]
    return element("div", element("h3", "Towers"), table(("Modality", "Tower"), rows))


def _environment(environment: Mapping[str, Any]) -> Markup | None:
    if not environment:
        return None
    told = {key: value for key, value in environment.items() if key not in {"versions", "command", "commit", "dirty"}}
    if environment.get("commit"):
        told["commit"] = f"{environment['commit']}{', with changes that are not committed' if environment.get('dirty') else ''}"
    command = environment.get("command")
    if command:
        told["command"] = shlex.join(map(str, command)) if isinstance(command, list) else str(command)
    return element(
        "div",
        element("div", element("h3", "Environment"), definitions(told)),
        element("div", element("h3", "Versions"), definitions(environment.get("versions") or {})),
        class_="pair",
    )


def _configuration(config: Mapping[str, Any]) -> Markup | None:
    if not config:
        return None
    text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return element("details", element("summary", "Every setting", element("small", "config.yaml")), element("pre", text))
