"""The data node's agent: what PostgreSQL says of itself, and whether this primary is one of the past.

A primary is of the past (stale) when another node, that answers now, is primary on a newer timeline: then the cluster
was failed over while this one was away, and it must not be written to. Nobody's silence ever makes a primary stale, and
what a node said earlier counts no more once it says otherwise: a cluster restored onto a lower timeline is welcome.
"""

import contextlib
import json
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from airflow_watchdog.config import Postgresql
from airflow_watchdog.snapshot import PostgresqlState, RedisState

if TYPE_CHECKING:
    import psycopg

# Less than the shortest interval of HAProxy's checks (100 ms), however many ask.
CACHE_S = 0.09
# A new connection from time to time proves that the server still takes any.
RECONNECT_S = 2.0
DETAIL_LENGTH = 300
# A primary that was told to stop gets so long before it is told again.
FENCE_PERIOD_S = 10.0
FENCED_FILE = "postgresql-fenced.json"
# Lag is what a standby has not replayed of what its primary last told it of.
QUERY = b"""
    select pg_is_in_recovery(),
           case when pg_is_in_recovery()
                then coalesce((select received_tli from pg_stat_wal_receiver), (pg_control_checkpoint()).timeline_id)
                else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int end,
           case when pg_is_in_recovery() then greatest(0, pg_wal_lsn_diff(
                greatest(pg_last_wal_receive_lsn(), (select latest_end_lsn from pg_stat_wal_receiver)),
                pg_last_wal_replay_lsn()))::bigint end,
           exists (select from pg_stat_wal_receiver where status = 'streaming'),
           pg_is_in_recovery() and pg_is_wal_replay_paused()
"""

State = TypeVar("State", PostgresqlState, RedisState)
log = logging.getLogger(__name__)


class AskError(Exception):
    """The server gave no usable answer; `role` is what follows from that: down or unknown."""

    def __init__(self, role: str, detail: str) -> None:
        super().__init__(detail)
        self.role = role


class Watched(Generic[State]):
    """A server's state, asked for by one thread at a time and kept for CACHE_S, with since when its role is so.

    `ask` raises AskError; `patience_s` is how long a thread waits for another one's question.
    """

    def __init__(self, ask: Callable[[], State], failed: Callable[[str, str], State], patience_s: float) -> None:
        self._ask: Callable[[], State] = ask
        self._failed: Callable[[str, str], State] = failed
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._state: State = failed("unknown", "not asked yet")
        self._asked_at = float("-inf")
        self._since = time.monotonic()

    def state(self, max_age_s: float | None = None) -> State:
        """Return the state, at most so old (CACHE_S); its `for_s` is up to date."""
        if not self._lock.acquire(timeout=self._patience_s):
            return self._failed("unknown", "no answer in time")
        try:
            if time.monotonic() - self._asked_at > (CACHE_S if max_age_s is None else max_age_s):
                state = self._answer()
                now = time.monotonic()
                if state.role != self._state.role:
                    self._since = now
                self._state, self._asked_at = state, now
            return self._state.model_copy(update={"for_s": round(time.monotonic() - self._since, 3)})
        finally:
            self._lock.release()

    def _answer(self) -> State:
        try:
            return self._ask()
        except AskError as error:
            return self._failed(error.role, str(error)[:DETAIL_LENGTH])


class _Link:
    """The connection to PostgreSQL. Every question has a deadline, even if the server hangs in the middle of it."""

    def __init__(self, settings: Postgresql, timeout_s: float) -> None:
        self._settings, self._timeout_s = settings, timeout_s
        self._connection: psycopg.Connection | None = None
        self._connected_at = 0.0

    def ask(self) -> PostgresqlState:
        """Put the question. Raises AskError."""
        # Here, since only data nodes need it.
        import psycopg

        try:
            if self._connection is None or time.monotonic() - self._connected_at > RECONNECT_S:
                row = self._on_a_new_connection()
            else:
                try:
                    row = self._query(self._connection)
                except psycopg.errors.QueryCanceled:
                    raise
                except psycopg.Error:
                    # Somebody ended our connection: that alone says nothing.
                    row = self._on_a_new_connection()
        except (psycopg.Error, OSError) as error:
            self.close()
            text = " ".join(str(error).split()) or type(error).__name__
            nobody = "No such file or directory" in text or "Connection refused" in text
            raise AskError("down" if nobody else "unknown", text) from None
        in_recovery, timeline, lag, streaming, paused = row
        if in_recovery != "t":
            return PostgresqlState(role="primary", timeline=int(timeline))
        return PostgresqlState(
            role="standby",
            timeline=int(timeline),
            lag_bytes=int(lag) if lag else None,
            streaming=streaming == "t",
            detail="replay is paused" if paused == "t" else "" if streaming == "t" else "not connected to a primary",
        )

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _on_a_new_connection(self) -> list[str]:
        self.close()
        self._connection, self._connected_at = self._connect(), time.monotonic()
        return self._query(self._connection)

    def _connect(self) -> "psycopg.Connection":
        import psycopg

        return psycopg.connect(
            host=str(self._settings.socket),
            port=self._settings.port,
            user=self._settings.user,
            dbname=self._settings.database,
            application_name="airflow-watchdog agent",
            connect_timeout=max(2, round(self._timeout_s)),
            autocommit=True,
        )

    def _query(self, connection: "psycopg.Connection") -> list[str]:
        """Ask below psycopg's cursors, which wait for ever on a server that hangs."""
        from psycopg import OperationalError, errors, pq

        link, deadline = connection.pgconn, time.monotonic() + self._timeout_s
        link.send_query(QUERY)
        poller = select.poll()
        poller.register(link.socket, select.POLLIN)
        while link.is_busy():
            if not poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise errors.QueryCanceled("no answer in time")
            link.consume_input()
        result = link.get_result()
        if result is None or result.status != pq.ExecStatus.TUPLES_OK:
            raise OperationalError((result.error_message if result else b"no answer").decode(errors="replace"))
        row = [(result.get_value(0, column) or b"").decode() for column in range(result.nfields)]
        # The result's end, without which the next question cannot be put.
        while link.get_result() is not None:
            pass
        return row


class PostgresqlAgent:
    """This node's PostgreSQL. `stop` ends a unit, and may raise anything; `folder` is kept over restarts."""

    def __init__(
        self, settings: Postgresql, timeout_s: float, stop: Callable[[str], object], folder: Path | None = None
    ) -> None:
        self._settings, self._stop = settings, stop
        self._link = _Link(settings, timeout_s)
        self._watched = Watched[PostgresqlState](
            self._link.ask, lambda role, detail: PostgresqlState(role=role, detail=detail), 2 * timeout_s
        )
        self._newer: tuple[str, int] | None = None
        self._rivals: tuple[str, ...] = ()
        self._stopped_at = float("-inf")
        self._marker = folder / FENCED_FILE if folder else None

    def state(self) -> PostgresqlState:
        """Return what to tell: a primary of the past is "stale". Never raises; takes 2 time-outs at most."""
        return self._told(self._watched.state())

    def judge(self, peers: Mapping[str, PostgresqlState]) -> PostgresqlState:
        """Compare with the data nodes that answered in this very loop, and return the state that follows.

        Stops this PostgreSQL when it is a primary of the past (and `fence` is on). Its unit asks the peers when it is
        started again, and finds in the marker that it must be a standby even if it reaches none of them.
        """
        own = self._watched.state(max_age_s=0)
        self._newer, self._rivals = compare(own, peers)
        if self._newer and self._settings.fence:
            self._fence(own, *self._newer)
        elif own.role == "standby" or (own.role == "primary" and peers and not self._newer):
            self._unmark()
        return self._told(own)

    def close(self) -> None:
        """Drop the connection."""
        self._link.close()

    def _told(self, state: PostgresqlState) -> PostgresqlState:
        if state.role == "primary" and self._newer:
            peer, timeline = self._newer
            detail = f"{peer} is primary on the newer timeline {timeline}"
            return state.model_copy(update={"role": "stale", "detail": detail})
        if state.role == "primary" and self._rivals:
            return state.model_copy(update={"detail": f"also primary on this timeline: {', '.join(self._rivals)}"})
        if state.role == "down" and self._marked():
            detail = "stopped by airflow-watchdog: it was the primary of an older timeline"
            return state.model_copy(update={"detail": detail})
        return state

    def _fence(self, own: PostgresqlState, peer: str, timeline: int) -> None:
        now = time.monotonic()
        if now - self._stopped_at < FENCE_PERIOD_S:
            return
        self._stopped_at = now
        log.error(
            "PostgreSQL is primary on timeline %s and %s on the newer %s: stopping it", own.timeline, peer, timeline
        )
        self._mark({"own_timeline": own.timeline, "peer": peer, "peer_timeline": timeline})
        self._link.close()
        try:
            self._stop(self._settings.unit)
        except Exception as error:
            log.error("%s was not stopped: %s", self._settings.unit, error)

    # --- the marker ------------------------------------------------------------------------------

    def _marked(self) -> bool:
        return self._marker is not None and self._marker.exists()

    def _mark(self, why: Mapping[str, object]) -> None:
        if self._marker is None:
            return
        try:
            with self._marker.open("w", encoding="utf-8") as stream:
                json.dump(why, stream)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            log.error("%s: %s", self._marker, error.strerror)

    def _unmark(self) -> None:
        if self._marker is not None:
            with contextlib.suppress(OSError):
                self._marker.unlink(missing_ok=True)


def compare(
    own: PostgresqlState, peers: Mapping[str, PostgresqlState]
) -> tuple[tuple[str, int] | None, tuple[str, ...]]:
    """Return the peer that is primary on the newest timeline, if newer than this primary's, and those on the same."""
    if own.role != "primary" or own.timeline is None:
        return None, ()
    primaries = [(s.timeline, name) for name, s in peers.items() if s.role == "primary" and s.timeline is not None]
    timeline, name = max(primaries, default=(0, ""))
    if timeline > own.timeline:
        return (name, timeline), ()
    return None, tuple(sorted(name for timeline, name in primaries if timeline == own.timeline))
