"""A bounded write load through the local proxy: `<postgresql|redis> <seconds>`, with the Python of an Airflow server.

Writes one number after the other, reconnecting whenever something fails, until standard input is closed or the time is
over, and then reads all of them back. Prints "begins", and in the end JSON: `acknowledged` (how many), `lost`
(acknowledged and not there), `gap` (seconds, the longest time between two acknowledged writes), `first_after_gap` (when
that one ended, seconds since 1970) and `errors` by their text.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

PAUSE_S = 0.01
MAX_WRITES = 20_000


def environment() -> dict[str, str]:
    """What the services of this node get from systemd."""
    lines = [line.partition("=") for line in Path("/etc/airflow/airflow.env").read_text().splitlines()]
    return {name: "".join(shlex.split(value)) for name, _, value in lines if not name.startswith("#")}


class PostgresqlLoad:
    """A table of numbers in Airflow's own database."""

    def __init__(self) -> None:
        self._url = environment()["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"].replace("+psycopg2", "", 1)
        self._link: Any = None

    def _run(self, statement: str, *values: Any) -> Any:
        if self._link is None:
            self._link = import_module("psycopg2").connect(self._url)
        with self._link, self._link.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall() if cursor.description else []

    def begin(self) -> None:
        """Start with an empty table."""
        self._run("drop table if exists fault_load")
        self._run("create table fault_load (number bigint not null)")

    def write(self, number: int) -> None:
        """Commit one number."""
        self._run("insert into fault_load values (%s)", number)

    def read(self) -> set[int]:
        """All numbers that are there."""
        return {row[0] for row in self._run("select number from fault_load")}

    def end(self) -> None:
        """Leave nothing behind."""
        self._run("drop table fault_load")

    def close(self) -> None:
        """Give up the connection."""
        with contextlib.suppress(Exception):
            self._link.close()
        self._link = None


class RedisLoad:
    """A set of numbers in the broker."""

    def __init__(self) -> None:
        url = environment()["AIRFLOW__CELERY__BROKER_URL"]
        self._link = import_module("redis").from_url(
            url, ssl_ca_certs="/etc/airflow-ha/tls/ca.crt", socket_timeout=3, socket_connect_timeout=3
        )

    def begin(self) -> None:
        """Start with an empty set."""
        self._link.delete("fault-load")

    def write(self, number: int) -> None:
        """Add one number."""
        self._link.sadd("fault-load", number)

    def read(self) -> set[int]:
        """All numbers that are there."""
        return {int(number) for number in self._link.smembers("fault-load")}

    def end(self) -> None:
        """Leave nothing behind."""
        self._link.delete("fault-load")

    def close(self) -> None:
        """Give up the connection."""
        with contextlib.suppress(Exception):
            self._link.connection_pool.disconnect()


def insist(load: Any, action: Any, seconds: float) -> Any:
    """The action's result, tried again until the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return action()
        except Exception:
            if time.monotonic() > deadline:
                raise
            load.close()
            time.sleep(0.2)


def end_of_input() -> threading.Event:
    """Set when nobody holds the other end of standard input any more."""
    closed = threading.Event()

    def read() -> None:
        sys.stdin.read()
        closed.set()

    threading.Thread(target=read, daemon=True).start()
    return closed


def main(service: str, seconds: str) -> None:
    """Entry point."""
    load: Any = {"postgresql": PostgresqlLoad, "redis": RedisLoad}[service]()
    insist(load, load.begin, 10)
    closed = end_of_input()
    print("begins", flush=True)
    acknowledged, errors = [], {}
    began = last = time.monotonic()
    gap, ended = 0.0, 0.0
    for number in range(MAX_WRITES):
        # An outage at the end counts too: it goes on until a write is acknowledged.
        asked_to_stop = closed.is_set() and acknowledged[-1:] == [number - 1]
        if asked_to_stop or time.monotonic() - began > float(seconds):
            break
        try:
            load.write(number)
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).strip().splitlines()[0][-80:]}"
            errors[text] = errors.get(text, 0) + 1
            load.close()
        else:
            acknowledged.append(number)
            if time.monotonic() - last > gap:
                gap, ended = time.monotonic() - last, time.time()
            last = time.monotonic()
        time.sleep(PAUSE_S)
    gap = max(gap, time.monotonic() - last)
    present = insist(load, load.read, 30)
    lost = sorted(set(acknowledged) - present)
    insist(load, load.end, 10)
    result = {"acknowledged": len(acknowledged), "lost": lost[:20], "gap": round(gap, 3), "first_after_gap": ended}
    print(json.dumps({**result, "errors": errors}))


if __name__ == "__main__":
    main(*sys.argv[1:])
