"""Bad machines are refused with one line each, all at once, and nothing on them is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from testinfra.host import Host

SCENARIO = Path(__file__).resolve().parents[1]
PROJECT = SCENARIO.parents[1]
FOREIGN_LISTENER = "import socket, time; s = socket.create_server(('', 5432)); time.sleep(120)"
# A node whose clock is an hour behind, without setting any clock: the containers share this machine's.
LATE_DATE = "#!/bin/sh\nexec /usr/bin/date --date='1 hour ago' \"$@\"\n"
# What a deployment would change first.
FINGERPRINT = "find /etc /opt /var/lib /usr/local -xdev -printf '%p %T@ %m %u\\n' | sort | sha256sum"

BAD_SETTINGS = {
    "preflight_memory_base_mb": 900_000_000,
    "preflight_disk_mb": {"postgresql": {"/var": 900_000_000}},
    "preflight_supported_os": {"debian": ["9"]},
    "preflight_python_min": "4.0",
}
EXPECTED = {
    "taken port": r"preflight1: port 5432 \(postgresql\) is taken by python3;",
    "clock": r"preflight1: the clock is at least (3599|3600)\.\d s behind the controller's",
    "memory": r"preflight1: \d+ MiB of memory, 90000\d+ needed for",
    "disk": r"preflight1: \d+ MiB free for /var on \S+, 900000000 needed",
    "operating system": r"preflight1: operating system debian 13 is not supported; debian 9 is",
    "python": r"preflight1: Python 3\.\d+\.\d+ is too old, 4\.0 or newer is needed",
}


def preflight(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the scenario's converge playbook with further arguments."""
    program = shutil.which("ansible-playbook", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    inventories = (PROJECT / "molecule" / "shared" / "inventory" / "hosts.yml", SCENARIO / "inventory.yml")
    plain = {name: value for name, value in os.environ.items() if name != "ANSIBLE_FORCE_COLOR"}
    return subprocess.run(
        [str(program), *(f"--inventory={path}" for path in inventories), str(SCENARIO / "converge.yml"), *arguments],
        cwd=PROJECT,
        env=plain | {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def findings(output: str) -> list[str]:
    """The lines below the last headline of what preflight says."""
    block = output.rpartition("Not deployed, nothing was changed:")[2].partition("PLAY RECAP")[0]
    return [line.strip() for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def bad_machine(host: Host) -> tuple[str, bool]:
    """The machine with everything wrong: what preflight said, and whether it left the machine as it was."""
    with host.sudo():
        host.check_output("printf %s %s > /usr/local/bin/date && chmod 0755 /usr/local/bin/date", "%s", LATE_DATE)
        pid = host.check_output("nohup python3 -c %s > /dev/null 2>&1 & echo $!", FOREIGN_LISTENER)
        try:
            before = host.check_output(FINGERPRINT)
            result = preflight("--extra-vars", json.dumps(BAD_SETTINGS))
            after = host.check_output(FINGERPRINT)
        finally:
            host.run("kill %s; rm -f /usr/local/bin/date", pid)
    assert result.returncode != 0
    return result.stdout, before == after


@pytest.mark.parametrize("case", EXPECTED)
def test_bad_machine_gets_one_line_for(case: str, bad_machine: tuple[str, bool]) -> None:
    lines = [line for line in findings(bad_machine[0]) if re.match(EXPECTED[case], line)]
    assert len(lines) == 1, bad_machine[0]


def test_nothing_else_is_reported_and_nothing_was_changed(bad_machine: tuple[str, bool]) -> None:
    output, untouched = bad_machine
    assert len(findings(output)) == len(EXPECTED), output
    assert "changed=0" in output
    assert untouched


def test_unreachable_host_gets_one_line_and_stops_all(tmp_path: Path) -> None:
    inventory = tmp_path / "more.yml"
    inventory.write_text('{all: {hosts: {preflight2: {ansible_host: "{{ lab_subnet }}.17", rack: b}}}}')
    result = preflight(f"--inventory={inventory}", "--extra-vars", "ansible_ssh_timeout=5")
    assert result.returncode != 0
    (line,) = findings(result.stdout)
    assert re.match(r"preflight2: unreachable: .*(No route to host|timed out)", line)


def test_limit_leaves_an_unreachable_host_alone(tmp_path: Path) -> None:
    inventory = tmp_path / "more.yml"
    inventory.write_text('{all: {hosts: {preflight2: {ansible_host: "{{ lab_subnet }}.17", rack: b}}}}')
    result = preflight(f"--inventory={inventory}", "--limit=preflight1")
    assert result.returncode == 0, result.stdout


def test_no_way_to_root_gets_one_line() -> None:
    result = preflight("--extra-vars", "ansible_become_exe=/usr/bin/no-such-sudo")
    assert result.returncode != 0
    (line,) = findings(result.stdout)
    assert line.startswith("preflight1: cannot run commands as root: ")
