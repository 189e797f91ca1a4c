"""PostgreSQL's part: what this member is, and the steps that move the role of the primary."""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.extras
from journal import FailoverError, Journal, wait_for

READY_TIMEOUT_S = 20
STOP_TIMEOUT_S = 60
START_TIMEOUT_S = 60
STREAM_TIMEOUT_S = 60
# Longer than the primary waits for a standby that is silent (wal_sender_timeout).
ARRIVAL_TIMEOUT_S = 15
# airflow-watchdog leaves it when it stops a primary that is older than another (files/watchdog, agent.py).
WATCHDOG_MARKER = Path("/var/lib/airflow-watchdog/postgresql-fenced.json")
SHUTDOWN_RECORD = re.compile(r"desc: CHECKPOINT_SHUTDOWN\b")
STATE_QUERY = """
    select json_build_object(
      'role', case when pg_is_in_recovery() then 'standby' else 'primary' end,
      'system_id', (select system_identifier::text from pg_control_system()),
      'slots', (
        select coalesce(json_agg(json_build_object(
          'name', slot_name, 'active', active, 'wal_status', wal_status,
          'retained', pg_wal_lsn_diff(here.lsn, restart_lsn)::bigint)), '[]') from pg_replication_slots),
      'max_slots', current_setting('max_replication_slots')::int,
      'synchronous', current_setting('synchronous_standby_names'))
    from (select case when pg_is_in_recovery() then pg_last_wal_replay_lsn() else pg_current_wal_lsn() end as lsn) here
"""
PRIMARY_QUERY = """
    select json_build_object(
      'timeline', ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int,
      'lsn', pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0')::bigint,
      'standbys', (select coalesce(json_agg(json_build_object('name', application_name, 'address', host(client_addr),
        'state', state, 'sync', sync_state, 'lag', pg_wal_lsn_diff(pg_current_wal_flush_lsn(), flush_lsn)::bigint,
        'replay_lag', pg_wal_lsn_diff(pg_current_wal_flush_lsn(), replay_lsn)::bigint,
        'replay_lag_s', coalesce(extract(epoch from replay_lag), 0)::float)), '[]') from pg_stat_replication))
"""
STANDBY_QUERY = """
    select json_build_object(
      'timeline', coalesce((select received_tli from pg_stat_wal_receiver), (pg_control_checkpoint()).timeline_id),
      'lsn', pg_wal_lsn_diff(greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()), '0/0')::bigint,
      'replay_lsn', pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0')::bigint,
      'replay_paused', pg_is_wal_replay_paused(),
      'receiver', (select json_build_object('status', status, 'sender', sender_host,
        'behind', greatest(pg_wal_lsn_diff(latest_end_lsn, pg_last_wal_receive_lsn()), 0)::bigint,
        'silent_s', extract(epoch from clock_timestamp() - last_msg_receipt_time)::float) from pg_stat_wal_receiver),
      'replayed_at', extract(epoch from pg_last_xact_replay_timestamp())::float)
"""


@contextlib.contextmanager
def acting_as(user: str) -> Iterator[None]:
    """Have the block's connections come from this OS user, as peer authentication asks."""
    uid = os.geteuid()
    os.seteuid(pwd.getpwnam(user).pw_uid)
    try:
        yield
    finally:
        os.seteuid(uid)


class Postgresql:
    """This node's member. `settings`: as its role writes them to /etc/airflow-ha/failover/."""

    def __init__(self, settings: dict[str, Any], journal: Journal) -> None:
        self._bin, self._data = Path(settings["bin_dir"]), Path(settings["data_dir"])
        self._unit, self._port = settings["unit"], settings["port"]
        self._conninfo, self._others = settings["conninfo"], settings["other_slots"]
        self._peers = settings["peers"]
        self._config = settings["config_file"]
        self._run = settings["run"]
        self._journal = journal

    # --- looking ---------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What this member says of itself; of a stopped one, what its control file says. LSNs are bytes from 0/0."""
        state: dict[str, Any] = {
            "running": self._postmaster() is not None,
            "standby_signal": (self._data / "standby.signal").exists(),
            "masked": self._systemctl("is-enabled", check=False).startswith("masked"),
            "disk_free_mb": shutil.disk_usage(self._data if self._data.exists() else "/").free >> 20,
        }
        if not (self._data / "PG_VERSION").exists():
            return {**state, "role": "none"}
        try:
            with self._connect(patience_s=0) as cursor:
                answer = self._ask(cursor, STATE_QUERY)
                answer |= self._ask(cursor, PRIMARY_QUERY if answer["role"] == "primary" else STANDBY_QUERY)
        except (psycopg2.Error, FailoverError) as error:
            control = self._control()
            return {
                **state,
                "role": "unknown" if state["running"] else "stopped",
                "problem": str(error).strip().partition("\n")[0],
                "system_id": control.get("Database system identifier", ""),
                "timeline": int(control.get("Latest checkpoint's TimeLineID", 0)),
                "control_state": control.get("Database cluster state", ""),
            }
        return {**state, **answer}

    def probe(self, address: str) -> dict[str, Any]:
        """Whether another member can be reached from here as a running primary."""
        try:
            link = psycopg2.connect(f"host={address} dbname=postgres {self._conninfo}")
            with contextlib.closing(link), link.cursor() as cursor:
                cursor.execute("select pg_is_in_recovery()")
                row = cursor.fetchone()
            return {"role": "standby" if row and row[0] else "primary"}
        except psycopg2.Error as error:
            return {"role": "unknown", "problem": str(error).strip().partition("\n")[0]}

    # --- changing --------------------------------------------------------------------------------

    def demote(self) -> None:
        """Stop this primary cleanly, once the candidate watches."""
        marker = f"failover {self._run}"
        with self._connect() as cursor:

            def watched() -> Any:
                cursor.execute("select 1 from pg_stat_activity where application_name = %s", [marker])
                return cursor.fetchone()

            if not wait_for(watched, READY_TIMEOUT_S):
                raise FailoverError("the candidate did not get ready; nothing was changed")
            # Most is written out while clients still write, so that little is left for the shutdown.
            cursor.execute("checkpoint")
            cursor.execute("checkpoint")
            self._journal.step("checkpoint done")
        # From here on, whoever starts this server, and whatever happens to us, it comes up as a standby.
        self._signal_file()
        self._stop()

    def wake(self) -> None:
        """Start this stopped member, which is marked as a standby."""
        self._systemctl("start")
        self._journal.step("started as a standby")

    def follow(self) -> None:
        """Run as a standby and stream from the primary, which libpq finds among all members."""
        self._signal_file()
        self._systemctl("unmask")
        self._systemctl("reset-failed", check=False)
        self._systemctl("start")
        self._journal.step("started as a standby")
        with self._connect() as cursor:
            # Slots of a time as primary would keep WAL here for ever.
            cursor.execute(
                "select pg_drop_replication_slot(slot_name) from pg_replication_slots"
                " where slot_name like 'standby\\_%' and not active and slot_type = 'physical'"
            )

            def streams() -> Any:
                cursor.execute("select 1 from pg_stat_wal_receiver where status = 'streaming'")
                return cursor.fetchone()

            if not wait_for(streams, STREAM_TIMEOUT_S, 0.1):
                raise FailoverError(f"the standby does not stream after {STREAM_TIMEOUT_S} s")
        self._journal.step("streams from the new primary")

    def take_over(self, primary: str) -> None:
        """Wait until the primary at this address has shut down and all it wrote is here, then promote."""
        conninfo = f"host={primary} {self._conninfo} application_name='failover {self._run}'"
        with self._connect() as cursor:
            begin = self._received(cursor)
            cursor.execute("select received_tli from pg_stat_wal_receiver where status = 'streaming'")
            row = cursor.fetchone()
            if not row:
                raise FailoverError("the candidate does not stream; nothing was changed")
            watch = psycopg2.connect(conninfo, connection_factory=psycopg2.extras.PhysicalReplicationConnection)
            self._journal.step("the candidate watches the primary")
            if not select.select([watch], [], [], READY_TIMEOUT_S + STOP_TIMEOUT_S)[0]:
                raise FailoverError("the primary did not shut down; nothing was changed here")
            watch.close()
            self._journal.step("the primary closes its connections")

            def complete() -> bool:
                cursor.execute("select count(*) from pg_stat_wal_receiver")
                (receivers,) = cursor.fetchone()
                end = self._received(cursor)
                cursor.execute("select pg_last_wal_replay_lsn() = %s::pg_lsn", [end])
                (replayed,) = cursor.fetchone()
                return not receivers and replayed and self._ends_with_shutdown(row[0], begin, end)

            if not wait_for(complete, ARRIVAL_TIMEOUT_S):
                raise FailoverError("the primary's last record did not arrive; the candidate was not promoted")
            self._journal.step("the candidate has the primary's last record")
        self.promote()

    def promote(self) -> None:
        """Make this standby the primary, with a slot for every other member."""
        with self._connect() as cursor:
            cursor.execute("select pg_promote(true, 60)")
            (promoted,) = cursor.fetchone()
            if not promoted:
                raise FailoverError("the promotion did not end within 60 s")
            self._journal.step("promoted")
        self.welcome()

    def welcome(self) -> None:
        """Have a slot for every other member on this primary, and a checkpoint that a rewind can start from."""
        with self._connect() as cursor:
            for slot in self._others:
                cursor.execute(
                    "select pg_create_physical_replication_slot(%s, true) where not exists"
                    " (select from pg_replication_slots where slot_name = %s)",
                    [slot, slot],
                )
            # pg_rewind believes in a new timeline only when a checkpoint has it.
            cursor.execute("checkpoint")
        self._journal.step("slots and checkpoint of the primary done")

    def guard(self) -> None:
        """Before every start: a former primary that sees another one comes up as its standby, never beside it.

        Where the histories have parted it cannot stream, and waits so for rejoin.yml.
        """
        if (self._data / "standby.signal").exists() or not (self._data / "PG_VERSION").exists():
            return
        for host, address in self._peers.items():
            if self.probe(address)["role"] == "primary":
                self._signal_file()
                # Slots of its time as primary would keep WAL for ever. A stopped server forgets those it does not find.
                for slot in (self._data / "pg_replslot").glob("standby_*"):
                    shutil.rmtree(slot)
                self._journal.step(f"{host} is the primary: this former primary starts as a standby")
                return
        # Whoever it was older than may only be out of sight.
        if WATCHDOG_MARKER.exists():
            self._signal_file()
            self._journal.step("airflow-watchdog had stopped it as a primary of the past: it starts as a standby")

    def reinstate(self) -> None:
        """Undo a demotion whose candidate was not promoted: be the primary again."""
        self._stop()
        (self._data / "standby.signal").unlink(missing_ok=True)
        self._systemctl("start")
        self._journal.step("the old primary is the primary again")

    def release(self) -> None:
        """Undo the part of a fence that keeps this member from starting."""
        self._systemctl("unmask")
        self._systemctl("reset-failed", check=False)

    def fence(self) -> None:
        """Stop this member for good: it starts neither now nor after a boot, and never as a primary."""
        self._systemctl("mask")
        if (self._data / "PG_VERSION").exists():
            self._signal_file()
        self._stop(signal.SIGQUIT)
        self._systemctl("stop", check=False)
        self._journal.step("fenced: stopped, masked, marked as a standby")

    def rewind(self, primary: str) -> None:
        """Give this stopped member the history of the primary at this address, and have it follow."""
        self._stop()
        conninfo = f"host={primary} dbname=postgres {self._conninfo}"
        # It recovers a crashed server first, which a signal file would keep from ending.
        (self._data / "standby.signal").unlink(missing_ok=True)
        done = self._as_postgres(
            "pg_rewind", f"--target-pgdata={self._data}", f"--source-server={conninfo}", f"--config-file={self._config}"
        )
        self._signal_file()
        if done.returncode != 0:
            raise FailoverError(f"pg_rewind: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        self._journal.step("rewound" if "Done!" in done.stderr + done.stdout else "no rewind was needed")
        self.follow()

    # --- helpers ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connect(self, patience_s: float = START_TIMEOUT_S) -> Iterator[Any]:
        def connection() -> Any:
            with acting_as("postgres"):
                return psycopg2.connect(
                    f"dbname=postgres port={self._port} connect_timeout=3 application_name=failover"
                )

        def answers() -> Any:
            # After a start it may still be on its way to a consistent state.
            try:
                return connection()
            except psycopg2.OperationalError as error:
                if "starting up" not in str(error) and "not yet accepting" not in str(error):
                    raise
                return None

        server = wait_for(answers, patience_s, 0.1)
        if not server:
            raise FailoverError(f"PostgreSQL takes no connections {patience_s} s after its start")
        with contextlib.closing(server):
            server.autocommit = True
            with server.cursor() as cursor:
                yield cursor

    @staticmethod
    def _ask(cursor: Any, query: str) -> dict[str, Any]:
        cursor.execute(query)
        (answer,) = cursor.fetchone()
        return dict(answer)

    @staticmethod
    def _received(cursor: Any) -> str:
        cursor.execute("select greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())::text")
        (lsn,) = cursor.fetchone()
        return str(lsn)

    def _ends_with_shutdown(self, timeline: int, begin: str, end: str) -> bool:
        """Whether the WAL up to `end` ends with the record that a clean shutdown writes last."""
        path = f"--path={self._data / 'pg_wal'}"
        done = self._as_postgres("pg_waldump", path, f"--timeline={timeline}", f"--start={begin}", f"--end={end}")
        lines = [line for line in done.stdout.splitlines() if line.startswith("rmgr:")]
        return bool(lines and SHUTDOWN_RECORD.search(lines[-1]))

    def _as_postgres(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["runuser", "--user=postgres", "--", str(self._bin / program), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")

    def _control(self) -> dict[str, str]:
        output = self._as_postgres("pg_controldata", str(self._data)).stdout
        pairs = (line.partition(":") for line in output.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}

    def _postmaster(self) -> int | None:
        """The server's process, if it runs."""
        try:
            pid = int((self._data / "postmaster.pid").read_text().splitlines()[0])
            return pid if Path(f"/proc/{pid}/comm").read_text().strip() == "postgres" else None
        except (FileNotFoundError, ProcessLookupError, ValueError, IndexError):
            return None

    def _signal_file(self) -> None:
        path = self._data / "standby.signal"
        owner = self._data.stat()
        with path.open("a") as stream:
            os.fchown(stream.fileno(), owner.st_uid, owner.st_gid)
            os.fchmod(stream.fileno(), 0o600)
            os.fsync(stream.fileno())
        folder = os.open(self._data, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)

    def _stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server: SIGINT ends sessions and writes the last record, SIGQUIT ends it as a crash would.

        Sent by us, since the packages' wrappers would add a quarter of a second in which nobody can write.
        Source: PostgreSQL's documentation, "Shutting Down the Server".
        """
        pid = self._postmaster()
        if pid is None:
            return
        os.kill(pid, how)
        self._journal.step("told to stop")
        if not wait_for(lambda: self._postmaster() is None, STOP_TIMEOUT_S):
            raise FailoverError(f"PostgreSQL has not stopped after {STOP_TIMEOUT_S} s")
        self._journal.step("stopped")
        # The unit has to notice, or starting it would do nothing.
        wait_for(lambda: self._systemctl("is-active", check=False).strip() in ("inactive", "failed"), 10, 0.05)

    def _systemctl(self, verb: str, *, check: bool = True) -> str:
        done = subprocess.run(["systemctl", verb, self._unit], capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            raise FailoverError(f"systemctl {verb} {self._unit}: {done.stderr.strip().splitlines()[-1]}")
        return done.stdout
