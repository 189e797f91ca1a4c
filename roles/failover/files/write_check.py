"""Write through the proxy of this node, as Airflow does, until it works.

`- <postgresql|redis> <environment file> <CA> <seconds>` prints JSON: `seconds` until the write was acknowledged and
`server`, who took it; exit code 1 and `problem` if none did.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from importlib import import_module
from pathlib import Path


def postgresql(url: str) -> str:
    """Commit a message to the WAL, which needs no table; return the server's address."""
    connection = import_module("psycopg2").connect(url.replace("+psycopg2", "", 1))
    with connection, connection.cursor() as cursor:
        cursor.execute("select pg_logical_emit_message(true, 'airflow-ha', 'write check')")
        cursor.execute("select host(inet_server_addr())")
        return str(cursor.fetchone()[0])


def redis(url: str, ca: str) -> str:
    """Set a key that is gone a minute later; return the server's replication offset."""
    client = import_module("redis").from_url(url, ssl_ca_certs=ca, socket_timeout=3, socket_connect_timeout=3)
    client.set("airflow-ha:write-check", time.time(), ex=60)
    return str(client.info("replication")["role"])


def main(service: str, environment_file: str, ca: str, timeout: str) -> int:
    """Try until the time is over; returns the exit code."""
    lines = [
        line.partition("=") for line in Path(environment_file).read_text().splitlines() if not line.startswith("#")
    ]
    environment = {name: "".join(shlex.split(value)) for name, _, value in lines}
    began, problem = time.monotonic(), ""
    while time.monotonic() - began < float(timeout):
        try:
            if service == "postgresql":
                server = postgresql(environment["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"])
            else:
                server = redis(environment["AIRFLOW__CELERY__BROKER_URL"], ca)
            print(json.dumps({"seconds": round(time.monotonic() - began, 2), "server": server}))
            return 0
        except Exception as error:  # every kind of outage has its own class; all mean "not yet"
            problem = str(error).strip().partition("\n")[0]
            time.sleep(0.1)
    print(json.dumps({"problem": problem}))
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
