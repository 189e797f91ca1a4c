"""Labs of several checkouts on one machine leave each other alone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import machines
import pytest


@contextmanager
def monitor(owner: str, name: str) -> Iterator[None]:
    """A process that looks like the one that podman keeps for each container."""
    bundle = f"{owner}/.lab/podman/overlay-containers/0/userdata"
    words = ["conmon", "-c", "input()", "-b", bundle, "-n", name]
    with subprocess.Popen(words, executable=sys.executable, stdin=subprocess.PIPE) as process:
        # Its command line appears a moment after the program has.
        while not Path(f"/proc/{process.pid}/cmdline").read_text():
            time.sleep(0.01)
        yield
        process.communicate(b"\n")


def test_a_lab_of_another_checkout_is_seen() -> None:
    assert machines.running_elsewhere("unit") is None
    with monitor("/srv/other", "unit-data1"):
        assert machines.running_elsewhere("unit") == "/srv/other"
        assert machines.running_elsewhere("uni") is None
    with monitor(str(machines.PROJECT), "unit-data1"):
        assert machines.running_elsewhere("unit") is None


def test_what_a_killed_run_left_is_not_found_in_place_of_the_new_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(machines, "LAB", tmp_path)
    (tmp_path / "unit" / "ssh").mkdir(parents=True)
    for name, address in (("a", "10.77.9.1"), ("b", "10.77.9.2"), ("a", "10.77.9.3"), ("c", "10.77.9.3")):
        machines.write_ssh_files("unit", [{"name": name, "address": address}], [f"key of {name}"])
    hosts = (tmp_path / "unit" / "ssh" / "known_hosts").read_text().splitlines()
    assert hosts == ["b,10.77.9.2 key of b", "c,10.77.9.3 key of c"]


def test_its_network_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cleared: list[str] = []
    monkeypatch.setattr(machines, "LAB", tmp_path)
    monkeypatch.setattr(machines, "clear_network", lambda lab, _subnet: cleared.append(lab))
    with monitor("/srv/other", "unit-data1"):
        machines.remove_network("unit", "10.77.9")
    assert cleared == []
    machines.remove_network("unit", "10.77.9")
    assert cleared == ["unit"]
