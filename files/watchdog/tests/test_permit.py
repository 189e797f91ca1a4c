"""The permit that stands before each start of the scheduler."""

import subprocess
import sys
from pathlib import Path

import pytest
from airflow_watchdog import cli, permit


def test_a_permit_allows_until_its_time(tmp_path: Path) -> None:
    path = tmp_path / "permit.json"
    permit.write(path, 7, 100.0)
    assert permit.refusal(str(path), 99.9) == ""
    assert permit.refusal(str(path), 100.0) == "this node's lease is over"
    assert path.stat().st_mode & 0o777 == 0o644
    permit.write(path, 7, 200.0)
    assert permit.refusal(str(path), 150.0) == ""
    permit.revoke(path)
    permit.revoke(path)
    assert permit.refusal(str(path), 0.0) == "this node is not in charge of the scheduler"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"until": "x"}', '{"until": null}', "\xff", '{"until": NaN}'])
def test_what_is_no_permit_allows_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "permit.json"
    path.write_text(text, encoding="latin-1")
    assert permit.refusal(str(path), 0.0)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "permit.json"
    assert cli.main(["permit", str(path)]) == 1
    assert capsys.readouterr().err == "airflow-watchdog: no start: this node is not in charge of the scheduler\n"
    permit.write(path, 1, permit.clock() + 60)
    assert cli.main(["permit", str(path)]) == 0


def test_it_loads_nothing_heavy() -> None:
    code = "import sys; from airflow_watchdog import cli; cli.main(['permit', '/x']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    loaded = set(done.stdout.split())
    assert "airflow_watchdog.permit" in loaded
    assert not loaded & {"pydantic", "psycopg", "ssl", "http.client", "argparse"}
