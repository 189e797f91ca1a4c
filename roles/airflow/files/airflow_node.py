"""What an Airflow node needs besides Airflow itself.

    airflow_node.hostname()                  Airflow's [core] hostname_callable
    airflow_node.py wait <url> <ca> <n> <s>  wait until the API server's n processes serve tasks
    airflow_node.py bootstrap < spec.json    bring the metadata database up to date and create the administrator

Imported by every Airflow process, so only the standard library stands at the top; Airflow itself takes seconds.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import shlex
import ssl
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

CONNECT_TIMEOUT_S = 60


def hostname() -> str:
    """The node's name in the inventory: every node can resolve it, whatever the machine calls itself."""
    return os.environ["AIRFLOW_NODE_NAME"]


def wait(url: str, ca: str, processes: int, timeout: float) -> int:
    """Wait until the API server's processes serve tasks; returns 1 when they don't within the timeout (seconds).

    A process builds the tasks' part of its API at the first request for it, answering nothing else for 5 s or more on
    a slow machine: long enough for running tasks to fail. So this is that first request, before load balancers
    send others. A process that is busy with it accepts no further connection, which leaves the next to another one.
    """
    https = urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca))
    # The server is on this machine, whatever proxy the environment names for others.
    opener = urllib.request.build_opener(https, urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + timeout

    def ask() -> bool:
        while time.monotonic() < deadline:
            try:
                with opener.open(url, timeout=max(1, deadline - time.monotonic())) as answer:
                    return bool(answer.status == 200)
            except OSError:
                time.sleep(0.1)
        return False

    with ThreadPoolExecutor() as pool:
        asked = []
        for _ in range(processes):
            asked.append(pool.submit(ask))
            time.sleep(0.5 if processes > 1 else 0)
        if all(one.result() for one in asked):
            return 0
    print(f"{url} did not answer within {timeout:.0f} s", file=sys.stderr)
    return 1


def load_environment(path: Path) -> None:
    """Take over the services' environment file, as systemd and the command line wrapper do."""
    for line in path.read_text().splitlines():
        name, found, value = line.partition("=")
        if found and not line.startswith("#"):
            os.environ[name] = "".join(shlex.split(value))


def digest(password: str, salt: str) -> str:
    """A password's fingerprint, for noticing that the configured one has changed."""
    return hashlib.scrypt(password.encode(), salt=bytes.fromhex(salt), n=2**14, r=8, p=1).hex()


def read_database(admin: str) -> dict[str, Any]:
    """Schema revisions and the administrator's existence, read without Airflow: importing it costs seconds.

    Tries for a minute to reach the database, which on a first deployment has only just come up behind the proxy.
    """
    psycopg2 = import_module("psycopg2")
    url = os.environ["AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"].replace("+psycopg2", "", 1)
    deadline = time.monotonic() + CONNECT_TIMEOUT_S
    while True:
        try:
            connection = psycopg2.connect(url)
            break
        except psycopg2.OperationalError as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"no connection to the metadata database: {error}".strip()) from None
            time.sleep(1)
    try:
        with connection.cursor() as cursor:
            try:
                cursor.execute(
                    "select 'airflow ' || version_num from alembic_version"
                    " union all select 'fab ' || version_num from alembic_version_fab order by 1"
                )
                revisions = [row[0] for row in cursor.fetchall()]
                cursor.execute("select exists (select from ab_user where lower(username) = lower(%s))", (admin,))
                row = cursor.fetchone()
            except psycopg2.errors.UndefinedTable:
                return {"revisions": [], "admin": False}
    finally:
        connection.close()
    return {"revisions": revisions, "admin": bool(row and row[0])}


def migrate_and_create(spec: dict[str, str], reset_password: bool) -> None:
    """Migrate the schema, then create the administrator or give it a new password."""
    loaded = import_module("airflow.utils.providers_configuration_loader").providers_configuration_loaded

    def work() -> None:
        import_module("airflow.utils.db").upgradedb()
        fab = import_module("airflow.providers.fab.auth_manager.cli_commands.utils")
        with fab.get_application_builder() as builder:
            manager = builder.sm
            user = manager.find_user(spec["user"])
            if user is None:
                role = manager.find_role("Admin")
                if role is None:
                    raise SystemExit("the role Admin is missing after the migration")
                if not manager.add_user(spec["user"], "Airflow", "Admin", spec["email"], role, spec["password"]):
                    raise SystemExit(f"could not create the user {spec['user']}")
            elif reset_password and not manager.reset_password(user.id, spec["password"]):
                raise SystemExit(f"could not set the password of {spec['user']}")

    loaded(work)()


def bootstrap(spec: dict[str, str]) -> bool:
    """Make schema and administrator match this release and the specification; returns whether that took anything.

    What was done last time is noted in a file beside what the database said afterwards, so that a run with nothing to
    do takes a fraction of a second. The file alone is never believed: a restored or an emptied database differs.
    An existing administrator's password is only set when the configured one changed, so one set in the UI stays.
    """
    load_environment(Path(spec["environment_file"]))
    note_file = Path(os.environ["AIRFLOW_HOME"]) / ".bootstrap.json"
    note = json.loads(note_file.read_text()) if note_file.exists() else {}
    release = os.path.realpath(sys.prefix)
    state = read_database(spec["user"])
    changed_password = note.get("user") == spec["user"] and not hmac.compare_digest(
        note["digest"], digest(spec["password"], note["salt"])
    )
    same_schema = note.get("release") == release and note.get("revisions") == state["revisions"] != []
    if same_schema and state["admin"] and note.get("user") == spec["user"] and not changed_password:
        return False
    migrate_and_create(spec, changed_password)
    after = read_database(spec["user"])
    salt = secrets.token_hex(16)
    note = {
        "release": release,
        "revisions": after["revisions"],
        "user": spec["user"],
        "salt": salt,
        "digest": digest(spec["password"], salt),
    }
    draft = note_file.with_suffix(".tmp")
    draft.touch(mode=0o600)
    draft.write_text(json.dumps(note))
    draft.replace(note_file)
    return after != state or changed_password


def main(argv: list[str]) -> int:
    """Entry point."""
    match argv:
        case ["wait", url, ca, processes, timeout]:
            return wait(url, ca, int(processes), float(timeout))
        case ["bootstrap"]:
            # Airflow logs to standard output; only the answer belongs there.
            answer = os.dup(1)
            os.dup2(2, 1)
            changed = bootstrap(json.load(sys.stdin))
            os.write(answer, b"changed\n" if changed else b"unchanged\n")
            return 0
    print((__doc__ or "").strip(), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
