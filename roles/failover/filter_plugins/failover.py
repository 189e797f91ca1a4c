"""Decides what a failover has to do, or why it must not, from what every member says of itself."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

State = Mapping[str, Any]
SERVICES = {"postgresql": "PostgreSQL", "redis": "Redis"}


@dataclass
class Plan:
    """What will be done. Nothing is, while there are refusals."""

    kind: str = "none"  # "planned", "forced", "restore", "resume" or "wake" (one that broke off) or "none"
    primary: str = ""  # the old one
    candidate: str = ""
    followers: list[str] = field(default_factory=list)  # other members that will follow the new primary
    fence: list[str] = field(default_factory=list)
    lag: int = 0  # bytes that the candidate is known to miss
    alone: bool = False  # nobody will stream from the candidate until a rejoin
    says: list[str] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def refuse(self, reason: str) -> Plan:
        """Add a reason why nothing is done."""
        self.refusals.append(reason)
        return self


def reachable(state: State) -> bool:
    """Whether the member's machine answered at all."""
    return bool(state.get("reachable", True)) and "role" in state


def locked(states: Mapping[str, State], options: Mapping[str, Any]) -> list[str]:
    """Members on which another run than `run` of the options is at work."""
    return [
        f"{host}: another failover, started by {lock['by']}, is running (heard of {lock['age']} s ago);"
        " if that run was killed, try again in 30 s"
        for host, state in states.items()
        if (lock := state.get("lock") or {}) and lock["run"] != options.get("run")
    ]


def primaries_of(states: Mapping[str, State]) -> list[str]:
    """Members that are running primaries, by their own word or as another member sees them over the network."""
    found = []
    for host, state in states.items():
        views = [other["seen"][host]["role"] for other in states.values() if host in other.get("seen", {})]
        claims = [state["role"]] if reachable(state) else views
        if "primary" in claims:
            found.append(host)
    return found


def candidate_problems(service: str, host: str, state: State, primary: State, max_lag: int) -> list[str]:
    """Why this member cannot take over from a healthy primary without loss."""
    if not reachable(state):
        return [f"{host} cannot be reached: {state.get('problem', 'no answer')}"]
    if state["role"] != "standby":
        return [f"{host} is no running standby ({state['role']}: {state.get('problem', 'see its log')})"]
    problems = []
    if (state.get("receiver") or {}).get("status") != "streaming":
        problems.append(f"{host} does not stream from the primary")
    if service == "postgresql":
        if state.get("system_id") != primary.get("system_id"):
            problems.append(f"{host} belongs to another cluster (system identifier {state.get('system_id')})")
        if state.get("timeline") != primary.get("timeline"):
            problems.append(f"{host} is on timeline {state.get('timeline')}, the primary on {primary.get('timeline')}")
        if state.get("replay_paused"):
            problems.append(f"replay is paused on {host}: run `select pg_wal_replay_resume()` there")
        if state.get("disk_free_mb", 1 << 30) < 512:
            problems.append(f"{host} has {state['disk_free_mb']} MiB of disk left, 512 are needed")
    elif state.get("replication_id") != primary.get("replication_id"):
        problems.append(f"{host} replicates another history than the primary's")
    lag = max(int(primary.get("lsn", 0)) - int(state.get("lsn", 0)), 0)
    if lag > max_lag:
        problems.append(f"{host} lags by {lag} bytes, max_lag allows {max_lag}")
    return problems


def planned(plan: Plan, service: str, states: Mapping[str, State], wanted: str, max_lag: int) -> Plan:
    """A switchover from a primary that works."""
    primary = states[plan.primary]
    standbys = [host for host in states if host != plan.primary]
    if not standbys:
        return plan.refuse(f"{plan.primary} has no standby")
    problems = {host: candidate_problems(service, host, states[host], primary, max_lag) for host in standbys}
    fit = [host for host in standbys if not problems[host]]
    if wanted:
        plan.refusals += problems[wanted]
        plan.candidate = wanted
    elif fit:
        # One that streams from another standby was asked later and may only seem to have more.
        direct = {item.get("name") for item in primary.get("standbys", [])}
        plan.candidate = max(fit, key=lambda host: (host in direct, int(states[host].get("lsn", 0))))
    else:
        plan.refusals += [reason for host in standbys for reason in problems[host]]
    if primary.get("switching"):
        plan.refuse(f"{plan.primary} is in the middle of a failover")
    if plan.refusals:
        return plan
    plan.kind = "planned"
    plan.lag = max(int(primary.get("lsn", 0)) - int(states[plan.candidate].get("lsn", 0)), 0)
    plan.followers = [host for host in standbys if host != plan.candidate and reachable(states[host])]
    plan.says = [
        f"planned switchover of {SERVICES[service]}: {plan.primary} hands over to {plan.candidate} and follows it",
        f"{plan.candidate} is {plan.lag} bytes behind and will have everything before it is promoted",
    ]
    return plan


def forced(
    plan: Plan, service: str, states: Mapping[str, State], wanted: str, confirm: str, alive: Sequence[str]
) -> Plan:
    """A failover from a primary that is gone, or that the operator gives up."""
    standbys = {host: state for host, state in states.items() if reachable(state) and state["role"] == "standby"}
    if alive and confirm != plan.primary:
        return plan.refuse(
            f"{plan.primary} is a live primary: leave out force for a switchover without loss,"
            f" or give it up with force=true confirm={plan.primary}"
        )
    if alive and not reachable(states[plan.primary]):
        plan.says.append(f"{plan.primary} answers to clients, but not to us: it cannot be fenced")
    if not standbys:
        return plan.refuse("no standby runs: there is nothing to promote; start one, or restore a backup")
    best = max(standbys, key=lambda host: int(standbys[host].get("lsn", 0)))
    plan.candidate = wanted or best
    if plan.candidate not in standbys:
        state = states[plan.candidate]
        why = state.get("problem", state.get("role", "no answer"))
        return plan.refuse(f"{plan.candidate} is no running standby ({why})")
    behind = int(standbys[best]["lsn"]) - int(standbys[plan.candidate]["lsn"])
    if behind > 0:
        return plan.refuse(
            f"{plan.candidate} has {behind} bytes less than {best}: they would be lost, use candidate={best}"
        )
    receiver = standbys[plan.candidate].get("receiver") or {}
    plan.kind = "forced"
    plan.lag = int(receiver.get("behind", 0))
    plan.followers = [host for host in standbys if host != plan.candidate]
    plan.alone = not any(states[host].get("upstream", "") in ("", plan.candidate) for host in plan.followers)
    plan.fence = [host for host in states if host not in standbys and reachable(states[host])]
    unreachable = [host for host in states if not reachable(states[host])]
    plan.says += [
        f"forced failover of {SERVICES[service]}: {plan.candidate} becomes the primary",
        f"it is known to miss {plan.lag} bytes; what the old primary accepted and never sent is lost with it",
        *(f"{host} will be stopped and kept from starting" for host in plan.fence),
        *(f"{host} cannot be reached and is not fenced: it refuses to start as a primary while it sees a newer one"
          for host in unreachable),
        *([f"{plan.candidate} will have no standby: synchronous replication is suspended, synchronous.yml resumes it"]
          if plan.alone and states[plan.candidate].get("synchronous") else []),
    ]  # fmt: skip
    return plan


def failover_plan(states: Mapping[str, State], service: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The plan for one failover, as the fields of `Plan`.

    states: host to what it said (`__main__.py state`), in the inventory's order; a host that gave no answer has
    `{"reachable": False, "problem": "..."}`. options: candidate (name or ""), max_lag (bytes), force (bool), confirm
    (host or ""), run (id).
    """
    plan = Plan()
    wanted, force = str(options.get("candidate", "")), bool(options.get("force"))
    names = ", ".join(states)
    if wanted and wanted not in states:
        plan.refuse(f"candidate={wanted}: not a member of {service} ({names})")
    confirm = str(options.get("confirm", ""))
    if confirm and (not force or confirm not in states):
        plan.refuse(f"confirm={confirm}: only with force=true, and the name of the primary that is given up")
    plan.refusals += locked(states, options)
    primaries = primaries_of(states)
    if len(primaries) > 1:
        plan.refuse(
            f"two primaries: {' and '.join(primaries)}; stop the one whose data is to be given up, then rejoin it"
        )
    if plan.refusals:
        return vars(plan)
    if primaries and wanted == primaries[0] and options.get("only_if_needed"):
        plan.says.append(f"{wanted} is the primary already: nothing to do")
        return vars(plan)
    if primaries and wanted == primaries[0]:
        return vars(plan.refuse(f"candidate={wanted}: it is the primary already"))
    if primaries:
        plan.primary = primaries[0]
        if force:
            return vars(forced(plan, service, states, wanted, confirm, primaries))
        if not reachable(states[plan.primary]):
            return vars(
                plan.refuse(f"{plan.primary} is the primary but cannot be reached; force=true would give it up")
            )
        return vars(planned(plan, service, states, wanted, int(options["max_lag"])))
    return vars(without_primary(plan, service, states, wanted, force, confirm))


def without_primary(
    plan: Plan, service: str, states: Mapping[str, State], wanted: str, force: bool, confirm: str
) -> Plan:
    """Nobody is primary: it died, or a switchover broke off between stopping one and promoting the other."""
    marked = all(
        reachable(state) and state.get("standby_signal") and not state.get("masked") for state in states.values()
    )
    standbys = [host for host, state in states.items() if state.get("role") == "standby"]
    others = [host for host in states if host not in standbys]
    if service == "postgresql" and marked and all(states[host]["role"] == "stopped" for host in others):
        plan.says = [f"a switchover of {SERVICES[service]} broke off: all members are standbys that wait for a primary"]
        if others:
            plan.kind, plan.followers = "wake", others
            plan.says.append(f"{' and '.join(others)} will be started, to see who has most")
            return plan
        best = max(standbys, key=lambda host: int(states[host].get("lsn", 0)))
        plan.candidate = wanted if wanted and states[wanted].get("lsn") == states[best].get("lsn") else best
        plan.kind = "resume"
        plan.followers = [host for host in standbys if host != plan.candidate]
        plan.says.append(f"{plan.candidate} has everything that any of them has, and is promoted")
        return plan
    plan.primary = next(iter(others), "")
    if force:
        return forced(plan, service, states, wanted, confirm, [])
    said = ", ".join(f"{host}: {state.get('role') or 'unreachable'}" for host, state in states.items())
    return plan.refuse(
        f"no primary of {SERVICES[service]} runs ({said}): start it again, or give it up with force=true"
    )


def rejoin_plan(states: Mapping[str, State], service: str, host: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The plan that makes `host` a standby again, as the fields of `Plan`; the live primary is its `candidate`.

    states, and run and confirm in the options: as for `failover_plan`.
    """
    plan = Plan()
    if host not in states:
        return vars(plan.refuse(f"host={host}: not a member of {service} ({', '.join(states)})"))
    state = states[host]
    plan.refusals += locked(states, options)
    primaries = primaries_of(states)
    live = [member for member in primaries if member != host]
    if options.get("only_if_needed") and primaries == [host]:
        plan.says = [f"{host} is the primary"]
        return vars(plan)
    if not reachable(state):
        plan.refuse(f"{host} cannot be reached: {state.get('problem', 'no answer')}")
    elif len(live) != 1:
        says = " and ".join(live) or (f"{host} is the primary itself" if host in primaries else "none runs")
        plan.refuse(f"{host} needs one live primary to join: {says}")
    elif host in primaries and options.get("confirm") != host:
        plan.refuse(f"{host} is a primary beside {live[0]}: what only it has is lost, say so with confirm={host}")
    elif state["role"] == "none":
        plan.refuse(f"{host} has no data: run site.yml, which clones the primary")
    if plan.refusals:
        return vars(plan)
    plan.primary, plan.candidate = host, live[0]
    plan.followers = [member for member in states if member not in (host, live[0]) and reachable(states[member])]
    same = service != "postgresql" or state.get("timeline") == states[live[0]].get("timeline")
    streams = state["role"] == "standby" and (state.get("receiver") or {}).get("status") == "streaming"
    if streams and same and not state.get("masked") and not state.get("firewalled"):
        plan.says = [f"{host} is a standby of {live[0]} and in step: nothing to do"]
        return vars(plan)
    plan.kind = "rewind" if service == "postgresql" else "follow"
    plan.says = [f"{host} becomes a standby of {live[0]}"]
    return vars(plan)


def failover_states(hostvars: Mapping[str, Any], members: Sequence[str], register: str) -> dict[str, dict[str, Any]]:
    """Member to what it said in the registered task; `reachable: False` and `problem` for those that gave no answer."""
    states: dict[str, dict[str, Any]] = {}
    for host in members:
        answer = hostvars[host].get(register) or {}
        try:
            states[host] = {**json.loads(answer["stdout"]), "reachable": True}
        except (KeyError, ValueError):
            text = str(answer.get("stderr") or answer.get("msg") or "unreachable").strip()
            states[host] = {"reachable": False, "problem": text.splitlines()[-1]}
    return states


def failover_looks(hostvars: Mapping[str, Any], members: Sequence[str], service: str) -> dict[str, dict[str, Any]]:
    """Like `failover_states`, from a task that asked each member in a loop over its services."""
    found: dict[str, Any] = {}
    for host in members:
        results = (hostvars[host].get("__failover_look") or {}).get("results", [])
        found[host] = {"answer": next((item for item in results if item.get("item") == service), {})}
    return failover_states(found, members, "answer")


def proxy_views(hostvars: Mapping[str, Any], hosts: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Host to backend to usable servers, from the task that asked the local proxies; a host without answer has none."""
    answers = {host: (hostvars[host].get("__status_proxy") or {}).get("stdout", "") for host in dict.fromkeys(hosts)}
    return {host: json.loads(text) if text.startswith("{") else {} for host, text in answers.items()}


def failover_problem(hostvars: Mapping[str, Any], members: Sequence[str], register: str) -> str:
    """What went wrong in the registered task on any of these members; empty when nothing did."""
    said = []
    for host, answer in failover_states(hostvars, members, register).items():
        if answer.get("problem"):
            said.append(f"{host}: {answer['problem']}")
    return "; ".join(said)


def failover_account(hostvars: Mapping[str, Any], members: Sequence[str], registers: Sequence[str]) -> list[str]:
    """Every member's steps in the order of time, in seconds from the first."""
    steps = []
    for host in members:
        for register in registers:
            answer = (hostvars[host].get(register) or {}).get("stdout", "")
            found = json.loads(answer).get("steps", []) if answer.startswith("{") else []
            steps += [(entry["at"], host, entry["step"]) for entry in found]
    begin = min((at for at, _, _ in steps), default=0.0)
    return [f"{at - begin:7.2f} s  {host}: {text}" for at, host, text in sorted(set(steps))]


def synchronous_problems(host: str, state: State) -> list[str]:
    """Whether writes on this primary wait for a standby that is not there."""
    acknowledging = [item for item in state.get("standbys", []) if item.get("sync") in ("sync", "quorum")]
    if not state.get("synchronous") or any(item.get("state") == "streaming" for item in acknowledging):
        return []
    return [f"{host}: writes wait for a synchronous standby; synchronous.yml -e enabled=false lets them through"]


def synchronous_plan(
    states: Mapping[str, State], enabled: bool, mode: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Who has to suspend (`enabled` false) or resume synchronous replication, as `{"hosts", "says", "refusals"}`.

    states, and run in the options: as for `failover_plan`; mode: postgresql_synchronous_mode, "off" for none.
    """
    refusals = locked(states, options)
    hosts = [host for host, state in states.items() if reachable(state) and state.get("suspended") == enabled]
    gone = [host for host, state in states.items() if not reachable(state)]
    primaries = primaries_of(states)
    if mode == "off" and not enabled:
        refusals.append("postgresql_synchronous_mode is off: nothing waits for a standby")
    if enabled and mode != "off" and (len(primaries) != 1 or not any(
        item["state"] == "streaming" for item in states[primaries[0]].get("standbys", [])
    )):  # fmt: skip
        refusals.append("no standby streams from the primary: writes would wait for one; rejoin one first")
    verb = "resumed" if enabled else "suspended"
    says = [f"synchronous replication is {verb} on {', '.join(hosts)}" if hosts else "nothing to do"]
    says += [f"{host} cannot be reached and keeps what it has: run this again when it is back" for host in gone]
    return {"hosts": [] if refusals else hosts, "says": says, "refusals": refusals}


def service_status(service: str, states: Mapping[str, State]) -> tuple[list[str], list[str]]:
    """Table rows of one service's members, and what is wrong with them."""
    rows, problems = [], []
    primaries = primaries_of(states)
    if len(primaries) != 1:
        problems.append(f"{SERVICES[service]}: {len(primaries) or 'no'} primar{'ies' if primaries else 'y'}")
    primary = states[primaries[0]] if primaries else {}
    for host, state in states.items():
        role, detail = state.get("role", "unreachable"), ""
        receiver = state.get("receiver") or {}
        lag = max(int(primary.get("lsn", 0)) - int(state.get("lsn", 0)), 0)
        if role == "primary":
            detail = f"{len(state['standbys'])} standbys"
            problems += synchronous_problems(host, state)
            archiver = state.get("archiver") or {}
            if archiver.get("waiting"):
                detail += f", {archiver['waiting']} WAL segments wait for the archive"
            if archiver.get("failing"):
                problems.append(
                    f"{host}: WAL does not reach the archive (last tried {archiver['failed_at']},"
                    f" {archiver['waiting']} segments wait)"
                )
        elif role == "standby":
            # Who sends to it knows how late it replays.
            senders = [item for other in states.values() for item in other.get("standbys", [])]
            seconds = max((item.get("replay_lag_s", 0.0) for item in senders if item.get("name") == host), default=0.0)
            detail = f"{receiver.get('status', 'not streaming')}, {lag} bytes and {seconds:.1f} s behind"
            detail += f", from {state['upstream']}" if state.get("upstream") not in (None, "", *primaries) else ""
            detail += ", warm" if not state.get("hot", True) else ""
            if receiver.get("status") != "streaming":
                problems.append(f"{host}: the standby of {SERVICES[service]} does not stream")
            if service == "postgresql" and primary and state.get("timeline") != primary.get("timeline"):
                problems.append(f"{host}: PostgreSQL is on timeline {state.get('timeline')}, not the primary's")
            if state.get("replay_paused"):
                problems.append(f"{host}: replay is paused")
        else:
            detail = str(state.get("problem", ""))
            problems.append(f"{host}: {SERVICES[service]} {role}{': ' + detail if detail else ''}")
        if state.get("masked"):
            problems.append(f"{host}: {SERVICES[service]} is fenced (masked); rejoin.yml brings it back")
        if state.get("firewalled"):
            problems.append(f"{host}: {SERVICES[service]} is fenced (firewall); rejoin.yml opens it")
        if state.get("suspended"):
            problems.append(f"{host}: synchronous replication is suspended; synchronous.yml -e enabled=true resumes it")
        timeline = f"timeline {state['timeline']}" if "timeline" in state else ""
        rows.append(f"{SERVICES[service]:<11} {host:<12} {role:<11} {timeline:<12} {detail}".rstrip())
        for slot in state.get("slots", []):
            use = "active" if slot["active"] else "inactive"
            rows.append(
                f"{'':<11} {'':<12} slot {slot['name']}: {use}, {slot['wal_status']}, keeps {slot['retained']} bytes"
            )
            if slot["wal_status"] in ("unreserved", "lost"):
                problems.append(f"{host}: slot {slot['name']} has lost WAL: its standby has to be cloned")
            if not slot["active"]:
                problems.append(f"{host}: nobody uses slot {slot['name']}, which keeps {slot['retained']} bytes of WAL")
    return rows, problems


def failover_status(
    services: Mapping[str, Mapping[str, State]],
    proxies: Mapping[str, Mapping[str, Sequence[str]]],
    backups: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What the data services' members and users see: `healthy`, `problems`, `table`, and what they were made from.

    services: service to host to state. proxies: host to backend to the servers that its local proxy would use; a host
    that gave no answer has none. backups: what `backup_status` (role backup) found, if there are any.
    """
    table, problems = [], []
    for service, states in services.items():
        rows, wrong = service_status(service, states)
        table += rows
        problems += wrong
    for host, backends in proxies.items():
        if not backends:
            problems.append(f"{host}: the local proxy gives no answer")
        for service, states in services.items():
            expected = primaries_of(states)
            used = list(backends.get(f"{service}-primary", []))
            if backends and used != expected:
                problems.append(f"{host}: the local proxy has {used or 'no server'} as primary of {SERVICES[service]}")
        uses = ", ".join(
            f"{service} {'/'.join(backends.get(f'{service}-primary', [])) or 'none'}" for service in services
        )
        table.append(f"{'proxy':<11} {host:<12} {uses}")
    if backups:
        table += backups["table"]
        problems += backups["problems"]
    return {
        "healthy": not problems, "problems": problems, "table": table,
        "services": services, "proxies": proxies, "backups": (backups or {}).get("state", {}),
    }  # fmt: skip


def moment(text: str) -> datetime.datetime:
    """The moment that an operator wrote in ISO 8601, in UTC, which is also meant where no zone is given.

    Raises ValueError when it is none.
    """
    parsed = datetime.datetime.fromisoformat(text.strip())
    return (parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC)).astimezone(datetime.UTC)


def shown_moment(when: datetime.datetime | float) -> str:
    """A moment for people: UTC, to the second. A number is seconds since 1970."""
    known = when if isinstance(when, datetime.datetime) else datetime.datetime.fromtimestamp(when, datetime.UTC)
    return known.strftime("%Y-%m-%d %H:%M:%S UTC")


def restore_target(options: Mapping[str, Any], repository: Mapping[str, Any]) -> tuple[list[str], str, str]:
    """The options of pgBackRest for what was asked, how to say it, and why it cannot be done (empty when it can).

    options: target_time (ISO 8601, "latest" or ""), set (label of a backup or ""), target_timeline (number or "").
    repository: what backup_state.py found.
    """
    wanted, label, timeline = (str(options.get(name, "")) for name in ("target_time", "set", "target_timeline"))
    backups = {item["label"]: item for item in repository["backups"]}
    if not wanted and not label:
        return [], "", "say to when: target_time=<time>, target_time=latest, or set=<label of a backup>"
    if not backups:
        return [], "", "the repository holds no backup"
    if label and label not in backups:
        return [], "", f"set={label}: no such backup; there are {', '.join(backups)}"
    if timeline and not timeline.isdigit():
        return [], "", f"target_timeline={timeline}: it is a number"
    arguments = [f"--set={label}"] * bool(label) + [f"--target-timeline={timeline}"] * bool(timeline)
    if not wanted:
        return [*arguments, "--type=immediate", "--target-action=promote"], f"the end of backup {label}", ""
    if wanted == "latest":
        return [*arguments, "--type=default"], "the end of the archive", ""
    try:
        when = moment(wanted)
    except ValueError:
        return [], "", f"target_time={wanted}: no time; write it like 2026-01-31T12:00:00+01:00, or latest"
    earliest = float(backups[label]["stop"] if label else min(item["stop"] for item in backups.values()))
    latest = float(repository["now"] if repository["reached"] else repository["archived_at"])
    # pgBackRest knows the end of a backup to the second.
    if not earliest < when.timestamp() <= latest:
        between = f"between {shown_moment(earliest)}, the end of the first backup, and {shown_moment(latest)}"
        return [], "", f"target_time={wanted}: it has to be {between}"
    newest = list(backups.values())[-1]
    if repository["gaps"] and when.timestamp() > float(newest["stop"]):
        lost = f"the archive lacks WAL ({', '.join(repository['gaps'])})"
        return [], "", f"target_time={wanted}: {lost}; set={newest['label']} or latest come closest"
    text = when.strftime("%Y-%m-%d %H:%M:%S.%f+00")
    return [*arguments, "--type=time", f"--target={text}", "--target-action=promote"], shown_moment(when), ""


def restore_plan(
    states: Mapping[str, State], repositories: Mapping[str, Mapping[str, Any]], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The plan for one restore, as the fields of `Plan` and `arguments` for the member that is restored (`candidate`).

    states: as for `failover_plan`. repositories: host to what backup_state.py said there, likewise. options: those of
    `restore_target`, host (whose data is replaced, or ""), confirm (the same, to be sure), dry_run (bool), run (id).
    """
    plan = Plan()
    plan.refusals += locked(states, options)
    primaries = primaries_of(states)
    host = str(options.get("host", "")) or next(iter([*primaries, *states]))
    if host not in states:
        return {**vars(plan.refuse(f"host={host}: not a member of postgresql ({', '.join(states)})")), "arguments": []}
    for name, state in states.items():
        if not reachable(state) and (name == host or name in primaries):
            plan.refuse(f"{name} cannot be reached: {state.get('problem', 'no answer')}")
        elif not reachable(state):
            plan.says.append(f"{name} cannot be reached: keep it off, and run rejoin.yml when it is back")
    repository = repositories[host]
    arguments: list[str] = []
    if "backups" not in repository:
        plan.refuse(f"the repository cannot be reached from {host}: {repository.get('problem', 'no answer')}")
    else:
        # Only the primary can have the archive get what is newer than its last segment.
        reached = any(item.get("reached") for item in repositories.values())
        arguments, says, problem = restore_target(options, {**repository, "reached": reached})
        plan.says.insert(0, f"PostgreSQL goes back to {says} on {host}, whose data is replaced; the others follow it")
        if problem:
            plan.refuse(problem)
    if options.get("confirm") != host and not options.get("dry_run"):
        plan.refuse(f"confirm: the data of {host} would be replaced and every later write lost, say confirm={host}")
    if plan.refusals:
        return {**vars(plan), "arguments": []}
    plan.kind, plan.candidate = "restore", host
    plan.primary = next((name for name in primaries if name != host), "")
    plan.followers = [name for name in states if name != host and reachable(states[name])]
    return {**vars(plan), "arguments": arguments}


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., object]]:
        """Names of the filters and the functions behind them."""
        return {
            "failover_plan": failover_plan,
            "rejoin_plan": rejoin_plan,
            "synchronous_plan": synchronous_plan,
            "failover_status": failover_status,
            "restore_plan": restore_plan,
            "failover_looks": failover_looks,
            "proxy_views": proxy_views,
            "failover_states": failover_states,
            "failover_problem": failover_problem,
            "failover_account": failover_account,
        }
