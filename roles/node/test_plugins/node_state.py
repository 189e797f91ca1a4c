"""Tests of what preflight has found on a node, so that a task that would change nothing is skipped without being sent.

Without preflight's facts (a role used alone) every test is false, and the module itself finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Facts = Mapping[str, Any]


def holding_packages(facts: Facts, names: Iterable[str]) -> bool:
    """Whether all OS packages are installed; `facts` as `ansible.builtin.package_facts` forms them."""
    installed = facts.get("packages", {})
    return all(name in installed for name in names)


def having_account(facts: Facts, user: str, groups: Iterable[str] = ()) -> bool:
    """Whether the user exists and is a member of all groups; `facts` as `ansible.builtin.getent` forms them."""
    members = {name: entry[2].split(",") for name, entry in facts.get("getent_group", {}).items()}
    return user in facts.get("getent_passwd", {}) and all(user in members.get(group, []) for group in groups)


def having_group(facts: Facts, name: str) -> bool:
    """Whether the group exists."""
    return name in facts.get("getent_group", {})


def running_services(facts: Facts, names: Iterable[str]) -> bool:
    """Whether all services run and are enabled; `facts` as `ansible.builtin.service_facts` forms them."""
    services = facts.get("services", {})
    found = [services.get(f"{name}.service", {}) for name in names]
    return all(service.get("state") == "running" and service.get("status") == "enabled" for service in found)


class TestModule:
    """Registration with Ansible."""

    def tests(self) -> dict[str, Callable[..., bool]]:
        """Name and function of each test."""
        return {
            "holding_packages": holding_packages,
            "having_account": having_account,
            "having_group": having_group,
            "running_services": running_services,
        }
