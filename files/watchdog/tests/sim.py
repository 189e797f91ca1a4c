"""A world of watchdogs: nodes with clocks that run at their own pace, a network that loses and delays, one database.

Everything the real ones have around them is here in its worst form; only the state machine under test is the real one.
Time is the world's; a run of a minute takes some milliseconds. The invariant is checked whenever a scheduler starts.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from airflow_watchdog import lease

TIMES = lease.Times()
TIMEOUT = 2.0
RESTART_S = 1.0


class OverlapError(AssertionError):
    """Two schedulers ran at once."""


@dataclass
class Stored:
    """The row of the table."""

    holder: str | None = None
    epoch: int = 0
    version: int = 0
    timeline: int = 1  # given back on the first timeline: somebody takes it at once
    expires: float = 0.0
    ttl: float = 10.0
    reserved_for: str | None = None
    wanted: str | None = None
    wanted_until: float = 0.0
    paused_until: float | None = None


class Database:
    """What the statements of store.py do, in Python. tests/test_store.py shows that SQL does the same."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.row = Stored()
        self.timeline = 1
        self.up = True
        self.clock_offset = 0.0
        self.versions = [replace(self.row)]

    def now(self) -> float:
        return self.world.now + self.clock_offset

    def execute(self, node: str, command: lease.Command) -> tuple[lease.Row, bool]:
        row, now, done = self.row, self.now(), False
        paused = row.paused_until is not None and now < row.paused_until
        match command:
            case lease.Acquire(version, timeline):
                free = row.holder in (None, node) or row.expires <= now or row.expires > now + max(row.ttl, TIMES.ttl)
                if row.version == version and self.timeline == timeline and free and not paused:
                    row.holder, row.epoch, done = node, max(row.epoch + 1, self.timeline << 32), True
                    row.expires, row.ttl = now + TIMES.ttl, TIMES.ttl
                    row.wanted = row.reserved_for = None
            case lease.Renew(epoch):
                if (row.holder, row.epoch) == (node, epoch):
                    row.expires, row.ttl, done = now + TIMES.ttl, TIMES.ttl, True
            case lease.Release(epoch, reserved_for):
                if (row.holder, row.epoch) == (node, epoch):
                    row.holder, row.expires, row.reserved_for, row.wanted, done = None, now, reserved_for, None, True
        if done:
            row.version += 1
            row.timeline = self.timeline
            self.save()
        return self.view(), done

    def save(self) -> None:
        self.versions.append(replace(self.row))

    def view(self) -> lease.Row:
        row, now = self.row, self.now()
        left = None if row.paused_until is None or row.paused_until <= now else row.paused_until - now
        wanted = row.wanted if row.wanted and row.wanted_until > now else None
        return lease.Row(
            row.holder, row.epoch, row.version, row.timeline, self.timeline, row.ttl, row.reserved_for, wanted, left
        )

    def fail_over(self, lost: int) -> None:
        """Promote a standby that lacks the last `lost` changes."""
        self.row = replace(self.versions[max(0, len(self.versions) - 1 - lost)])
        self.versions = [replace(self.row)]
        self.timeline += 1
        self.up = True


class Node:
    """A machine: systemd, a scheduler, and a watchdog that runs the real state machine."""

    def __init__(self, world: "World", name: str, rate: float) -> None:
        self.world, self.name, self.rate = world, name, rate
        self.offset = world.random.uniform(0, 1e6)
        self.machine: lease.Machine | None = None
        self.life = 0  # of the watchdog
        self.power = 0  # of the machine
        self.on = True
        self.active, self.sub = "inactive", ""
        self.invocation = 0
        self.job = 0  # counts what happens to the unit, so that later events know whether they still apply
        self.permit: float | None = None
        self.health: bool | None = True
        self.well_from = 0.0
        self.stalled = False
        self.dbus = True
        self.reach = True
        self.stubborn = False
        self.load = "loaded"
        self.unit = lease.Unit(at=self.clock(), active="unknown")
        self.killer = 0
        self.boot()

    def clock(self) -> float:
        return self.offset + self.world.now * self.rate

    # --- systemd ---

    @property
    def running(self) -> bool:
        return self.on and self.active in ("active", "deactivating")

    def start(self) -> None:
        """Start the unit, by whomever: ExecCondition looks at the permit."""
        if not self.on or self.running or self.load != "loaded":
            return
        self.job += 1
        if self.permit is None or self.clock() >= self.permit:
            self.active, self.sub = "inactive", ""
            return
        self.active, self.sub = "active", ""
        self.invocation += 1
        self.well_from = self.world.now + self.world.random.uniform(1, 8)
        self.world.check(self)

    def ended(self, job: int, restart: bool) -> None:
        if job != self.job or not self.on:
            return
        self.job += 1
        if restart:
            self.active, self.sub = "activating", "auto-restart"
            self.world.later(RESTART_S, lambda job=self.job: self.start() if job == self.job else None)  # type: ignore[misc]
        else:
            self.active, self.sub = "inactive", ""

    def stop(self) -> None:
        if self.active == "activating":
            self.job += 1
            self.active, self.sub = "inactive", ""
        if self.active == "active":
            self.active = "deactivating"
            self.job += 1
            # Asked nicely it may take for ever; systemd's own patience is TimeoutStopSec.
            lasts = TIMES.stop_timeout if self.stubborn else self.world.random.uniform(0, 2 * TIMES.stop_timeout)
            lasts = min(lasts, TIMES.stop_timeout) + 0.1
            self.world.later(lasts, lambda job=self.job: self.ended(job, restart=False))  # type: ignore[misc]

    def kill(self) -> None:
        if self.running:
            restart = self.active == "active"
            self.job += 1
            job = self.job
            self.world.later(0.05, lambda: self.ended(job, restart))

    def power_off(self) -> None:
        self.on, self.power = False, self.power + 1
        self.life += 1
        self.job += 1
        self.machine, self.permit, self.active, self.sub = None, None, "inactive", ""

    def power_on(self) -> None:
        if not self.on:
            self.on, self.dbus, self.stalled = True, True, False
            self.offset = self.world.random.uniform(0, 1e6) - self.world.now
            self.boot()

    def boot(self) -> None:
        """Start the watchdog, as systemd does."""
        self.life += 1
        self.stalled = False
        self.unit = lease.Unit(at=self.clock(), active="unknown")
        self.machine = lease.Machine(self.name, TIMES, self.clock())
        self.answers: list[lease.Answer] = []
        self.feed(10.0)
        self.loop(self.life)

    def watchdog_dies(self) -> None:
        """BindsTo: the scheduler stops with it. RuntimeDirectory: the permit goes. Restart=always."""
        if self.machine is None:
            return
        self.life += 1
        power = self.power
        self.machine, self.permit = None, None
        self.stop()
        self.world.later(RESTART_S, lambda: self.boot() if self.power == power and self.machine is None else None)

    def feed(self, patience: float) -> None:
        self.killer += 1
        killer, life = self.killer, self.life
        self.world.later(
            patience / self.rate, lambda: self.watchdog_dies() if (killer, life) == (self.killer, self.life) else None
        )

    # --- the daemon ---

    def loop(self, life: int) -> None:
        if life != self.life or self.machine is None:
            return
        if not self.stalled:
            self.step()
        if life == self.life and self.machine is not None:
            tick = 0.2 if self.machine.busy else 1.0
            self.world.later(tick * self.world.random.uniform(0.9, 1.1), lambda: self.loop(life))

    def observe(self) -> None:
        if self.dbus:
            self.unit = lease.Unit(self.clock(), self.load, self.active, self.sub, str(self.invocation))

    def step(self) -> None:
        assert self.machine is not None
        self.observe()
        now = self.clock()
        ok = (
            self.active == "active"
            and self.world.now >= self.well_from
            and bool(self.health)
            and self.world.database.up
        )
        for answer in [*self.answers, None] if not self.answers else [*self.answers]:
            for action in self.machine.step(now, self.unit, lease.Health(now, ok), answer):
                self.act(action)
                if self.machine is None:
                    return
        self.answers.clear()
        self.feed(self.machine.patience(now, 10.0))

    def act(self, action: lease.Action) -> None:
        match action:
            case lease.Ask(command):
                self.send(command)
            case lease.Control(verb):
                if self.dbus and self.world.random.random() > self.world.noise / 4:
                    {"start": self.start, "stop": self.stop, "kill": self.kill, "reset-failed": lambda: None}[verb]()
            case lease.Permit(_, until):
                self.permit = until
            case lease.Revoke():
                self.permit = None
            case lease.Die():
                self.watchdog_dies()
            case lease.Tell(kind):
                self.world.told[kind] = self.world.told.get(kind, 0) + 1

    def send(self, command: lease.Command) -> None:
        """A statement may be late, be lost on its way, or be carried out without its answer coming back."""
        random, world, life = self.world.random, self.world, self.life
        sent = self.clock()
        open_ = [True]

        def fail() -> None:
            if open_[0]:
                answer(None, False, "timeout")

        def answer(row: lease.Row | None, done: bool, error: str = "") -> None:
            if open_[0] and life == self.life:
                self.answers.append(lease.Answer(command, sent, self.clock(), row, done, error))
                world.later(0.0, lambda: self.loop_once(life))
            open_[0] = False

        def arrive() -> None:
            # What comes after the client gave up may still be carried out.
            if not world.database.up or not self.reach:
                world.later(0.01, fail)
                return
            row, done = world.database.execute(self.name, command)
            if random.random() >= world.noise:
                slow = random.random() < world.noise
                delay = random.uniform(0, TIMEOUT) if slow else random.expovariate(200)
                world.later(delay, lambda: answer(row, done) if self.reach else None)

        world.later(TIMEOUT, fail)
        lost = random.random() < world.noise
        if self.reach and not lost:
            late = random.random() < world.noise
            world.later(random.uniform(0, 12) if late else random.uniform(0.001, 0.01), arrive)

    def loop_once(self, life: int) -> None:
        if life == self.life and self.machine is not None and not self.stalled and self.answers:
            self.step()


class World:
    """Nodes, a database, and what happens when."""

    def __init__(self, nodes: int, random: Random, noise: float = 0.0) -> None:
        self.random = random
        self.noise = noise
        self.now = 0.0
        self.told: dict[str, int] = {}
        self.starts = 0
        self.gap = 0.0
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._count = 0
        self.nodes: list[Node] = []
        self.database = Database(self)
        for index in range(nodes):
            # Quartz is good to 0.01 %; a hundred times that is still within the margin.
            self.nodes.append(Node(self, f"n{index}", random.uniform(0.99, 1.01)))

    def later(self, seconds: float, call: Callable[[], object]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + seconds, self._count, call))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, call = heapq.heappop(self._queue)
            call()
        self.now = end

    def running(self) -> list[str]:
        return [node.name for node in self.nodes if node.running]

    def check(self, started: Node) -> None:
        self.starts += 1
        if len(self.running()) > 1:
            raise OverlapError(f"{self.now:.3f} s: {started.name} started, running are {self.running()}")

    def settle(self, seconds: float = 90.0) -> None:
        """End all faults, wait, and show that exactly one scheduler runs."""
        self.noise = 0.0
        self.database.up = True
        self.database.row.paused_until = None
        for node in self.nodes:
            node.reach = node.dbus = True
            node.stalled = node.stubborn = False
            node.health, node.load = True, "loaded"
            node.power_on()
        self.run(seconds)
        assert len(self.running()) == 1, f"{self.running()} run after everything was mended"

    # --- faults ---

    def fault(self) -> None:
        """Let something happen to somebody."""
        random, node, database = self.random, self.random.choice(self.nodes), self.database
        lasts = random.choice((0.5, 3.0, 9.0, 18.0))

        def flag(name: str, value: object, usual: object) -> None:
            setattr(node, name, value)
            self.later(lasts, lambda: setattr(node, name, usual))

        match random.randrange(16):
            case 0:
                flag("reach", False, True)
            case 1:
                flag("stalled", True, False)
            case 2:
                flag("dbus", False, True)
            case 3:
                flag("stubborn", True, False)
            case 4:
                flag("health", False, True)
            case 5:
                node.watchdog_dies()
            case 6:
                node.power_off()
                self.later(lasts, node.power_on)
            case 7:
                node.kill()
            case 8:
                node.start()
            case 9:
                database.up = False
                self.later(lasts, lambda: setattr(database, "up", True))
            case 10:
                database.up = False
                lost = random.randrange(8)
                self.later(lasts / 4, lambda: database.fail_over(lost))
            case 11:
                database.clock_offset += random.choice((-3600.0, -5.0, -1.0, 1.0, 5.0, 3600.0))
            case 12:
                row = database.row
                row.wanted, row.wanted_until = random.choice([n.name for n in self.nodes] + ["*"]), database.now() + 60
                database.save()
            case 13:
                database.row.paused_until = random.choice((None, database.now() + lasts))
                database.save()
            case 14:
                if node.machine is not None:
                    node.machine.stopping = True
                    self.later(12.0, lambda life=node.life: node.watchdog_dies() if life == node.life else None)  # type: ignore[misc]
            case 15:
                flag("load", "masked", "loaded")


def history(seed: int) -> World:
    """Run one random history: some quiet, some faults, and then a world that has to come to rest."""
    random = Random(seed)
    world = World(random.choice((2, 2, 2, 3, 5)), random, noise=random.choice((0.0, 0.02, 0.1, 0.3)))
    world.run(random.uniform(0, 4))
    for _ in range(random.randrange(1, 7)):
        world.fault()
        world.run(random.expovariate(0.14))
    return world
