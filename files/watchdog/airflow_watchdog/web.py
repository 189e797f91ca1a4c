"""The HTTPS server: GET and HEAD of a few fixed paths, with limits on size, time and number of connections.

Load balancers and peers ask several times a second, so a request costs little; and whoever is slow, silent or many only
ever harms himself: the handshake is in the connection's own thread, a connection that takes too long is cut off, and
when there are too many, the client with the most of them loses its oldest.
"""

import contextlib
import json
import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from airflow_watchdog.config import Http

MAX_REQUEST_BYTES = 8192
MAX_CONNECTIONS = 64
REQUEST_TIMEOUT_S = 5.0  # handshake, and each request from its first byte to the last one of its answer
IDLE_TIMEOUT_S = 30.0  # between two requests of one connection
CERTIFICATE_PERIOD_S = 5.0
JSON = "application/json"
HEADERS = (("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"))

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Response:
    """An answer: status code, body, and what the body is."""

    status: int
    body: bytes
    content_type: str = JSON


# Gets the query's parameters (of several with one name the last); must not block for longer than a client may wait.
Route = Callable[[Mapping[str, str]], Response]


def json_response(status: int, content: Any) -> Response:
    """Return the content as JSON."""
    return Response(status, json.dumps(content, separators=(",", ":")).encode() + b"\n")


class _TooLongError(Exception):
    """A request beyond MAX_REQUEST_BYTES."""


@dataclass(slots=True)
class _Connection:
    client: str
    socket: ssl.SSLSocket
    deadline: float


class HttpsServer(ThreadingHTTPServer):
    """Serves the routes; `serve_forever` blocks, `start` does so in a thread. Raises OSError for an address in use.

    A certificate that is replaced is used within CERTIFICATE_PERIOD_S; one that can't be used is reported and the old
    one stays.
    """

    daemon_threads = True
    # Threads end with their connections, which end at their deadlines; nobody waits for them.
    block_on_close = False
    request_queue_size = 128

    def __init__(
        self,
        settings: Http,
        routes: Mapping[str, Route],
        max_connections: int = MAX_CONNECTIONS,
        listener: socket.socket | None = None,
    ) -> None:
        """`listener`: a socket that listens already, of a former life; only used at the configured address."""
        self._settings, self.routes, self._limit = settings, routes, max_connections
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._stamp, self._looked_at = self._certificate_stamp(), time.monotonic()
        self._context = self._load()
        self.address_family = socket.AF_INET6 if ":" in settings.address else socket.AF_INET
        address = settings.address, settings.port
        if listener is not None and listener.getsockname()[:2] != address:
            listener.close()
            listener = None
        super().__init__(address, _Handler, bind_and_activate=listener is None)
        if listener is not None:
            self.socket.close()
            self.socket, self.server_address = listener, listener.getsockname()

    def start(self, look_s: float = 0.5) -> threading.Thread:
        """Serve in a thread of its own until `stop`; look for slow clients and new certificates every `look_s`."""
        thread = threading.Thread(target=self.serve_forever, args=(look_s,), name="https", daemon=True)
        thread.start()
        return thread

    def stop(self) -> None:
        """Stop serving, and end the connections that are left. Only after `start`."""
        self.shutdown()
        self.server_close()
        with self._lock:
            for connection in self._connections.values():
                _cut(connection.socket)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server_address[1])

    # --- certificates ----------------------------------------------------------------------------

    def _certificate_stamp(self) -> tuple[tuple[int, int], ...]:
        def stamp(path: Path) -> tuple[int, int]:
            try:
                status = path.stat()
            except OSError:
                return 0, 0
            return status.st_mtime_ns, status.st_ino

        return stamp(self._settings.certificate), stamp(self._settings.key)

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # Clients that come again resume their session: no signature, which is most of a check's cost.
        context.num_tickets = 1
        context.load_cert_chain(self._settings.certificate, self._settings.key)
        return context

    def _reload(self) -> None:
        stamp = self._certificate_stamp()
        if stamp == self._stamp:
            return
        try:
            self._context = self._load()
            log.info("certificate reloaded")
        except (OSError, ValueError) as error:
            log.error("the new certificate cannot be used: %s", type(error).__name__)
        self._stamp = stamp

    # --- connections -----------------------------------------------------------------------------

    def get_request(self) -> tuple[Any, Any]:
        """Accept a connection; its handshake comes later, in its own thread."""
        raw, address = self.socket.accept()
        try:
            raw.settimeout(REQUEST_TIMEOUT_S)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return self._context.wrap_socket(raw, server_side=True, do_handshake_on_connect=False), address
        except (OSError, ValueError):
            raw.close()
            raise OSError("gone before it was accepted") from None

    def process_request(self, request: Any, client_address: Any) -> None:
        """Enter the connection into the books, make room for it if need be, and give it a thread."""
        entry = _Connection(str(client_address[0]), request, time.monotonic() + REQUEST_TIMEOUT_S)
        with self._lock:
            if len(self._connections) >= self._limit:
                self._make_room()
            self._connections[id(request)] = entry
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Serve one connection, in its thread."""
        try:
            request.do_handshake()
            self.touch(request, IDLE_TIMEOUT_S)
            super().finish_request(request, client_address)
        finally:
            with self._lock:
                self._connections.pop(id(request), None)

    def touch(self, request: Any, seconds: float) -> None:
        """Give a connection so long until its next step is done."""
        with self._lock:
            if entry := self._connections.get(id(request)):
                entry.deadline = time.monotonic() + seconds

    def _make_room(self) -> None:
        # Dictionaries keep the order of entry: the first is the oldest.
        client, _ = Counter(entry.client for entry in self._connections.values()).most_common(1)[0]
        key = next(key for key, entry in self._connections.items() if entry.client == client)
        _cut(self._connections.pop(key).socket)

    def service_actions(self) -> None:
        """Called by serve_forever: cut off who takes too long, look for a new certificate."""
        now = time.monotonic()
        with self._lock:
            for key in [key for key, entry in self._connections.items() if entry.deadline < now]:
                _cut(self._connections.pop(key).socket)
        if now - self._looked_at >= CERTIFICATE_PERIOD_S:
            self._looked_at = now
            self._reload()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up, time out or speak no TLS are none of our business."""


def _cut(connection: ssl.SSLSocket) -> None:
    """Wake whoever reads from or writes to the connection; its thread closes it."""
    with contextlib.suppress(OSError):
        # Not SSLSocket's own, which takes the TLS state from under the thread that uses it.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


class _Limited:
    """Reads a request, no more of it than is allowed, and says when its first line is there."""

    def __init__(self, stream: Any, begun: Callable[[], None]) -> None:
        self._stream, self._begun, self._left = stream, begun, 0

    def begin(self) -> None:
        self._left = -1

    def readline(self, _size: int = -1) -> bytes:
        if self._left < 0:
            first = self._stream.read(1)
            if not first:
                return b""
            self._begun()
            self._left = MAX_REQUEST_BYTES
            line = first if first == b"\n" else first + self._stream.readline(self._left)
        else:
            line = self._stream.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise _TooLongError
        return bytes(line)

    def close(self) -> None:
        self._stream.close()


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: HttpsServer
    protocol_version = "HTTP/1.1"
    server_version = "airflow-watchdog"
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        self._limited = _Limited(self.rfile, lambda: self.server.touch(self.request, REQUEST_TIMEOUT_S))
        self.connection.settimeout(IDLE_TIMEOUT_S)

    def handle_one_request(self) -> None:
        self._limited.begin()
        self.rfile = self._limited  # type: ignore[assignment]
        self.requestline, self.request_version, self.command = "", self.protocol_version, ""
        self.close_connection = True
        try:
            self.raw_requestline = self._limited.readline()
            if not self.raw_requestline or not self.parse_request():
                return
            self._answer()
        except _TooLongError:
            self.send_error(431)
        finally:
            if not self.wfile.closed:
                self.wfile.flush()
        self.server.touch(self.request, IDLE_TIMEOUT_S)

    def _answer(self) -> None:
        path, _, query = self.path.partition("?")
        route = self.server.routes.get(path)
        if self.command not in ("GET", "HEAD"):
            self.send_error(405)
        elif self.headers.get("Transfer-Encoding") or self.headers.get("Content-Length", "0").strip() != "0":
            # It would be taken for the next request.
            self.send_error(413)
        elif route is None:
            self._send(json_response(404, {"error": "not found"}))
        else:
            try:
                response = route(dict(parse_qsl(query, max_num_fields=20)))
            except ValueError as error:
                response = json_response(400, {"error": str(error)})
            except Exception:
                log.exception("GET %s", path)
                response = json_response(500, {"error": "internal error"})
            self._send(response)

    def _send(self, response: Response) -> None:
        self.send_response(response.status)
        self.send_header("Content-Type", response.content_type)
        self.send_header("Content-Length", str(len(response.body)))
        for name, value in HEADERS:
            self.send_header(name, value)
        if response.status == 405:
            self.send_header("Allow", "GET, HEAD")
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer a request that is not served, and hang up. What the client sent is not repeated."""
        self.close_connection = True
        # What has no version that we know is answered in ours, not as HTTP 0.9, without a status.
        self.request_version = self.protocol_version
        self._send(json_response(code, {"error": self.responses.get(code, ("error", ""))[0].lower()}))

    def version_string(self) -> str:
        return self.server_version

    def log_message(self, *_args: Any, **_kwargs: Any) -> None:
        """Say nothing: load balancers ask every second."""
