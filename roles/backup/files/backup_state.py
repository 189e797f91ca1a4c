"""What the repository holds, as JSON, asked on the repository host or on a data node.

`--reach-now` (on the primary): first commits something and waits until the archive has it, so that every moment up to
now can be restored. Settings: /etc/airflow-ha/backup.json.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SETTINGS = Path("/etc/airflow-ha/backup.json")
TIMEOUT_S = 120
ARCHIVED = re.compile(r"(?:^|/)([0-9A-F]{24})-[0-9a-f]{40}")
# Of the default 16 MiB, in an "xlogid" of 4 GiB. Source: PostgreSQL's xlog_internal.h, XLByteToSeg and XLogFileName.
SEGMENTS_PER_ID = 256


def number(segment: str) -> tuple[int, int]:
    """Timeline and running number of a WAL segment's name (24 hexadecimal digits)."""
    return int(segment[:8], 16), int(segment[8:16], 16) * SEGMENTS_PER_ID + int(segment[16:], 16)


def gaps(segments: Iterable[str], since: str) -> list[str]:
    """Where the archive lacks WAL from the segment `since` on, as lines of text; dropped WAL leaves such a gap.

    A segment may be on any timeline from that of `since` on: where one ends and the next begins, after a failover or
    a restore, only the history of the cluster could tell.
    """
    timeline, begin = number(since)
    there = {place[1] for place in map(number, segments) if place[0] >= timeline and place[1] >= begin}
    missing = set(range(begin, max(there, default=begin))) - there
    starts = sorted(position for position in missing if position - 1 not in missing)
    ends = sorted(position for position in missing if position + 1 not in missing)
    return [
        f"{end - start + 1} segments from {start // SEGMENTS_PER_ID:X}/{start % SEGMENTS_PER_ID:02X}"
        for start, end in zip(starts, ends, strict=True)
    ]


def run(settings: dict[str, Any], *arguments: str) -> Any:
    """The JSON that pgBackRest prints. Raises RuntimeError with its last line."""
    command = [settings["program"], *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if "ERROR" in line]
        raise RuntimeError(lines[-1].strip() if lines else f"pgbackrest ended with code {done.returncode}")
    return json.loads(done.stdout or "null")


def reach_now(settings: dict[str, Any]) -> bool:
    """Whether all that was committed until now is in the archive. False where no primary runs."""
    # A restore to a moment ends at the first commit after it: there has to be one.
    commit = "select pg_current_xact_id()"
    command = ["psql", "-XAtq", f"--port={settings['port']}", "--dbname=postgres", f"--command={commit}"]
    if subprocess.run(command, capture_output=True, check=False, timeout=TIMEOUT_S).returncode != 0:
        return False
    try:
        run(settings, f"--stanza={settings['stanza']}", "check")
    except RuntimeError:
        return False
    return True


def repository(settings: dict[str, Any]) -> dict[str, Any]:
    """Backups and archive. Times are seconds since 1970."""
    stanza = settings["stanza"]
    (info,) = run(settings, f"--stanza={stanza}", "--output=json", "info")
    backups = [
        {"label": item["label"], "type": item["type"], "start": item["timestamp"]["start"],
         "stop": item["timestamp"]["stop"], "size": item["info"]["size"], "stored": item["info"]["repository"]["delta"],
         "wal": item["archive"]["start"]}
        for item in info.get("backup", [])
        if not item.get("error")
    ]  # fmt: skip
    segments: dict[str, int] = {}
    if info.get("archive"):
        path = f"archive/{stanza}/{info['archive'][-1]['id']}"
        listed = run(settings, f"--stanza={stanza}", "--output=json", "--recurse", "repo-ls", path)
        segments = {match[1]: entry["time"] for name, entry in listed.items() if (match := ARCHIVED.search(name))}
    return {
        "code": info["status"]["code"],
        "running": info["status"]["lock"]["backup"]["held"],
        "backups": backups,
        "archived_at": max(segments.values(), default=0),
        "gaps": gaps(segments, backups[-1]["wal"]) if backups else [],
    }


def redis_copies(settings: dict[str, Any]) -> dict[str, Any]:
    """Number of Redis copies here, and the time of the newest in seconds since 1970."""
    times = [path.stat().st_mtime for path in Path(settings["folder"]).glob("[0-9]*.rdb")]
    return {"copies": len(times), "newest": max(times, default=0)}


def main() -> int:
    """Entry point; returns the exit code."""
    settings = json.loads(SETTINGS.read_text())
    try:
        reached = reach_now(settings) if "--reach-now" in sys.argv[1:] else False
        state = {**repository(settings), "reached": reached, "now": time.time()}
        if settings["redis"]:
            state["redis"] = redis_copies(settings["redis"])
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"pgBackRest: {error}", file=sys.stderr)
        return 1
    print(json.dumps(state))
    return 0


if __name__ == "__main__":
    sys.exit(main())
