"""Writes down, 50 times a second, whether a scheduler is there: `sampler.py <seconds>`, on an Airflow server, as root.

Prints lines `<time in ns> <0|1>`. Told by the processes in the unit's control group and not by what systemd believes;
what asks whether a start is permitted is no scheduler.
"""

from __future__ import annotations

import contextlib
import sys
import time
from pathlib import Path

PERIOD_S = 0.02
GROUP = Path("/sys/fs/cgroup/system.slice/airflow-scheduler.service/cgroup.procs")


def there() -> bool:
    """Whether any process of the unit is an Airflow scheduler, hung ones included."""
    found = False
    with contextlib.suppress(OSError):
        for pid in GROUP.read_text().split():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                found = found or b"scheduler" in command or b"airflow scheduler" in command[0]
    return found


def main(seconds: str) -> None:
    """Entry point."""
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        print(time.time_ns(), int(there()), flush=True)
        time.sleep(PERIOD_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
