"""Components by their units and URLs."""

import http.server
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from airflow_watchdog import components
from airflow_watchdog.components import Components, Url, UrlError, of_unit
from airflow_watchdog.config import Config
from airflow_watchdog.snapshot import State
from airflow_watchdog.units import Systemd, UnitState
from bus import FakeSystemd
from servers import Authority, eventually, free_port


class Site:
    """A web server that answers what a test says."""

    def __init__(self, context: Any = None, address: str = "127.0.0.1") -> None:
        self.status, self.body, self.delay_s, self.hang_up = 200, b"all is well", 0.0, False
        self.connections = 0
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                site.connections += 1
                super().setup()

            def do_GET(self) -> None:
                time.sleep(site.delay_s)
                self.send_response(site.status)
                self.send_header("Content-Length", str(len(site.body)))
                self.end_headers()
                self.wfile.write(site.body)
                self.close_connection = site.hang_up

            def log_message(self, *_args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer((address, 0), Handler)
        self.server.daemon_threads = True
        if context:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def site() -> Iterator[Site]:
    own = Site()
    yield own
    own.server.shutdown()
    own.server.server_close()


def test_an_url_is_asked_over_one_connection_and_over_a_new_one_when_that_has_ended(site: Site) -> None:
    url = Url(f"http://127.0.0.1:{site.port}/health?x=1", 1.0, "")
    assert url.get() == (200, b"all is well")
    assert url.get() == (200, b"all is well")
    assert site.connections == 1
    site.hang_up = True
    url.get()
    assert url.get()[0] == 200
    assert site.connections == 2
    site.status, site.body = 503, b"x" * 100_000
    assert url.get() == (503, b"x" * 65536)


def test_what_an_url_may_suffer(site: Site) -> None:
    with pytest.raises(UrlError, match="Connection refused"):
        Url(f"http://127.0.0.1:{free_port()}/", 0.3, "").get()
    site.delay_s = 0.6
    begin = time.monotonic()
    with pytest.raises(UrlError, match="no answer in time"):
        Url(f"http://127.0.0.1:{site.port}/", 0.2, "").get()
    assert time.monotonic() - begin < 0.55
    with pytest.raises(UrlError):
        Url("http://no-such-host.invalid/", 0.3, "").get()


def test_https_is_believed_on_this_machine_and_checked_elsewhere(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority.certificate, authority.key)
    own = Site(context, "")
    assert Url(f"https://127.0.0.1:{own.port}/", 1.0, str(authority.ca)).get()[0] == 200
    assert Url(f"https://127.0.0.1:{own.port}", 1.0, str(authority.ca)).get()[0] == 200
    with pytest.raises(UrlError, match="certificate verify failed"):
        Url(f"https://127.0.0.2:{own.port}/", 1.0, str(authority.ca)).get()
    own.server.shutdown()
    own.server.server_close()


@pytest.mark.parametrize(
    ("unit", "state"),
    [
        (UnitState("loaded", "active", "running"), State.RUNNING),
        (UnitState("loaded", "reloading", "reload"), State.RUNNING),
        (UnitState("loaded", "activating", "start"), State.STARTING),
        (UnitState("loaded", "deactivating", "stop"), State.STOPPED),
        (UnitState("loaded", "inactive", "dead"), State.STOPPED),
        (UnitState("loaded", "failed", "failed"), State.FAILED),
        (UnitState("not-found", "inactive", "dead"), State.ABSENT),
        (UnitState("masked", "active", "running"), State.ABSENT),
        (UnitState(), State.UNKNOWN),
    ],
)
def test_what_systemds_words_mean(unit: UnitState, state: State) -> None:
    assert of_unit(unit)[0] is state


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[FakeSystemd]:
    fake = FakeSystemd(tmp_path)
    yield fake
    fake.close()


def test_components(systemd: FakeSystemd, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(components, "URL_PERIOD_S", 0.0)
    config = Config.model_validate(
        {
            "node": {"name": "n"},
            "http": {"certificate": "/c", "key": "/k", "ca": "/a"},
            "component": [
                {"name": "plain", "unit": "plain.service"},
                {"name": "web", "unit": "web.service", "url": f"http://127.0.0.1:{site.port}/", "match": "well"},
            ],
        }
    )
    systemd.units = {name: ["loaded", "active", "running", "aa"] for name in ("plain.service", "web.service")}
    own = Components(config, Systemd(0.3, systemd.address))
    assert {component.state for component in own.states()} == {State.UNKNOWN}
    plain, web = own.look()
    assert (plain.state, web.state, web.detail) == (State.RUNNING, State.STARTING, "not asked yet")

    def becomes(state: State, detail: str) -> Callable[[], bool]:
        def look() -> bool:
            own.look()
            return (own.states()[1].state, own.states()[1].detail) == (state, detail)

        return look

    eventually(becomes(State.RUNNING, ""))
    site.status = 500
    eventually(becomes(State.UNHEALTHY, "status 500"))
    time.sleep(0.05)
    assert own.look()[1].for_s >= 0.05
    site.status, site.body = 200, b"all is lost"
    eventually(becomes(State.UNHEALTHY, "the answer does not hold what it should"))
    site.body = b"well again"
    eventually(becomes(State.RUNNING, ""))
    # A unit that does not run needs no URL to be asked.
    systemd.units["web.service"][1] = "failed"
    assert own.look()[1].state is State.FAILED
    # "Unknown" is never read as "running".
    systemd.mute = True
    assert [component.state for component in own.look()] == [State.UNKNOWN, State.UNKNOWN]
    own.close()
