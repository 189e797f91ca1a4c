"""The data node's agent: what Redis says of itself.

Speaks the little of Redis' protocol that it needs: redis-py would cost every data node 20 MB.
Source: Redis' protocol specification (RESP2) and the documentation of INFO.
"""

import socket
import ssl
import time

from airflow_watchdog.agent import AskError, Watched
from airflow_watchdog.config import ConfigError, Redis, read_secret
from airflow_watchdog.snapshot import RedisState

MAX_REPLY_BYTES = 65536
RECONNECT_S = 10.0


class RedisAgent:
    """This node's Redis."""

    def __init__(self, settings: Redis, timeout_s: float) -> None:
        self._settings, self._timeout_s = settings, timeout_s
        self._link: socket.socket | None = None
        self._connected_at = self._deadline = 0.0
        self._unread = b""
        self._context: ssl.SSLContext | None = None
        self._watched = Watched[RedisState](
            self._ask, lambda role, detail: RedisState(role=role, detail=detail), 2 * timeout_s
        )

    def state(self) -> RedisState:
        """Return what Redis says of itself; role down or unknown, and why, if it does not."""
        return self._watched.state()

    def close(self) -> None:
        """Drop the connection."""
        if self._link is not None:
            self._link.close()
            self._link = None
        self._unread = b""

    def _ask(self) -> RedisState:
        self._deadline = time.monotonic() + self._timeout_s
        try:
            if self._link is None or time.monotonic() - self._connected_at > RECONNECT_S:
                self.close()
                self._connect()
            return read_info(self._do("INFO", "replication"), self._do("INFO", "persistence"))
        except ConnectionRefusedError:
            self.close()
            raise AskError("down", "connection refused") from None
        except (OSError, ValueError, ConfigError) as error:
            # ValueError: it does not speak Redis' protocol.
            self.close()
            late = isinstance(error, TimeoutError)
            raise AskError("unknown", "no answer in time" if late else str(error) or type(error).__name__) from None
        except AskError:
            self.close()
            raise

    def _connect(self) -> None:
        own = self._settings
        raw = socket.create_connection((own.address, own.port), timeout=self._left())
        self._link = raw
        if own.ca:
            if self._context is None:
                self._context = ssl.create_default_context(cafile=str(own.ca))
                self._context.minimum_version = ssl.TLSVersion.TLSv1_2
            self._link = self._context.wrap_socket(raw, server_hostname=own.host or own.address)
        self._connected_at = time.monotonic()
        if own.password_file:
            secret = read_secret(own.password_file)
            self._do("AUTH", *([own.user] if own.user else []), secret)

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _do(self, *words: str) -> str:
        """Send a command and return its reply. An error reply never quotes the command's secrets."""
        assert self._link is not None
        parts = [word.encode() for word in words]
        request = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        self._link.settimeout(self._left())
        self._link.sendall(request)
        line = self._line()
        kind, text = line[:1], line[1:].decode(errors="replace")
        if kind == b"+":
            return text
        if kind == b"$" and 0 <= int(text) <= MAX_REPLY_BYTES:
            return self._exactly(int(text) + 2)[:-2].decode(errors="replace")
        if kind == b"-":
            raise AskError("loading" if text.startswith("LOADING") else "unknown", f"{words[0]}: {text}")
        raise ValueError("not Redis' protocol")

    def _receive(self) -> None:
        assert self._link is not None
        self._link.settimeout(self._left())
        data = self._link.recv(16384)
        if not data:
            raise ConnectionError("connection closed")
        self._unread += data
        if len(self._unread) > 2 * MAX_REPLY_BYTES:
            raise ValueError("too long a reply")

    def _line(self) -> bytes:
        while b"\r\n" not in self._unread:
            self._receive()
        line, _, self._unread = self._unread.partition(b"\r\n")
        return line

    def _exactly(self, size: int) -> bytes:
        while len(self._unread) < size:
            self._receive()
        found, self._unread = self._unread[:size], self._unread[size:]
        return found


def read_info(replication: str, persistence: str) -> RedisState:
    """Return the state that the two sections of INFO tell. Raises ValueError for anything else.

    Lag, in bytes of the replication stream: of a primary, how far its farthest connected replica is behind; of a
    replica, what it received but has not processed.
    """
    info = dict(
        line.split(":", 1) for line in (replication + "\n" + persistence).replace("\r", "").split("\n") if ":" in line
    )
    role = {"master": "primary", "slave": "replica"}.get(info.get("role", ""))
    if role is None:
        raise ValueError("INFO says no role")
    if info.get("loading") == "1":
        return RedisState(role="loading", detail=f"a {role} that loads its data")
    if role == "primary":
        offset = int(info["master_repl_offset"])
        replicas = [
            dict(pair.split("=", 1) for pair in value.split(",") if "=" in pair)
            for name, value in info.items()
            if name.startswith("slave") and name[5:].isdigit()
        ]
        lags = [offset - int(replica["offset"]) for replica in replicas if replica.get("state") == "online"]
        return RedisState(role=role, replicas=len(lags), lag_bytes=max(lags, default=None))
    up = info.get("master_link_status") == "up"
    read, done = info.get("slave_read_repl_offset"), info.get("slave_repl_offset")
    lag = max(0, int(read) - int(done)) if up and read and done else None
    detail = "" if up else f"no link to its primary {info.get('master_host', '')}"
    return RedisState(role=role, link_up=up, lag_bytes=lag, detail=detail)
