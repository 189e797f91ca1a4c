"""The plugins that ask a node what it has and bring it files; `deliver` runs for real, on this machine."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deliver
import node_state
import pytest
import yaml
from preflight_probe import node_facts

PROJECT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("watch_job", PROJECT / "roles/node/action_plugins/watch_job.py")
assert _spec
assert _spec.loader
watch_job = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(watch_job)

PROBE = """package redis-server 5:8.0.2-3
passwd redis:x:102:103::/var/lib/redis:/usr/sbin/nologin
group redis:x:103:
group airflow-ha-tls:x:990:redis,postgres
service_file redis-server.service enabled
service_file chrony.service disabled
service_file ssh.service enabled
service_running redis-server.service
service_running chrony.service
memory_kb 4"""
FACTS = node_facts(PROBE.splitlines())


def test_facts_have_the_form_of_the_modules_they_stand_for() -> None:
    assert FACTS["packages"]["redis-server"][0]["version"] == "5:8.0.2-3"
    assert FACTS["getent_passwd"]["redis"][1] == "102"
    assert FACTS["services"]["redis-server.service"] == {
        "name": "redis-server.service", "source": "systemd", "state": "running", "status": "enabled",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("test", "arguments", "expected"),
    [
        (node_state.holding_packages, [["redis-server"]], True),
        (node_state.holding_packages, [["redis-server", "redis"]], False),
        (node_state.having_account, ["redis"], True),
        (node_state.having_account, ["redis", ["airflow-ha-tls"]], True),
        (node_state.having_account, ["redis", ["redis"]], False),
        (node_state.having_account, ["redi", ["airflow-ha-tls"]], False),
        (node_state.having_group, ["airflow-ha-tls"], True),
        (node_state.having_group, ["airflow"], False),
        (node_state.running_services, [["redis-server"]], True),
        (node_state.running_services, [["redis-server", "chrony"]], False),  # would not come back after a boot
        (node_state.running_services, [["ssh"]], False),
    ],
)
def test_what_a_node_has(test: Any, arguments: list[Any], expected: bool) -> None:
    assert test(FACTS, *arguments) is expected
    assert test({}, *arguments) is False, "without facts the module must be asked"


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ("", "B\n1 a\nE\n"),
        ("127.0.0.1 localhost\n127.0.1.1 me\n", "127.0.0.1 localhost\nB\n1 a\nE\n"),
        ("x\nB\nold\nolder\nE\ny\n", "x\nB\n1 a\nE\ny\n"),
        ("x\nB\ncut short", "x\nB\n1 a\nE\ncut short\n"),
    ],
)
def test_a_block_leaves_the_rest_alone(present: str, expected: str) -> None:
    def marked(text: str) -> str:
        return text.replace("B\n", deliver.BEGIN + "\n").replace("E\n", deliver.END + "\n")

    once = deliver.with_block(marked(present), "1 a\n", r"^127\.0\.1\.1\s")
    assert once == marked(expected)
    assert deliver.with_block(once, "1 a\n", r"^127\.0\.1\.1\s") == once


def play(folder: Path, task: dict[str, Any], *options: str) -> tuple[dict[str, Any], str]:
    """Run one `deliver` task on this machine; return its result and everything that Ansible printed."""
    owner = {"owner": folder.owner(), "group": folder.group()}
    for kind in ("folders", "files"):
        task[kind] = [{**owner, **item} for item in task.get(kind, [])]
    tasks = [
        {"name": "Deliver", "deliver": task, "register": "result"},
        {
            "name": "Keep",
            "ansible.builtin.copy": {"content": "{{ result }}", "dest": str(folder / "result")},
            "check_mode": False,
            "diff": False,
        },
    ]  # fmt: skip
    handlers = [{"name": name, "ansible.builtin.debug": {"msg": name}} for name in ("first", "second")]
    play = {
        "name": "Test", "hosts": "localhost", "connection": "local", "gather_facts": False,
        "vars": {"word": "rendered", "ansible_python_interpreter": sys.executable},
        "roles": [str(PROJECT / "roles" / "node")], "tasks": tasks, "handlers": handlers,
    }  # fmt: skip
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    (folder / "templates").mkdir(exist_ok=True)
    (folder / "templates" / "a.j2").write_text("# {{ ansible_managed }}\n{{ word }} {{ own | default('') }}\n")
    done = subprocess.run(
        ["ansible-playbook", "-i", "localhost,", "--diff", *options, str(folder / "play.yml")],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    result = folder / "result"
    return (json.loads(result.read_text()) if result.exists() else {}), done.stdout + done.stderr


def test_deliver_writes_once_and_notifies_what_differs(tmp_path: Path) -> None:
    there = tmp_path / "there"
    task: dict[str, Any] = {
        "folders": [{"path": str(there / "deep"), "mode": "0750"}],
        "links": [{"path": str(there / "current"), "target": "deep"}],
        "files": [
            {"src": "a.j2", "own": "too", "dest": str(there / "a"), "notify": "first"},
            {"content": "hidden-word", "dest": str(there / "b"), "mode": "0640", "secret": True, "notify": ["second"]},
        ],
    }
    checked, _ = play(tmp_path, task, "--check")
    assert checked["changed"]
    assert not there.exists(), "check mode changed something"

    result, output = play(tmp_path, task)
    assert result["delivered"] == [str(there / name) for name in ("deep", "current", "a", "b")]
    assert (there / "a").read_text().endswith("\nrendered too\n")
    assert (there / "b").stat().st_mode & 0o777 == 0o640
    assert (there / "deep").stat().st_mode & 0o777 == 0o750
    assert (there / "current").resolve() == there / "deep"
    assert "hidden-word" not in output
    assert "+rendered too" in output
    assert "HANDLER [first]" in output
    assert "HANDLER [second]" in output

    (there / "b").write_text("other")
    result, output = play(tmp_path, task)
    assert result["delivered"] == [str(there / "b")]
    assert "HANDLER [first]" not in output
    assert "HANDLER [second]" in output

    result, output = play(tmp_path, task)
    assert not result["changed"]
    assert "HANDLER" not in output


def test_deliver_leaves_the_old_file_when_the_new_one_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    _, output = play(tmp_path, {"files": [{"content": "new", "dest": str(target), "validate": "grep -q old %s"}]})
    assert f"{target}: refused by grep" in output
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.glob(".a.*")] == []


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"content": "x"}, "it needs `dest`"),
        ({"dest": "/nowhere", "content": "x", "src": "a.j2"}, "either `src` or `content`"),
    ],
)
def test_deliver_refuses_a_file_it_cannot_understand(tmp_path: Path, entry: dict[str, Any], says: str) -> None:
    _, output = play(tmp_path, {"files": [entry]})
    assert says in output


@pytest.mark.parametrize("end", [{"finished": True, "rc": 0}, {"finished": True, "rc": 1, "failed": True}])
def test_a_job_is_watched_to_its_end(
    end: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([{"finished": False}, {"finished": False}, end])
    monkeypatch.setattr(watch_job, "POLL_S", 0)
    monkeypatch.setattr(watch_job.ActionBase, "run", lambda *_: {})
    plugin = object.__new__(watch_job.ActionModule)
    plugin._task = SimpleNamespace(args={"job": "7", "ask": ["echo", "a b"], "every": 60})
    plugin.get_shell_option = lambda *_: "folder"
    plugin._execute_module = lambda _name, arguments, **_: next(answers) | {"asked": arguments}
    plugin._low_level_execute_command = lambda command: {"rc": 0, "stdout": f"{command}: half\n"}
    result = plugin.run(task_vars={"inventory_hostname": "data2"})
    assert (result["rc"], result.get("failed", False)) == (end["rc"], end.get("failed", False))
    assert result["asked"] == {"jid": "7", "mode": "status", "_async_dir": "folder"}
    assert capsys.readouterr().out == "data2: echo 'a b': half\n"
