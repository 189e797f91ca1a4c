"""sd_notify, as systemd hears it."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from airflow_watchdog.notify import Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as own:
        own.bind(str(tmp_path / "notify"))
        own.settimeout(5)
        yield own


def heard(manager: socket.socket) -> str:
    return manager.recv(4096).decode()


def test_feeding_changes_the_time_only_when_it_has_changed(manager: socket.socket, tmp_path: Path) -> None:
    own = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "5000000"})
    assert own.usual_s == 5.0
    own.send("READY=1")
    assert heard(manager) == "READY=1"
    own.feed(5.0)
    assert heard(manager) == "WATCHDOG=1"
    own.feed(2.5)
    assert heard(manager) == "WATCHDOG_USEC=2500000\nWATCHDOG=1"
    own.feed(2.52)
    assert heard(manager) == "WATCHDOG=1"
    own.feed(5.0)
    assert heard(manager) == "WATCHDOG_USEC=5000000\nWATCHDOG=1"


def test_abstract_sockets() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0airflow-watchdog-test")
        manager.settimeout(5)
        Notifier({"NOTIFY_SOCKET": "@airflow-watchdog-test"}).send("READY=1")
        assert heard(manager) == "READY=1"


def test_where_nobody_listens_nothing_happens(tmp_path: Path) -> None:
    own = Notifier({})
    own.send("READY=1")
    own.feed(1.0)
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "none"), "WATCHDOG_USEC": "x"}).send("READY=1")
