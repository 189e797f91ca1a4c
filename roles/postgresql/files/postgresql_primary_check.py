"""Answers load balancers whether this node's PostgreSQL is the primary: `GET /primary`, `/replica`, `/health`.

200 or 503, with JSON that says why. Whatever goes wrong is a 503: a server whose role is not certain gets no traffic.
"""

from __future__ import annotations

import argparse
import json
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psycopg2

PATHS = {"/primary": {"primary"}, "/replica": {"replica"}, "/health": {"primary", "replica"}}
CACHE_S = 0.1
# A new connection from time to time proves that the server still takes any.
RECONNECT_S = 2.0
DATABASE_TIMEOUT_S = 2
TIMEOUTS = f"connect_timeout={DATABASE_TIMEOUT_S} options='-c statement_timeout={DATABASE_TIMEOUT_S}s'"
CLIENT_TIMEOUT_S = 5
QUERY = """
    select pg_is_in_recovery(),
           case when pg_is_in_recovery() then (pg_control_checkpoint()).timeline_id
                else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int end,
           coalesce(pg_wal_lsn_diff(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()), 0)::bigint,
           exists (select from pg_stat_wal_receiver where status = 'streaming')
"""


class Database:
    """What PostgreSQL says of itself, asked at most every CACHE_S seconds however many ask us."""

    def __init__(self, port: int) -> None:
        self._conninfo = f"dbname=postgres port={port} application_name=primary-check {TIMEOUTS}"
        self._lock = threading.Lock()
        self._state: dict[str, Any] = {}
        self._asked_at = float("-inf")
        self._connection: Any = None
        self._connected_at = 0.0

    def state(self) -> dict[str, Any]:
        """Role, timeline and lag; role "unknown" and why, when there is no clear answer."""
        if not self._lock.acquire(timeout=2 * DATABASE_TIMEOUT_S):
            return {"role": "unknown", "error": "no answer in time"}
        try:
            if time.monotonic() - self._asked_at > CACHE_S:
                self._state, self._asked_at = self._ask(), time.monotonic()
            return self._state
        finally:
            self._lock.release()

    def _ask(self) -> dict[str, Any]:
        try:
            if self._connection is None or time.monotonic() - self._connected_at > RECONNECT_S:
                self._disconnect()
                self._connection, self._connected_at = psycopg2.connect(self._conninfo), time.monotonic()
                self._connection.autocommit = True
            with self._connection.cursor() as cursor:
                cursor.execute(QUERY)
                in_recovery, timeline, lag, streaming = cursor.fetchone()
        except psycopg2.Error as error:
            self._disconnect()
            return {"role": "unknown", "error": str(error).strip().partition("\n")[0]}
        if in_recovery:
            return {"role": "replica", "timeline": timeline, "replay_lag_bytes": lag, "streaming": streaming}
        return {"role": "primary", "timeline": timeline}

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Server(ThreadingHTTPServer):
    """HTTPS with the handshake in the connection's own thread, where a slow client holds up nobody else."""

    request_queue_size = 128

    def __init__(self, port: int, database: Database, certificate: str, key: str) -> None:
        self.database = database
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        super().__init__(("", port), Handler)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve one connection: handshake first, everything under a time-out."""
        request.settimeout(CLIENT_TIMEOUT_S)
        with self._context.wrap_socket(request, server_side=True) as connection:
            super().finish_request(connection, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up, time out or speak no TLS are none of our business."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_GET(self) -> None:
        """Answer 200 when the role is among those that the path asks for, 503 when not, 404 for other paths."""
        roles = PATHS.get(self.path.partition("?")[0])
        state = self.server.database.state() if roles else {"error": "not found"}
        body = json.dumps(state).encode()
        self.send_response(404 if roles is None else 200 if state["role"] in roles else 503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        """Answer as to GET, without the body."""
        self.do_GET()

    def log_message(self, *_args: Any, **_kwargs: Any) -> None:
        """Say nothing: load balancers ask every second."""


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for option, kind in {"--port": int, "--database-port": int, "--certificate": str, "--key": str}.items():
        parser.add_argument(option, type=kind, required=True)
    options = parser.parse_args()
    Server(options.port, Database(options.database_port), options.certificate, options.key).serve_forever()


if __name__ == "__main__":
    main()
