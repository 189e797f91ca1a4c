"""The permit: a file that says until when this node may start its scheduler.

The daemon writes it while it holds the lease; the scheduler's unit asks before each start (`airflow-watchdog permit`,
an ExecCondition), so that nobody starts a second one by hand. Times are seconds of CLOCK_BOOTTIME: the wall clock
decides nothing, and a file from before a boot was in /run and is gone. Imports little: every start waits for it.
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

DEFAULT_PATH = Path("/run/airflow-watchdog/permit.json")
MAX_BYTES = 4096
# What systemd takes for "condition not met" rather than for a failure: 1 to 254.
REFUSED = 1


def write(path: Path, epoch: int, until: float) -> None:
    """Allow starts until then. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(json.dumps({"epoch": epoch, "until": until}), encoding="ascii")
    # The scheduler's account reads it, whatever our umask.
    new.chmod(0o644)
    os.replace(new, path)


def revoke(path: Path) -> None:
    """Allow no starts. Raises OSError."""
    path.unlink(missing_ok=True)


def refusal(path: Path, now: float) -> str:
    """Return why the scheduler may not start; empty if it may. Whatever is not understood is no permit."""
    try:
        with path.open("rb") as stream:
            until = float(json.loads(stream.read(MAX_BYTES))["until"])
    except FileNotFoundError:
        return "this node is not in charge of the scheduler"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path}: {type(error).__name__}"
    # Not "until <= now": nothing is less than "not a number".
    return "" if now < until < float("inf") else "this node's lease has ended"


def main(arguments: Sequence[str]) -> int:
    """Return 0 if the scheduler may start now, or say why not; takes the file's path, if it is not the default."""
    if len(arguments) > 1 or arguments[:1] in (["-h"], ["--help"]):
        print("usage: airflow-watchdog permit [FILE]", file=sys.stderr)
        return 2
    path = Path(arguments[0]) if arguments else DEFAULT_PATH
    why = refusal(path, time.clock_gettime(time.CLOCK_BOOTTIME))
    if why:
        print(f"airflow-watchdog: the scheduler may not start here: {why}", file=sys.stderr)
    return REFUSED if why else 0
