"""The database of the watchdogs: the lease, heartbeats and events, in PostgreSQL itself rather than behind a proxy.

Every call ends within a given time, whatever the servers or the network do. One connection for the lease and one for
the heartbeats, one statement per loop on each; the number of nodes changes neither.
"""

import contextlib
import queue
import select
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg.conninfo import make_conninfo
from psycopg.waiting import Ready, Wait

from airflow_watchdog import lease
from airflow_watchdog.config import Config, ConfigError, read_secret
from airflow_watchdog.events import Event, Severity
from airflow_watchdog.permit import clock

T = TypeVar("T")
Record = tuple[Any, ...]

CHANNEL = "airflow_watchdog"
# After this many intervals without news a node counts as silent.
SILENT_LOOPS = 4
# How long a switchover may wait to be followed, in seconds.
WANTED_S = 60

# Each runs once, in this order, in a transaction of its own. Never change one that was released; add another.
MIGRATIONS: tuple[LiteralString, ...] = (
    """
    CREATE TABLE lease (
        name text PRIMARY KEY,
        holder text,
        epoch bigint NOT NULL DEFAULT 0,
        version bigint NOT NULL DEFAULT 0,
        timeline bigint NOT NULL DEFAULT 0,
        ttl_s double precision NOT NULL DEFAULT 0,
        acquired_at timestamptz,
        expires_at timestamptz NOT NULL DEFAULT clock_timestamp(),
        reserved_for text,
        wanted text,
        wanted_until timestamptz,
        paused_until timestamptz,
        pause_reason text NOT NULL DEFAULT ''
    ) WITH (fillfactor = 20);
    INSERT INTO lease (name) VALUES ('scheduler');
    CREATE TABLE heartbeat (
        node text NOT NULL,
        rack text NOT NULL,
        component text NOT NULL,
        state text NOT NULL,
        was text NOT NULL DEFAULT '',
        detail text NOT NULL DEFAULT '',
        since timestamptz NOT NULL,
        seen_at timestamptz NOT NULL,
        PRIMARY KEY (node, component)
    ) WITH (fillfactor = 40);
    CREATE TABLE event (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        at timestamptz NOT NULL DEFAULT clock_timestamp(),
        kind text NOT NULL,
        node text NOT NULL,
        component text NOT NULL DEFAULT '',
        severity text NOT NULL DEFAULT 'info',
        message text NOT NULL
    );
    CREATE INDEX event_at ON event (at);
    """,
)

# The timeline that this primary writes on now; pg_control_checkpoint() would be late by a checkpoint.
_TIMELINE: LiteralString = "('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::bigint"

_ROW: LiteralString = f"""
    holder, epoch, version, timeline, {_TIMELINE}, ttl_s, reserved_for,
    CASE WHEN wanted_until > clock_timestamp() THEN wanted END,
    CASE WHEN paused_until > clock_timestamp()
         THEN extract(epoch FROM paused_until - clock_timestamp())::double precision END,
    pause_reason
"""

_POLL: LiteralString = f"SELECT false, {_ROW} FROM lease WHERE name = 'scheduler'"


def _change(assignments: LiteralString, condition: LiteralString, also: LiteralString = "") -> LiteralString:
    """One statement that changes the row if it may, and returns it in any case, with whether it did."""
    return f"""
    WITH changed AS (
        UPDATE lease SET version = version + 1, timeline = {_TIMELINE}, {assignments}
        WHERE name = 'scheduler' AND {condition} RETURNING *
    )
    SELECT true, {_ROW} {also} FROM changed
    UNION ALL SELECT false, {_ROW} {", NULL" if also else ""} FROM lease
    WHERE name = 'scheduler' AND NOT EXISTS (SELECT FROM changed)
    """


# An end further away than any lease is long: the clock of the database's machine was set back. Then, too, what counts
# is what lease.py has seen; here the database's clock can only say no for a while.
_ACQUIRE: LiteralString = _change(
    f"""
    holder = %(node)s, epoch = greatest(epoch + 1, {_TIMELINE} << 32), ttl_s = %(ttl)s, acquired_at = clock_timestamp(),
    expires_at = clock_timestamp() + make_interval(secs => %(ttl)s), reserved_for = NULL, wanted = NULL
    """,
    f"""
    version = %(version)s AND {_TIMELINE} = %(timeline)s
    AND (holder IS NULL OR holder = %(node)s OR expires_at <= clock_timestamp()
         OR expires_at > clock_timestamp() + make_interval(secs => greatest(ttl_s, %(ttl)s)))
    AND coalesce(paused_until <= clock_timestamp(), true)
    """,
)
_RENEW: LiteralString = _change(
    "ttl_s = %(ttl)s, expires_at = clock_timestamp() + make_interval(secs => %(ttl)s)",
    "holder = %(node)s AND epoch = %(epoch)s",
)
_RELEASE: LiteralString = _change(
    "holder = NULL, expires_at = clock_timestamp(), reserved_for = %(reserved_for)s, wanted = NULL",
    "holder = %(node)s AND epoch = %(epoch)s",
    also=", pg_notify('airflow_watchdog', 'released')",
)

# What is older than what another server wrote already does not count, unless the database's clock was set back.
_BEAT: LiteralString = """
    WITH seen AS (
        SELECT node, rack, component, state, detail, now() - make_interval(secs => age) AS seen_at
        FROM unnest(%(nodes)s::text[], %(racks)s::text[], %(components)s::text[], %(states)s::text[],
                    %(details)s::text[], %(ages)s::double precision[]) AS s (node, rack, component, state, detail, age)
    ), written AS (
        INSERT INTO heartbeat AS h (node, rack, component, state, detail, since, seen_at)
        SELECT node, rack, component, state, detail, now(), seen_at FROM seen ORDER BY node, component
        ON CONFLICT (node, component) DO UPDATE SET
            rack = excluded.rack, state = excluded.state, detail = excluded.detail, seen_at = excluded.seen_at,
            was = CASE WHEN h.state = excluded.state THEN h.was ELSE h.state END,
            since = CASE WHEN h.state = excluded.state THEN h.since ELSE now() END
        WHERE excluded.seen_at >= h.seen_at OR h.seen_at > now()
        RETURNING node, component, state, was, detail, since = now() AND was <> '' AS changed
    ), silent AS (
        UPDATE heartbeat SET was = state, state = 'unknown', since = seen_at, detail = 'no answer'
        WHERE seen_at < now() - make_interval(secs => %(silent)s) AND state <> 'unknown'
        AND node <> ALL (%(nodes)s::text[]) AND node = ANY (%(known)s::text[])
        RETURNING node, component, state, was, detail
    ), gone AS (
        DELETE FROM heartbeat AS h WHERE seen_at < now() - interval '10 minutes'
        AND (node <> ALL (%(known)s::text[]) OR (node = ANY (%(nodes)s::text[]) AND NOT EXISTS (
            SELECT FROM seen AS s WHERE s.node = h.node AND s.component = h.component)))
    ), told AS (
        INSERT INTO event (at, kind, node, component, severity, message)
        SELECT now() - make_interval(secs => age), kind, node, component, severity, message
        FROM unnest(%(event_ages)s::double precision[], %(kinds)s::text[], %(event_nodes)s::text[],
                    %(event_components)s::text[], %(severities)s::text[], %(messages)s::text[])
             AS e (age, kind, node, component, severity, message)
        UNION ALL
        SELECT now(), 'component', node, component,
            CASE WHEN state IN ('failed', 'unhealthy', 'unknown', 'absent', 'down', 'stale')
                 THEN 'warning' ELSE 'info' END,
            node || ': ' || component || ' is ' || state || ', was ' || was
            || CASE WHEN detail <> '' THEN ': ' || detail ELSE '' END
        FROM written WHERE changed
        UNION ALL
        SELECT now(), 'node_silent', node, 'watchdog', 'critical', node || ' does not answer'
        FROM silent WHERE component = 'watchdog'
        RETURNING kind, node, component, severity, message
    )
    SELECT * FROM told WHERE kind IN ('component', 'node_silent')
"""


class StoreError(Exception):
    """The database cannot be used now; str() is one line without any secret."""


class RefusedError(Exception):
    """What was asked for cannot be done; str() says why."""


class _Connection(psycopg.Connection[Record]):
    """A connection on which nothing waits longer than until `deadline`, even when the server's machine has gone."""

    deadline = float("inf")

    def wait(self, gen: Generator[Wait, Ready | int, T], interval: float = 0.1, timeout: float | None = None) -> T:
        """Run psycopg's generator; when the time is over, close and raise TimeoutError."""
        poll = select.poll()
        try:
            wanted = next(gen)
            while True:
                poll.register(
                    self.pgconn.socket,
                    (select.POLLIN if wanted & Wait.R else 0) | (select.POLLOUT if wanted & Wait.W else 0),
                )
                left = self.deadline - time.monotonic()
                found = poll.poll(min(left, 3600) * 1000) if left > 0 else []
                if not found:
                    self.pgconn.finish()
                    raise TimeoutError("no answer in time")
                # After an error or a hang-up it may do both: libpq finds out which it was.
                ready = sum(bit for bit, event in _READY if found[0][1] & ~event) & wanted
                wanted = gen.send(Ready(ready or wanted))
        except StopIteration as stop:
            result: T = stop.value
            return result


# What is ready unless poll says nothing but the other.
_READY = ((int(Ready.R), select.POLLOUT), (int(Ready.W), select.POLLIN))


class Server:
    """The servers of which one is the primary. Shared by all links of a process: what one learns, the others know."""

    def __init__(self, config: Config) -> None:
        """Take over the configuration; connects to nothing. Raises ConfigError for an unreadable password."""
        if config.database is None:
            raise ConfigError("database: is missing")
        self.config = config.database
        self.node = config.node.name
        self.timeout_s = config.loop.timeout_s
        self.newest_timeline = 0
        self._password = read_secret(self.config.password_file) if self.config.password_file else None
        self._trying: dict[str, threading.Thread] = {}

    def connect(self, purpose: str, timeout_s: float) -> _Connection:
        """Ask all hosts at once and return a connection to the primary with the newest timeline. Raises StoreError.

        A host that is dead then costs the others no time.
        """
        answers: queue.SimpleQueue[tuple[str, int, _Connection | str]] = queue.SimpleQueue()
        over = threading.Event()
        begin = time.monotonic()
        for host in self.config.hosts:
            if (old := self._trying.get(host + purpose)) is not None and old.is_alive():
                continue
            self._trying[host + purpose] = thread = threading.Thread(
                target=self._try, args=(host, purpose, timeout_s, answers, over), name=f"connect {host}", daemon=True
            )
            thread.start()
        best: _Connection | None = None
        errors: list[str] = []
        end = begin + timeout_s
        waiting = len(self.config.hosts)
        while waiting:
            try:
                host, timeline, answer = answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                errors.append("no answer in time")
                break
            waiting -= 1
            if isinstance(answer, str):
                errors.append(f"{host}: {answer}")
            elif timeline < self.newest_timeline:
                answer.close()
                errors.append(f"{host}: a former primary")
            else:
                if best is not None:
                    best.close()
                best, self.newest_timeline = answer, timeline
                # The other one, if it is a primary, too, has a moment to say so.
                end = min(end, time.monotonic() + 0.2)
        over.set()
        if best is None:
            raise StoreError("; ".join(errors) or "no host answers")
        return best

    def _try(
        self,
        host: str,
        purpose: str,
        timeout_s: float,
        answers: "queue.SimpleQueue[tuple[str, int, _Connection | str]]",
        over: threading.Event,
    ) -> None:
        try:
            connection = _Connection.connect(self._conninfo(host, purpose), autocommit=True)
            connection.deadline = time.monotonic() + timeout_s
            found = connection.execute(f"SELECT {_TIMELINE}").fetchone()
        except (psycopg.Error, OSError) as error:
            answers.put((host, 0, one_line(error)))
            return
        if over.is_set():
            connection.close()
        else:
            answers.put((host, int(found[0]) if found else 0, connection))

    def _conninfo(self, host: str, purpose: str) -> str:
        config, milliseconds = self.config, round(self.timeout_s * 1000)
        tls = {"sslmode": "verify-full", "sslrootcert": str(config.ca)} if config.ca else {"sslmode": "disable"}
        return make_conninfo(
            host=host, port=config.port, dbname=config.name, user=config.user, password=self._password,
            target_session_attrs="read-write", application_name=f"airflow-watchdog {purpose} {self.node}",
            # libpq takes 2 s at least; connect() itself waits no longer than it may.
            connect_timeout=max(2, round(self.timeout_s)), tcp_user_timeout=milliseconds, keepalives_idle=5,
            # A synchronous standby that is away must not hold up the lease.
            options=f"-c statement_timeout={milliseconds} -c lock_timeout={milliseconds} -c synchronous_commit=local"
                    " -c client_min_messages=warning -c timezone=UTC",
            **tls,
        )  # fmt: skip


class Link:
    """One connection that is made when needed, and made anew after any error."""

    def __init__(self, server: Server, purpose: str, listen: bool = False) -> None:
        """`purpose` is shown in pg_stat_activity; `listen`: hear of changes at once."""
        self.server = server
        self._purpose = purpose
        self._listen = listen
        self._connection: _Connection | None = None

    def fetch(self, statement: LiteralString, values: dict[str, Any] | None = None) -> list[Record]:
        """Run one statement; it is done or given up within the loop's timeout. Raises StoreError."""
        end = time.monotonic() + self.server.timeout_s
        try:
            connection = self._open(end)
            connection.deadline = end
            cursor = connection.execute(statement, values)
            return cursor.fetchall() if cursor.description else []
        except (psycopg.Error, OSError) as error:
            self.close()
            raise StoreError(one_line(error)) from None

    def _open(self, end: float) -> _Connection:
        if self._connection is not None and not self._connection.closed:
            return self._connection
        self._connection = connection = self.server.connect(self._purpose, max(0.05, end - time.monotonic()))
        connection.deadline = end
        if self._listen:
            connection.execute("LISTEN airflow_watchdog")
        return connection

    def migrate(self) -> None:
        """Make the tables, or bring them up to date. Safe to call from all nodes at once. Raises StoreError."""
        end = time.monotonic() + self.server.timeout_s
        try:
            connection = self._open(end)
            connection.deadline = end
            with connection.transaction():
                connection.execute("SELECT pg_advisory_xact_lock(7100230411)")
                connection.execute("CREATE TABLE IF NOT EXISTS migration (number int PRIMARY KEY)")
                done = {row[0] for row in connection.execute("SELECT number FROM migration").fetchall()}
                for number, statement in enumerate(MIGRATIONS, start=1):
                    if number not in done:
                        connection.execute(statement)
                        connection.execute("INSERT INTO migration VALUES (%s)", [number])
        except (psycopg.Error, OSError) as error:
            self.close()
            raise StoreError(one_line(error)) from None

    def fileno(self) -> int | None:
        """Return what to select on for notifications; None while not connected."""
        if self._connection is None or self._connection.closed:
            return None
        return self._connection.fileno()

    def notified(self) -> bool:
        """Whether something came that was worth waking up for. A connection that has ended counts, too."""
        if self._connection is None or self._connection.closed:
            return True
        try:
            self._connection.pgconn.consume_input()
            found = False
            while self._connection.pgconn.notifies() is not None:
                found = True
            return found
        except psycopg.Error:
            self.close()
            return True

    def close(self) -> None:
        """Drop the connection; the next call makes a new one."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error, OSError):
                connection.close()


class Lease:
    """The lease in the database: carries out lease.Command."""

    def __init__(self, server: Server, ttl_s: float) -> None:
        """`ttl_s`: how long a lease lasts."""
        self.link = Link(server, "lease", listen=True)
        self._ttl_s = ttl_s
        self._migrated = False

    def execute(self, command: lease.Command) -> lease.Answer:
        """Carry out the command and say what came of it; never raises for an unusable database."""
        sent_at = clock()
        try:
            if not self._migrated:
                self.link.migrate()
                self._migrated = True
                # What comes now counts from now.
                sent_at = clock()
            rows = self.link.fetch(*self._statement(command))
            if not rows:
                self._migrated = False
                raise StoreError("the lease's row is missing")
        except StoreError as error:
            if "does not exist" in str(error):
                self._migrated = False
            return lease.Answer(command, sent_at, clock(), error=str(error))
        done, *row = rows[0][:11]
        self.link.server.newest_timeline = max(self.link.server.newest_timeline, row[4])
        return lease.Answer(command, sent_at, clock(), lease.Row(*row), bool(done))

    def _statement(self, command: lease.Command) -> tuple[LiteralString, dict[str, Any]]:
        values: dict[str, Any] = {"node": self.link.server.node, "ttl": self._ttl_s}
        match command:
            case lease.Acquire(version, timeline):
                return _ACQUIRE, values | {"version": version, "timeline": timeline}
            case lease.Renew(epoch):
                return _RENEW, values | {"epoch": epoch}
            case lease.Release(epoch, reserved_for):
                return _RELEASE, values | {"epoch": epoch, "reserved_for": reserved_for}
        return _POLL, {}


@dataclass(frozen=True)
class Beat:
    """The state of one component of one node, seen `age_s` ago."""

    node: str
    rack: str
    component: str
    state: str
    detail: str = ""
    age_s: float = 0.0


class Heartbeats:
    """Writes what was seen of all nodes."""

    def __init__(self, server: Server, interval_s: float) -> None:
        """`interval_s`: how often `write` will be called; what is old follows from it."""
        self.link = Link(server, "heartbeat")
        self._silent_s = SILENT_LOOPS * interval_s
        self._swept_at = float("-inf")

    def write(self, beats: Iterable[Beat], events: Sequence[Event], known: Sequence[str]) -> list[Event]:
        """Write all in one statement. Return the changes of state that this write was the first to bring.

        `known`: all nodes there are; others are forgotten. Raises StoreError.
        """
        beats = list(beats)
        now = time.time()
        rows = self.link.fetch(
            _BEAT,
            {
                "nodes": [beat.node for beat in beats],
                "racks": [beat.rack for beat in beats],
                "components": [beat.component for beat in beats],
                "states": [str(beat.state) for beat in beats],
                "details": [beat.detail[:500].replace("\0", "") for beat in beats],
                "ages": [beat.age_s for beat in beats],
                "silent": self._silent_s,
                "known": list(known),
                "event_ages": [max(0.0, now - event.at) for event in events],
                "kinds": [event.kind for event in events],
                "event_nodes": [event.node for event in events],
                "event_components": [event.component for event in events],
                "severities": [event.severity for event in events],
                "messages": [event.message[:2000].replace("\0", "") for event in events],
            },
        )
        return [Event(kind, node, text, component, severity, now) for kind, node, component, severity, text in rows]

    def sweep_when_due(self) -> None:
        """Forget old events, once an hour. Raises StoreError."""
        if time.monotonic() - self._swept_at < 3600:
            return
        self.link.fetch(
            "DELETE FROM event WHERE at < now() - make_interval(days => %(days)s)",
            {"days": self.link.server.config.event_retention_days},
        )
        self._swept_at = time.monotonic()


class Control:
    """What an operator may ask for."""

    def __init__(self, config: Config) -> None:
        """Connects at the first call. Raises ConfigError without [database]."""
        self._link = Link(Server(config), "cli")
        self._silent_s = SILENT_LOOPS * config.loop.interval_s

    def history(self, limit: int) -> list[Event]:
        """Return the newest events, oldest first; `at` by the database's clock. Raises StoreError."""
        rows = self._link.fetch(
            """SELECT kind, node, message, component, severity, extract(epoch FROM at)::double precision
               FROM event ORDER BY at DESC, id DESC LIMIT %(limit)s""",
            {"limit": limit},
        )
        return [Event(*row) for row in reversed(rows)]

    def pause(self, seconds: float, reason: str, by: str) -> None:
        """Let no scheduler move for so many seconds. Raises StoreError."""
        self._link.fetch(
            """UPDATE lease SET version = version + 1, pause_reason = %(reason)s, wanted = NULL,
               paused_until = clock_timestamp() + make_interval(secs => %(seconds)s) WHERE name = 'scheduler'""",
            {"seconds": seconds, "reason": reason},
        )
        self._told("paused", f"{by} paused the watchdogs for {seconds:.0f} s: {reason}", "warning")

    def resume(self, by: str) -> bool:
        """End a pause; False if there was none. Raises StoreError."""
        rows = self._link.fetch(
            """UPDATE lease SET version = version + 1, paused_until = NULL, pause_reason = ''
               WHERE name = 'scheduler' AND paused_until > clock_timestamp() RETURNING true"""
        )
        if rows:
            self._told("resumed", f"{by} ended the pause")
        return bool(rows)

    def switchover(self, target: str | None, by: str) -> None:
        """Ask the holder to hand over to `target`, or to whoever is quickest. Raises RefusedError, StoreError."""
        (holder, paused, seen), *_ = self._link.fetch(
            """SELECT holder, paused_until > clock_timestamp(), %(target)s::text IS NULL OR EXISTS (
                   SELECT FROM heartbeat WHERE node = %(target)s AND component = 'watchdog'
                   AND seen_at > now() - make_interval(secs => %(silent)s))
               FROM lease WHERE name = 'scheduler'""",
            {"target": target, "silent": self._silent_s},
        )
        if paused:
            raise RefusedError("the watchdogs are paused")
        if holder is None:
            raise RefusedError("nobody is in charge of the scheduler now")
        if holder == target:
            raise RefusedError(f"{target} is in charge already")
        if not seen:
            raise RefusedError(f"nothing was heard of the watchdog of {target} lately")
        self._link.fetch(
            """UPDATE lease SET wanted = %(target)s, wanted_until = clock_timestamp() + make_interval(secs => %(s)s)
               WHERE name = 'scheduler'""",
            {"target": target or "*", "s": WANTED_S},
        )
        self._told("switchover_asked", f"{by} asks {holder} to hand the scheduler over to {target or 'any other node'}")

    def withdraw(self) -> None:
        """Take back a switchover that nobody has followed yet. Raises StoreError."""
        self._link.fetch("UPDATE lease SET wanted = NULL WHERE name = 'scheduler'")

    def close(self) -> None:
        """Drop the connection."""
        self._link.close()

    def _told(self, kind: str, message: str, severity: Severity = "info") -> None:
        self._link.fetch(
            """WITH told AS (INSERT INTO event (kind, node, component, severity, message)
                             VALUES (%(kind)s, %(node)s, 'scheduler', %(severity)s, %(message)s) RETURNING id)
               SELECT pg_notify('airflow_watchdog', %(kind)s) FROM told""",
            {"kind": kind, "node": self._link.server.node, "severity": severity, "message": message},
        )


def one_line(error: BaseException) -> str:
    """Return an error's text in one line; libpq's never holds the password."""
    return " ".join(str(error).split()) or type(error).__name__
