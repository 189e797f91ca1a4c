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
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fence
import psycopg2
import psycopg2.extras
from journal import FailoverError, Journal, wait_for
from wal import REPLAYING, SHUTDOWN_RECORD, end_of_wal, lsn_text, segment_start, wanted_slots

READY_TIMEOUT_S = 20
STOP_TIMEOUT_S = 60
START_TIMEOUT_S = 60
STREAM_TIMEOUT_S = 60
# Longer than the primary waits for a standby that is silent (wal_sender_timeout).
ARRIVAL_TIMEOUT_S = 15
WARM = "Hot standby mode is disabled"
# Sorts after the role's own file: what stands here wins, until somebody takes it away.
SUSPENDED = "conf.d/zz-synchronous-suspended.conf"
# airflow-watchdog leaves it when it stops a primary that is older than another (files/watchdog, agent.py).
WATCHDOG_MARKER = Path("/var/lib/airflow-watchdog/postgresql-fenced.json")
STATE_QUERY = """
    select json_build_object(
      'role', case when pg_is_in_recovery() then 'standby' else 'primary' end,
      'system_id', (select system_identifier::text from pg_control_system()),
      'slots', (
        select coalesce(json_agg(json_build_object(
          'name', slot_name, 'active', active, 'wal_status', wal_status,
          'retained', pg_wal_lsn_diff(here.lsn, restart_lsn)::bigint)), '[]') from pg_replication_slots),
      'max_slots', current_setting('max_replication_slots')::int,
      'synchronous', current_setting('synchronous_standby_names'),
      'standbys', (select coalesce(json_agg(json_build_object('name', application_name, 'address', host(client_addr),
        'state', state, 'sync', sync_state, 'lag', pg_wal_lsn_diff(here.lsn, flush_lsn)::bigint,
        'replay_lag', pg_wal_lsn_diff(here.lsn, replay_lsn)::bigint,
        'replay_lag_s', coalesce(extract(epoch from replay_lag), 0)::float)), '[]') from pg_stat_replication))
    from (select case when pg_is_in_recovery() then greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn())
                 else pg_current_wal_flush_lsn() end as lsn) here
"""
PRIMARY_QUERY = """
    select json_build_object(
      'timeline', ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int,
      'lsn', pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0')::bigint,
      'archiver', (select json_build_object(
        'failing', coalesce(last_failed_time > last_archived_time, failed_count > 0),
        'failed_at', to_char(last_failed_time at time zone 'UTC', 'YYYY-MM-DD HH24:MI:SS"Z"'),
        'waiting', (select count(*) from pg_ls_archive_statusdir() where name like '%.ready')) from pg_stat_archiver))
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
# What a member that is asked over the network knows of us, by our name: the role, and how much it has sent to us.
PEER_QUERY = """
    select pg_is_in_recovery(), (
      select json_build_object('status', state, 'sender', host(inet_server_addr()),
        'lsn', pg_wal_lsn_diff(flush_lsn, '0/0')::bigint,
        'behind', pg_wal_lsn_diff(case when pg_is_in_recovery() then pg_last_wal_receive_lsn()
                                       else pg_current_wal_flush_lsn() end, flush_lsn)::bigint)
      from pg_stat_replication where application_name = %s and state = 'streaming' limit 1)
"""


class WarmStandbyError(FailoverError):
    """The server is a warm standby, which takes no connections."""


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
        self._conninfo, self._peers = settings["conninfo"], settings["peers"]
        self._name, self._upstream = settings["name"], settings["upstream"]
        self._slots, self._upstreams = settings["slots"], settings["upstreams"]
        self._ports, self._synchronous = settings["fence_ports"], settings["synchronous"]
        self._config = settings["config_file"]
        self._run = settings["run"]
        self._stanza, self._log = settings["stanza"], Path(settings["log"])
        self._journal = journal

    # --- looking ---------------------------------------------------------------------------------

    def state(self, seen: dict[str, Any]) -> dict[str, Any]:
        """What this member says of itself; of a stopped one, what its control file says. LSNs are bytes from 0/0.

        seen: what its peers look like from here; they know how far a warm standby is.
        """
        state: dict[str, Any] = {
            "upstream": self._upstream,
            "suspended": self._suspended.exists(),
            "firewalled": fence.closed("postgresql"),
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
        except WarmStandbyError:
            return {**state, **self._warm_state(seen)}
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
        """Whether another member can be reached from here as a running primary, and in `sends` what it sends to us."""
        try:
            link = psycopg2.connect(f"host={address} dbname=postgres {self._conninfo}")
            with contextlib.closing(link), link.cursor() as cursor:
                cursor.execute(PEER_QUERY, [self._name])
                standby, sends = cursor.fetchone()
            return {"role": "standby" if standby else "primary", "sends": sends}
        except psycopg2.Error as error:
            if WARM in str(error):
                return {"role": "standby", "sends": None}
            return {"role": "unknown", "problem": str(error).strip().partition("\n")[0]}

    def _warm_state(self, seen: dict[str, Any]) -> dict[str, Any]:
        control, replay = self._control(), REPLAYING.search(self._titles())
        receiver = next((peer["sends"] for peer in seen.values() if peer.get("sends")), None)
        timeline = int(replay[1], 16) if replay else int(control["Latest checkpoint's TimeLineID"])
        return {
            "role": "standby",
            "hot": False,
            "system_id": control["Database system identifier"],
            "timeline": timeline,
            "lsn": receiver["lsn"] if receiver else self._end_of_wal(timeline, replay),
            "replay_paused": False,
            "receiver": receiver,
            "slots": [],
            "standbys": [],
        }

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

    def follow(self, primary: str) -> None:
        """Run as a standby that streams from its upstream, or from this primary, which libpq finds by itself."""
        self._signal_file()
        self.release()
        if self._postmaster() is None:
            self._forget_slots(primary)
        self._systemctl("start")
        self._journal.step("started as a standby")
        self.slots(primary)
        if not wait_for(self._streams, STREAM_TIMEOUT_S, 0.1):
            raise FailoverError(f"the standby does not stream after {STREAM_TIMEOUT_S} s")
        self._journal.step("streams again")

    def slots(self, primary: str) -> None:
        """Have a slot for each member that streams from here while that one is the primary, and no others.

        What nobody uses would keep WAL here for ever.
        """
        wanted = list(self._wanted(primary))
        with contextlib.suppress(WarmStandbyError), self._connect() as cursor:
            cursor.execute(
                "select pg_create_physical_replication_slot(name, true) from unnest(%s::text[]) name"
                " where name not in (select slot_name from pg_replication_slots)",
                [wanted],
            )
            cursor.execute(
                "select pg_drop_replication_slot(slot_name) from pg_replication_slots"
                " where slot_name like 'standby\\_%%' and slot_type = 'physical' and not active"
                " and slot_name <> all(%s::text[])",
                [wanted],
            )

    def take_over(self, primary: str) -> None:
        """Wait until the primary at this address has shut down and all it wrote is here, then promote."""
        conninfo = f"host={primary} {self._conninfo} application_name='failover {self._run}'"
        with self._cursor_if_hot() as cursor:
            timeline, begin = self._position(cursor)
            watch = psycopg2.connect(conninfo, connection_factory=psycopg2.extras.PhysicalReplicationConnection)
            self._journal.step("the candidate watches the primary")
            if not select.select([watch], [], [], READY_TIMEOUT_S + STOP_TIMEOUT_S)[0]:
                raise FailoverError("the primary did not shut down; nothing was changed here")
            watch.close()
            self._journal.step("the primary closes its connections")
            # Who streams from another standby stays connected to it.
            direct = self._peers.get(self._upstream, primary) == primary

            def complete() -> bool:
                if cursor is None:
                    receiving, replayed, end = "walreceiver" in self._titles(), True, ""
                else:
                    cursor.execute("select count(*) from pg_stat_wal_receiver")
                    (receiving,) = cursor.fetchone()
                    end = self._received(cursor)
                    cursor.execute("select pg_last_wal_replay_lsn() = %s::pg_lsn", [end])
                    (replayed,) = cursor.fetchone()
                return not (receiving and direct) and replayed and self._ends_with_shutdown(timeline, begin, end)

            if not wait_for(complete, ARRIVAL_TIMEOUT_S):
                raise FailoverError("the primary's last record did not arrive; the candidate was not promoted")
            self._journal.step("the candidate has the primary's last record")
        self.promote()

    def promote(self, alone: str = "") -> None:
        """Make this standby the primary, with a slot for everyone who will stream from it.

        alone: not empty when no standby is left that could acknowledge what is written.
        """
        if alone and self._synchronous:
            self.synchronous("false")
        with self._cursor_if_hot() as cursor:
            if cursor is None:
                promoted = (
                    self._as_postgres("pg_ctl", "promote", f"--pgdata={self._data}", "--timeout=60").returncode == 0
                )
            else:
                cursor.execute("select pg_promote(true, 60)")
                (promoted,) = cursor.fetchone()
        if not promoted:
            raise FailoverError("the promotion did not end within 60 s")
        self._journal.step("promoted")
        self.welcome()

    def welcome(self) -> None:
        """Have a slot for everyone who streams from this primary, and a checkpoint that a rewind can start from."""
        self.slots(self._name)
        with self._connect() as cursor:
            # pg_rewind believes in a new timeline only when a checkpoint has it.
            cursor.execute("checkpoint")
        self._journal.step("slots and checkpoint of the primary done")

    def synchronous(self, enabled: str) -> None:
        """Suspend synchronous replication on this member ("false"), or end the suspension ("true"); no restart."""
        if enabled == "true":
            self._suspended.unlink(missing_ok=True)
        else:
            self._suspended.write_text(
                "# Suspended by an operator or a forced failover; playbooks/synchronous.yml -e enabled=true ends it.\n"
                "synchronous_standby_names = ''\n"
            )
            self._suspended.chmod(0o644)
        pid = self._postmaster()
        if pid is not None:
            os.kill(pid, signal.SIGHUP)
        self._journal.step(f"synchronous replication {'resumed' if enabled == 'true' else 'suspended'}")

    def guard(self) -> None:
        """Before every start: a former primary that sees another one comes up as its standby, never beside it.

        Where the histories have parted it cannot stream, and waits so for rejoin.yml.
        """
        if (self._data / "standby.signal").exists() or not (self._data / "PG_VERSION").exists():
            return
        for host, address in self._peers.items():
            if self.probe(address)["role"] == "primary":
                self._signal_file()
                self._forget_slots(host)
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
        """Undo a fence."""
        self._systemctl("unmask")
        self._systemctl("reset-failed", check=False)
        fence.release("postgresql")

    def fence(self) -> None:
        """Stop this member for good: it starts neither now nor after a boot, never as a primary, and reaches nobody."""
        self._systemctl("mask")
        if (self._data / "PG_VERSION").exists():
            self._signal_file()
        self._stop(signal.SIGQUIT)
        self._systemctl("stop", check=False)
        self._journal.step("fenced: stopped, masked, marked as a standby")
        self._journal.step(fence.close("postgresql", self._ports))

    def rewind(self, primary: str, name: str) -> None:
        """Give this member the history of the primary of this address and name, and have it follow."""
        # A primary that ends cleanly archives a last segment, under a name that the next primary may need for its own.
        self._stop(signal.SIGINT if (self._data / "standby.signal").exists() else signal.SIGQUIT)
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
        self.follow(name)

    def halt(self) -> None:
        """Stop this member cleanly, before another is restored; if it ever starts, then as a standby of that one."""
        if (self._data / "PG_VERSION").exists():
            self._signal_file()
        self._stop()
        self._systemctl("stop", check=False)

    def restore(self, *options: str) -> None:
        """Replace this member's data by a backup, recover to where pgBackRest's `options` say, and be the primary.

        What is the same as in the backup stays as it is (--delta). Raises FailoverError when recovery does not get
        there; the member is stopped then, and a restore can be tried again.
        """
        self._stop()
        self._systemctl("stop", check=False)
        self.release()
        if not self._data.exists():
            self._data.mkdir(mode=0o700)
            shutil.chown(self._data, "postgres", "postgres")
        WATCHDOG_MARKER.unlink(missing_ok=True)
        (self._data / "standby.signal").unlink(missing_ok=True)
        done = self._run_as_postgres("pgbackrest", f"--stanza={self._stanza}", "--delta", *options, "restore")
        if done.returncode != 0:
            raise FailoverError(f"pgbackrest restore: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        self._journal.step("data restored")
        self._recover()
        with self._connect() as cursor:
            # What pgBackRest left here would end the recovery of every standby that is cloned from this server.
            cursor.execute(
                "select name from pg_file_settings where sourcefile like '%postgresql.auto.conf'"
                " and (name = 'restore_command' or name like 'recovery\\_target%')"
            )
            for (name,) in set(cursor.fetchall()):
                cursor.execute(f"alter system reset {name}")
        # They stay in force until a restart, and nobody can use the server yet.
        self._stop()
        self._systemctl("start")
        self.welcome()

    # --- helpers ---------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Start, and wait however long until recovery has ended with a promotion."""
        log_end = self._log.stat().st_size if self._log.exists() else 0
        started = subprocess.run(["systemctl", "start", self._unit], capture_output=True, check=False).returncode == 0
        while started:
            with contextlib.suppress(psycopg2.Error, FailoverError), self._connect(patience_s=2) as cursor:
                cursor.execute("select pg_is_in_recovery()")
                if cursor.fetchone() == (False,):
                    self._journal.step("recovered and promoted")
                    return
            shown = self._systemctl("show --property=NRestarts", check=False)
            started = shown.strip() == "NRestarts=0" and self._systemctl("is-active", check=False).strip() != "failed"
            time.sleep(0.5)
        self._systemctl("stop", check=False)
        with self._log.open("rb") as stream:
            stream.seek(log_end)
            lines = [line for line in stream.read().decode(errors="replace").splitlines() if "FATAL: " in line]
        said = [line.partition("FATAL: ")[2].strip() for line in lines]
        reasons = [line for line in said if "starting up" not in line and "not yet accepting" not in line]
        raise FailoverError(f"recovery failed: {reasons[0] if reasons else 'see its log'}")

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
                if WARM in str(error):
                    raise WarmStandbyError("a warm standby takes no connections") from error
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

    @contextlib.contextmanager
    def _cursor_if_hot(self) -> Iterator[Any]:
        """A cursor, or None on a warm standby."""
        with contextlib.ExitStack() as stack:
            cursor = None
            with contextlib.suppress(WarmStandbyError):
                cursor = stack.enter_context(self._connect())
            yield cursor

    def _position(self, cursor: Any) -> tuple[int, str]:
        """Timeline and end of what this standby has received."""
        if cursor is None:
            state = self._warm_state({host: self.probe(address) for host, address in self._peers.items()})
            row = (state["timeline"], lsn_text(state["lsn"])) if state["receiver"] else None
        else:
            begin = self._received(cursor)
            cursor.execute("select received_tli from pg_stat_wal_receiver where status = 'streaming'")
            found = cursor.fetchone()
            row = (found[0], begin) if found else None
        if not row:
            raise FailoverError("the candidate does not stream; nothing was changed")
        return row

    def _streams(self) -> bool:
        try:
            with self._connect() as cursor:
                cursor.execute("select 1 from pg_stat_wal_receiver where status = 'streaming'")
                return bool(cursor.fetchone())
        except WarmStandbyError:
            return any(self.probe(address).get("sends") for address in self._peers.values())

    def _wanted(self, primary: str) -> set[str]:
        return wanted_slots(self._name, primary, self._slots, self._upstreams)

    def _forget_slots(self, primary: str) -> None:
        """As `slots`, on a stopped server, which forgets those that it does not find."""
        for slot in (self._data / "pg_replslot").glob("standby_*"):
            if slot.name not in self._wanted(primary):
                shutil.rmtree(slot)

    def _ends_with_shutdown(self, timeline: int, begin: str, end: str = "") -> bool:
        """Whether the WAL up to `end`, or to where it ends, ends with the record that a clean shutdown writes last."""
        done = self._waldump(timeline, begin, *([f"--end={end}"] if end else []))
        lines = [line for line in done.stdout.splitlines() if line.startswith("rmgr:")]
        return bool(lines and SHUTDOWN_RECORD.search(lines[-1]))

    def _end_of_wal(self, timeline: int, replay: re.Match[str] | None) -> int:
        """Where the WAL here ends, read from the beginning of the segment that is being replayed."""
        if not replay:
            return 0
        begin = segment_start(replay, int(self._control()["Bytes per WAL segment"]))
        return end_of_wal(begin, self._waldump(timeline, lsn_text(begin), "--quiet").stderr)

    def _waldump(self, timeline: int, begin: str, *options: str) -> subprocess.CompletedProcess[str]:
        path = f"--path={self._data / 'pg_wal'}"
        return self._as_postgres("pg_waldump", path, f"--timeline={timeline}", f"--start={begin}", *options)

    def _titles(self) -> str:
        """What the server's processes call themselves, one per line."""
        pid = self._postmaster()
        if pid is None:
            return ""
        command = ["ps", "--no-headers", "-o", "args", "--ppid", str(pid)]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

    @property
    def _suspended(self) -> Path:
        return Path(self._config).parent / SUSPENDED

    def _as_postgres(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run_as_postgres(str(self._bin / program), *arguments)

    @staticmethod
    def _run_as_postgres(*command: str) -> subprocess.CompletedProcess[str]:
        full = ["runuser", "--user=postgres", "--", *command]
        return subprocess.run(full, capture_output=True, text=True, check=False, cwd="/")

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
        done = subprocess.run(["systemctl", *verb.split(), self._unit], capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            raise FailoverError(f"systemctl {verb} {self._unit}: {done.stderr.strip().splitlines()[-1]}")
        return done.stdout
