"""A benchmark's verdicts come from its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import report


@pytest.mark.parametrize(
    ("figures", "goal", "met"),
    [
        ([1.0, 1.4, 9.0], ("s", 1.5, None), True),
        ([1.0, 1.6, 1.7], ("s", 1.5, None), False),
        ([1.0, 1.4, 9.0], ("s", 1.5, 3.0), False),
        ([0, 0, 0, 0, 1], ("tasks", 0, 0), False),
        ([0, 0], ("tasks", 0, 0), True),
    ],
)
def test_met_is_computed(figures: list[float], goal: report.Goal, met: bool) -> None:
    assert report.row("some_gap", goal, figures)["met"] is met


def test_the_file_has_the_form_of_all_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PROJECT", tmp_path)
    lines = report.rows({"some_gap": ("s", 1.5, 3.0)}, {"some_gap": [0.5, 2.0, 1.0]})
    report.write({"bench": "some", "commit": "c", "machine": "m"}, lines)
    found = json.loads((tmp_path / "bench/results/some.json").read_text())
    assert (found["bench"], found["commit"], found["machine"]) == ("some", "c", "m")
    (line,) = found["rows"]
    assert (line["median"], line["worst"], line["n"], line["goal"]) == (1.0, 2.0, 3, "<= 1.5, worst <= 3")
    assert "some_gap" in report.table(lines)
