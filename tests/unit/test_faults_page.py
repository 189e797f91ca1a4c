"""docs/faults.md names tests that exist, and has every case."""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
PAGE = (PROJECT / "docs" / "faults.md").read_text()


def test_every_case_has_a_row() -> None:
    assert re.findall(r"^\| (\d+) \|.*$", PAGE, re.MULTILINE) == [str(number) for number in range(1, 31)]


def test_every_named_test_exists() -> None:
    named = re.findall(r"`([\w/]+)::(test_\w+)`", PAGE)
    assert len(named) > 20
    missing = []
    for folder, test in named:
        sources = "".join(path.read_text() for path in (PROJECT / folder).rglob("test_*.py"))
        if not re.search(rf"^ *def {test}\(", sources, re.MULTILINE):
            missing.append(f"{folder}::{test}")
    assert missing == []


def test_nothing_is_left_to_fill_in() -> None:
    assert "TODO" not in PAGE
