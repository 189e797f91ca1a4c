"""The scheduler's own health decides, asked over HTTP by the daemon's thread."""

from pathlib import Path

from airflow_watchdog.components import Url
from airflow_watchdog.config import Config
from airflow_watchdog.daemon import _Charge
from airflow_watchdog.snapshot import State
from airflow_watchdog.units import Systemd
from bus import FakeSystemd
from servers import free_port
from test_components import Site

UNIT = "airflow-scheduler.service"


def test_the_scheduler_is_asked_only_while_it_runs(tmp_path: Path) -> None:
    systemd, site = FakeSystemd(tmp_path), Site()
    config = Config.model_validate(
        {
            "node": {"name": "a"},
            "http": {"certificate": "/c", "key": "/k", "ca": "/a"},
            "loop": {"interval_s": 0.05, "timeout_s": 0.3},
            "scheduler": {"health_url": f"http://127.0.0.1:{site.port}/health", "mode": "active_active"},
            "database": {"hosts": ["127.0.0.1"], "port": free_port()},
        }
    )
    assert config.scheduler is not None
    charge = _Charge(config, config.scheduler, Systemd(0.3, systemd.address), lambda _event: None)
    assert [worker.name for worker in charge.workers()] == ["unit", "database", "health"]
    systemd.units[UNIT] = ["loaded", "inactive", "dead", "00" * 16]
    charge.observer.look_once()
    charge._ask_health()
    assert site.connections == 0
    assert charge.scheduler().state is State.STOPPED
    systemd.units[UNIT] = ["loaded", "active", "running", "01" * 16]
    charge.observer.look_once()
    charge._ask_health()
    assert charge.scheduler().state is State.RUNNING
    site.status, site.body = 503, b"scheduler: unhealthy"
    charge._ask_health()
    found = charge.scheduler()
    assert (found.state, found.detail) == (State.UNHEALTHY, "status 503: scheduler: unhealthy")
    site.server.shutdown()
    site.server.server_close()
    charge._url = Url(f"http://127.0.0.1:{free_port()}/", 0.3, "")
    charge._ask_health()
    assert "refused" in charge.scheduler().detail
    systemd.close()
