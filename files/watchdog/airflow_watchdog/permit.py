"""The permit: a file by which the holder of the lease says until when its scheduler may be started.

The scheduler's unit asks for it before each start (ExecCondition), so neither a person nor systemd's Restart= starts
one that has no lease. It lies in the watchdog's runtime directory and goes with it. Starts wait for
this: it imports little.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

DEFAULT_PATH = "/run/airflow-watchdog/permit.json"


def clock() -> float:
    """Return seconds since boot: never steps, and counts on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def write(path: Path, epoch: int, until: float) -> None:
    """Allow starts until `until` by `clock`. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps({"epoch": epoch, "until": until}), encoding="ascii")
    new.chmod(0o644)  # the scheduler's user reads it
    os.replace(new, path)


def revoke(path: Path) -> None:
    """Allow no starts. Raises OSError."""
    path.unlink(missing_ok=True)


def refusal(path: str, now: float) -> str:
    """Return why no start is allowed now; empty if one is."""
    try:
        with open(path, encoding="ascii") as file:
            content = json.load(file)
        until = float(content["until"])
    except FileNotFoundError:
        return "this node is not in charge of the scheduler"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path}: {type(error).__name__}"
    return "" if now < until else "this node's lease is over"


def main(arguments: Sequence[str] = ()) -> int:
    """Exit code 0: may start; 1: may not. The argument is the permit's path, if it is not the default one."""
    why = refusal(arguments[0] if arguments else DEFAULT_PATH, clock())
    if why:
        print(f"airflow-watchdog: no start: {why}", file=sys.stderr)
    return 1 if why else 0
