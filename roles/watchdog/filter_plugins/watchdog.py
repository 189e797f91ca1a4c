"""What the role computes for the watchdog's configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

Groups = Mapping[str, Sequence[str]]
DATA_GROUPS = ("postgresql", "redis")


def watchdog_components(by_group: Mapping[str, Sequence[Mapping[str, Any]]], groups: Sequence[str]) -> list[Any]:
    """The parts that run on a host of these groups, each unit once; `needs` that is empty leaves one out."""
    found: dict[str, dict[str, Any]] = {}
    for group, components in by_group.items():
        for component in components if group in groups else ():
            if component.get("needs", True):
                part = {key: value for key, value in component.items() if key != "needs"}
                found.setdefault(part["unit"], part)
    return list(found.values())


def watchdog_peers(hostvars: Mapping[str, Any], groups: Groups, own: str, port: int) -> list[dict[str, Any]]:
    """The nodes that this one asks: all others from an Airflow server, the other data nodes from a data node."""

    def member(host: str, *names: str) -> bool:
        return any(host in groups.get(name, ()) for name in names)

    if member(own, "airflow_servers"):
        asked = list(groups["all"])
    elif member(own, *DATA_GROUPS):
        asked = [host for host in groups["all"] if member(host, *DATA_GROUPS)]
    else:
        asked = []
    return [
        {
            "name": host,
            "rack": str(hostvars[host]["rack"]),
            "address": str(hostvars[host]["node_address"]),
            "port": port,
            "airflow_server": member(host, "airflow_servers"),
            "postgresql": member(host, "postgresql"),
            "redis": member(host, "redis"),
        }
        for host in sorted(asked)
        if host not in (own, "localhost")
    ]


def _value(value: Any) -> str:
    """One TOML value; a table inside a list is written inline."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_value(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):
        # A JSON string is a TOML string, but for this one character.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_value, value)) + "]"
    raise AnsibleFilterError(f"to_toml: {type(value).__name__} has no form in TOML")


def to_toml(config: Mapping[str, Any], path: str = "") -> str:
    """A configuration as TOML: keys first, then tables, then lists of tables."""
    lines, tables = [], []
    for key, value in config.items():
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            inner = to_toml(value, f"{name}.")
            tables.append(f"\n[{name}]\n{inner}" if value else "")
        elif isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
            tables += [f"\n[[{name}]]\n{to_toml(entry, f'{name}.')}" for entry in value]
        elif value is not None and value != []:
            lines.append(f"{key} = {_value(value)}\n")
    return "".join(lines + tables)


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., object]]:
        """Names of the filters and the functions behind them."""
        return {"watchdog_components": watchdog_components, "watchdog_peers": watchdog_peers, "to_toml": to_toml}
