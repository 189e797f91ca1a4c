"""Rules about the repository itself."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.name for path in (PROJECT / "roles").iterdir() if (path / "tasks").is_dir())
# Built from pieces, so that this file does not contain what it looks for.
DOT = r"\."
REGISTRIES = (
    rf"\b(pypi{DOT}org|pythonhosted{DOT}org|deb{DOT}debian|security{DOT}debian|archive{DOT}ubuntu|galaxy{DOT}ansible"
    rf"|docker{DOT}io|quay{DOT}io|ghcr{DOT}io|registry{DOT}npmjs|repo1?{DOT}maven|proxy{DOT}golang)"
)
DEVELOPER_PATHS = r"(?<![\w.])/(work|Users)/|(?<![\w.])/home/(?!(deploy|airflow)\b)\w"
# Nothing in the repository may be skipped instead of cured.
SUPPRESSIONS = r"^\s*ignore_errors:|\bno" + r"qa\b|^\s*(skip_list|warn_list):"


def files() -> list[Path]:
    """Every text file that git knows or would add."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=PROJECT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = []
    for name in sorted(set(listed.splitlines())):
        path = PROJECT / name
        if path.is_file() and not path.is_symlink() and b"\0" not in path.read_bytes()[:1024]:
            found.append(path)
    return found


FILES = files()


def hits(pattern: str, paths: list[Path]) -> list[str]:
    """`file:line: text` of every match."""
    compiled = re.compile(pattern, re.MULTILINE)
    return [
        f"{path.relative_to(PROJECT)}:{number}: {line.strip()[:100]}"
        for path in paths
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1)
        if compiled.search(line)
    ]


def others() -> list[Path]:
    """All files but this one."""
    return [path for path in FILES if path != Path(__file__).resolve()]


def test_no_registry_is_named() -> None:
    assert hits(REGISTRIES, others()) == []


def test_no_path_of_a_developer_machine() -> None:
    assert hits(DEVELOPER_PATHS, others()) == []


def test_nothing_is_suppressed() -> None:
    assert (
        hits(SUPPRESSIONS, [path for path in others() if path.suffix in (".yml", ".yaml", ".py", ".toml", ".cfg")])
        == []
    )


def test_sets_are_put_in_order() -> None:
    """Ansible's set filters lose the order, differently in every run: what depends on it would change by itself."""
    assert (
        hits(
            r"\b(intersect|difference|union)\((?!.*\| sort)", [path for path in FILES if path.suffix in (".yml", ".j2")]
        )
        == []
    )


def test_readme_names_the_two_commands() -> None:
    readme = (PROJECT / "README.md").read_text()
    for command in ("make lab", "make test"):
        assert command in readme


def test_readme_links_lead_somewhere() -> None:
    for page in (PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_in_the_makefile_is_documented() -> None:
    makefile = (PROJECT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    for target in phony.split():
        assert re.search(rf"^{target}:.*## \w", makefile, re.MULTILINE), target


@pytest.mark.parametrize("role", ROLES)
def test_role_has_the_anatomy(role: str) -> None:
    for name in ("defaults/main.yml", "meta/main.yml", "meta/argument_specs.yml", "tasks/main.yml"):
        assert (PROJECT / "roles" / role / name).exists(), name


@pytest.mark.parametrize("role", ROLES)
def test_role_has_a_scenario_with_tests(role: str) -> None:
    folder = PROJECT / "molecule" / role
    for name in ("molecule.yml", "converge.yml", "inventory.yml"):
        assert (folder / name).exists(), name
    assert list((folder / "tests").glob("test_*.py")), "no tests"


def tasks(node: Any) -> Iterator[dict[str, Any]]:
    """The tasks of a task file, those in blocks included."""
    for item in node if isinstance(node, list) else []:
        if isinstance(item, dict):
            yield item
            for part in ("block", "rescue", "always", "tasks", "pre_tasks", "post_tasks", "handlers"):
                yield from tasks(item.get(part))


def names_with_secrets(role: Path) -> set[str]:
    """Secrets, and the role's variables that are made of them, however many steps away."""
    variables: dict[str, str] = {}
    for path in [*role.glob("defaults/*.yml"), *role.glob("vars/*.yml")]:
        content = yaml.safe_load(path.read_text()) or {}
        variables |= {name: yaml.safe_dump(value) for name, value in content.items()}
    tainted = {r"secret_\w+"}
    while True:
        pattern = re.compile(rf"\b({'|'.join(sorted(tainted))})\b")
        more = {name for name, text in variables.items() if pattern.search(text)} - tainted
        if not more:
            return tainted
        tainted |= more


def secret_templates(role: Path) -> set[str]:
    """Templates that put a secret into a file."""
    pattern = re.compile(rf"\b({'|'.join(sorted(names_with_secrets(role)))})\b")
    return {path.name for path in role.glob("templates/**/*.j2") if pattern.search(path.read_text())}


def delivered(role: Path) -> Iterator[dict[str, Any]]:
    """The files of the role's `deliver` tasks, wherever they are listed."""

    def walk(node: Any) -> Iterator[dict[str, Any]]:
        if isinstance(node, dict):
            if "dest" in node and ("src" in node or "content" in node):
                yield node
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    for path in [*role.glob("vars/*.yml"), *role.glob("tasks/*.yml")]:
        yield from walk(yaml.safe_load(path.read_text()))


@pytest.mark.parametrize("role", ROLES)
def test_files_with_secrets_are_delivered_as_such(role: str) -> None:
    folder = PROJECT / "roles" / role
    templates = secret_templates(folder)
    for file in delivered(folder):
        if Path(str(file.get("src", ""))).name in templates or "_key" in str(file.get("content", "")):
            assert file.get("secret") is True, file["dest"]
            assert file["mode"] in ("0640", "0600"), file["dest"]


@pytest.mark.parametrize("role", ROLES)
def test_tasks_that_pass_secrets_log_nothing(role: str) -> None:
    folder = PROJECT / "roles" / role
    pattern = re.compile(rf"\b({'|'.join(sorted(names_with_secrets(folder)))})\b")
    templates = secret_templates(folder)
    for path in [*folder.glob("tasks/*.yml"), *folder.glob("handlers/*.yml")]:
        for task in tasks(yaml.safe_load(path.read_text())):
            inner = {key: value for key, value in task.items() if key not in ("block", "rescue", "always", "name")}
            # It keeps to itself what a file marked as secret holds.
            if "deliver" in inner:
                continue
            # An assertion prints its expressions and its message, never a value.
            if "ansible.builtin.assert" in inner:
                inner = {"fail_msg": str(inner["ansible.builtin.assert"].get("fail_msg", ""))}
                if not re.search(rf"{{{{[^}}]*({pattern.pattern})", inner["fail_msg"]):
                    continue
            text = yaml.safe_dump(inner)
            source = str((inner.get("ansible.builtin.template") or {}).get("src", ""))
            loops = any(Path(str(item)).name in templates for item in re.findall(r"[\w./-]+\.j2", text))
            if pattern.search(text) or Path(source).name in templates or loops:
                # A template says nothing of its content unless a diff is asked for.
                quiet = "no_log" in task or ("ansible.builtin.template" in task and task.get("diff") is False)
                assert quiet, f"{path.relative_to(PROJECT)}: {task.get('name')}"
