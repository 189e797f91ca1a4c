"""systemd over D-Bus, against a bus of our own."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from airflow_watchdog.permit import clock
from airflow_watchdog.units import Observer, Systemd, UnitError, UnitState
from bus import FakeSystemd

UNIT = "airflow-scheduler.service"


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[FakeSystemd]:
    fake = FakeSystemd(tmp_path)
    fake.units[UNIT] = ["loaded", "active", "running", "ab" * 16]
    yield fake
    fake.close()


def test_states_and_orders(systemd: FakeSystemd) -> None:
    own = Systemd(1.0, systemd.address)
    states = own.states([UNIT, "none.service"])
    assert states[UNIT] == UnitState("loaded", "active", "running", "/unit/airflow_2dscheduler_2eservice")
    assert states["none.service"].load == "not-found"
    assert own.invocation(states[UNIT].path) == "ab" * 16
    own.control(UNIT, "kill")
    own.control(UNIT, "stop")
    own.control(UNIT, "reset-failed")
    own.control(UNIT, "start")
    assert [method for method, _ in systemd.calls] == ["KillUnit", "StopUnit", "ResetFailedUnit", "StartUnit"]
    own.close()
    assert own.states([UNIT])[UNIT].active == "active"


def test_a_refusal_names_its_reason(systemd: FakeSystemd) -> None:
    systemd.refuse = True
    with pytest.raises(UnitError, match=r"^StopUnit: Permission denied$"):
        Systemd(1.0, systemd.address).control(UNIT, "stop")


def test_a_bus_that_is_away_mute_or_mad_holds_nobody_up(systemd: FakeSystemd, tmp_path: Path) -> None:
    with pytest.raises(UnitError, match="D-Bus"):
        Systemd(0.2, f"unix:path={tmp_path}/none").states([UNIT])
    own = Systemd(0.2, systemd.address)
    own.states([UNIT])
    systemd.mute = True
    begin = time.monotonic()
    with pytest.raises(UnitError):
        own.states([UNIT])
    assert time.monotonic() - begin < 1.0
    systemd.mute, systemd.garbage = False, True
    with pytest.raises(UnitError):
        own.states([UNIT])
    systemd.garbage = False
    assert own.states([UNIT])[UNIT].active == "active"
    systemd.cut()
    with pytest.raises(UnitError):
        own.states([UNIT])
    assert own.states([UNIT])[UNIT].active == "active"


def test_the_observer_looks_and_carries_out(systemd: FakeSystemd, caplog: pytest.LogCaptureFixture) -> None:
    news = threading.Event()
    observer = Observer(Systemd(0.3, systemd.address), UNIT, 0.01, news.set)
    assert observer.unit.active == "unknown"
    observer.look_once()
    assert (observer.unit.active, observer.unit.invocation) == ("active", "ab" * 16)
    assert news.is_set()
    news.clear()
    observer.look_once()
    assert not news.is_set()
    ordered = clock()
    observer.order("stop")
    observer.look_once()
    assert observer.unit.active == "inactive"
    assert observer.unit.at > ordered
    assert news.is_set()
    # An answer that does not come leaves the old state with its old time.
    systemd.mute = True
    at = observer.unit.at
    observer.look_once()
    observer.look_once()
    assert observer.unit.at == at
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    systemd.mute, systemd.refuse = False, True
    observer.order("start")
    observer.look_once()
    assert "Permission denied" in caplog.text
    assert observer.unit.at > at


def test_an_order_ends_the_wait_for_the_next_look(systemd: FakeSystemd) -> None:
    observer = Observer(Systemd(1.0, systemd.address), UNIT, 60.0, lambda: None)
    thread = threading.Thread(target=observer.look_once)
    thread.start()
    time.sleep(0.1)
    observer.order("stop")
    thread.join(5)
    assert not thread.is_alive()
    observer.stop()
    observer.look_once()
    assert systemd.calls == [("StopUnit", UNIT)]
