"""What the watchdogs of the Airflow servers say, as part of status.yml."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def watchdog_views(hostvars: Mapping[str, Any], servers: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Server to what `airflow-watchdog status --json` printed there; a server that gave no answer has nothing."""
    answers = {host: (hostvars[host].get("__status_watchdog") or {}).get("stdout", "") for host in servers}
    return {host: json.loads(text) if text.startswith("{") else {} for host, text in answers.items()}


def with_watchdogs(status: Mapping[str, Any], views: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Add a row for the scheduler, one for the watchdogs, and what they find wrong, to the answer of `failover_status`.

    The first server that answers speaks for all nodes. Without Airflow servers there is nothing to add.
    """
    if not views:
        return dict(status)
    problems = [f"{host}: airflow-watchdog gives no answer" for host, view in views.items() if not view]
    rows = []
    view = next((view for view in views.values() if view), {})
    if view:
        problems += [": ".join(filter(None, (item["node"], item["text"]))) for item in view["problems"]]
        lease, nodes = view.get("lease") or {}, view["nodes"]
        if lease.get("mode") == "active_standby":
            holder, epoch = lease.get("holder") or "nobody", lease.get("epoch")
            rows.append(f"{'scheduler':<11} {holder:<12} {'in charge':<11} epoch {epoch}")
        elif lease:
            rows.append(f"{'scheduler':<11} {'all servers':<12} {lease['mode']}")
        answering = sum(bool(node["answering"]) for node in nodes)
        rows.append(f"{'watchdogs':<11} {f'{answering} of {len(nodes)}':<12} {'answer':<11} health {view['health']}")
    found = [*status["problems"], *problems]
    return {**status, "healthy": not found, "problems": found, "table": [*status["table"], *rows], "watchdog": view}


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., object]]:
        """Names of the filters and the functions behind them."""
        return {"watchdog_views": watchdog_views, "with_watchdogs": with_watchdogs}
