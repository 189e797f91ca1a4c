"""Make Airflow's connections match a specification.

    airflow_connections.py < spec.json

``spec.json`` is ``{"environment_file": "…", "connections": {"<id>": {"conn_type": …, "host": …, "port": …, "schema": …,
"login": …, "password": …, "extra": {…}}}}`` and comes on standard input, because it holds passwords. Prints "changed"
or "unchanged". Connections that are not named are left alone.

Importing Airflow takes seconds, so what is there is read without it; it is only asked to write.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from airflow_node import load_environment

FIELDS = ("conn_type", "host", "port", "schema", "login", "password", "extra")


def wanted(specs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the specification with all fields; None for what is empty, as Airflow has it."""
    target = {name: {field: spec.get(field) or None for field in FIELDS} for name, spec in specs.items()}
    for spec in target.values():
        spec["port"] = int(spec["port"]) if spec["port"] else None
    return target


def existing(names: list[str]) -> dict[str, dict[str, Any]]:
    """Return the connections as they are, decrypted; those that cannot be decrypted are left out."""
    import psycopg2
    from cryptography.fernet import Fernet, InvalidToken, MultiFernet

    keys = MultiFernet([Fernet(key.strip()) for key in os.environ["AIRFLOW__CORE__FERNET_KEY"].split(",")])

    def clear(value: str | None, encrypted: bool) -> str | None:
        return keys.decrypt(value.encode()).decode() if value and encrypted else value or None

    found = {}
    url = os.environ["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"].replace("+psycopg2", "", 1)
    connection = psycopg2.connect(url)
    try:
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT conn_id, conn_type, host, port, schema, login, password, is_encrypted, extra,"
                " is_extra_encrypted FROM connection WHERE conn_id = ANY(%s)",
                (names,),
            )
            for name, kind, host, port, schema, login, password, secret, extra, extra_secret in cursor:
                try:
                    values = (kind, host, port, schema, login, clear(password, secret), clear(extra, extra_secret))
                except InvalidToken:
                    continue
                found[name] = dict(zip(FIELDS, values, strict=True))
                found[name]["extra"] = json.loads(found[name]["extra"] or "null") or None
    finally:
        connection.close()
    return found


def write(specs: dict[str, dict[str, Any]]) -> None:
    """Create or update connections in one transaction."""
    from airflow.models.connection import Connection
    from airflow.utils.session import create_session
    from sqlalchemy import select

    with create_session() as session:
        for name, spec in specs.items():
            row = session.scalar(select(Connection).where(Connection.conn_id == name))
            if row is None:
                row = Connection(conn_id=name)
                session.add(row)
            for field in ("conn_type", "host", "port", "schema", "login"):
                setattr(row, field, spec[field])
            row.set_password(spec["password"])
            row.set_extra(json.dumps(spec["extra"]) if spec["extra"] else "")


def main() -> int:
    """Entry point."""
    # Airflow logs to standard output; only the answer belongs there.
    answer = os.dup(1)
    os.dup2(2, 1)
    spec = json.load(sys.stdin)
    load_environment(Path(spec["environment_file"]))
    target = wanted(spec["connections"])
    now = existing(list(target))
    different = {name: values for name, values in target.items() if now.get(name) != values}
    if different:
        write(different)
    os.write(answer, b"changed\n" if different else b"unchanged\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
