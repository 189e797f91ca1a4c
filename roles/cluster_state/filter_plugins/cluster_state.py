"""Decides who is primary from what the members of a service say about themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ansible.errors import AnsibleFilterError

# How PostgreSQL (through our query) and Redis (`ROLE`) name themselves, and what we call it.
_WARM = "Hot standby mode is disabled"  # what PostgreSQL's warm standby answers to whoever connects
_ROLES = {"primary": "primary", "standby": "standby", "master": "primary", "slave": "standby"}


def cluster_state_answers(results: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Member to "primary", "standby" or "" (no clear answer), from the results of a loop over the members."""
    answers = {
        result["item"]: next((_ROLES[line] for line in result.get("stdout_lines") or [] if line in _ROLES), "")
        for result in results
        if result.get("rc") == 0
    }
    return answers | {result["item"]: "standby" for result in results if _WARM in result.get("stderr", "")}


def elect_primary(members: Sequence[str], answers: Mapping[str, str], deployed: Sequence[str], service: str) -> str:
    """The name of the one live primary.

    members: hosts of the service in the inventory's order. answers: what each said of itself, "primary", "standby"
    or anything else for "no clear answer". deployed: the members that have been part of the cluster before.
    service: its name, for messages. On a first deployment, which is when no member is in `deployed`, the first
    primary found is taken, else the first member: only then does the inventory's order count.
    Raises AnsibleFilterError with one line when a deployed service has no primary, or more than one.
    """
    primaries = [member for member in members if answers.get(member) == "primary"]
    if not deployed:
        return [*primaries, *members][0]
    if len(primaries) == 1:
        return primaries[0]
    said = ", ".join(f"{member}: {answers.get(member) or 'no answer'}" for member in members)
    problem = "no primary" if not primaries else f"{len(primaries)} primaries"
    raise AnsibleFilterError(f"{service} has {problem} ({said}); nothing was changed, make it exactly one first")


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., object]]:
        """Names of the filters and the functions behind them."""
        return {"cluster_state_answers": cluster_state_answers, "elect_primary": elect_primary}
