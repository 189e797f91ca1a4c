"""What Redis says of itself: texts of INFO by table, a server that misbehaves, and real ones."""

import contextlib
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from airflow_watchdog import agent, redis_agent
from airflow_watchdog.config import Redis
from airflow_watchdog.redis_agent import RedisAgent, read_info
from airflow_watchdog.snapshot import RedisState
from servers import Authority, RedisServer, eventually, free_port

PRIMARY = "# Replication\r\nrole:master\r\nconnected_slaves:2\r\n"
REPLICA = "role:slave\r\nmaster_host:10.0.0.1\r\n"


@pytest.mark.parametrize(
    ("replication", "persistence", "expected"),
    [
        (f"{PRIMARY}master_repl_offset:100\r\n", "loading:0\r\n", RedisState(role="primary", replicas=0)),
        (
            (
                f"{PRIMARY}slave0:ip=10.0.0.2,port=6379,state=online,offset=90,lag=1\r\n"
                "slave1:ip=10.0.0.3,port=6379,state=online,offset=40,lag=1\r\n"
                "slave2:ip=10.0.0.4,port=6379,state=wait_bgsave,offset=0,lag=0\r\nmaster_repl_offset:100\r\n"
            ),
            "loading:0\r\n",
            RedisState(role="primary", replicas=2, lag_bytes=60),
        ),
        (
            f"{REPLICA}master_link_status:up\r\nslave_read_repl_offset:120\r\nslave_repl_offset:100\r\n",
            "loading:0\r\n",
            RedisState(role="replica", link_up=True, lag_bytes=20),
        ),
        (
            f"{REPLICA}master_link_status:down\r\nslave_read_repl_offset:120\r\nslave_repl_offset:100\r\n",
            "loading:0\r\n",
            RedisState(role="replica", link_up=False, detail="no link to its primary 10.0.0.1"),
        ),
        (PRIMARY, "loading:1\r\n", RedisState(role="loading", detail="a primary that loads its data")),
    ],
)
def test_info_is_read(replication: str, persistence: str, expected: RedisState) -> None:
    assert read_info(replication, persistence) == expected


@pytest.mark.parametrize("text", ["", "role:sentinel", "role:", "nonsense"])
def test_info_without_a_role_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="no role"):
        read_info(text, "")


Serve = Callable[[bytes], RedisAgent]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """An agent that asks a server which answers everything with these bytes."""
    opened: list[socket.socket] = []

    def server(reply: bytes) -> RedisAgent:
        listener = socket.create_server(("127.0.0.1", 0))
        opened.append(listener)

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    opened.append(connection)
                    while connection.recv(1000) and reply:
                        connection.sendall(reply)

        threading.Thread(target=run, daemon=True).start()
        secret = tmp_path / "password"
        secret.write_text("hush\n")
        own = Redis(port=listener.getsockname()[1], user="monitor", password_file=secret)
        return RedisAgent(own, 0.3)

    yield server
    for used in opened:
        used.close()


@pytest.mark.parametrize(
    ("reply", "role", "detail"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", "loading", "AUTH: LOADING"),
        (b"-WRONGPASS invalid username-password pair\r\n", "unknown", "AUTH: WRONGPASS"),
        (b"HTTP/1.0 400 Bad Request\r\n\r\n", "unknown", "not Redis' protocol"),
        (b"$99999999\r\n", "unknown", "not Redis' protocol"),
        (b"$-1\r\n", "unknown", "not Redis' protocol"),
        (b"x" * 200_000, "unknown", "too long a reply"),
        (b"+OK\r\n", "unknown", "INFO says no role"),
        (b"$5\r\nab", "unknown", "no answer in time"),
    ],
)
def test_a_server_that_misbehaves_is_never_primary(serve: Serve, reply: bytes, role: str, detail: str) -> None:
    state = serve(reply).state()
    assert (state.role, state.detail[: len(detail)]) == (role, detail)
    assert "hush" not in state.detail


def test_nobody_there_is_down_and_a_missing_password_unknown(tmp_path: Path) -> None:
    assert RedisAgent(Redis(port=free_port()), 0.3).state().role == "down"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        own = Redis(port=listener.getsockname()[1], password_file=tmp_path / "none")
        assert RedisAgent(own, 0.3).state().role == "unknown"
        # It accepts, and says nothing.
        silent = RedisAgent(Redis(port=listener.getsockname()[1]), 0.1)
        assert silent.state().detail == "no answer in time"
        silent.close()


# --- with Redis ---


def test_a_real_primary_and_its_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not shutil.which("redis-server"):
        pytest.skip("Redis is not installed")
    monkeypatch.setattr(agent, "CACHE_S", 0.0)
    authority = Authority(tmp_path)
    secret = tmp_path / "password"
    secret.write_text(f"{RedisServer.PASSWORD}\n")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    servers = [RedisServer(tmp_path / "a", authority), RedisServer(tmp_path / "b", authority)]
    try:
        primary, replica = (
            RedisAgent(
                Redis(port=server.port, host="localhost", ca=authority.ca, user="monitor", password_file=secret), 0.5
            )
            for server in servers
        )
        assert primary.state().role == replica.state().role == "primary"
        servers[1].do("REPLICAOF", "127.0.0.1", str(servers[0].port))
        state = eventually(lambda: (s := replica.state()).link_up and s)
        assert (state.role, state.lag_bytes) == ("replica", 0)
        state = eventually(lambda: (s := primary.state()).replicas and s)
        assert state.role == "primary"
        assert state.lag_bytes is not None
        os.kill(servers[0].pid, signal.SIGSTOP)
        hung = primary.state()
        os.kill(servers[0].pid, signal.SIGCONT)
        assert (hung.role, hung.detail) == ("unknown", "no answer in time")
        assert primary.state().role == "primary"
        monkeypatch.setattr(redis_agent, "RECONNECT_S", 0.0)
        secret.write_text("wrong\n")
        assert "WRONGPASS" in primary.state().detail
        secret.write_text(f"{RedisServer.PASSWORD}\n")
        # Its certificate is for localhost alone.
        strict = RedisAgent(Redis(port=servers[0].port, host="redis.example", ca=authority.ca), 0.5)
        assert "certificate verify failed" in strict.state().detail
        servers[0].stop()
        assert primary.state().role == "down"
        state = eventually(lambda: (s := replica.state()).link_up is False and s)
        assert state.detail == "no link to its primary 127.0.0.1"
    finally:
        for server in servers:
            server.stop()
