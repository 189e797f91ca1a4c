"""Two schedulers never run at once: ten thousand random histories, and proof that a broken rule would be seen."""

import os
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
import sim
from airflow_watchdog import lease
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

HISTORIES = int(os.environ.get("WATCHDOG_HISTORIES", "10000"))


def test_never_two_schedulers_at_once() -> None:
    told: Counter[str] = Counter()
    starts = 0
    for seed in range(HISTORIES):
        world = sim.history(seed)
        if seed % 20 == 0:
            world.settle()
        told.update(world.told)
        starts += world.starts
    # The histories are worth something only if a lot happens in them.
    assert starts > HISTORIES
    expected = {
        "lease_acquired", "lease_released", "lease_lost", "lease_ended", "lease_fenced", "switchover", "database_lost",
        "scheduler_restarted", "scheduler_hung", "scheduler_given_up",
    }  # fmt: skip
    assert HISTORIES < 10000 or expected <= set(told), told


class Watchdogs(RuleBasedStateMachine):
    """The same world, with faults that hypothesis chooses, and shrinks to the shortest history that breaks a rule."""

    @initialize(nodes=st.integers(2, 5), seed=st.integers(0, 2**32), noise=st.sampled_from([0.0, 0.05, 0.3]))
    def begin(self, nodes: int, seed: int, noise: float) -> None:
        self.world = sim.World(nodes, Random(seed), noise)
        self.world.run(5.0)

    def node(self, index: int) -> sim.Node:
        return self.world.nodes[index % len(self.world.nodes)]

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 7.0, 12.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.run(seconds)

    @rule(index=st.integers(0, 4), flag=st.sampled_from(["reach", "dbus", "stubborn", "stalled", "health"]))
    def flips(self, index: int, flag: str) -> None:
        node = self.node(index)
        setattr(node, flag, not getattr(node, flag))

    @rule(index=st.integers(0, 4))
    def watchdog_killed(self, index: int) -> None:
        self.node(index).watchdog_dies()

    @rule(index=st.integers(0, 4), on=st.booleans())
    def power(self, index: int, on: bool) -> None:
        node = self.node(index)
        node.power_on() if on else node.power_off()

    @rule(index=st.integers(0, 4))
    def scheduler_killed(self, index: int) -> None:
        self.node(index).kill()

    @rule(index=st.integers(0, 4))
    def started_by_hand(self, index: int) -> None:
        self.node(index).start()

    @rule(up=st.booleans())
    def database(self, up: bool) -> None:
        self.world.database.up = up

    @rule(lost=st.integers(0, 6))
    def promotion(self, lost: int) -> None:
        self.world.database.fail_over(lost)

    @rule(step=st.sampled_from([-86400.0, -3600.0, -1.0, 1.0, 3600.0, 86400.0]))
    def database_clock_steps(self, step: float) -> None:
        self.world.database.clock_offset += step

    @rule(index=st.integers(-1, 4))
    def switchover(self, index: int) -> None:
        database = self.world.database
        database.row.wanted = "*" if index < 0 else self.node(index).name
        database.row.wanted_until = database.now() + 60

    @rule(seconds=st.sampled_from([0.0, 5.0, 60.0]))
    def pause(self, seconds: float) -> None:
        self.world.database.row.paused_until = self.world.database.now() + seconds

    @invariant()
    def one_at_most(self) -> None:
        assert not hasattr(self, "world") or len(self.world.running()) <= 1

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle()


TestWatchdogs = Watchdogs.TestCase
TestWatchdogs.settings = settings(
    max_examples=100, stateful_step_count=30, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)  # fmt: skip


# --- each rule of lease.py is needed ---


def no_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lease.Machine, "fence_at", property(lambda self: self.deadline + 30))


def late_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lease.Machine, "fence_at", property(lambda self: self.deadline))


def no_patience(patch: pytest.MonkeyPatch) -> None:
    # systemd's watchdog with a time of its own, as if the lease could not end before it.
    patch.setattr(lease.Machine, "patience", lambda self, now, usual: usual)


def trusts_a_promoted_row(patch: pytest.MonkeyPatch) -> None:
    def free_at(self: lease.Machine, row: lease.Row) -> float:
        return self._seen_since if row.holder in (None, self.node) else self._seen_since + self.times.ttl

    patch.setattr(lease.Machine, "_free_at", free_at)


def trusts_the_databases_clock(patch: pytest.MonkeyPatch) -> None:
    # The database still refuses what has not expired by its own clock; but that may have been stepped.
    patch.setattr(lease.Machine, "_free_at", lambda self, row: self._seen_since)


def gives_back_too_early(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lease.Machine, "_dead", lambda self, unit: True if self.ending else unit.dead)


def never_dies(patch: pytest.MonkeyPatch) -> None:
    act = sim.Node.act
    patch.setattr(sim.Node, "act", lambda self, action: None if isinstance(action, lease.Die) else act(self, action))


def takes_any_version(patch: pytest.MonkeyPatch) -> None:
    execute = sim.Database.execute

    def careless(self: sim.Database, node: str, command: lease.Command) -> tuple[lease.Row, bool]:
        if isinstance(command, lease.Acquire):
            self.row.expires = self.now()
            command = lease.Acquire(self.row.version, self.timeline)
        return execute(self, node, command)

    patch.setattr(sim.Database, "execute", careless)


def no_permit(patch: pytest.MonkeyPatch) -> None:
    act = sim.Node.act

    def careless(self: sim.Node, action: lease.Action) -> None:
        self.permit = float("inf")
        act(self, action)
        self.permit = float("inf")

    patch.setattr(sim.Node, "act", careless)


BROKEN = [
    no_fence, late_fence, no_patience, trusts_a_promoted_row, trusts_the_databases_clock,
    gives_back_too_early, never_dies, takes_any_version, no_permit,
]  # fmt: skip


@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_the_simulation_sees_a_broken_rule(
    breaks: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks(monkeypatch)
    with pytest.raises(sim.OverlapError):
        list(map(sim.history, range(10000)))
