"""The listening socket outlives the process: systemd keeps it over a restart."""

import os
import socket
from pathlib import Path

import pytest
from airflow_watchdog.config import Http
from airflow_watchdog.notify import Notifier
from airflow_watchdog.web import HttpsServer
from servers import Authority

FAR = 200


def listener() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0))


def test_a_socket_is_left_with_systemd(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, listener() as kept:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")}).keep("https", kept)
        assert manager.recv(4096) == b"FDSTOREREMOVE=1\nFDNAME=https"
        text, (descriptor,), _, _ = socket.recv_fds(manager, 4096, 1)
        assert text == b"FDSTORE=1\nFDNAME=https"
        with socket.socket(fileno=descriptor) as got:
            assert got.getsockname() == kept.getsockname()


@pytest.mark.parametrize(
    ("pid", "names", "found"),
    [(os.getpid(), ["https"], True), (os.getpid(), ["other"], False), (os.getpid() + 1, ["https"], False)],
)
def test_it_is_taken_by_the_process_that_it_is_meant_for(pid: int, names: list[str], found: bool) -> None:
    with listener() as kept:
        # Far from the descriptors of the test's own process.
        os.dup2(kept.fileno(), 3 + FAR)
        own = Notifier({"LISTEN_PID": str(pid), "LISTEN_FDNAMES": ":".join(["x"] * FAR + names)})
        got = own.inherited("https")
        assert (got is not None) is found
        if got is None:
            os.close(3 + FAR)
        else:
            assert got.getsockname() == kept.getsockname()
            got.close()


@pytest.mark.parametrize("same", [True, False])
def test_a_server_takes_over_a_socket_of_its_own_address(same: bool, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    kept = listener()
    port = kept.getsockname()[1]
    settings = Http(address="127.0.0.1", certificate=authority.certificate, key=authority.key, ca=authority.ca)
    wanted = settings.model_copy(update={"port": port if same else 0})
    server = HttpsServer(wanted, {}, listener=kept)
    try:
        assert (server.port == port) is same
        assert (server.socket is kept) is same
        assert (kept.fileno() == -1) is not same
    finally:
        server.server_close()
