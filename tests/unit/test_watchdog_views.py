"""The watchdogs' part of status.yml."""

from __future__ import annotations

import json
from typing import Any

import watchdog_views

WELL = {"healthy": True, "problems": [], "table": ["PostgreSQL  data1"], "services": {}, "proxies": {}}
VIEW = {
    "health": "OK",
    "problems": [],
    "lease": {"mode": "active_standby", "holder": "air1", "epoch": 7},
    "nodes": [{"name": "air1", "answering": True}, {"name": "lb1", "answering": True}],
}


def status(views: dict[str, Any]) -> dict[str, Any]:
    return watchdog_views.with_watchdogs(WELL, views)


def test_who_is_in_charge_and_how_many_answer() -> None:
    answer = status({"air1": VIEW, "air2": VIEW})
    assert answer["healthy"]
    assert answer["table"][0] == "PostgreSQL  data1"
    assert answer["table"][1].split() == ["scheduler", "air1", "in", "charge", "epoch", "7"]
    assert answer["table"][2].split() == ["watchdogs", "2", "of", "2", "answer", "health", "OK"]


def test_what_they_find_wrong_counts() -> None:
    problem = {"level": "CRITICAL", "node": "", "text": "no node is in charge of the scheduler"}
    silent = {"level": "WARNING", "node": "lb1", "text": "does not answer"}
    answer = status({"air1": {}, "air2": VIEW | {"problems": [problem, silent], "health": "CRITICAL"}})
    assert not answer["healthy"]
    assert answer["problems"] == [
        "air1: airflow-watchdog gives no answer", "no node is in charge of the scheduler", "lb1: does not answer",
    ]  # fmt: skip


def test_without_an_answer_and_without_servers() -> None:
    assert status({"air1": {}})["problems"] == ["air1: airflow-watchdog gives no answer"]
    assert status({}) == WELL


def test_answers_are_read_from_the_task() -> None:
    hostvars = {
        "air1": {"__status_watchdog": {"stdout": json.dumps(VIEW)}},
        "air2": {"__status_watchdog": {"stdout": "", "unreachable": True}},
        "air3": {},
    }
    assert watchdog_views.watchdog_views(hostvars, ["air1", "air2", "air3"]) == {"air1": VIEW, "air2": {}, "air3": {}}
