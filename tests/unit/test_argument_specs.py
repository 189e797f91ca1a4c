"""Every public variable of a role is described, and nothing else is; the variable reference is up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (PROJECT / "roles").iterdir() if (path / "tasks").is_dir())
TYPES = {"bool", "dict", "float", "int", "list", "path", "raw", "str"}


def read(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; empty when the file has none."""
    content = yaml.safe_load(path.read_text()) if path.exists() else None
    return content or {}


def options(role: str) -> dict[str, dict[str, Any]]:
    """The options of the role's main entry point."""
    specs = read(PROJECT / "roles" / role / "meta" / "argument_specs.yml")["argument_specs"]
    return specs["main"].get("options") or {}


@pytest.mark.parametrize("role", ROLES)
def test_defaults_and_options_are_the_same(role: str) -> None:
    defaults = set(read(PROJECT / "roles" / role / "defaults" / "main.yml"))
    described = options(role)
    without_default = {name for name, option in described.items() if option.get("required")}
    assert set(described) - without_default == defaults


@pytest.mark.parametrize("role", ROLES)
def test_every_option_says_what_it_is(role: str) -> None:
    for name, option in options(role).items():
        assert option.get("type") in TYPES, f"{name} has no type"
        assert len(str(option.get("description", ""))) > 10, f"{name} has no description"


@pytest.mark.parametrize("role", ROLES)
def test_public_variables_begin_with_the_role(role: str) -> None:
    assert [name for name in options(role) if not name.startswith(f"{role}_")] == []
    for path in (PROJECT / "roles" / role / "vars").glob("*.yml"):
        assert [name for name in read(path) if not name.startswith(f"_{role}_")] == [], path


@pytest.mark.parametrize("role", ROLES)
def test_defaults_have_the_type_they_claim(role: str) -> None:
    kinds: dict[str, type | tuple[type, ...]] = {
        "bool": bool,
        "int": int,
        "float": (int, float),
        "list": list,
        "dict": dict,
    }
    defaults = read(PROJECT / "roles" / role / "defaults" / "main.yml")
    for name, option in options(role).items():
        value = defaults.get(name)
        if value is None or (isinstance(value, str) and "{{" in value) or option["type"] not in kinds:
            continue
        assert isinstance(value, kinds[option["type"]]), name


def test_cluster_wide_variables_are_described() -> None:
    specs = read(PROJECT / "roles" / "preflight" / "meta" / "argument_specs.yml")["argument_specs"]
    assert set(specs["cluster"]["options"]) == set(read(PROJECT / "group_vars" / "all.yml")) | {"rack"}


def test_variable_reference_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, str(PROJECT / "docs" / "generate.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
