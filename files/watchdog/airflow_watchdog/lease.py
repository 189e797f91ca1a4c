"""Who may run the scheduler: a state machine without any I/O.

It is told what was observed and what time it is, and returns what to do. All times are seconds of one clock that never
steps and counts on while the machine sleeps (CLOCK_BOOTTIME); the wall clock and the database's clock never decide
that a scheduler may start.

Why two schedulers never run at once:

1. A holder counts its lease from the moment *before* it sent the statement that took or renewed it. If it is not renewed,
   the scheduler is ended so early that it is dead when the lease ends (`Times.fence_lead`).
2. Another node takes the lease only if the holder gave it back, or if the row has not changed for the lease's whole
   length since this node first *received* it so, by its own clock. The statement takes the row only in exactly that
   version. So a stepped clock, on a node or on the database's machine, decides nothing.
3. After a promotion of PostgreSQL the row may be older than what was acknowledged: it may have lost its last changes. Then
   nobody trusts "given back", and everybody waits the whole length from its first sight of the new timeline.
4. A holder that gives the lease back does so when its scheduler is dead, and never uses that epoch again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

# --- what comes in ---


@dataclass(frozen=True)
class Row:
    """The lease as the database returned it. `timeline` is PostgreSQL's when the row was written, `current` its own now."""

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


class Machine:
    """One node's part in the game. Call `step` often: twice a second, and whenever something was learned."""

    def __init__(self, node: str, times: Times, now: float, active_active: bool = False) -> None:
        """Begin as a standby that knows nothing."""
        self.node = node
        self.times = times
        self.active_active = active_active
        self.row: Row | None = None
        self.row_at: float | None = None
        self.error = "not asked yet"
        self.epoch: int | None = None
        self.deadline = 0.0
        self.stopping = False
        self._seen: tuple[object, ...] | None = None
        self._seen_since = now
        self._timeline = 0
        self._pending_since: float | None = None
        self._next_ask = now
        self._ending: _Ending | None = None
        self._released = False
        self._stop_since: float | None = None
        self._ordered: dict[str, float] = {}
        self._cool_until = now
        self._good_since = now
        self._up_at = now
        self._healthy_at = now
        self._restarted_at: float | None = None
        self._invocation = ""
        self._permitted = True  # a permit may be left of a former life: revoke it at first
        self._rogue = False

    # --- what others may ask ---

    @property
    def held(self) -> bool:
        """Whether the lease is ours, be it in its last moments."""
        return self.epoch is not None

    @property
    def fence_at(self) -> float:
        """When an unrenewed holder begins to end its scheduler."""
        return self.deadline - self.times.fence_lead

    @property
    def busy(self) -> bool:
        """Whether something is under way that is worth looking at the unit more often."""
        return self._ending is not None or self._stop_since is not None or bool(self._ordered)

    def finished(self, unit: Unit) -> bool:
        """Whether, after `stopping` was set, nothing is left to do."""
        return self.stopping and not self.held and (self.active_active or unit.dead or not unit.installed)

    def patience(self, now: float, usual: float) -> float:
        """Return for how many seconds systemd may hear nothing before it has to end this process, and the scheduler.

        A holder that hangs must be killed when it would have had to end its scheduler by itself.
        """
        if self.epoch is None or self._ending is not None:
            return usual
        return max(0.1, min(usual, self.fence_at - now))

    def paused(self, now: float) -> bool:
        """Whether an operator asked to leave everything as it is, as far as is known here."""
        if self.row is None or self.row.paused_left_s is None or self.row_at is None:
            return False
        return now < self.row_at + self.row.paused_left_s

    def unable(self, now: float, unit: Unit) -> str:
        """Return why this node would not take the lease if it were free; empty if it would."""
        if self.stopping:
            return "the watchdog is being stopped"
        if not unit.installed:
            return f"the scheduler's unit is {unit.load}"
        if unit.active == "unknown" or now - unit.at > 3 * self.times.interval:
            return "systemd does not answer"
        if now < self._cool_until:
            return "gave up its scheduler a moment ago"
        return ""

    # --- the step ---

    def nudge(self, now: float) -> None:
        """Look at the row now rather than at the next interval: somebody has changed it."""
        self._next_ask = now

    def step(self, now: float, unit: Unit, health: Health, answer: Answer | None = None) -> list[Action]:
        """Return what to do now, in this order."""
        actions = list(self._learn(now, answer)) if answer else []
        if self.active_active:
            actions += self._run_always(now, unit, health)
        else:
            actions += self._hold(now, unit, health)
        actions += self._ask(now, unit)
        return actions

    # --- what the database said ---

    def _learn(self, now: float, answer: Answer) -> Iterator[Action]:
        self._pending_since = None
        command, row = answer.command, answer.row
        if row is not None and row.current < self._timeline:
            # A former primary that does not know it yet.
            row, answer = None, Answer(command, answer.sent_at, answer.received_at, error="a stale primary answered")
        if row is None:
            if not self.error:
                yield Tell("database_lost", f"the database of the lease does not answer: {answer.error}", "warning")
            self.error = answer.error or "no answer"
            self._good_since = now
            self._next_ask = max(self._next_ask, now + min(self.times.interval, _AGAIN))
            return
        if self.error:
            if self.row is not None:
                yield Tell("database_back", "the database of the lease answers again")
            self.error = ""
        if row.current != self._timeline:
            self._timeline, self._good_since = row.current, now
        self.row, self.row_at = row, answer.received_at
        seen = (row.current, row.holder, row.epoch, row.version)
        if seen != self._seen:
            self._seen, self._seen_since = seen, answer.received_at
        yield from self._learn_lease(now, answer, row)

    def _learn_lease(self, now: float, answer: Answer, row: Row) -> Iterator[Action]:
        command = answer.command
        if isinstance(command, Acquire) and answer.done:
            self.epoch, self.deadline = row.epoch, answer.sent_at + self.times.ttl
            self._ending, self._released, self._invocation = None, False, ""
            self._up_at, self._healthy_at, self._restarted_at = now, now + self.times.start_grace, None
            self._good_since = now
            yield Tell("lease_acquired", f"{self.node} is in charge of the scheduler, epoch {row.epoch}")
        elif isinstance(command, Renew) and command.epoch == self.epoch:
            if answer.done:
                self.deadline = max(self.deadline, answer.sent_at + self.times.ttl)
            else:
                yield from self._lose(now, f"the lease is {row.holder or 'nobody'}'s, epoch {row.epoch}")
        elif isinstance(command, Release) and command.epoch == self.epoch and self._released:
            yield Tell("lease_released", f"{self.node} gave the lease back: {self._why()}")
            self._drop(now)

    # --- active/standby ---

    def _hold(self, now: float, unit: Unit, health: Health) -> Iterator[Action]:
        if self.held:
            yield from self._judge(now, unit, health)
        if self.held and self._ending is None:
            yield from self._run(now, unit, self.fence_at)
            return
        yield from self._revoke()
        if self.held and self._dead(unit):
            self._ordered.clear()
            self._stop_since = None
            if now >= self.deadline:
                yield Tell("lease_ended", f"{self.node} is no longer in charge: {self._why()}", "warning")
                self._drop(now)
        elif not self._dead(unit) and unit.installed:
            yield from self._end(now, unit)
        else:
            self._stop_since, self._rogue = None, False
            self._ordered.clear()
            if unit.active == "failed" and not self.stopping and not self.paused(now):
                yield Control("reset-failed")

    def _judge(self, now: float, unit: Unit, health: Health) -> Iterator[Action]:
        """Decide whether a holder has to end its scheduler."""
        if now >= self.deadline and not self._dead(unit):
            # This loop took longer than the lease, or ending took too long: somebody else may be in charge already.
            yield from self._lose(now, "it was not renewed in time")
            return
        ending = self._ending
        if now >= self.fence_at:
            if ending is None:
                self._ending = _Ending("it could not be renewed", renew=False)
                yield Tell("lease_fenced", f"{self.node} ends its scheduler: {self.error or 'renewing is slow'}", "critical")
            else:
                ending.renew = False
            return
        if ending is not None:
            return
        row = self.row
        if self.stopping:
            self._ending = _Ending("the watchdog is being stopped", renew=True)
        elif not unit.installed:
            self._ending = _Ending(f"the scheduler's unit is {unit.load}", renew=True, cooldown=self.times.cooldown)
        elif self.paused(now) or row is None:
            self._up_at, self._healthy_at = now, max(self._healthy_at, now)
        elif row.wanted and row.wanted != self.node:
            target = None if row.wanted == "*" else row.wanted
            self._ending = _Ending("switchover", renew=True, reserved_for=target, cooldown=self.times.ttl)
            yield Tell("switchover", f"{self.node} hands the scheduler over to {target or 'any other node'}")
        else:
            yield from self._judge_scheduler(now, unit, health)

    def _judge_scheduler(self, now: float, unit: Unit, health: Health) -> Iterator[Action]:
        times = self.times
        # Without the database every scheduler looks hung: begin to count when it is back.
        self._healthy_at = max(self._healthy_at, self._good_since)
        if unit.active in ("active", "unknown"):
            self._up_at = now
        if unit.invocation and unit.invocation != self._invocation:
            if self._invocation:
                yield Tell("scheduler_restarted", "systemd has restarted the scheduler", "warning")
                # One that was well gets the time of a start; one that never gets well does not get it again and again.
                if self._healthy_at <= now:
                    self._healthy_at = max(self._healthy_at, self._grace(now))
            self._invocation = unit.invocation
        if health.ok is not False:
            # None: it cannot be asked. Never later than now, lest a grace outlives its reason.
            self._healthy_at = max(min(self._healthy_at, now), health.at) if health.ok else now
        down = now - self._up_at
        hung = now - self._healthy_at
        if down >= times.down_after:
            yield from self._give_up(now, f"the scheduler has not been running for {down:.0f} s")
        elif hung >= times.hung_after and unit.active == "active":
            if self._restarted_at is None or now - self._restarted_at > _FORGIVEN:
                self._restarted_at = now
                self._healthy_at = now + times.start_grace
                yield Tell("scheduler_hung", f"the scheduler hangs and is restarted: {health.detail}", "critical")
                yield Control("kill")
            else:
                yield from self._give_up(now, f"the scheduler hangs again: {health.detail}")

    def _grace(self, now: float) -> float:
        return now + self.times.start_grace

    def _give_up(self, now: float, why: str) -> Iterator[Action]:
        self._ending = _Ending(why, renew=True, cooldown=self.times.cooldown)
        yield Tell("scheduler_given_up", f"{self.node} gives the scheduler up: {why}", "critical")

    def _run(self, now: float, unit: Unit, until: float) -> Iterator[Action]:
        """Have the scheduler run."""
        self._stop_since = None
        self._permitted = True
        yield Permit(self.epoch or 0, until)
        if unit.active == "active":
            self._ordered.clear()
        elif unit.active != "unknown" and unit.sub != "start" and not self.paused(now) and self._order("start", now):
            if unit.active == "failed":
                yield Control("reset-failed")
            yield Control("start")

    def _end(self, now: float, unit: Unit) -> Iterator[Action]:
        """Have the scheduler stop: first asked, then killed, then by our own death."""
        if self._stop_since is None:
            self._stop_since = now
            if not self.held and not self._rogue and unit.active != "unknown" and self.row is not None:
                self._rogue = True
                yield Tell("scheduler_stray", "a scheduler runs here without the lease and is ended", "critical")
        kill_at = self._stop_since + self.times.stop_timeout
        if self.held:
            kill_at = min(kill_at, self.deadline - self.times.kill_margin)
            # Somebody who does not know whether it is dead cannot wait until it must be.
            blind = unit.active == "unknown" or unit.at < self._stop_since
            if now >= self._stop_since + self.times.kill_margin and blind and not self._renewing():
                yield Die("systemd does not say whether the scheduler has ended")
                return
            if now >= self.deadline - self.times.kill_margin / 2:
                yield Die("the scheduler does not end")
                return
        if self._order("stop", now):
            yield Control("stop")
        if now >= kill_at and self._order("kill", now):
            yield Control("kill")

    def _renewing(self) -> bool:
        return self._ending is not None and self._ending.renew and not self.error

    def _lose(self, now: float, why: str) -> Iterator[Action]:
        """The lease is somebody else's, or may be: no time for politeness."""
        yield Tell("lease_lost", f"{self.node} has lost the lease: {why}", "critical")
        self._ending = _Ending(why, renew=False)
        yield from self._revoke()
        yield Control("kill")
        yield Control("stop")
        self._drop(now)
        self._stop_since = now - self.times.stop_timeout

    def _drop(self, now: float) -> None:
        if self._ending is not None:
            self._cool_until = max(self._cool_until, now + self._ending.cooldown)
        self.epoch = None
        self._ending, self._released, self._rogue = None, False, False
        self._next_ask = now

    def _why(self) -> str:
        return self._ending.why if self._ending else ""

    def _dead(self, unit: Unit) -> bool:
        """Whether the scheduler is surely dead: seen so after it was last allowed or told to run."""
        return unit.dead and unit.at >= self._ordered.get("start", 0.0)

    def _order(self, verb: str, now: float) -> bool:
        """Whether to give this order (again) now."""
        last = self._ordered.get(verb)
        if last is not None and now - last < _AGAIN:
            return False
        self._ordered[verb] = now
        return True

    def _revoke(self) -> Iterator[Action]:
        if self._permitted:
            self._permitted = False
            yield Revoke()

    # --- active/active ---

    def _run_always(self, now: float, unit: Unit, health: Health) -> Iterator[Action]:
        if self.stopping or not unit.installed:
            yield from self._revoke()
            return
        yield from self._run(now, unit, now + self.times.ttl)
        if self.paused(now) or self.error:
            self._healthy_at = max(self._healthy_at, now)
            return
        if unit.invocation != self._invocation:
            self._invocation = unit.invocation
            if self._healthy_at <= now:
                self._healthy_at = self._grace(now)
        if health.ok is not False:
            self._healthy_at = max(min(self._healthy_at, now), health.at) if health.ok else now
        if unit.active == "active" and now - self._healthy_at >= self.times.hung_after:
            self._healthy_at = self._grace(now)
            yield Tell("scheduler_hung", f"the scheduler hangs and is restarted: {health.detail}", "critical")
            yield Control("kill")

    # --- what to ask the database ---

    def _ask(self, now: float, unit: Unit) -> Iterator[Action]:
        if self._pending_since is not None:
            return
        command = self._command(now, unit)
        if command is not None:
            self._pending_since = now
            self._next_ask = now + self.times.interval
            yield Ask(command)

    def _command(self, now: float, unit: Unit) -> Command | None:
        if self.epoch is not None:
            if self._ending is not None and self._dead(unit):
                if self._released and now < self._next_ask:
                    return None
                self._released = True
                return Release(self.epoch, self._ending.reserved_for)
            if now >= self._next_ask and not self._released and (self._ending is None or self._ending.renew):
                return Renew(self.epoch)
            return None
        row = self.row
        if self._may_take(now, unit) and row is not None:
            return Acquire(row.version, row.current)
        return Poll() if now >= self._next_ask else None

    def _may_take(self, now: float, unit: Unit) -> bool:
        row = self.row
        if row is None or self.active_active or self.error or self.paused(now) or self.unable(now, unit):
            return False
        if not self._dead(unit) or now < self._wait(row):
            return False
        # A refused try has brought a new row; without one, the next try is at the next interval.
        return now >= self._next_ask or self._fresh_chance(row)

    def _fresh_chance(self, row: Row) -> bool:
        chance = (row.current, row.version)
        if chance == getattr(self, "_tried", None):
            return False
        self._tried = chance
        return True

    def _wait(self, row: Row) -> float:
        """Return when the row may be taken as it is."""
        whole = self._seen_since + max(self.times.ttl, row.ttl_s)
        if row.timeline != row.current:
            return whole
        if row.holder is None:
            return self._seen_since if row.reserved_for in (None, self.node) else whole
        return self._seen_since if row.holder == self.node else whole
