"""What is said about backups, where the archive has gaps, and what a restore refuses."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import backup
import backup_state
import failover
import pytest
import redis_copy

NOW = datetime.datetime(2026, 1, 31, 12, tzinfo=datetime.UTC).timestamp()
HOUR = 3600
LIMITS = {"full_h": 192, "any_h": 30, "redis_h": 3}


def entry(label: str, kind: str, age_h: float) -> dict[str, Any]:
    stop = int(NOW - age_h * HOUR)
    return {"label": label, "type": kind, "start": stop - 60, "stop": stop, "size": 3 << 20, "stored": 1 << 20}


def repository(**more: Any) -> dict[str, Any]:
    return {
        "now": NOW, "running": False, "backups": [entry("F1", "full", 100), entry("I1", "incr", 4)], "gaps": [],
        "archived_at": NOW - 600, "reached": True, "redis": {"copies": 3, "newest": NOW - HOUR},
    } | more  # fmt: skip


STATUS = {
    "sound": ({}, []),
    "none": ({"backups": []}, ["there is no full backup of PostgreSQL yet", "there is no backup of PostgreSQL yet"]),
    "first one being made": (
        {"backups": [], "running": True},
        ["no full backup of PostgreSQL yet, one is being made", "no backup of PostgreSQL yet, one is being made"],
    ),
    "old full": (
        {"backups": [entry("F1", "full", 193), entry("I1", "incr", 4)]},
        ["the last full backup is 193 h old"],
    ),
    "old increment": ({"backups": [entry("F1", "full", 31)]}, ["the last backup is 31 h old"]),
    "dropped WAL": ({"gaps": ["2 segments of timeline 1"]}, ["lacks WAL (2 segments of timeline 1)"]),
    "old Redis copy": ({"redis": {"copies": 3, "newest": NOW - 4 * HOUR}}, ["copy of Redis' data is 4 h old"]),
    "no Redis copy": ({"redis": {"copies": 0, "newest": 0}}, ["copy of Redis' data is missing"]),
}


@pytest.mark.parametrize("case", STATUS)
def test_status_names_what_is_wrong_and_nothing_else(case: str) -> None:
    change, expected = STATUS[case]
    rows, problems = backup.backup_rows(repository(**change), LIMITS)
    assert len(rows) == 4
    assert len(problems) == len(expected)
    for problem, text in zip(problems, expected, strict=True):
        assert text in problem


def test_repository_that_gives_no_answer_is_a_problem() -> None:
    for answer in ({"msg": "No route to host"}, {"stdout": "", "stderr": "noise\nNo route to host"}):
        assert backup.backup_status({"__backup_state": answer}, LIMITS)["problems"] == ["backup: No route to host"]
    assert backup.backup_status({}, LIMITS)["problems"] == ["backup: no answer"]


def test_failing_archive_is_a_problem_of_the_primary() -> None:
    archiver = {"failing": True, "failed_at": "2026-01-31 12:00:00Z", "waiting": 7}
    state = {"role": "primary", "standbys": [], "lsn": 0, "archiver": archiver}
    _, (problem,) = failover.service_status("postgresql", {"data1": state})
    assert problem.startswith("data1: WAL does not reach the archive")
    assert (
        failover.service_status("postgresql", {"data1": state | {"archiver": archiver | {"failing": False}}})[1] == []
    )


def names(timeline: int, *numbers: int) -> list[str]:
    return [f"{timeline:08X}{number // 256:08X}{number % 256:08X}" for number in numbers]


GAPS = {
    "complete, over the end of an id": (names(1, *range(250, 260)), []),
    "dropped in the middle, twice": (
        names(1, *range(250, 255), 257, 259),
        ["2 segments from 0/FF", "1 segments from 1/02"],
    ),
    "dropped at the begin": (names(1, 252, 253), ["2 segments from 0/FA"]),
    "older than the backup": (names(1, 240, *range(250, 253)), []),
    "switchover": (names(1, 250, 251) + names(2, 252, 253), []),
    "forced failover, both archived the same": (names(1, 250, 251, 252) + names(2, 252, 253), []),
    "dropped at a failover": (names(1, 250, 251) + names(2, 254), ["2 segments from 0/FC"]),
    "restore to an earlier moment": (names(1, *range(250, 260)) + names(2, 254, 255, 256), []),
    "a promotion by hand that was given up": (names(1, *range(250, 260)) + names(2, 252) + names(3, 260), []),
    "nothing after the backup": ([], []),
}


@pytest.mark.parametrize("case", GAPS)
def test_gaps_of_the_archive(case: str) -> None:
    segments, expected = GAPS[case]
    assert backup_state.gaps(reversed(segments), names(1, 250)[0]) == expected


def states(**more: Any) -> dict[str, Any]:
    standby = {"role": "standby", "lock": {}}
    return {"data1": standby, "data2": {"role": "primary", "lock": {}, "standbys": []}} | more


def plan(members: dict[str, Any] | None = None, here: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    members = members or states()
    seen = {host: (here or repository()) | {"reachable": True} for host in members}
    return failover.restore_plan(members, seen, {"run": "me", "confirm": "data2"} | options)


def test_restore_of_the_primary_to_a_moment() -> None:
    made = plan(target_time="2026-01-31T12:00:00+01:00")
    assert made["refusals"] == []
    assert (made["kind"], made["candidate"], made["primary"]) == ("restore", "data2", "")
    assert made["followers"] == ["data1"]
    assert "--target=2026-01-31 11:00:00.000000+00" in made["arguments"]
    assert made["says"][0].startswith("PostgreSQL goes back to 2026-01-31 11:00:00 UTC on data2")


def test_restore_on_another_member() -> None:
    made = plan(target_time="latest", host="data1", confirm="data1")
    assert (made["candidate"], made["primary"], made["followers"]) == ("data1", "data2", ["data2"])
    assert made["arguments"] == ["--type=default"]


def test_restore_of_a_backup_alone_and_on_a_timeline() -> None:
    assert plan(set="I1", target_timeline="2")["arguments"] == [
        "--set=I1", "--target-timeline=2", "--type=immediate", "--target-action=promote",
    ]  # fmt: skip


def test_dry_run_needs_no_confirmation() -> None:
    assert plan(target_time="latest", confirm="", dry_run=True)["refusals"] == []


GONE = {"reachable": False, "problem": "No route to host"}
REFUSED = {
    "no target": ({}, {}, "say to when"),
    "not a time": ({}, {"target_time": "yesterday"}, "target_time=yesterday: no time"),
    "before the first backup": (
        {},
        {"target_time": "2026-01-27T07:00:00Z"},
        "has to be between 2026-01-27 08:00:00 UTC",
    ),
    "in the future": ({}, {"target_time": "2026-01-31T12:00:01Z"}, "and 2026-01-31 12:00:00 UTC"),
    "before the end of the set": ({}, {"target_time": "2026-01-31T07:00:00Z", "set": "I1"}, "has to be between"),
    "unknown set": ({}, {"set": "F9"}, "set=F9: no such backup; there are F1, I1"),
    "timeline that is none": ({}, {"target_time": "latest", "target_timeline": "x"}, "target_timeline=x"),
    "not confirmed": ({}, {"target_time": "latest", "confirm": ""}, "say confirm=data2"),
    "another confirmed": ({}, {"target_time": "latest", "confirm": "data1"}, "say confirm=data2"),
    "unknown host": ({}, {"target_time": "latest", "host": "data9"}, "host=data9: not a member"),
    "host away": ({"data1": GONE}, {"target_time": "latest", "host": "data1", "confirm": "data1"}, "data1 cannot be"),
    "primary away": (
        {"data1": {"role": "standby", "lock": {}, "seen": {"data2": {"role": "primary"}}}, "data2": GONE},
        {"target_time": "latest", "host": "data1", "confirm": "data1"},
        "data2 cannot be reached",
    ),
    "another run": (
        {"data1": {"role": "standby", "lock": {"run": "other", "by": "eve@bastion", "age": 2.0}}},
        {"target_time": "latest"},
        "another failover",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_restore_refuses(case: str) -> None:
    change, options, reason = REFUSED[case]
    made = plan(states(**change), **options)
    assert (made["kind"], made["arguments"]) == ("none", [])
    assert any(reason in refusal for refusal in made["refusals"]), made["refusals"]


def test_restore_without_a_repository_or_backups() -> None:
    members = states()
    seen = {host: {"reachable": False, "problem": "pgBackRest: unable to connect"} for host in members}
    made = failover.restore_plan(members, seen, {"target_time": "latest", "confirm": "data2"})
    assert made["refusals"] == ["the repository cannot be reached from data2: pgBackRest: unable to connect"]
    assert plan(here=repository(backups=[]), target_time="latest")["refusals"] == ["the repository holds no backup"]


def test_restore_does_not_go_beyond_dropped_wal() -> None:
    dropped = repository(gaps=["2 segments of timeline 1"])
    assert "lacks WAL (2 segments" in plan(here=dropped, target_time="2026-01-31T11:00:00Z")["refusals"][0]
    assert plan(here=dropped, target_time="2026-01-30T11:00:00Z")["refusals"] == []


def test_without_a_primary_the_archive_ends_with_its_last_segment() -> None:
    dead = states(data2={"role": "stopped", "lock": {}})
    late = {"target_time": "2026-01-31T11:55:00Z", "host": "data2"}
    assert "2026-01-31 11:50:00 UTC" in plan(dead, repository(reached=False), **late)["refusals"][0]
    assert plan(dead, repository(reached=True), **late)["refusals"] == []


def test_only_the_newest_copies_of_redis_stay(tmp_path: Path) -> None:
    for day in range(1, 6):
        (tmp_path / f"2026010{day}T000000Z-data1.rdb").touch()
    (tmp_path / ".new.rdb").touch()
    redis_copy.expire(tmp_path, 2)
    assert sorted(path.name[:8] for path in tmp_path.glob("2*.rdb")) == ["20260104", "20260105"]


def test_copy_prefers_a_replica_in_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "10.0.0.1": "role:master\r\n",
        "10.0.0.2": "role:slave\r\nmaster_link_status:up\r\n",
        "10.0.0.3": "role:slave\r\n",
    }
    asked = []

    def run(_self: object, address: str, *arguments: str, timeout_s: int = 0) -> str:
        if arguments[0] == "INFO":
            return answers[address]
        asked.append(address)
        raise redis_copy.CopyError("no")

    monkeypatch.setattr(redis_copy.Redis, "run", run)
    members = {"data3": "10.0.0.3", "data1": "10.0.0.1", "data2": "10.0.0.2"}
    with pytest.raises(redis_copy.CopyError, match="data2: no; data1: no"):
        redis_copy.copy({"members": members, "folder": str(tmp_path), "port": 6379, "ca": "", "password": ""})
    assert asked == ["10.0.0.2", "10.0.0.1"]
