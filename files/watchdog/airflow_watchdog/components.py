"""How the parts of this node are: their units by systemd, and what they answer themselves."""

import http.client
import logging
import ssl
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from urllib.parse import urlsplit

from airflow_watchdog.config import Component, Config
from airflow_watchdog.snapshot import ComponentState, State
from airflow_watchdog.units import Systemd, UnitError, UnitState

# URLs are asked less often than units: what they cost, they cost the component, too.
URL_PERIOD_S = 5.0
TOO_LATE = "no answer in time"
_MAX_BODY = 1 << 16
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
log = logging.getLogger(__name__)


class UrlError(Exception):
    """An URL did not answer as it should; str() says why."""


class Url:
    """One URL, asked again and again over one connection."""

    def __init__(self, url: str, timeout_s: float, ca: str) -> None:
        """`ca`: who vouches for other machines; on this one there is nobody in between to be afraid of."""
        self._parts = urlsplit(url)
        self._timeout_s, self._ca = timeout_s, ca
        self._connection: http.client.HTTPConnection | None = None

    def get(self) -> tuple[int, bytes]:
        """Return status and body (64 kB at most). Raises UrlError."""
        again = self._connection is not None
        try:
            return self._get()
        except UrlError as error:
            # A connection that the other side had ended meanwhile says nothing.
            if not again or str(error) == TOO_LATE:
                raise
            return self._get()

    def _get(self) -> tuple[int, bytes]:
        try:
            if self._connection is None:
                self._connection = self._connect()
            path = self._parts.path or "/"
            self._connection.request("GET", f"{path}?{self._parts.query}" if self._parts.query else path)
            response = self._connection.getresponse()
            body = response.read(_MAX_BODY)
            if response.read(1):
                self.close()
            return response.status, body
        except TimeoutError:
            self.close()
            raise UrlError(TOO_LATE) from None
        except (OSError, http.client.HTTPException) as error:
            self.close()
            text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
            raise UrlError(text) from None

    def _connect(self) -> http.client.HTTPConnection:
        host, port = self._parts.hostname or "", self._parts.port
        if self._parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self._timeout_s)
        context = ssl.create_default_context(cafile=self._ca)
        if host in _LOOPBACK:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        return http.client.HTTPSConnection(host, port, timeout=self._timeout_s, context=context)

    def close(self) -> None:
        """Drop the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def of_unit(unit: UnitState) -> tuple[State, str]:
    """Return what systemd's states of a unit mean for a component, and in words what is wrong."""
    if unit.load in ("not-found", "masked"):
        return State.ABSENT, unit.load
    match unit.active:
        case "active" | "reloading":
            return State.RUNNING, ""
        case "activating":
            return State.STARTING, unit.sub
        case "deactivating" | "inactive":
            return State.STOPPED, ""
        case "failed":
            return State.FAILED, "its unit has failed"
    return State.UNKNOWN, unit.active


class Components:
    """The components of the configuration, with since when each is in its state."""

    def __init__(self, config: Config, systemd: Systemd) -> None:
        """Starts no thread before there is an URL to ask."""
        self._systemd = systemd
        self._components = config.component
        self._urls = {
            c.name: Url(c.url, config.loop.timeout_s, str(config.http.ca))
            for c in self._components
            if c.url is not None
        }
        self._pool = ThreadPoolExecutor(max(1, len(self._urls)), "url")
        self._asked: dict[str, Future[str]] = {}
        self._asked_at = float("-inf")
        self._problems: dict[str, str | None] = {}
        self._since: dict[str, tuple[State, float]] = {}
        self._lock = threading.Lock()
        self._states = tuple(
            ComponentState(name=c.name, state=State.UNKNOWN, detail="not looked yet") for c in self._components
        )

    def states(self) -> tuple[ComponentState, ...]:
        """Return the states of the last look."""
        with self._lock:
            return self._states

    def look(self) -> tuple[ComponentState, ...]:
        """Look at all units now, and at what the URLs said lately. Never raises; takes one call's time at most."""
        now = time.monotonic()
        self._ask(now)
        try:
            units = self._systemd.states(c.unit for c in self._components) if self._components else {}
            error = ""
        except UnitError as problem:
            units, error = {}, str(problem)
        states = tuple(self._state(c, units.get(c.unit), error, now) for c in self._components)
        with self._lock:
            self._states = states
        return states

    def _ask(self, now: float) -> None:
        for name, future in list(self._asked.items()):
            if future.done():
                self._problems[name] = future.result()
                del self._asked[name]
        if now - self._asked_at < URL_PERIOD_S and all(self._problems.get(name) == "" for name in self._urls):
            return
        self._asked_at = now
        for component in self._components:
            if component.url is not None and component.name not in self._asked:
                self._asked[component.name] = self._pool.submit(self._problem, component)

    def _problem(self, component: Component) -> str:
        """Return what is wrong with the answer of a component's URL; empty if nothing is."""
        try:
            status, body = self._urls[component.name].get()
        except UrlError as error:
            return str(error)
        if status != 200:
            return f"status {status}"
        if component.match is not None and component.match.encode() not in body:
            return "the answer does not hold what it should"
        return ""

    def _state(self, component: Component, unit: UnitState | None, error: str, now: float) -> ComponentState:
        state, detail = of_unit(unit) if unit is not None else (State.UNKNOWN, error or "systemd does not know it")
        if state is State.RUNNING and component.name in self._urls:
            problem = self._problems.get(component.name)
            if problem is None:
                state, detail = State.STARTING, "not asked yet"
            elif problem:
                state, detail = State.UNHEALTHY, problem
        before, since = self._since.get(component.name, (None, now))
        if state is not before:
            since = now
        self._since[component.name] = state, since
        return ComponentState(name=component.name, state=state, for_s=round(now - since, 3), detail=detail[:500])

    def close(self) -> None:
        """Ask no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
