#!/usr/bin/env python3
"""Stand-ins for what HAProxy talks to, with the real ones' ports, TLS and health endpoints, and nothing behind them.

The real services meet HAProxy in scenario `default`. Here only HAProxy is under test, so every answer can be
switched: `/run/molecule/<name>` holds what the service of that name shall say instead of what it says by default.

    molecule-backends <address>
"""

from __future__ import annotations

import http.server
import json
import socketserver
import ssl
import sys
import threading
from pathlib import Path

SWITCHES = Path("/run/molecule")
TLS = Path("/etc/airflow-ha/tls")


def says(name: str, default: str = "") -> str:
    """What the switch of that name says."""
    switch = SWITCHES / name
    return switch.read_text().strip() if switch.exists() else default


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the service on this port; everything unknown echoes the request."""

    protocol_version = "HTTP/1.1"
    address = ""

    def do_GET(self) -> None:
        """Dispatch on the path."""
        status, body, headers = 200, "", {}
        if self.path == "/primary":
            status = 200 if says("postgresql", "standby") == "primary" else 503
        elif self.path == "/replica":
            status = 200 if says("postgresql", "standby") == "standby" else 503
        elif self.path == "/api/v2/monitor/health":
            state = says("database", "healthy")
            body = json.dumps({"metadatabase": {"status": state}, "scheduler": {"status": "healthy"}})
        elif self.path == "/api/v2/version":
            status = 200 if says("api", "alive") == "alive" else 503
        elif self.path == "/json/status":
            body = json.dumps({"status": says("spark", "STANDBY")}, indent=1)
        elif self.path == "/move":
            status, headers = 302, {"Location": f"http://{self.headers['Host']}/moved"}
        else:
            lower = {name.lower(): value for name, value in self.headers.items()}
            body = json.dumps({"address": self.address, "path": self.path, "headers": lower})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Say nothing: the checks would fill the journal."""


class Echo(socketserver.StreamRequestHandler):
    """In PostgreSQL's place: names itself, then echoes lines. The proxy passes bytes, whatever they mean."""

    def handle(self) -> None:
        """One client."""
        self.wfile.write(f"{Handler.address}\n".encode())
        for line in self.rfile:
            self.wfile.write(line)


class Server(socketserver.ThreadingTCPServer):
    """One thread per connection; a TLS handshake must not hold up the others."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128
    context: ssl.SSLContext | None = None

    def finish_request(self, request, client_address):  # type: ignore[no-untyped-def]
        """Speak TLS where the port does."""
        if self.context:
            request = self.context.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def handle_error(self, request, client_address):  # type: ignore[no-untyped-def]
        """Clients come and go."""


def main() -> None:
    """Listen on all ports until stopped."""
    Handler.address = address = sys.argv[1]
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(TLS / "node.crt", TLS / "node.key")
    SWITCHES.mkdir(exist_ok=True)
    for port, handler, tls in (
        (8008, Handler, True),
        (8080, Handler, True),
        (5555, Handler, True),
        (8081, Handler, False),
        (5432, Echo, False),
    ):
        server = Server((address, port), handler)
        server.context = context if tls else None
        threading.Thread(target=server.serve_forever, daemon=True).start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
