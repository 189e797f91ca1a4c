"""Other nodes, asked over TLS. What is not surely an answer of that node is none."""

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from airflow_watchdog.config import Config, Http
from airflow_watchdog.peers import Peers
from airflow_watchdog.snapshot import PostgresqlState, Snapshot
from airflow_watchdog.web import HttpsServer, Response
from servers import Authority, eventually, free_port

# The name in the test certificate.
NAME = "localhost"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


class Peer:
    """A watchdog that answers what a test says."""

    def __init__(self, authority: Authority) -> None:
        self.snapshot = Snapshot(node=NAME, postgresql=PostgresqlState(role="primary", timeline=3))
        self.body: bytes | None = None
        settings = Http(address="127.0.0.1", certificate=authority.certificate, key=authority.key, ca=authority.ca)
        self.server = HttpsServer(settings.model_copy(update={"port": 0}), {"/health": self.health})
        self.server.start(look_s=0.02)

    def health(self, _query: object) -> Response:
        body = self.snapshot.model_dump_json().encode() if self.body is None else self.body
        return Response(503, body, "application/json")


@pytest.fixture
def peer(authority: Authority) -> Iterator[Peer]:
    own = Peer(authority)
    yield own
    own.server.stop()


def asked(authority: Authority, port: int, name: str = NAME, timeout_s: float = 0.5) -> Peers:
    return Peers(
        Config.model_validate(
            {
                "node": {"name": "own"},
                "http": {"certificate": "/c", "key": "/k", "ca": authority.ca},
                "loop": {"interval_s": 0.02, "timeout_s": timeout_s},
                "peer": [{"name": name, "rack": "b", "address": "127.0.0.1", "port": port}],
            }
        )
    )


def becomes(peers: Peers, answering: bool, detail: str = "") -> Callable[[], bool]:
    def look() -> bool:
        peers.look()
        (view,) = peers.views()
        return view.answering is answering and detail in view.detail

    return look


def test_a_peer_that_answers_goes_away_and_comes_back(authority: Authority, peer: Peer) -> None:
    peers = asked(authority, peer.server.port)
    assert peers.views()[0].answering is None
    peers.look()
    peers.wait(5)
    eventually(becomes(peers, True))
    assert peers.postgresql(1.0) == {NAME: PostgresqlState(role="primary", timeline=3)}
    ((age_s, snapshot),) = peers.snapshots(1.0).values()
    assert age_s < 1.0
    assert snapshot.node == NAME
    peer.server.stop()
    eventually(becomes(peers, False))
    (view,) = peers.views()
    assert view.seen_s is not None
    assert view.for_s <= view.seen_s
    # What it said before it went away counts no more.
    assert peers.snapshots(60.0) == {}
    assert peers.postgresql(60.0) == {}
    peers.close()


def test_an_old_answer_is_no_answer(authority: Authority, peer: Peer) -> None:
    peers = asked(authority, peer.server.port)
    eventually(becomes(peers, True))
    time.sleep(0.1)
    assert peers.snapshots(0.05) == {}
    peers.close()


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", "not the answer of a watchdog"),
        (b"[]", "not the answer of a watchdog"),
        (b'{"node": 5}', "not the answer of a watchdog"),
        (b'{"node": "localhost", "components": [{"name": "x", "state": "superb"}]}', "not the answer of a watchdog"),
        (b'{"node": "somebody"}', "says that it is somebody"),
        (b'{"node": "' + b"x" * (2 << 20), "not the answer of a watchdog"),
    ],
)
def test_what_is_no_answer(authority: Authority, peer: Peer, body: bytes, detail: str) -> None:
    peer.body = body
    peers = asked(authority, peer.server.port)
    eventually(becomes(peers, False, detail))
    # And once it is one again, it counts.
    peer.body = None
    eventually(becomes(peers, True))
    peers.close()


def test_keys_of_a_newer_version_do_no_harm(authority: Authority, peer: Peer) -> None:
    peer.body = b'{"node": "localhost", "new": {"a": 1}}'
    peers = asked(authority, peer.server.port)
    eventually(becomes(peers, True))
    peers.close()


def test_strangers_are_not_believed(authority: Authority, peer: Peer, tmp_path: Path) -> None:
    # Another CA's certificate, another node's, no TLS at all, nobody.
    (tmp_path / "other").mkdir()
    stranger = asked(Authority(tmp_path / "other"), peer.server.port)
    eventually(becomes(stranger, False, "certificate"))
    wrong = asked(authority, peer.server.port, name="data1")
    eventually(becomes(wrong, False, "Hostname mismatch"))
    nobody = asked(authority, free_port())
    eventually(becomes(nobody, False, "Connection refused"))
    for peers in (stranger, wrong, nobody):
        assert peers.snapshots(60) == {}
        peers.close()


def test_one_that_hangs_delays_nobody(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        peers = asked(authority, silent.getsockname()[1], timeout_s=0.3)
        begin = time.monotonic()
        peers.look()
        peers.look()
        assert time.monotonic() - begin < 0.2
        eventually(becomes(peers, False, "no answer in time"))
        peers.close()


def test_hundreds_are_asked_less_often() -> None:
    peer = [{"name": f"n{number}", "address": "127.0.0.1"} for number in range(500)]
    config = {"node": {"name": "own"}, "http": {"certificate": "/c", "key": "/k", "ca": "/a"}, "peer": peer}
    assert Peers(Config.model_validate(config)).period_s == 10.0
