"""Judges what the repository of backups said of itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any


def read_answer(answer: Mapping[str, Any]) -> dict[str, Any]:
    """What `backup_state.py` printed, from the task's result; `{"problem": …}` when it gave no answer."""
    try:
        return dict(json.loads(answer["stdout"]))
    except (KeyError, ValueError):
        text = str(answer.get("stderr") or answer.get("msg") or "no answer").strip()
        return {"problem": text.splitlines()[-1]}


def shown_age(seconds: float) -> str:
    """An age as people say it."""
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def shown_size(size: float) -> str:
    """Bytes as MiB."""
    return f"{size / (1 << 20):.1f} MiB"


def backup_rows(state: Mapping[str, Any], limits: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Table rows, and what is wrong. limits: hours, `full_h`, `any_h` and `redis_h`."""
    rows, problems = [], []
    now, backups = float(state["now"]), state["backups"]
    running = ", one is being made" if state["running"] else ""
    for kind, wanted, limit in (
        ("full", ("full",), "full_h"),
        ("incremental", ("diff", "incr"), ""),
        ("any", ("full", "diff", "incr"), "any_h"),
    ):
        found = [item for item in backups if item["type"] in wanted]
        age = now - max((item["stop"] for item in found), default=0)
        if kind != "any":
            last = f"{found[-1]['label']}, {shown_age(age)} old, {shown_size(found[-1]['stored'])}" if found else "none"
            rows.append(f"{'backup':<11} {kind:<12} {last}")
        name = "full backup" if kind == "full" else "backup"
        if limit and not found:
            problems.append(f"backup: there is no {name} of PostgreSQL yet{running}")
        elif limit and age > float(limits[limit]) * 3600:
            problems.append(f"backup: the last {name} is {shown_age(age)} old{running}")
    archived = shown_age(now - state["archived_at"]) + " ago" if state["archived_at"] else "never"
    rows.append(f"{'backup':<11} {'WAL archive':<12} last segment {archived}, {', '.join(state['gaps']) or 'complete'}")
    problems += [
        f"backup: the archive lacks WAL ({gap}): no restore goes beyond it; make a full backup" for gap in state["gaps"]
    ]
    if "redis" in state:
        age = now - state["redis"]["newest"]
        copies = state["redis"]["copies"]
        last = f"{shown_age(age)} old" if copies else "missing"
        rows.append(f"{'backup':<11} {'Redis':<12} {copies} copies, the last {last}")
        if age > float(limits["redis_h"]) * 3600:
            problems.append(f"backup: the last copy of Redis' data is {last}")
    return rows, list(dict.fromkeys(problems))


def backup_status(host: Mapping[str, Any], limits: Mapping[str, Any]) -> dict[str, Any]:
    """What status.yml shows of the backups: `{"table", "problems", "state"}`, from the repository host's variables."""
    state = read_answer(host.get("__backup_state") or {})
    if "problem" in state:
        return {"table": [], "problems": [f"backup: {state['problem']}"], "state": state}
    rows, problems = backup_rows(state, limits)
    return {"table": rows, "problems": problems, "state": state}


def backup_lines(host: Mapping[str, Any]) -> list[str]:
    """One line for each backup of the repository, from the repository host's variables."""
    state = read_answer(host.get("__backup_state") or {})
    if "problem" in state:
        return [state["problem"]]
    return [
        f"{item['label']:<34} {item['type']:<5} {item['stop'] - item['start']:>5} s "
        f" database {shown_size(item['size'])}, stored {shown_size(item['stored'])}"
        for item in state["backups"]
    ]


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., object]]:
        """Names of the filters and the functions behind them."""
        return {"backup_status": backup_status, "backup_lines": backup_lines}
