"""What a failover leaves on each node: a lock against a second one, and a journal of its steps."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path("/var/lib/airflow-ha")
# A run that has not been heard of for so long was killed; the next one may go on. Running steps are heard every second.
STALE_S = 30


class FailoverError(Exception):
    """Why a step was not done, in one line."""


class Lock:
    """One failover at a time on this node, whichever controller started it."""

    def __init__(self, run: str, by: str, folder: Path = FOLDER) -> None:
        self._run, self._by, self._folder = run, by, folder
        self._path = folder / "failover.lock"

    def owner(self) -> dict[str, Any]:
        """Who holds the lock: `{"run", "by", "age"}` with the age in seconds, or nothing when it is free or stale."""
        try:
            content, age = json.loads(self._path.read_text()), time.time() - self._path.stat().st_mtime
        except (FileNotFoundError, ValueError):
            return {}
        return {**content, "age": round(age, 1)} if age < STALE_S else {}

    def take(self) -> None:
        """Take or refresh the lock; raise FailoverError when another run holds it."""
        self._folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        with (self._folder / "failover.guard").open("w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            owner = self.owner()
            if owner and owner["run"] != self._run:
                raise FailoverError(
                    f"another failover, started by {owner['by']}, is running here (heard of {owner['age']} s ago)"
                )
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps({"run": self._run, "by": self._by}))
            new.replace(self._path)

    def release(self) -> None:
        """Give the lock back, if it is ours."""
        if self.owner().get("run") == self._run:
            self._path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock and keep it fresh for as long as the block runs."""
        self.take()
        done = threading.Event()

        def refresh() -> None:
            while not done.wait(1):
                # While a connection is made as another user, the file is not ours; the next second it is.
                with contextlib.suppress(PermissionError):
                    os.utime(self._path)

        keeper = threading.Thread(target=refresh, daemon=True)
        keeper.start()
        try:
            yield
        finally:
            done.set()
            keeper.join()


class Journal:
    """Steps with their time, kept in `failover.jsonl` on the node and handed back to the playbook."""

    def __init__(self, run: str, service: str, folder: Path = FOLDER) -> None:
        self._run, self._service, self._path = run, service, folder / "failover.jsonl"
        self.steps: list[dict[str, Any]] = []

    def step(self, text: str) -> None:
        """Note that a step is done, with the wall clock's time in seconds since 1970."""
        entry = {"at": round(time.time(), 3), "step": text}
        self.steps.append(entry)
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        with self._path.open("a") as stream:
            os.fchmod(stream.fileno(), 0o640)
            stream.write(json.dumps({**entry, "run": self._run, "service": self._service}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def wait_for(condition: Any, timeout_s: float, poll_s: float = 0.01) -> Any:
    """The condition's first true result, or its last false one after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if result or time.monotonic() > deadline:
            return result
        time.sleep(poll_s)
