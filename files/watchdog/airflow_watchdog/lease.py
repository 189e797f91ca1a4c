"""Who may run the scheduler: a state machine without any I/O.

It is told what was observed and what time it is, and returns what to do. All times are seconds of one clock that never
steps and counts on while the machine sleeps (CLOCK_BOOTTIME); the wall clock and the database's clock never decide
that a scheduler may start.

Why two schedulers never run at once:

1. A holder counts its lease from the moment *before* it sent the statement that took or renewed it. If it is not
   renewed, the scheduler is ended so early that it is dead when the lease ends (`Times.fence_lead`).
2. Another node takes the lease only if the holder gave it back, or if the row has not changed for the lease's whole
   length since this node first *received* it so, by its own clock. The statement takes the row only in exactly that
   version. So a stepped clock, on a node or on the database's machine, decides nothing.
3. After a promotion of PostgreSQL the row may be older than what was acknowledged: it may lack the last changes. Then
   nobody trusts "given back", and everybody waits the whole length from its first sight of the new timeline.
4. A holder that gives the lease back does so when its scheduler is dead, and never uses that epoch again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# --- what comes in ---


@dataclass(frozen=True)
class Row:
    """The lease as the database returned it. `timeline`: PostgreSQL's when it was written, `current`: now."""

    holder: str | None
    epoch: int
    version: int
    timeline: int
    current: int
    ttl_s: float
    reserved_for: str | None = None
    wanted: str | None = None  # a switchover is asked for: a node's name, or "*"
    paused_left_s: float | None = None
    pause_reason: str = ""


@dataclass(frozen=True)
class Poll:
    """Look at the row."""


@dataclass(frozen=True)
class Acquire:
    """Take the lease, if the row is still exactly this version on this timeline."""

    version: int
    timeline: int


@dataclass(frozen=True)
class Renew:
    """Lengthen the lease, if it is still ours with this epoch."""

    epoch: int


@dataclass(frozen=True)
class Release:
    """Give the lease back; for `ttl` seconds only `reserved_for` may take it, if named."""

    epoch: int
    reserved_for: str | None


Command = Poll | Acquire | Renew | Release


@dataclass(frozen=True)
class Answer:
    """What became of a command. `done`: it changed the row. `row` None with `error`: nothing is known."""

    command: Command
    sent_at: float
    received_at: float
    row: Row | None = None
    done: bool = False
    error: str = ""


@dataclass(frozen=True)
class Unit:
    """The scheduler's unit as systemd has it, at a time. `active` "unknown": systemd did not answer."""

    at: float
    load: str = "loaded"
    active: str = "unknown"
    sub: str = ""
    invocation: str = ""

    @property
    def dead(self) -> bool:
        """Whether it surely has no process, and systemd will not start one by itself."""
        return self.active in ("inactive", "failed")

    @property
    def installed(self) -> bool:
        """Whether systemd could start it at all."""
        return self.load == "loaded"


@dataclass(frozen=True)
class Health:
    """The last answer of the scheduler's health URL; `ok` None: there is no such URL."""

    at: float
    ok: bool | None
    detail: str = ""


# --- what goes out ---


@dataclass(frozen=True)
class Ask:
    """Send this to the database, and answer with what came of it."""

    command: Command


@dataclass(frozen=True)
class Control:
    """Have systemd do this with the scheduler, without waiting for the end of it."""

    verb: Literal["start", "stop", "kill", "reset-failed"]


@dataclass(frozen=True)
class Permit:
    """Allow starts of the scheduler until then."""

    epoch: int
    until: float


@dataclass(frozen=True)
class Revoke:
    """Allow no starts of the scheduler."""


@dataclass(frozen=True)
class Tell:
    """Something changed that people should know."""

    kind: str
    message: str
    severity: Literal["info", "warning", "critical"] = "info"


@dataclass(frozen=True)
class Die:
    """End this process at once: systemd then ends the scheduler, which is bound to it."""

    why: str


Action = Ask | Control | Permit | Revoke | Tell | Die


@dataclass(frozen=True)
class Times:
    """All durations in seconds; the meanings stand in config.py."""

    interval: float = 2.0
    ttl: float = 10.0
    stop_timeout: float = 3.0
    kill_margin: float = 1.0
    hung_after: float = 15.0
    start_grace: float = 30.0
    down_after: float = 6.0
    cooldown: float = 15.0

    @property
    def fence_lead(self) -> float:
        """How long before the end of the lease an unrenewed holder begins to end its scheduler."""
        return self.stop_timeout + self.kill_margin


@dataclass
class _Ending:
    """The scheduler is being ended, after which the lease goes back. `renew`: the lease lives on until then."""

    why: str
    renew: bool
    reserved_for: str | None = None
    cooldown: float = 0.0


# How often an order to systemd is repeated while it shows no effect, and an unreachable database is tried again.
_AGAIN = 1.0
# A restart of a hung scheduler is forgotten after so long: the next hang is restarted, too, rather than given up.
_FORGIVEN = 600.0


class _Wellness:
    """Since when the scheduler has not answered well, with the time that a start may take left out."""

    def __init__(self, times: Times, now: float) -> None:
        self._times = times
        self._invocation = ""
        self._was_well = False
        self._since = self._well_at = now

    def starts(self, now: float) -> None:
        """It is being started: what it answered before counts no more, and it has time to get well."""
        self._since, self._well_at, self._was_well = now, now + self._times.start_grace, False
        self._invocation = ""

    def excuse(self, now: float) -> None:
        """Whatever it answers now is not its fault, or nobody's business."""
        self._well_at = max(self._well_at, now)

    def learn(self, now: float, unit: Unit, health: Health) -> bool:
        """Take in what was seen. Return whether somebody else has restarted it."""
        if health.ok is None:
            self._well_at = now
        elif health.ok and health.at >= self._since:
            self._well_at, self._was_well = health.at, True
        if unit.active != "active" or unit.invocation == self._invocation:
            return False
        known = bool(self._invocation)
        # One that was well gets the time of a start; one that never gets well does not get it again and again.
        if known and self._was_well:
            self.starts(now)
        self._invocation = unit.invocation
        return known

    def hung(self, now: float, unit: Unit, health: Health) -> bool:
        """Whether it has been answering badly for too long, and still does."""
        current = health.ok is False and now - health.at <= 2 * self._times.interval + self._times.hung_after
        return current and unit.active == "active" and now - self._well_at >= self._times.hung_after


class Machine:
    """One node's part in the game. Call `step` often: twice a second, and whenever something was learned."""

    def __init__(self, node: str, times: Times, now: float, active_active: bool = False) -> None:
        """Begin as a standby that knows nothing."""
        self.node = node
        self.times = times
        self.active_active = active_active
        # What the database said last, and when; the error of the last try, if it was one.
        self.row: Row | None = None
        self.row_at = now
        self.error = "not asked yet"
        # The lease, if it is ours: since it was taken, and until when by our own clock.
        self.epoch: int | None = None
        self.deadline = now
        # Set from outside: give everything back, and stay out of it.
        self.stopping = False
        self._seen: tuple[object, ...] = ()
        self._seen_since = now
        self._timeline = 0
        self._good_since = now
        self._pending = False
        self._next_ask = self._next_try = now
        self._ending: _Ending | None = None
        self._releasing = False
        self._cool_until = now
        # Orders to systemd that show no effect yet, and when they were given.
        self._ordered: dict[str, float] = {}
        self._stop_since: float | None = None
        # The lease was lost while the scheduler ran: it has to end, or we do.
        self._owed = False
        # A permit may be left of a former life: revoke it at first.
        self._permitted: Permit | None = Permit(0, now)
        self._wellness = _Wellness(times, now)
        self._up_at = now
        self._restarted_at = -_FORGIVEN

    # --- what others may ask ---

    @property
    def held(self) -> bool:
        """Whether the lease is ours, be it in its last moments."""
        return self.epoch is not None

    @property
    def ending(self) -> str:
        """Why the scheduler is being ended, if it is."""
        return self._ending.why if self._ending else ""

    @property
    def fence_at(self) -> float:
        """When an unrenewed holder begins to end its scheduler."""
        return self.deadline - self.times.fence_lead

    @property
    def busy(self) -> bool:
        """Whether something is under way that makes it worth looking at the unit more often."""
        return self._ending is not None or self._stop_since is not None or bool(self._ordered)

    def finished(self, unit: Unit) -> bool:
        """Whether, after `stopping` was set, nothing is left to do that can be done."""
        if not self.stopping or (self.held and not (self._releasing and self.error)):
            return False
        return self.active_active or unit.dead

    def patience(self, now: float, usual: float) -> float:
        """Return for how many seconds systemd may hear nothing before it has to end this process, and the scheduler.

        A holder that hangs must be killed at the moment at which it would have begun to end its scheduler by itself.
        """
        if self.epoch is None or self._ending is not None:
            return usual
        return max(0.1, min(usual, self.fence_at - now))

    def paused(self, now: float) -> bool:
        """Whether an operator asked to leave everything as it is, as far as is known here."""
        left = self.row.paused_left_s if self.row else None
        return left is not None and now < self.row_at + left

    def unable(self, now: float, unit: Unit) -> str:
        """Return why this node would not take the lease if it were free; empty if it would."""
        if self.stopping:
            return "the watchdog is being stopped"
        if unit.active == "unknown" or now - unit.at > 3 * self.times.interval:
            return "systemd does not answer"
        if not unit.installed:
            return f"the scheduler's unit is {unit.load}"
        if now < self._cool_until:
            return "gave up its scheduler a moment ago"
        return ""

    def nudge(self, now: float) -> None:
        """Look at the row now rather than at the next interval: somebody has changed it."""
        self._next_ask = now

    def step(self, now: float, unit: Unit, health: Health, answer: Answer | None = None) -> list[Action]:
        """Return what to do now, in this order."""
        actions: list[Action] = []
        if answer:
            actions += self._learn(now, answer)
        if self.active_active:
            actions += self._run_always(now, unit, health)
        else:
            actions += self._hold(now, unit, health)
        actions += self._ask(now, unit)
        return actions

    # --- what the database said ---

    def _learn(self, now: float, answer: Answer) -> Iterator[Action]:
        self._pending = False
        row, error = answer.row, answer.error
        if row is not None and row.current < self._timeline:
            row, error = None, "a former primary answered"
        if row is None:
            if not self.error:
                yield Tell("database_lost", f"the database of the lease: {error}", "warning")
            self.error = error or "no answer"
            self._good_since = now
            self._next_ask = now + min(self.times.interval, _AGAIN)
            return
        if self.error and self.row is not None:
            yield Tell("database_back", "the database of the lease answers again")
        self.error = ""
        if row.current != self._timeline:
            self._timeline, self._good_since = row.current, now
        self.row, self.row_at = row, answer.received_at
        seen = (row.current, row.timeline, row.holder, row.epoch, row.version)
        if seen != self._seen:
            self._seen, self._seen_since = seen, answer.received_at
        yield from self._learn_lease(now, answer, row)

    def _learn_lease(self, now: float, answer: Answer, row: Row) -> Iterator[Action]:
        match answer.command:
            case Acquire() if answer.done:
                self.epoch, self.deadline = row.epoch, answer.sent_at + self.times.ttl
                self._ending, self._releasing, self._stop_since = None, False, None
                self._ordered.clear()
                self._wellness.starts(now)
                self._up_at = self._good_since = now
                self._restarted_at = now - _FORGIVEN
                yield Tell("lease_acquired", f"{self.node} is in charge of the scheduler, epoch {row.epoch}")
            case Renew(epoch=epoch) if epoch == self.epoch and not self._releasing:
                if answer.done:
                    self.deadline = max(self.deadline, answer.sent_at + self.times.ttl)
                else:
                    yield from self._lose(now, f"it is {row.holder or 'nobody'}'s, epoch {row.epoch}")
            case Release(epoch=epoch) if epoch == self.epoch:
                yield Tell("lease_released", f"{self.node} gave the lease back: {self.ending}")
                self._drop(now)

    # --- active/standby ---

    def _hold(self, now: float, unit: Unit, health: Health) -> Iterator[Action]:
        if self.held:
            yield from self._judge(now, unit, health)
        if self.held and self._ending is None:
            yield from self._run(now, unit, self.fence_at)
            return
        yield from self._revoke()
        if self.held and self._stop_since is None:
            # Even if it is dead: a start that waits in systemd's queue has to go, too.
            yield from self._stop(now)
        elif not self._dead(unit):
            yield from self._end(now, unit)
        elif not self.held:
            self._stop_since, self._owed = None, False
            if unit.active != "failed" or self.stopping or self.paused(now):
                self._ordered.clear()
            elif self._order("reset-failed", now):
                yield Control("reset-failed")
        elif now >= self.deadline:
            yield Tell("lease_ended", f"{self.node} is no longer in charge: {self.ending}", "warning")
            self._drop(now)

    def _judge(self, now: float, unit: Unit, health: Health) -> Iterator[Action]:
        """Decide whether a holder has to end its scheduler."""
        if now >= self.deadline and not self._dead(unit):
            # A loop took longer than the lease: somebody else may be in charge already.
            yield from self._lose(now, "it was not renewed in time")
        elif now >= self.fence_at:
            if self._ending is None:
                self._ending = _Ending("it could not be renewed", renew=False)
                why = self.error or "no answer in time"
                yield Tell("lease_fenced", f"{self.node} cannot renew and ends its scheduler: {why}", "critical")
            self._ending.renew = False
        elif self._ending is None:
            yield from self._judge_wishes(now, unit, health)

    def _judge_wishes(self, now: float, unit: Unit, health: Health) -> Iterator[Action]:
        wanted = self.row.wanted if self.row else None
        if self.stopping:
            self._ending = _Ending("the watchdog is being stopped", renew=True)
        elif not unit.installed and unit.active != "unknown":
            self._ending = _Ending(f"the scheduler's unit is {unit.load}", renew=True, cooldown=self.times.cooldown)
        elif self.paused(now):
            self._up_at = now
            self._wellness.excuse(now)
        elif wanted and wanted != self.node:
            target = None if wanted == "*" else wanted
            self._ending = _Ending("switchover", renew=True, reserved_for=target, cooldown=self.times.ttl)
            yield Tell("switchover", f"{self.node} hands the scheduler over to {target or 'any other node'}")
        else:
            yield from self._judge_scheduler(now, unit, health)

    def _judge_scheduler(self, now: float, unit: Unit, health: Health) -> Iterator[Action]:
        # Without the database every scheduler looks hung: count from its return.
        self._wellness.excuse(self._good_since if not self.error else now)
        if self._wellness.learn(now, unit, health):
            yield Tell("scheduler_restarted", "systemd has restarted the scheduler", "warning")
        if unit.active in ("active", "unknown"):
            self._up_at = now
        if now - self._up_at >= self.times.down_after:
            yield from self._give_up(f"the scheduler has not been running for {now - self._up_at:.0f} s")
        elif self._wellness.hung(now, unit, health):
            if now - self._restarted_at < _FORGIVEN:
                yield from self._give_up(f"the scheduler hangs again: {health.detail}")
            else:
                self._restarted_at = now
                yield from self._restart(now, health)

    def _restart(self, now: float, health: Health) -> Iterator[Action]:
        self._wellness.starts(now)
        yield Tell("scheduler_hung", f"the scheduler hangs and is restarted: {health.detail}", "critical")
        # A hung process may hear nothing else; systemd starts it anew, and so would _run.
        yield Control("kill")

    def _give_up(self, why: str) -> Iterator[Action]:
        self._ending = _Ending(why, renew=True, cooldown=self.times.cooldown)
        yield Tell("scheduler_given_up", f"{self.node} gives the scheduler up: {why}", "critical")

    def _lose(self, now: float, why: str) -> Iterator[Action]:
        """The lease is somebody else's, or may be: no time for politeness."""
        yield Tell("lease_lost", f"{self.node} has lost the lease: {why}", "critical")
        yield from self._revoke()
        self._ordered["kill"] = now
        yield Control("kill")
        yield from self._stop(now)
        self._drop(now)
        self._owed = True

    def _drop(self, now: float) -> None:
        if self._ending is not None:
            self._cool_until = now + self._ending.cooldown
        self.epoch, self._ending, self._releasing = None, None, False
        self._next_ask = now

    # --- orders to systemd ---

    def _run(self, now: float, unit: Unit, until: float) -> Iterator[Action]:
        """Have the scheduler run, and let it be started until then."""
        self._stop_since = None
        permit, last = Permit(self.epoch or 0, until), self._permitted
        if last is None or last.epoch != permit.epoch or until - last.until >= _AGAIN:
            self._permitted = permit
            yield permit
        if unit.active == "active":
            self._ordered.clear()
        elif (unit.dead or unit.sub.startswith("auto-restart")) and not self.paused(now) and self._order("start", now):
            if unit.active == "failed":
                yield Control("reset-failed")
            yield Control("start")

    def _stop(self, now: float) -> Iterator[Action]:
        self._stop_since = self._ordered["stop"] = now
        yield Control("stop")

    def _end(self, now: float, unit: Unit) -> Iterator[Action]:
        """Have the scheduler end: first asked, then killed, then by our own death."""
        blind = unit.active == "unknown"
        if self._stop_since is None:
            if blind:
                return
            if unit.active != "deactivating":
                yield Tell("scheduler_stray", "a scheduler runs here without the lease and is ended", "critical")
            yield from self._stop(now)
            return
        kill_at = self._stop_since + self.times.stop_timeout
        if self.held or self._owed:
            margin = self.times.kill_margin
            kill_at = self._stop_since if self._owed else min(kill_at, self.deadline - margin)
            blind = blind or unit.at <= self._stop_since
            if blind and not self._renewing and now >= self._stop_since + margin / 2:
                yield Die("systemd does not say whether the scheduler has ended")
            elif now >= max(self.deadline - margin / 2, self._stop_since + margin):
                yield Die("the scheduler does not end")
        if self._order("stop", now):
            yield Control("stop")
        if now >= kill_at and self._order("kill", now):
            yield Control("kill")

    @property
    def _renewing(self) -> bool:
        return self._ending is not None and self._ending.renew and not self.error

    def _dead(self, unit: Unit) -> bool:
        """Whether the scheduler is surely dead: seen so after it was last told to stop."""
        return unit.dead and (self._stop_since is None or unit.at > self._stop_since)

    def _order(self, verb: str, now: float) -> bool:
        """Whether to give this order (again) now."""
        if now - self._ordered.get(verb, -_AGAIN) < _AGAIN:
            return False
        self._ordered[verb] = now
        return True

    def _revoke(self) -> Iterator[Action]:
        if self._permitted is not None:
            self._permitted = None
            yield Revoke()

    # --- active/active ---

    def _run_always(self, now: float, unit: Unit, health: Health) -> Iterator[Action]:
        if self.stopping or not unit.installed:
            yield from self._revoke()
            return
        yield from self._run(now, unit, now + self.times.ttl)
        if self.paused(now) or self.error:
            self._wellness.excuse(now)
            return
        self._wellness.excuse(self._good_since)
        if self._wellness.learn(now, unit, health):
            yield Tell("scheduler_restarted", "systemd has restarted the scheduler", "warning")
        if self._wellness.hung(now, unit, health):
            yield from self._restart(now, health)

    # --- what to ask the database ---

    def _ask(self, now: float, unit: Unit) -> Iterator[Action]:
        command = None if self._pending else self._command(now, unit)
        if command is not None:
            self._pending = True
            self._next_ask = now + self.times.interval
            yield Ask(command)

    def _command(self, now: float, unit: Unit) -> Command | None:
        if self.epoch is None:
            if self._may_take(now, unit) and self.row is not None:
                self._next_try = now + self.times.interval
                return Acquire(self.row.version, self.row.current)
            return Poll() if now >= self._next_ask else None
        if self._ending is not None and self._stop_since is not None and self._dead(unit):
            if not self._releasing or now >= self._next_ask:
                self._releasing = True
                return Release(self.epoch, self._ending.reserved_for)
            return None
        if now >= self._next_ask and not self._releasing and (self._ending is None or self._ending.renew):
            return Renew(self.epoch)
        return None

    def _may_take(self, now: float, unit: Unit) -> bool:
        if self.row is None or self.error or self.active_active or now < self._next_try:
            return False
        if self.paused(now) or self.unable(now, unit) or not self._dead(unit):
            return False
        return now >= self._free_at(self.row)

    def _free_at(self, row: Row) -> float:
        """Return when the row may be taken, if it stays as it is."""
        whole = self._seen_since + max(self.times.ttl, row.ttl_s)
        if row.timeline != row.current:
            return whole
        if row.holder is None:
            return self._seen_since if row.reserved_for in (None, self.node) else whole
        return self._seen_since if row.holder == self.node else whole
