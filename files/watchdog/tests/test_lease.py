"""The state machine, case by case. The interplay of several is in test_simulation.py."""

from dataclasses import replace
from typing import Any

import pytest
from airflow_watchdog import lease
from airflow_watchdog.lease import (
    Acquire,
    Answer,
    Ask,
    Control,
    Die,
    Health,
    Machine,
    Permit,
    Poll,
    Release,
    Renew,
    Row,
)

TIMES = lease.Times()
FREE = Row(None, 7, 3, timeline=1, current=1, ttl_s=10.0)
OTHERS = replace(FREE, holder="b")
MINE = replace(FREE, holder="a", epoch=8, version=4)
SCHEDULER = "scheduler"


class Bench:
    """A machine and what is around it; `at` moves time on and makes a step."""

    def __init__(self, **changes: Any) -> None:
        self.machine = Machine("a", TIMES, 0.0, **changes)
        self.now = 0.0
        self.active, self.sub, self.load, self.invocation = "inactive", "", "loaded", "1"
        self.ok: bool | None = True
        self.seen_at: float | None = None
        self.health_at: float | None = None

    def at(self, now: float, answer: Answer | None = None) -> list[lease.Action]:
        self.now = now
        unit = lease.Unit(
            now if self.seen_at is None else self.seen_at, self.load, self.active, self.sub, self.invocation
        )
        health = Health(now if self.health_at is None else self.health_at, self.ok, "503")
        return self.machine.step(now, unit, health, answer)

    def answer(
        self, command: lease.Command, row: Row | None, done: bool = False, late: float = 0.0
    ) -> list[lease.Action]:
        error = "" if row else "refused"
        return self.at(self.now, Answer(command, self.now - late, self.now, row, done, error))

    def take(self, now: float = 0.0) -> None:
        """Become the holder, with the scheduler running."""
        assert ask(self.at(now)) == Poll()
        assert ask(self.answer(Poll(), FREE)) == Acquire(3, 1)
        assert "start" in verbs(self.answer(Acquire(3, 1), MINE, done=True))
        self.active, self.invocation = "active", "2"
        assert verbs(self.at(now + 0.1)) == []

    def renew(self, now: float, row: Row = MINE) -> list[lease.Action]:
        assert ask(self.at(now)) == Renew(8)
        return self.answer(Renew(8), row, done=True)

    def live(self, until: float, row: Row = MINE) -> list[lease.Action]:
        """Go on with everything answering until something but renewals is to be done, or the time is over."""
        while self.now < until:
            actions = self.at(self.now + 0.5)
            for command in [action.command for action in actions if isinstance(action, Ask)]:
                assert command == Renew(8)
                actions += self.answer(command, row, done=True)
            if told(actions) or verbs(actions):
                return actions
        return []


def ask(actions: list[lease.Action]) -> lease.Command | None:
    return next((action.command for action in actions if isinstance(action, Ask)), None)


def verbs(actions: list[lease.Action]) -> list[str]:
    return [action.verb for action in actions if isinstance(action, Control)]


def told(actions: list[lease.Action]) -> list[str]:
    return [action.kind for action in actions if isinstance(action, lease.Tell)]


def has(actions: list[lease.Action], kind: type) -> bool:
    return any(isinstance(action, kind) for action in actions)


def test_a_free_lease_is_taken_at_once_and_its_time_counts_from_the_sending() -> None:
    bench = Bench()
    bench.at(0.0)
    bench.now = 1.0
    assert ask(bench.answer(Poll(), FREE)) == Acquire(3, 1)
    bench.now = 2.5
    actions = bench.answer(Acquire(3, 1), MINE, done=True, late=1.5)
    assert bench.machine.deadline == 1.0 + TIMES.ttl
    assert [a for a in actions if isinstance(a, Permit)] == [Permit(8, bench.machine.deadline - 4.0)]
    assert verbs(actions) == ["start"]


def test_anothers_lease_is_taken_when_it_has_not_moved_for_its_whole_length() -> None:
    bench = Bench()
    for now in (0.0, 2.0, 4.0, 6.0, 8.0):
        bench.at(now)
        # The other renews until 4 s.
        bench.answer(Poll(), replace(OTHERS, version=3 + min(int(now), 4)))
    bench.at(12.0)
    assert ask(bench.answer(Poll(), replace(OTHERS, version=7))) is None
    assert ask(bench.at(13.9)) is None
    assert ask(bench.at(14.0)) == Acquire(7, 1)


def test_a_longer_lease_of_another_configuration_is_respected() -> None:
    bench = Bench()
    bench.at(0.0)
    bench.answer(Poll(), replace(OTHERS, ttl_s=30.0))
    assert ask(bench.at(29.9)) == Poll()
    bench.answer(Poll(), replace(OTHERS, ttl_s=30.0))
    assert ask(bench.at(30.0)) == Acquire(3, 1)


def test_after_a_promotion_nobody_believes_that_the_lease_was_given_back() -> None:
    bench = Bench()
    bench.at(0.0)
    promoted = replace(FREE, current=2)
    assert ask(bench.answer(Poll(), promoted)) is None
    bench.at(9.9)
    bench.answer(Poll(), promoted)
    assert ask(bench.at(10.0)) == Acquire(3, 2)


def test_a_former_primary_is_no_answer() -> None:
    bench = Bench()
    bench.at(0.0)
    bench.answer(Poll(), replace(OTHERS, current=2, timeline=2))
    bench.at(2.0)
    assert "database_lost" in told(bench.answer(Poll(), FREE))
    assert bench.machine.row is not None
    assert bench.machine.row.current == 2


def test_a_lease_reserved_for_another_is_left_to_it_for_a_while() -> None:
    bench = Bench()
    bench.at(0.0)
    assert ask(bench.answer(Poll(), replace(FREE, reserved_for="c"))) is None
    bench.at(9.0)
    bench.answer(Poll(), replace(FREE, reserved_for="c"))
    assert ask(bench.at(10.0)) == Acquire(3, 1)
    mine = Bench()
    mine.at(0.0)
    assert ask(mine.answer(Poll(), replace(FREE, reserved_for="a"))) == Acquire(3, 1)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"load": "not-found"}, "the scheduler's unit is not-found"),
        ({"load": "masked"}, "the scheduler's unit is masked"),
        ({"active": "unknown"}, "systemd does not answer"),
        ({"seen_at": -7.0}, "systemd does not answer"),
        ({"active": "active"}, ""),
    ],
)
def test_who_could_not_run_a_scheduler_takes_no_lease(changes: dict[str, Any], why: str) -> None:
    bench = Bench()
    for name, value in changes.items():
        setattr(bench, name, value)
    bench.at(0.0)
    assert ask(bench.answer(Poll(), FREE)) is None
    unit = lease.Unit(bench.now if bench.seen_at is None else bench.seen_at, bench.load, bench.active)
    assert bench.machine.unable(bench.now, unit) == why


def test_a_failed_unit_of_a_standby_is_reset() -> None:
    bench = Bench()
    bench.active = "failed"
    assert verbs(bench.at(0.0)) == ["reset-failed"]
    assert verbs(bench.at(0.5)) == []


def test_a_scheduler_without_a_lease_is_ended() -> None:
    bench = Bench()
    bench.active = "active"
    actions = bench.at(0.0)
    assert (told(actions), verbs(actions)) == (["scheduler_stray"], ["stop"])
    assert "kill" in verbs(bench.at(3.0))


def test_renewal_goes_on_every_interval_and_sooner_after_an_error() -> None:
    bench = Bench()
    bench.take()
    assert ask(bench.at(1.9)) is None
    bench.renew(2.1)
    assert bench.machine.deadline == 2.1 + TIMES.ttl
    assert ask(bench.at(4.2)) == Renew(8)
    assert told(bench.answer(Renew(8), None)) == ["database_lost"]
    assert ask(bench.at(5.0)) is None
    assert ask(bench.at(5.3)) == Renew(8)
    assert told(bench.answer(Renew(8), MINE, done=True)) == ["database_back"]


def test_a_holder_that_cannot_renew_ends_its_scheduler_before_the_lease_ends() -> None:
    bench = Bench()
    bench.take()
    bench.at(2.1)
    actions = bench.at(5.9)
    assert verbs(actions) == []
    actions = bench.at(6.0)
    assert told(actions) == ["lease_fenced"]
    assert verbs(actions) == ["stop"]
    assert has(actions, lease.Revoke)
    assert "kill" not in verbs(bench.at(8.9))
    assert "kill" in verbs(bench.at(9.0))
    assert has(bench.at(9.5), Die)


def test_who_does_not_see_whether_it_ended_dies_while_there_is_time() -> None:
    bench = Bench()
    bench.take()
    bench.at(2.1)
    bench.at(6.0)
    bench.seen_at = 5.9
    assert has(bench.at(6.5), Die)


def test_a_fenced_holder_gives_the_lease_back_if_it_still_can() -> None:
    bench = Bench()
    bench.take()
    bench.at(2.1)
    bench.at(6.0)
    bench.active = "inactive"
    # The renewal that is still under way has to be answered first.
    assert ask(bench.at(6.2)) is None
    assert ask(bench.answer(Renew(8), None)) == Release(8, None)
    assert "lease_released" in told(bench.answer(Release(8, None), FREE, done=True))
    assert not bench.machine.held


def test_a_fenced_holder_that_reaches_nobody_is_a_standby_at_the_end() -> None:
    bench = Bench()
    bench.take()
    bench.at(2.1)
    bench.at(6.0)
    bench.active = "inactive"
    assert told(bench.at(10.0)) == ["lease_ended"]
    assert not bench.machine.held


def test_a_loop_that_takes_longer_than_the_lease_has_lost_it() -> None:
    bench = Bench()
    bench.take()
    actions = bench.at(10.0)
    assert told(actions) == ["lease_lost"]
    assert verbs(actions) == ["kill", "stop"]
    assert not bench.machine.held
    bench.seen_at = 9.0
    assert has(bench.at(10.6), Die)


def test_a_lease_that_is_anothers_now_ends_the_scheduler_at_once() -> None:
    bench = Bench()
    bench.take()
    bench.at(2.1)
    actions = bench.answer(Renew(8), replace(OTHERS, epoch=9))
    assert told(actions) == ["lease_lost"]
    assert verbs(actions) == ["kill", "stop"]
    bench.active = "inactive"
    bench.at(2.5)
    assert not bench.machine.busy


def test_a_switchover_hands_over_when_the_scheduler_is_dead() -> None:
    bench = Bench()
    bench.take()
    actions = bench.renew(2.1, replace(MINE, wanted="b"))
    assert told(actions) == ["switchover"]
    assert verbs(actions) == ["stop"]
    # It keeps the lease meanwhile.
    assert ask(bench.at(4.2)) == Renew(8)
    bench.answer(Renew(8), MINE, done=True)
    bench.active = "inactive"
    assert ask(bench.at(4.4)) == Release(8, "b")
    given = replace(FREE, epoch=8, reserved_for="b")
    assert "lease_released" in told(bench.answer(Release(8, "b"), given, done=True))
    assert bench.machine.unable(4.5, lease.Unit(4.5, active="inactive")) == "gave up its scheduler a moment ago"


def test_a_state_from_before_the_order_to_stop_proves_nothing() -> None:
    bench = Bench()
    bench.take()
    bench.active, bench.seen_at = "inactive", 2.05
    bench.renew(2.1, replace(MINE, wanted="*"))
    assert ask(bench.at(2.3)) is None
    bench.seen_at = 2.4
    assert ask(bench.at(2.5)) == Release(8, None)


def test_a_release_is_tried_again_and_the_epoch_never_used_again() -> None:
    bench = Bench()
    bench.take()
    bench.renew(2.1, replace(MINE, wanted="*"))
    bench.active = "inactive"
    assert ask(bench.at(2.3)) == Release(8, None)
    assert ask(bench.answer(Release(8, None), None)) is None
    assert ask(bench.at(3.4)) == Release(8, None)
    bench.answer(Release(8, None), None)
    bench.at(12.1)
    assert not bench.machine.held


def test_a_switchover_to_ourselves_and_one_during_a_pause_change_nothing() -> None:
    bench = Bench()
    bench.take()
    assert told(bench.renew(2.1, replace(MINE, wanted="a"))) == []
    assert told(bench.renew(4.2, replace(MINE, wanted="b", paused_left_s=60.0))) == []


def test_a_hung_scheduler_is_restarted_once_and_then_given_up() -> None:
    bench = Bench()
    bench.take()
    bench.live(5.0)
    bench.ok = False
    bench.live(19.0)
    actions = bench.live(25.0)
    assert 19.5 <= bench.now <= 21.0
    assert (told(actions), verbs(actions)) == (["scheduler_hung"], ["kill"])
    bench.invocation = "3"
    again = bench.now
    assert told(bench.live(again + 44.0)) in ([], ["scheduler_restarted"])
    actions = bench.live(again + 50.0)
    assert told(actions) == ["scheduler_given_up"]
    assert 44.5 <= bench.now - again <= 46.5


def test_health_from_before_the_start_does_not_count() -> None:
    bench = Bench()
    bench.ok, bench.health_at = True, -5.0
    bench.take()
    bench.live(20.0)
    bench.ok, bench.health_at = False, None
    # Never well since it was started: the time for a start, and then that for a hang.
    assert told(bench.live(44.0)) == []
    assert told(bench.live(47.0)) == ["scheduler_hung"]


def test_without_the_database_no_scheduler_is_called_hung() -> None:
    bench = Bench()
    bench.take()
    bench.live(4.0)
    bench.ok = False
    bench.live(16.0)
    promoted = replace(MINE, current=2, timeline=2)
    assert told(bench.live(30.0, promoted)) == []
    assert told(bench.live(33.0, promoted)) == ["scheduler_hung"]


def test_a_scheduler_that_nobody_can_ask_is_not_called_hung() -> None:
    bench = Bench()
    bench.ok = None
    bench.take()
    assert bench.live(60.0) == []


def test_a_crash_is_told_and_forgiven_if_it_was_well_before() -> None:
    bench = Bench()
    bench.take()
    bench.live(5.0)
    bench.invocation, bench.ok = "3", False
    assert told(bench.live(6.0)) == ["scheduler_restarted"]
    assert told(bench.live(40.0)) == []
    # A second one without having been well in between gets no new time.
    bench.invocation = "4"
    assert told(bench.live(41.0)) == ["scheduler_restarted"]
    assert told(bench.live(52.0)) == ["scheduler_hung"]


def test_a_scheduler_that_does_not_come_back_is_given_up() -> None:
    bench = Bench()
    bench.take()
    bench.live(3.0)
    bench.active, bench.sub = "activating", "auto-restart"
    assert verbs(bench.at(3.5)) == ["start"]
    bench.sub = "start"
    for now in (4.0, 5.0, 6.0, 7.0, 8.0):
        actions = bench.at(now)
        if ask(actions):
            bench.answer(Renew(8), MINE, done=True)
        assert told(actions) == []
    actions = bench.at(9.1)
    assert told(actions) == ["scheduler_given_up"]
    assert verbs(actions) == ["stop"]


def test_a_failed_unit_is_reset_and_started_by_the_holder() -> None:
    bench = Bench()
    bench.take()
    bench.active = "failed"
    assert verbs(bench.at(0.5)) == ["reset-failed", "start"]
    assert verbs(bench.at(1.0)) == []
    assert verbs(bench.at(1.6)) == ["reset-failed", "start"]


def test_a_masked_unit_makes_the_holder_give_up() -> None:
    bench = Bench()
    bench.take()
    bench.load = "masked"
    assert verbs(bench.at(1.0)) == ["stop"]
    assert bench.machine.ending == "the scheduler's unit is masked"


def test_paused_it_renews_and_does_nothing_else() -> None:
    bench = Bench()
    bench.take()
    paused = replace(MINE, paused_left_s=60.0)
    bench.renew(2.1, paused)
    bench.active, bench.ok = "inactive", False
    assert bench.live(30.0, paused) == []
    assert bench.machine.held
    # Once it is over, by our own clock if nobody says so.
    assert verbs(bench.live(33.0)) == ["start"]


def test_paused_nobody_takes_the_lease_and_fencing_goes_on() -> None:
    bench = Bench()
    bench.at(0.0)
    assert ask(bench.answer(Poll(), replace(FREE, paused_left_s=5.0))) is None
    bench.at(4.0)
    bench.answer(Poll(), replace(FREE, paused_left_s=1.0))
    assert ask(bench.at(5.0)) == Acquire(3, 1)
    holder = Bench()
    holder.take()
    holder.renew(2.1, replace(MINE, paused_left_s=60.0))
    holder.at(4.2)
    assert told(holder.at(8.1)) == ["lease_fenced"]


def test_stopping_ends_the_scheduler_and_gives_the_lease_back() -> None:
    bench = Bench()
    bench.take()
    bench.machine.stopping = True
    assert verbs(bench.at(1.0)) == ["stop"]
    running = lease.Unit(1.0, active="active")
    dead = lease.Unit(1.2, active="inactive")
    assert not bench.machine.finished(running)
    bench.active = "inactive"
    assert ask(bench.at(1.2)) == Release(8, None)
    assert not bench.machine.finished(dead)
    bench.answer(Release(8, None), FREE, done=True)
    assert bench.machine.finished(dead)
    assert ask(bench.answer(Poll(), FREE)) is None


def test_stopping_does_not_wait_for_a_database_that_is_away() -> None:
    bench = Bench()
    bench.take()
    bench.machine.stopping = True
    bench.at(1.0)
    bench.active = "inactive"
    bench.at(1.2)
    bench.answer(Release(8, None), None)
    assert bench.machine.finished(lease.Unit(1.3, active="inactive"))


def test_the_patience_of_systemd_ends_when_the_scheduler_would_have_been_ended() -> None:
    bench = Bench()
    assert bench.machine.patience(0.0, 5.0) == 5.0
    bench.take()
    assert bench.machine.patience(1.0, 5.0) == 5.0
    assert bench.machine.patience(4.0, 5.0) == 2.0
    assert bench.machine.patience(5.99, 5.0) == pytest.approx(0.1)


def test_our_own_lease_of_a_former_life_is_taken_anew_at_once() -> None:
    bench = Bench()
    bench.at(0.0)
    assert ask(bench.answer(Poll(), replace(FREE, holder="a"))) == Acquire(3, 1)


def test_a_try_that_failed_waits_for_the_next_interval() -> None:
    bench = Bench()
    bench.at(0.0)
    bench.answer(Poll(), FREE)
    assert ask(bench.answer(Acquire(3, 1), FREE)) is None
    assert ask(bench.at(1.9)) is None
    assert ask(bench.at(2.1)) == Acquire(3, 1)


def test_a_nudge_makes_it_look_now() -> None:
    bench = Bench()
    bench.at(0.0)
    bench.answer(Poll(), OTHERS)
    assert ask(bench.at(0.5)) is None
    bench.machine.nudge(0.6)
    assert ask(bench.at(0.6)) == Poll()


# --- active/active ---


def test_all_run_without_a_lease_and_without_a_database() -> None:
    bench = Bench(active_active=True)
    actions = bench.at(0.0)
    assert verbs(actions) == ["start"]
    assert ask(actions) == Poll()
    assert has(actions, Permit)
    bench.active = "active"
    assert ask(bench.answer(Poll(), FREE)) is None
    assert not bench.machine.held


def test_with_all_running_a_hung_one_is_restarted_every_time() -> None:
    bench = Bench(active_active=True)
    bench.at(0.0)
    bench.active, bench.ok = "active", False
    bench.answer(Poll(), FREE)
    hangs = []
    for tick in range(1, 241):
        actions = bench.at(tick * 0.5)
        if ask(actions):
            actions += bench.answer(Poll(), FREE)
        if "scheduler_hung" in told(actions):
            hangs.append(bench.now)
            bench.invocation = str(tick)
    assert len(hangs) == 3


def test_with_all_running_a_pause_a_missing_unit_and_the_end_start_nothing() -> None:
    bench = Bench(active_active=True)
    bench.load = "not-found"
    assert verbs(bench.at(0.0)) == []
    bench.load = "loaded"
    bench.answer(Poll(), replace(FREE, paused_left_s=60.0))
    bench.at(1.0)
    paused = bench.at(2.5)
    assert verbs(paused) == []
    bench.machine.stopping = True
    assert has(bench.at(3.0), lease.Revoke)
    assert bench.machine.finished(lease.Unit(3.0, active="active"))
