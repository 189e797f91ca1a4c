"""The HTTPS server, asked by real clients: good, bad, slow and many."""

import contextlib
import http.client
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from airflow_watchdog import web
from airflow_watchdog.config import Http
from airflow_watchdog.web import HttpsServer, Response, json_response
from servers import Authority, eventually


def _boom(_query: object) -> Response:
    raise RuntimeError("secret inside")


def _refuse(_query: object) -> Response:
    raise ValueError("lag: not a number")


ROUTES = {
    "/health": lambda query: json_response(200, dict(query)),
    "/primary": lambda _query: json_response(503, {"role": "standby"}),
    "/boom": _boom,
    "/refuse": _refuse,
}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


def settings(authority: Authority, address: str = "127.0.0.1") -> Http:
    # Port 0, a free one, is nothing that a site could configure.
    return Http(address=address, certificate=authority.certificate, key=authority.key, ca=authority.ca).model_copy(
        update={"port": 0}
    )


Start = Callable[..., HttpsServer]


@pytest.fixture
def start(authority: Authority) -> Iterator[Start]:
    servers = []

    def starter(max_connections: int = 64, used: Authority = authority) -> HttpsServer:
        server = HttpsServer(settings(used), ROUTES, max_connections)
        server.start(look_s=0.02)
        servers.append(server)
        return server

    yield starter
    for server in servers:
        server.stop()


def trust(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(authority.ca))


def client(server: HttpsServer, authority: Authority) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection("127.0.0.1", server.port, timeout=5, context=trust(authority))


def ask(
    server: HttpsServer, authority: Authority, method: str, path: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    with contextlib.closing(client(server, authority)) as link:
        link.request(method, path)
        answer = link.getresponse()
        return answer.status, answer.read(), answer.headers


def raw(server: HttpsServer, authority: Authority, request: bytes) -> bytes:
    """All that comes back for these bytes, until the server hangs up."""
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        trust(authority).wrap_socket(plain, server_hostname="localhost") as link,
    ):
        with contextlib.suppress(OSError):
            link.sendall(request)
        received = b""
        with contextlib.suppress(OSError):
            while data := link.recv(65536):
                received += data
        return received


def test_get_and_head_answer_alike(start: Start, authority: Authority) -> None:
    server = start()
    status, body, headers = ask(server, authority, "GET", "/health?lag=10&lag=20&empty=")
    assert (status, json.loads(body)) == (200, {"lag": "20"})
    assert headers["Content-Type"] == "application/json"
    assert headers["Cache-Control"] == "no-store"
    assert headers["Server"] == "airflow-watchdog"
    assert ask(server, authority, "GET", "/primary")[0] == 503
    status, nothing, headers = ask(server, authority, "HEAD", "/primary")
    assert (status, nothing, headers["Content-Length"]) == (503, b"", "19")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "BREW"])
def test_other_methods_are_refused(start: Start, authority: Authority, method: str) -> None:
    status, _, headers = ask(start(), authority, method, "/health")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"GET /health/ HTTP/1.1\r\n\r\n", 404),
        (b"GET /../etc/passwd HTTP/1.1\r\n\r\n", 404),
        (b"GET /refuse HTTP/1.1\r\n\r\n", 400),
        (b"GET /health?" + b"&".join(b"a%d=1" % n for n in range(30)) + b" HTTP/1.1\r\n\r\n", 400),
        (b"GET /boom HTTP/1.1\r\n\r\n", 500),
        (b"GET /health HTTP/1.1\r\nContent-Length: 4\r\n\r\nbody", 413),
        (b"GET /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 413),
        (b"GET /" + b"x" * 10000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\nX: " + b"x" * 10000 + b"\r\n\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 3000 + b"\r\n", 431),
        (b"GET /health HTTP/1.1\r\n" + b"X: y\r\n" * 150 + b"\r\n", 431),
        (b"GET /health HTTP/3.9\r\n\r\n", 505),
        (b"what is this even about\r\n\r\n", 400),
        (b"GET /health HTTP/x\r\n\r\n", 400),
    ],
)
def test_a_bad_request_gets_its_status_and_nothing_else(
    start: Start, authority: Authority, request_: bytes, status: int
) -> None:
    server = start()
    answer = raw(server, authority, request_.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nConnection: close\r\n"))
    assert answer.split()[1] == str(status).encode(), answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"secret" not in answer
    assert b"xxxx" not in answer
    assert ask(server, authority, "GET", "/health")[0] == 200


def test_a_connection_serves_one_request_after_another(start: Start, authority: Authority) -> None:
    with contextlib.closing(client(start(), authority)) as link:
        for _ in range(3):
            link.request("GET", "/health")
            answer = link.getresponse()
            assert (answer.status, answer.read()) == (200, b"{}\n")
            used = link.sock
        assert link.sock is used
        assert used is not None


def test_plain_http_old_tls_and_garbage_get_nothing(start: Start, authority: Authority) -> None:
    server = start()
    for garbage in (b"GET /health HTTP/1.1\r\n\r\n", b"\x00" * 100, b""):
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as plain:
            plain.sendall(garbage)
            plain.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP" not in plain.recv(1000)
    old = trust(authority)
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as plain, pytest.raises(ssl.SSLError):
        old.wrap_socket(plain, server_hostname="localhost")
    assert ask(server, authority, "GET", "/health")[0] == 200


def test_clients_that_come_again_resume_their_session(start: Start, authority: Authority) -> None:
    server, context, session = start(), trust(authority), None
    reused = []
    for _ in range(2):
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=5) as plain,
            context.wrap_socket(plain, server_hostname="localhost", session=session) as link,
        ):
            link.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
            while link.recv(1000):
                pass
            reused.append(link.session_reused)
            session = link.session
    assert reused == [False, True]


def test_slow_clients_hold_up_nobody_and_are_cut_off(
    start: Start, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "REQUEST_TIMEOUT_S", 0.5)
    server = start()
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(20)]
    plain = socket.create_connection(("127.0.0.1", server.port), timeout=5)
    dripping = trust(authority).wrap_socket(plain, server_hostname="localhost")
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            dripping.sendall(b"GET /health HTTP/1.1\r\nX: ")
            while not stop.wait(0.05):
                dripping.sendall(b"x")

    thread = threading.Thread(target=drip)
    thread.start()
    before = time.monotonic()
    assert ask(server, authority, "GET", "/health")[0] == 200
    assert time.monotonic() - before < 0.5
    # A byte now and then does not buy time.
    with contextlib.suppress(OSError):
        assert dripping.recv(1000) == b""
    assert time.monotonic() - before < 3
    for connection in silent:
        with contextlib.suppress(OSError):
            assert connection.recv(1) == b""
        connection.close()
    stop.set()
    thread.join()
    dripping.close()
    eventually(lambda: not server._connections)


def test_too_many_connections_cost_their_own_client_its_oldest(start: Start, authority: Authority) -> None:
    server = start(max_connections=4)
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(4)]
    eventually(lambda: len(server._connections) == 4)
    # From another address of the loopback network: it is not this one that has too many.
    other = socket.create_connection(("127.0.0.1", server.port), timeout=5, source_address=("127.0.0.2", 0))
    eventually(lambda: "127.0.0.2" in [entry.client for entry in server._connections.values()])
    with contextlib.suppress(OSError):
        assert held[0].recv(1) == b""
    more = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(8)]
    eventually(lambda: len(server._connections) <= 4)
    assert "127.0.0.2" in [entry.client for entry in server._connections.values()]
    link = trust(authority).wrap_socket(other, server_hostname="localhost")
    link.sendall(b"HEAD /health HTTP/1.0\r\n\r\n")
    assert link.recv(1000).startswith(b"HTTP/1.1 200")
    for connection in [*held, *more, link]:
        connection.close()


def test_a_new_certificate_is_used_and_a_broken_one_is_not(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(web, "CERTIFICATE_PERIOD_S", 0.0)
    authority = Authority(tmp_path)
    server = start(used=authority)

    def served() -> str:
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=5) as plain,
            trust(authority).wrap_socket(plain, server_hostname="localhost") as link,
        ):
            return str((link.getpeercert() or {})["serialNumber"])

    def is_serial(serial: int) -> bool:
        return int(served(), 16) == serial

    assert is_serial(authority.serial)
    renewed = authority.issue()
    eventually(lambda: is_serial(renewed))
    with caplog.at_level(logging.ERROR):
        authority.certificate.write_text("not a certificate")
        eventually(lambda: "cannot be used" in caplog.text)
    assert is_serial(renewed)
    authority.certificate.unlink()
    last = authority.issue()
    eventually(lambda: is_serial(last))


def test_an_address_in_use_and_a_missing_certificate_are_errors(start: Start, authority: Authority) -> None:
    taken = settings(authority).model_copy(update={"port": start().port})
    with pytest.raises(OSError, match="in use"):
        HttpsServer(taken, ROUTES)
    with pytest.raises(FileNotFoundError):
        HttpsServer(settings(authority).model_copy(update={"certificate": Path("/nowhere")}), ROUTES)


def test_it_serves_ipv6(authority: Authority) -> None:
    server = HttpsServer(settings(authority, "::1"), ROUTES)
    server.start(look_s=0.02)
    with (
        socket.create_connection(("::1", server.port), timeout=5) as plain,
        trust(authority).wrap_socket(plain, server_hostname="localhost") as link,
    ):
        link.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b" 200 " in link.recv(1000)
    server.stop()
