"""systemd, asked over D-Bus: no process is started per loop, and every call has an end."""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from jeepney import DBusAddress, MessageType, new_method_call
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from airflow_watchdog import lease
from airflow_watchdog.permit import clock

Verb = Literal["start", "stop", "kill", "reset-failed"]

_BUS = "org.freedesktop.systemd1"
_MANAGER = DBusAddress("/org/freedesktop/systemd1", bus_name=_BUS, interface=f"{_BUS}.Manager")
_SIGKILL = 9
# Between two looks while something is under way.
HURRY_S = 0.2
log = logging.getLogger(__name__)


class UnitError(Exception):
    """systemd did not answer, or refused; str() says why in one line."""


@dataclass(frozen=True)
class UnitState:
    """systemd's states of a unit, in systemd's words."""

    load: str = "unknown"
    active: str = "unknown"
    sub: str = ""
    path: str = ""


class Systemd:
    """The system's manager. For use by several threads, which wait for each other."""

    def __init__(self, timeout_s: float = 1.0, bus: str = "SYSTEM") -> None:
        """`timeout_s` bounds each call; `bus` is jeepney's name or the address of a bus."""
        self.timeout_s = timeout_s
        self.bus = bus
        self._lock = threading.Lock()
        self._connection: DBusConnection | None = None

    def states(self, names: Iterable[str]) -> dict[str, UnitState]:
        """Return the states of these units in one call. Raises UnitError."""
        wanted = list(names)
        (rows,) = self._call("ListUnitsByNames", "as", (wanted,))
        return {row[0]: UnitState(row[2], row[3], row[4], row[6]) for row in rows}

    def invocation(self, path: str) -> str:
        """Return the id of the unit's present life. Raises UnitError."""
        address = DBusAddress(path, bus_name=_BUS, interface="org.freedesktop.DBus.Properties")
        ((_signature, value),) = self._call("Get", "ss", (f"{_BUS}.Unit", "InvocationID"), address)
        return bytes(value).hex()

    def control(self, unit: str, verb: Verb) -> None:
        """Have systemd do it; returns when it is in its queue, not when it is done. Raises UnitError."""
        match verb:
            case "start":
                self._call("StartUnit", "ss", (unit, "replace"))
            case "stop":
                self._call("StopUnit", "ss", (unit, "replace"))
            case "kill":
                self._call("KillUnit", "ssi", (unit, "all", _SIGKILL))
            case "reset-failed":
                self._call("ResetFailedUnit", "s", (unit,))

    def close(self) -> None:
        """Drop the connection."""
        with self._lock:
            self._drop()

    def _call(self, method: str, signature: str, body: tuple[Any, ...], address: DBusAddress = _MANAGER) -> Any:
        message = new_method_call(address, method, signature, body)
        with self._lock:
            try:
                if self._connection is None:
                    self._connection = open_dbus_connection(self.bus, auth_timeout=self.timeout_s)
                reply = self._connection.send_and_get_reply(message, timeout=self.timeout_s)
            except Exception as error:
                # Of many kinds: of sockets, of jeepney, of its parser. After any the stream may be out of step.
                self._drop()
                raise UnitError(f"D-Bus: {' '.join(str(error).split()) or type(error).__name__}") from None
        if reply.header.message_type is MessageType.error:
            raise UnitError(f"{method}: {' '.join(map(str, reply.body or ('refused',)))}")
        return reply.body

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.close()
            except OSError:
                log.debug("D-Bus: closing failed")


class Observer:
    """Watches the scheduler's unit and gives systemd its orders, in a thread: the lease never waits for D-Bus."""

    def __init__(self, systemd: Systemd, unit: str, interval_s: float, changed: Callable[[], None]) -> None:
        """`changed` is called, in that thread, when a look has brought something new."""
        self._systemd, self._name, self._interval_s, self._changed = systemd, unit, interval_s, changed
        self._orders: list[Verb] = []
        self._wake = threading.Condition()
        self.unit = lease.Unit(at=clock())
        self.hurry = False
        self._stopped = False
        self._error = ""

    def order(self, verb: Verb) -> None:
        """Have this done as soon as possible, in the order of the calls."""
        with self._wake:
            self._orders.append(verb)
            self._wake.notify()

    def stop(self) -> None:
        """Let a look that waits return."""
        with self._wake:
            self._stopped = True
            self._wake.notify()

    def look_once(self) -> None:
        """Carry out what was ordered, look, and wait until the next look is due or something is ordered."""
        begin = time.monotonic()
        with self._wake:
            orders, self._orders = self._orders, []
            at = clock()
        for verb in orders:
            self._carry_out(verb)
        if orders:
            at = clock()
        self._look(at)
        period = HURRY_S if self.hurry else self._interval_s
        with self._wake:
            if not self._orders and not self._stopped:
                self._wake.wait(max(0.02, period - (time.monotonic() - begin)))

    def _carry_out(self, verb: Verb) -> None:
        try:
            self._systemd.control(self._name, verb)
            log.info("%s: %s", self._name, verb)
        except UnitError as error:
            log.error("%s: %s: %s", self._name, verb, error)

    def _look(self, at: float) -> None:
        """`at` is before the question was put: whatever was ordered later is not in the answer."""
        before = self.unit
        try:
            state = self._systemd.states([self._name]).get(self._name, UnitState())
            invocation = before.invocation
            if state.active == "active":
                invocation = self._systemd.invocation(state.path)
            self.unit = lease.Unit(at, state.load, state.active, state.sub, invocation)
            error = ""
        except UnitError as problem:
            # The old state keeps its old time: nobody takes it for news.
            error = str(problem)
        if error and not self._error:
            log.error("%s: %s", self._name, error)
        self._error = error
        after = self.unit
        if (before.load, before.active, before.sub, before.invocation) != (
            after.load, after.active, after.sub, after.invocation,
        ):  # fmt: skip
            self._changed()
