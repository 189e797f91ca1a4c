"""The daemon: threads that look and tell, and the loop that holds the lease, which waits for none of them.

main       holds the lease: steps the state machine, feeds systemd's watchdog
unit       the scheduler's unit: looks at it, carries out orders
database   the lease's statements, and the database's notifications
health     asks the scheduler how it is
survey     units, peers, PostgreSQL and Redis of this node
beats      writes heartbeats and events
Only Airflow servers have more than main and survey. HTTPS and the hooks of alerts have threads of their own.
"""

import logging
import os
import queue
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from airflow_watchdog import __version__, endpoints, lease, permit
from airflow_watchdog.agent import PostgresqlAgent
from airflow_watchdog.alerts import Alerter
from airflow_watchdog.components import Components, Url, UrlError, of_unit
from airflow_watchdog.config import Config, Scheduler
from airflow_watchdog.events import Event
from airflow_watchdog.metrics import Metrics
from airflow_watchdog.notify import Notifier
from airflow_watchdog.peers import Peers
from airflow_watchdog.redis_agent import RedisAgent
from airflow_watchdog.snapshot import ComponentState, LeaseView, PostgresqlState, RedisState, Snapshot, State
from airflow_watchdog.units import Observer, Systemd, UnitState
from airflow_watchdog.web import HttpsServer

if TYPE_CHECKING:
    from airflow_watchdog import store

TICK_S = 0.5
HURRY_S = 0.1
# A thread of ours that has made no step for so long hangs: then only a new process helps.
STUCK_S = 60.0
# What the database does not take in time is not worth the memory.
EVENTS_KEPT = 1000
DIED = 70
# The name under which systemd keeps the listening socket over a restart.
HTTPS = "https"
log = logging.getLogger("airflow_watchdog")

_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.ERROR}
_GOOD = (State.RUNNING, State.STARTING)


class _Journal(logging.Formatter):
    """Lines for the journal: systemd reads the priority from the front."""

    def format(self, record: logging.LogRecord) -> str:
        priority = 3 if record.levelno >= logging.ERROR else 4 if record.levelno >= logging.WARNING else 6
        return f"<{priority}>" + super().format(record).replace("\n", f"\n<{priority}>")


class _Worker:
    """A thread that calls `step` for ever, whatever that raises; `step` returns how long to wait before the next."""

    def __init__(self, name: str, step: Callable[[], float]) -> None:
        self.name = name
        self._step = step
        self.stepped_at = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                pause = self._step()
            except Exception:
                log.exception("%s: unexpected error", self.name)
                pause = 1.0
            self.stepped_at = time.monotonic()
            self._stopped.wait(pause)

    def stop(self, timeout_s: float) -> None:
        self._stopped.set()
        self._thread.join(timeout_s)


class _Charge:
    """An Airflow server's part: the lease and its scheduler."""

    def __init__(self, config: Config, settings: Scheduler, systemd: Systemd, tell: Callable[[Event], None]) -> None:
        from airflow_watchdog import store

        loop = config.loop
        times = lease.Times(
            loop.interval_s, loop.ttl_s, settings.stop_timeout_s, settings.kill_margin_s, settings.hung_after_s,
            settings.start_grace_s, settings.down_after_s, settings.cooldown_s,
        )  # fmt: skip
        self.settings, self._node, self._tell = settings, config.node.name, tell
        self.machine = lease.Machine(config.node.name, times, permit.clock(), settings.mode == "active_active")
        self.inbox: queue.SimpleQueue[lease.Answer | None] = queue.SimpleQueue()
        self.observer = Observer(systemd, settings.unit, loop.interval_s, self.wake)
        self._health = lease.Health(permit.clock(), None)
        self._url = Url(settings.health_url, loop.timeout_s, str(config.http.ca)) if settings.health_url else None
        self._interval_s = loop.interval_s
        self._server = store.Server(config)
        self._lease = store.Lease(self._server, loop.ttl_s)
        self._commands: queue.SimpleQueue[lease.Command] = queue.SimpleQueue()
        self._bell, self._rope = os.pipe()
        os.set_blocking(self._bell, False)
        self._nudged = False
        self._state_since = time.monotonic()
        self._state: State | None = None

    def workers(self) -> list[_Worker]:
        found = [_Worker("unit", self._observe), _Worker("database", self._serve)]
        return [*found, _Worker("health", self._ask_health)] if self._url else found

    def heartbeats(self, period_s: float) -> "store.Heartbeats":
        """Return what writes heartbeats to the same servers."""
        from airflow_watchdog import store

        return store.Heartbeats(self._server, period_s)

    def wake(self) -> None:
        """Have the main loop step now."""
        self.inbox.put(None)

    def stop(self) -> None:
        """Let the threads come to their ends."""
        self.observer.stop()
        os.write(self._rope, b".")

    # --- threads ---

    def _observe(self) -> float:
        self.observer.look_once()
        return 0.0

    def _ask_health(self) -> float:
        assert self._url is not None
        at = permit.clock()
        if self.observer.unit.active != "active":
            return self._interval_s / 2
        try:
            status, body = self._url.get()
            ok, detail = (
                status == 200,
                "" if status == 200 else f"status {status}: {body[:200].decode(errors='replace')}",
            )
        except UrlError as error:
            ok, detail = False, str(error)
        self._health = lease.Health(at, ok, detail)
        return self._interval_s

    def _serve(self) -> float:
        """Carry out a command, or hear from the database that something has changed; return soon."""
        link = self._lease.link
        connection = link.fileno()
        watched = [self._bell] if connection is None else [self._bell, connection]
        ready, _, _ = select.select(watched, [], [], 1.0)
        if self._bell in ready:
            os.read(self._bell, 512)
        try:
            command = self._commands.get_nowait()
        except queue.Empty:
            if ready and link.notified():
                self._nudged = True
                self.wake()
            return 0.0
        self.inbox.put(self._lease.execute(command))
        return 0.0

    # --- the loop ---

    def step(self) -> float:
        """One step of the state machine; return for how long systemd may wait for the next, at most."""
        machine = self.machine
        try:
            answer = self.inbox.get(timeout=HURRY_S if machine.busy else TICK_S)
        except queue.Empty:
            answer = None
        now = permit.clock()
        if self._nudged:
            self._nudged = False
            machine.nudge(now)
        for action in machine.step(now, self.observer.unit, self._health, answer):
            self._act(action)
        self.observer.hurry = machine.busy
        return now

    def _act(self, action: lease.Action) -> None:
        match action:
            case lease.Ask(command):
                self._commands.put(command)
                os.write(self._rope, b".")
            case lease.Control(verb):
                self.observer.order(verb)
            case lease.Permit(epoch, until):
                self._permit(lambda path: permit.write(path, epoch, until))
            case lease.Revoke():
                self._permit(permit.revoke)
            case lease.Tell(kind, message, severity):
                self._tell(Event(kind, self._node, message, "scheduler", severity, time.time()))
            case lease.Die(why):
                log.critical("ending this process, and the scheduler that is bound to it: %s", why)
                os._exit(DIED)

    def _permit(self, change: Callable[[Path], None]) -> None:
        try:
            change(self.settings.permit_file)
        except OSError as error:
            log.error("%s: %s", self.settings.permit_file, error.strerror)

    # --- what it shows ---

    def view(self) -> LeaseView:
        machine, now = self.machine, permit.clock()
        row, paused = machine.row, machine.paused(now)
        why = machine.unable(now, self.observer.unit)
        return LeaseView(
            mode=self.settings.mode,
            held=machine.held,
            holder=row.holder if row else None,
            epoch=row.epoch if row else 0,
            timeline=row.current if row else 0,
            left_s=round(machine.deadline - now, 3) if machine.held else None,
            seen_s=round(now - machine.row_at, 3) if row else None,
            able=not why,
            why=why,
            paused=paused,
            paused_left_s=round(machine.row_at + row.paused_left_s - now, 3)
            if paused and row and row.paused_left_s is not None
            else None,
            pause_reason=row.pause_reason if row and paused else "",
            database=machine.error or "ok",
        )

    def scheduler(self) -> ComponentState:
        unit, health, now = self.observer.unit, self._health, time.monotonic()
        state, detail = of_unit(UnitState(unit.load, unit.active, unit.sub))
        if state is State.RUNNING and health.ok is False:
            state, detail = State.UNHEALTHY, health.detail
        if state is not self._state:
            self._state, self._state_since = state, now
        return ComponentState(name="scheduler", state=state, for_s=round(now - self._state_since, 3), detail=detail)


class Daemon:
    """Everything of one node."""

    def __init__(self, config: Config, systemd: Systemd | None = None) -> None:
        """Raises ConfigError for secrets that cannot be read, and OSError for an address in use."""
        self.config = config
        self._begin = time.monotonic()
        self._systemd = systemd or Systemd(min(1.0, config.loop.timeout_s))
        self._notifier = Notifier()
        self.metrics = Metrics(self.snapshot)
        self._alerts = Alerter(config.alerts, self.metrics.count_alert)
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._stop = threading.Event()
        self._looped_at = time.monotonic()
        # What survey found last.
        self._components = Components(config, self._systemd)
        self._peers = Peers(config)
        self._postgresql: PostgresqlState | None = None
        self._redis: RedisState | None = None
        state_folder = os.environ.get("STATE_DIRECTORY")
        self._postgresql_agent = (
            PostgresqlAgent(
                config.postgresql, config.loop.timeout_s, self._stop_unit, Path(state_folder) if state_folder else None
            )
            if config.postgresql
            else None
        )
        self._redis_agent = RedisAgent(config.redis, config.loop.timeout_s) if config.redis else None
        self._charge = (
            _Charge(config, config.scheduler, Systemd(self._systemd.timeout_s, self._systemd.bus), self.tell)
            if config.scheduler
            else None
        )
        self._heartbeats: store.Heartbeats | None = None
        self._workers = [_Worker("survey", self._survey)]
        if self._charge:
            self._heartbeats = self._charge.heartbeats(self._peers.period_s)
            self._workers += [*self._charge.workers(), _Worker("beats", self._beat)]
        self._https = HttpsServer(
            config.http,
            endpoints.routes(
                self.snapshot,
                lambda: time.monotonic() - self._looped_at,
                config.loop.ttl_s,
                self._postgresql_agent,
                config.postgresql.max_lag_bytes if config.postgresql else None,
                self.metrics.render,
            ),
            listener=self._notifier.inherited(HTTPS),
        )
        self._notifier.keep(HTTPS, self._https.socket)

    # --- the main thread ---

    def run(self) -> int:
        """Work until `stop` is called; return the exit code."""
        self._https.start()
        for worker in self._workers:
            worker.start()
        self._notifier.send(f"READY=1\nSTATUS=airflow-watchdog {__version__}")
        usual = self._notifier.usual_s or self.config.loop.ttl_s
        shown = ""
        end: float | None = None
        while True:
            begin = time.monotonic()
            if self._charge:
                now = self._charge.step()
                self._notifier.feed(self._charge.machine.patience(now, usual))
                status = self._status(self._charge)
            else:
                self._notifier.feed(usual)
                self._stop.wait(TICK_S)
                status = "watching"
            self._looped_at = time.monotonic()
            self.metrics.count_loop(max(0.0, self._looped_at - begin - TICK_S))
            if status != shown:
                shown = status
                self._notifier.send(f"STATUS={status}")
            if self._stop.is_set():
                end = end or time.monotonic() + self.config.loop.ttl_s
                if self._may_end() or time.monotonic() > end:
                    break
            elif stuck := [w.name for w in self._workers if time.monotonic() - w.stepped_at > STUCK_S]:
                log.critical("ending this process: the thread %s hangs", ", ".join(stuck))
                return DIED
        self._notifier.send("STOPPING=1")
        self._close()
        return 0

    def stop(self) -> None:
        """End the scheduler, give the lease back, and return from `run`. May be called from a signal handler."""
        self._stop.set()
        if self._charge:
            self._charge.machine.stopping = True
            self._charge.wake()

    def _may_end(self) -> bool:
        return self._charge is None or self._charge.machine.finished(self._charge.observer.unit)

    def _close(self) -> None:
        if self._charge:
            self._charge.stop()
        for worker in self._workers:
            worker.stop(0.5)
        self._flush()
        self._https.stop()
        self._alerts.close()
        self._components.close()
        self._peers.close()

    @staticmethod
    def _status(charge: _Charge) -> str:
        machine = charge.machine
        if machine.held:
            return f"in charge of the scheduler, epoch {machine.epoch}" + (
                f"; ending: {machine.ending}" * bool(machine.ending)
            )
        holder = machine.row.holder if machine.row else None
        return f"standby; in charge: {holder or 'nobody'}" + (f"; database: {machine.error}" if machine.error else "")

    # --- events ---

    def tell(self, event: Event) -> None:
        """Log, count and alert; and keep for the database, where there is one."""
        self._announce(event)
        if self._charge:
            self._events.append(event)

    def _announce(self, event: Event) -> None:
        log.log(_LEVELS[event.severity], "%s: %s", event.kind, event.message)
        self.metrics.count_event(event.kind, event.severity)
        self._alerts.tell(event)

    # --- survey ---

    def _survey(self) -> float:
        begin, interval_s = time.monotonic(), self.config.loop.interval_s
        self._peers.look()
        self._components.look()
        if self._redis_agent:
            self._redis = self._redis_agent.state()
        if self._postgresql_agent:
            # The peers' answers to this very round, if they come in time: a primary of the past is to stop at once.
            self._peers.wait(self.config.loop.timeout_s / 2)
            self._peers.look()
            found = self._postgresql_agent.judge(self._peers.postgresql(interval_s + self.config.loop.timeout_s))
            before, self._postgresql = self._postgresql, found
            if found.role == "stale" and (before is None or before.role != "stale"):
                self.tell(
                    Event("primary_stale", self.config.node.name, found.detail, "postgresql", "critical", time.time())
                )
        return max(0.05, interval_s - (time.monotonic() - begin))

    def _stop_unit(self, unit: str) -> None:
        self._systemd.control(unit, "stop")

    def snapshot(self) -> Snapshot:
        """Return how this node is, as of the last look of each part."""
        charge = self._charge
        lease_view, scheduler = (charge.view(), charge.scheduler()) if charge else (None, None)
        components = self._components.states()
        if charge and scheduler:
            components = tuple(scheduler if c.name == "scheduler" else c for c in components)
        snapshot = Snapshot(
            node=self.config.node.name,
            rack=self.config.node.rack,
            version=__version__,
            uptime_s=round(time.monotonic() - self._begin, 3),
            components=components,
            lease=lease_view,
            scheduler=scheduler,
            postgresql=self._postgresql,
            redis=self._redis,
            peers=self._peers.views(),
        )
        return snapshot.model_copy(update={"healthy": is_healthy(snapshot)})

    # --- heartbeats ---

    def _beat(self) -> float:
        from airflow_watchdog import store

        assert self._heartbeats is not None
        begin = time.monotonic()
        events = list(self._events)
        beats = beats_of(self.snapshot(), 0.0)
        for age_s, snapshot in self._peers.snapshots(3 * self._peers.period_s).values():
            beats += beats_of(snapshot, age_s)
        known = [self.config.node.name, *(peer.name for peer in self.config.peer)]
        try:
            changes = self._heartbeats.write(beats, events, known)
        except store.StoreError as error:
            log.debug("heartbeats: %s", error)
        else:
            for _ in events:
                self._events.popleft()
            for change in changes:
                self._announce(change)
            self._heartbeats.sweep_when_due()
        return max(0.05, self._peers.period_s - (time.monotonic() - begin))

    def _flush(self) -> None:
        """The last events, if the database takes them."""
        if self._events:
            self._beat()


def is_healthy(snapshot: Snapshot) -> bool:
    """Whether all that should run here runs: a scheduler where the lease is, everything else everywhere."""
    lease_view = snapshot.lease
    standby = lease_view is not None and lease_view.mode == "active_standby" and not lease_view.held
    for component in snapshot.components:
        rests = standby and component.name == "scheduler" and component.state is State.STOPPED
        if component.state not in _GOOD and not rests:
            return False
    if lease_view and lease_view.database != "ok":
        return False
    return not endpoints.problems_of_data(snapshot)


def beats_of(snapshot: Snapshot, age_s: float) -> "list[store.Beat]":
    """Return the heartbeats that a snapshot of this age stands for."""
    from airflow_watchdog import store

    def beat(component: str, state: str, detail: str = "") -> store.Beat:
        return store.Beat(snapshot.node, snapshot.rack, component, state, detail, age_s)

    beats = [beat("watchdog", State.RUNNING, snapshot.lease.why if snapshot.lease else "")]
    beats += [beat(c.name, c.state, c.detail) for c in snapshot.components]
    if own := snapshot.postgresql:
        beats.append(beat("postgresql role", own.role, own.detail or f"timeline {own.timeline}, lag {own.lag_bytes}"))
    if redis := snapshot.redis:
        beats.append(beat("redis role", redis.role, redis.detail or f"lag {redis.lag_bytes}"))
    return beats


def run(config: Config) -> int:
    """Be the daemon until SIGTERM; return the exit code. Raises ConfigError."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Journal("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    try:
        daemon = Daemon(config)
    except OSError as error:
        log.error("port %d of %s: %s", config.http.port, config.http.address, error.strerror)
        return 1

    def stop(_number: int, _frame: FrameType | None) -> None:
        daemon.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return daemon.run()
