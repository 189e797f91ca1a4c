"""The Airflow servers' schedulers: who runs one, ways to lose it, and proof that there were never two."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

from cluster import Api
from faultlab import FAULTS, Tasks, eventually, inside, reach

SERVERS = ("airflow1", "airflow2")
UNIT = "airflow-scheduler"
SAMPLES = "/var/tmp/fault-sampler"
SAMPLER_MAX_S = 900


def active() -> list[str]:
    """Servers on which the scheduler's unit is active; one that is off has none."""

    def runs(name: str) -> bool:
        try:
            return str(reach(name).run(f"systemctl is-active {UNIT}").stdout).strip() == "active"
        except RuntimeError:
            return False

    return [name for name in SERVERS if runs(name)]


def holder(seconds: float = 60) -> str:
    """The one server in charge, once there is exactly one."""
    found: list[str] = eventually(lambda: servers if len(servers := active()) == 1 else [], seconds)
    return found[0]


def standby(name: str) -> str:
    """The other server."""
    return next(server for server in SERVERS if server != name)


def signal(name: str, unit: str, which: str) -> None:
    """Send a signal to the unit's main process alone, as what kills in real life does."""
    reach(name).check_output(f"kill -{which} $(systemctl show -p MainPID --value {unit})")


@contextmanager
def cut_off(name: str) -> Iterator[None]:
    """Take the network cable out of this server. Through podman, since ssh goes with it."""
    route = inside(name, "ip", "-4", "route", "show", "default").split()
    inside(name, "ip", "link", "set", "eth0", "down")
    try:
        yield
    finally:
        inside(name, "ip", "link", "set", "eth0", "up")
        if route:
            inside(name, "ip", "route", "replace", *route)


class Stream:
    """A run of so many short tasks that one is scheduled every moment, for longer than a takeover lasts."""

    def __init__(self, client: Api) -> None:
        """Start it and wait until it flows."""
        self.tasks = Tasks(client, count=60, seconds=2)
        eventually(lambda: len(self.tasks.numbers("success")) >= 4, 60)

    def moments(self) -> list[float]:
        """When tasks were given to the workers, in order, seconds since 1970, by the scheduler that did it."""
        found = [item["queued_when"] for item in self.tasks.instances().values() if item["queued_when"]]
        return sorted(datetime.datetime.fromisoformat(moment).timestamp() for moment in found)

    def next_after(self, fault: Callable[[], object], seconds: float = 120) -> float:
        """Do something; seconds from its beginning until a task is scheduled after its end."""
        began = time.time()
        fault()
        done = time.time()

        def later() -> list[float]:
            try:
                return [moment for moment in self.moments() if moment > done]
            except OSError:  # one of two API servers may be what has just been lost
                return []

        return float(eventually(later, seconds)[0]) - began

    def longest_gap(self, begin: float) -> float:
        """After the end: the longest time in seconds, from the moment `begin`, in which nothing was scheduled."""
        return max(later - earlier for earlier, later in pairwise([begin, *(m for m in self.moments() if m > begin)]))


def presence(samples: list[str]) -> list[tuple[int, int]]:
    """First and last sample of each time in which a scheduler was there, in ns; a second without samples ends one."""
    found: list[tuple[int, int]] = []
    before = False
    for line in samples:
        moment, there = int(line.split()[0]), line.endswith(" 1")
        if there and before and moment - found[-1][1] < 1_000_000_000:
            found[-1] = (found[-1][0], moment)
        elif there:
            found.append((moment, moment))
        before = there
    return found


def overlap_ms(one: list[tuple[int, int]], two: list[tuple[int, int]]) -> float:
    """For how long both were there at once."""
    return sum(max(0, min(b, d) - max(a, c)) for a, b in one for c, d in two) / 1e6


class Watch:
    """Samples of all servers' schedulers, from its start on."""

    def __init__(self) -> None:
        """Start the samplers; they survive their connection, and their samples a loss of power."""
        script = (FAULTS / "sampler.py").read_text()
        for name in SERVERS:
            host = reach(name)
            host.run("systemctl stop fault-sampler")
            host.check_output("printf %%s %s > %s.py && rm -f %s", script, SAMPLES, SAMPLES)
            host.check_output(
                f"systemd-run --quiet --collect --unit=fault-sampler --property=StandardOutput=append:{SAMPLES}"
                f" python3 {SAMPLES}.py {SAMPLER_MAX_S}"
            )

    def _samples(self, name: str) -> list[str]:
        reach(name).run("systemctl stop fault-sampler")
        return str(reach(name).check_output(f"cat {SAMPLES}")).splitlines()

    def overlap_ms(self) -> float:
        """For how long two schedulers were there at once."""
        one, two = (presence(self._samples(name)) for name in SERVERS)
        assert one or two, "no scheduler was seen at all"
        return overlap_ms(one, two)
