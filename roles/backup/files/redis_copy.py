"""Copies Redis' data (RDB) to this machine, checks the copy, and removes the oldest ones.

Takes a replica that is in step, or else the primary. Settings: /etc/airflow-ha/backup.json. Exit code 0 only when a
copy that redis-check-rdb accepts is in its place; what went wrong is in one line on standard error.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = Path("/etc/airflow-ha/backup.json")
ASK_TIMEOUT_S = 10
COPY_TIMEOUT_S = 3000


class CopyError(Exception):
    """Why there is no copy, in one line."""


class Redis:
    """The members of the service, as the user `backup`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings

    def run(self, address: str, *arguments: str, timeout_s: int = ASK_TIMEOUT_S) -> str:
        """redis-cli's output. The password is in its environment, which only root and we can read."""
        port, ca = str(self._settings["port"]), self._settings["ca"]
        command = ["redis-cli", "--tls", "--cacert", ca, "-h", address, "-p", port, "--user", "backup"]
        done = subprocess.run(
            [*command, *arguments], env={"PATH": os.environ["PATH"], "REDISCLI_AUTH": self._settings["password"]},
            capture_output=True, text=True, check=False, timeout=timeout_s,
        )  # fmt: skip
        if done.returncode != 0:
            raise CopyError(((done.stderr or done.stdout).strip().splitlines() or ["no reason given"])[-1])
        return done.stdout

    def rank(self, address: str) -> int:
        """How well this member suits: 0 a replica in step, 1 the primary, 2 none of these."""
        try:
            lines = self.run(address, "INFO", "replication").split()
        except (CopyError, subprocess.TimeoutExpired):
            return 2
        return 0 if "master_link_status:up" in lines else 1 if "role:master" in lines else 2


def copy(settings: dict[str, Any]) -> Path:
    """Make one checked copy; return its path. Raises CopyError when no member gave one."""
    redis, folder = Redis(settings), Path(settings["folder"])
    new = folder / ".new.rdb"
    reasons = []
    ranks = {host: redis.rank(address) for host, address in settings["members"].items()}
    for host in sorted((host for host, rank in ranks.items() if rank < 2), key=lambda name: ranks[name]):
        new.unlink(missing_ok=True)
        try:
            redis.run(settings["members"][host], "--rdb", str(new), timeout_s=COPY_TIMEOUT_S)
            check = subprocess.run(["redis-check-rdb", str(new)], capture_output=True, text=True, check=False)
            if check.returncode != 0:
                raise CopyError(f"redis-check-rdb: {check.stdout.strip().splitlines()[-1]}")
        except (CopyError, subprocess.TimeoutExpired) as error:
            reasons.append(f"{host}: {error}")
            continue
        with new.open("rb") as stream:
            os.fsync(stream.fileno())
        new.chmod(0o600)
        return new.rename(folder / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{host}.rdb")
    raise CopyError("; ".join(reasons) or f"no member of {', '.join(ranks)} is a primary or a replica in step")


def expire(folder: Path, keep: int) -> None:
    """Remove all but the newest copies, whose names sort by time."""
    for path in sorted(folder.glob("*.rdb"))[: -max(keep, 1)]:
        if not path.name.startswith("."):
            path.unlink()


def main() -> int:
    """Entry point; returns the exit code."""
    settings = json.loads(SETTINGS.read_text())["redis"]
    try:
        print(copy(settings))
    except CopyError as error:
        print(f"redis_copy: {error}", file=sys.stderr)
        return 1
    expire(Path(settings["folder"]), settings["keep"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
