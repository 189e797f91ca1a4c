"""The scheduler in charge is killed, hangs, is cut off, loses its machine or is moved. Cases of docs/faults.md: 1 to 5.

Every task of the run that it works on ends exactly once, and there are never two schedulers. The watchdog alone, in
more cases, is tested in molecule/watchdog.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from cluster import Api
from faultlab import eventually, kill, power_on, reach
from schedulers import UNIT, Stream, Watch, active, cut_off, holder, signal, standby

# Twice the goals of `make bench-failover`: here, other things run on the same cores.
KILLED_S = 16
GONE_S = 36
MOVED_S = 14


@pytest.fixture
def stream(client: Api) -> Iterator[Stream]:
    """Tasks all the time; each succeeds and leaves one row, and no moment sees two schedulers."""
    holder()
    watch = Watch()
    found = Stream(client)
    yield found
    found.tasks.succeed(240)
    holder()
    assert watch.overlap_ms() == 0


def test_a_killed_scheduler_is_replaced(stream: Stream) -> None:
    host = holder()
    assert stream.next_after(lambda: signal(host, UNIT, "KILL")) <= KILLED_S


@pytest.mark.shown_elsewhere
def test_a_hung_scheduler_is_replaced(stream: Stream) -> None:
    host = holder()
    pid = reach(host).check_output(f"systemctl show -p MainPID --value {UNIT}")
    stream.next_after(lambda: signal(host, UNIT, "STOP"))
    assert not reach(host).file(f"/proc/{pid}").exists


@pytest.mark.shown_elsewhere
def test_a_hung_watchdog_takes_its_scheduler_with_it(stream: Stream) -> None:
    host = holder()
    pid = reach(host).check_output(f"systemctl show -p MainPID --value {UNIT}")
    signal(host, "airflow-watchdog", "STOP")
    eventually(lambda: not reach(host).file(f"/proc/{pid}").exists, GONE_S)
    assert stream.next_after(holder) <= GONE_S
    eventually(lambda: reach(host).service("airflow-watchdog").is_running)


@pytest.mark.shown_elsewhere
def test_a_server_that_is_cut_off_gives_way_for_good(stream: Stream) -> None:
    host = holder()
    with cut_off(host):
        assert stream.next_after(lambda: eventually(lambda: active() == [standby(host)], GONE_S)) <= GONE_S
    time.sleep(5)
    assert active() == [standby(host)]


def test_a_server_without_power_comes_back_as_standby(stream: Stream) -> None:
    host = holder()
    try:
        assert stream.next_after(lambda: kill(host)) <= GONE_S
    finally:
        power_on()
    assert holder() == standby(host)


def test_a_planned_move_costs_a_moment(stream: Stream) -> None:
    host = holder()
    assert stream.next_after(lambda: reach(host).check_output("airflow-watchdog switchover scheduler")) <= MOVED_S
    assert holder() == standby(host)
    refused = reach(host).run("airflow-watchdog switchover scheduler --to no-such-node")
    assert refused.rc != 0
    assert "no-such-node" in refused.stderr
