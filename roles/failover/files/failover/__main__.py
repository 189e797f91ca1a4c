"""One step of a failover on this node: `python3 <this folder> <postgresql|redis> <verb>`.

Standard input is JSON: `run` (id of the failover), `by` (who started it) and `arguments` of the verb; `guard`, which
systemd runs, has none. What is fixed for this node stands in SETTINGS. Prints JSON: what the verb found, or the steps
it made with their times; `problem` and exit code 1 when it did not end well.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from journal import FailoverError, Journal, Lock

GUARD = {"run": "start", "by": "systemd"}
SETTINGS = Path("/etc/airflow-ha/failover")


def service(name: str, settings: dict[str, Any], journal: Journal) -> Any:
    """The node's member of the service."""
    if name == "postgresql":
        from member_postgresql import Postgresql

        return Postgresql(settings, journal)
    from member_redis import Redis

    return Redis(settings, journal)


def look(member: Any, peers: dict[str, str]) -> dict[str, Any]:
    """What the member says of itself, and in `seen` what its peers (name to address) look like from here.

    The peers are asked at the same time, since one that is gone lets us wait, and all before the member: that acts as
    another user for a moment, which holds for the whole process and would take the peers' threads their files.
    """
    with ThreadPoolExecutor() as pool:
        seen = dict(zip(peers, pool.map(member.probe, peers.values()), strict=True))
    return {**member.state(seen), "seen": seen}


def main() -> int:
    """Entry point; returns the exit code."""
    name, verb = sys.argv[1:3]
    settings = {
        **json.loads((SETTINGS / f"{name}.json").read_text()),
        **(GUARD if verb == "guard" else json.load(sys.stdin)),
    }
    lock = Lock(settings["run"], settings["by"])
    journal = Journal(settings["run"], name)
    member = service(name, settings, journal)
    result: dict[str, Any] = {}
    try:
        if verb == "state":
            result = {**look(member, settings["peers"]), "lock": lock.owner()}
        elif verb == "guard":
            member.guard()
        elif verb == "lock":
            lock.take()
        elif verb == "unlock":
            lock.release()
        else:
            with lock.held():
                getattr(member, verb)(*settings.get("arguments", []))
    except FailoverError as error:
        journal.step(f"failed: {error}")
        result["problem"] = str(error)
    print(json.dumps({**result, "steps": journal.steps}))
    return 1 if "problem" in result and verb != "state" else 0


if __name__ == "__main__":
    sys.exit(main())
