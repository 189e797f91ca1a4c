"""Asks the other nodes' watchdogs how they are, all at once, over TLS; a slow one delays nobody."""

import http.client
import logging
import socket
import ssl
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from airflow_watchdog.config import Config, Peer
from airflow_watchdog.snapshot import PeerView, PostgresqlState, Snapshot

AT_ONCE = 16
# So many nodes are asked per second at most, lest hundreds of them cost a core.
PER_SECOND = 50
TOO_LATE = "no answer in time"
_MAX_BYTES = 1 << 20
log = logging.getLogger(__name__)


class PeerError(Exception):
    """A peer gave no usable answer; str() says why."""


@dataclass
class _Known:
    """What is known of a peer; times by the monotonic clock."""

    snapshot: Snapshot | None = None
    seen_at: float | None = None
    answering: bool | None = None
    since: float = 0.0
    detail: str = ""


class _Link:
    """One peer, asked over one connection as long as that lives."""

    def __init__(self, peer: Peer, ca: str, timeout_s: float) -> None:
        self._peer, self._ca, self._timeout_s = peer, ca, timeout_s
        self._connection: http.client.HTTPSConnection | None = None

    def ask(self) -> Snapshot:
        """Return what the peer says of itself. Raises PeerError."""
        again = self._connection is not None
        try:
            return self._ask()
        except PeerError as error:
            # It may have ended the connection meanwhile, which says nothing.
            if not again or str(error) == TOO_LATE:
                raise
            return self._ask()

    def _ask(self) -> Snapshot:
        try:
            if self._connection is None:
                self._connection = self._connect()
            self._connection.request("GET", "/health")
            response = self._connection.getresponse()
            # 503 says that something is wrong there, and has the same body.
            body = response.read(_MAX_BYTES)
            if response.will_close or response.read(1):
                self.close()
            snapshot = Snapshot.model_validate_json(body)
        except TimeoutError:
            self.close()
            raise PeerError(TOO_LATE) from None
        except OSError as error:
            self.close()
            raise PeerError(getattr(error, "verify_message", "") or error.strerror or type(error).__name__) from None
        except (ValueError, http.client.HTTPException):
            self.close()
            raise PeerError("not the answer of a watchdog") from None
        if snapshot.node != self._peer.name:
            self.close()
            raise PeerError(f"says that it is {snapshot.node}")
        return snapshot

    def _connect(self) -> http.client.HTTPSConnection:
        peer = self._peer
        # A new context each time: the CA's file may have changed, and connections last.
        context = ssl.create_default_context(cafile=self._ca)
        raw = socket.create_connection((peer.address, peer.port), timeout=self._timeout_s)
        try:
            connection = http.client.HTTPSConnection(peer.address, peer.port, timeout=self._timeout_s, context=context)
            # The certificate is the node's, whatever address it was reached by.
            connection.sock = context.wrap_socket(raw, server_hostname=peer.name)
        except BaseException:
            raw.close()
            raise
        return connection

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Peers:
    """All peers. `look` is called by one thread; the rest by any."""

    def __init__(self, config: Config) -> None:
        """Connects to nobody yet."""
        ca, timeout_s = str(config.http.ca), config.loop.timeout_s
        self.period_s = max(config.loop.interval_s, len(config.peer) / PER_SECOND)
        self._peers = config.peer
        self._links = {peer.name: _Link(peer, ca, timeout_s) for peer in self._peers}
        now = time.monotonic()
        self._known = {peer.name: _Known(since=now) for peer in self._peers}
        self._asked: dict[str, Future[Snapshot]] = {}
        self._asked_at = float("-inf")
        self._pool = ThreadPoolExecutor(max(1, min(AT_ONCE, len(self._peers))), "peer")

    def look(self) -> None:
        """Take in the answers that have come, and ask whoever is not being asked. Never blocks, never raises."""
        now = time.monotonic()
        for name, future in list(self._asked.items()):
            if future.done():
                self._take(name, future)
                del self._asked[name]
        if now - self._asked_at < self.period_s * 0.9:
            return
        self._asked_at = now
        for peer in self._peers:
            if peer.name not in self._asked:
                self._asked[peer.name] = self._pool.submit(self._ask, peer.name)

    def wait(self, seconds: float) -> None:
        """Wait so long at most for those that are being asked."""
        wait(list(self._asked.values()), timeout=seconds)

    def _ask(self, name: str) -> Snapshot:
        return self._links[name].ask()

    def _take(self, name: str, future: "Future[Snapshot]") -> None:
        now, before = time.monotonic(), self._known[name]
        error = future.exception()
        answering = error is None
        since = before.since if before.answering is answering else now
        if error is None:
            self._known[name] = _Known(future.result(), now, True, since)
            return
        detail = str(error) if isinstance(error, PeerError) else type(error).__name__
        self._known[name] = _Known(None, before.seen_at, False, since, detail)

    def snapshots(self, max_age_s: float) -> dict[str, tuple[float, Snapshot]]:
        """Return those that answer now, each with its age in seconds."""
        now = time.monotonic()
        found = {}
        for name, known in self._known.items():
            if known.snapshot is not None and known.seen_at is not None and now - known.seen_at <= max_age_s:
                found[name] = (now - known.seen_at, known.snapshot)
        return found

    def postgresql(self, max_age_s: float) -> dict[str, PostgresqlState]:
        """Return what the PostgreSQL of each peer that answers now says of itself."""
        answers = self.snapshots(max_age_s).items()
        return {name: snapshot.postgresql for name, (_age, snapshot) in answers if snapshot.postgresql is not None}

    def views(self) -> tuple[PeerView, ...]:
        """Return all peers as they are to be shown."""
        now = time.monotonic()
        return tuple(
            PeerView(
                name=peer.name, rack=peer.rack, answering=known.answering, for_s=round(now - known.since, 3),
                seen_s=None if known.seen_at is None else round(now - known.seen_at, 3), detail=known.detail,
            )
            for peer in self._peers
            for known in (self._known[peer.name],)
        )  # fmt: skip

    def close(self) -> None:
        """Ask no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
