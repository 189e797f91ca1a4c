"""The configuration of other inventories than this scenario's: rendered here, judged by HAProxy on a machine."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml
from testinfra.host import Host

PROJECT = Path(__file__).resolve().parents[3]
ROLE = PROJECT / "roles/haproxy"
HOSTS = {name: f"10.0.0.{number}" for number, name in enumerate(("lb1", "lb2", "a1", "a2", "d1", "d2", "w1"), start=1)}
GROUPS = {
    "loadbalancers": ["lb1", "lb2"],
    "airflow_servers": ["a1", "a2"],
    "airflow_workers": ["w1"],
    "postgresql": ["d1", "d2"],
    "redis": ["d1", "d2"],
    "spark_masters": ["a1", "a2"],
}
SINGLE = {"loadbalancers": ["a1"], "airflow_servers": ["a1"], "postgresql": ["a1"]}

LOCAL = {"postgresql-primary", "postgresql-standby", "redis-primary", "local-api", "airflow-api", "airflow-api-alive"}
BALANCER = {"https", "http-to-https", "stats", "flower", "spark-master", "airflow-api", "airflow-api-alive"}

CASES: dict[str, tuple[str, dict[str, list[str]], dict[str, object], set[str]]] = {
    "balancer": ("lb1", GROUPS, {}, BALANCER),
    "worker": ("w1", GROUPS, {}, LOCAL),
    "server": ("a1", GROUPS, {}, LOCAL),
    "single": (
        "a1",
        SINGLE,
        {"cluster_profile": "single"},
        (BALANCER | LOCAL) - {"flower", "spark-master", "redis-primary"},
    ),
    "balancer-alone": ("lb1", {"loadbalancers": ["lb1"]}, {}, {"https", "http-to-https", "stats"}),
    "other-ports": (
        "lb1",
        GROUPS,
        {"haproxy_redirect_port": 0, "secret_haproxy_stats_password": "with space, \"quote\" and 'é'"},
        BALANCER - {"http-to-https"},
    ),
}


def render(folder: Path, name: str, groups: dict[str, list[str]], extra: dict[str, object]) -> str:
    """The haproxy.cfg of one host of such an inventory."""
    inventory = {
        "all": {
            "hosts": {host: {"ansible_host": HOSTS[host]} for members in groups.values() for host in members},
            "children": {group: {"hosts": {host: {} for host in members}} for group, members in groups.items()},
        }
    }
    variables = {
        "secret_redis_monitor_password": "a \"b\" 'c' $d \\e",
        "secret_haproxy_stats_password": "molecule",
        # As the machine that judges has it.
        "ansible_managed": "Ansible managed",
    }
    play = {
        "hosts": name,
        "connection": "local",
        "gather_facts": False,
        "vars_files": [
            str(file)
            for file in (
                ROLE / "defaults/main.yml",
                ROLE / "vars/main.yml",
                ROLE / "vars/Debian.yml",
            )
        ],
        "tasks": [
            {
                "ansible.builtin.template": {
                    "src": str(ROLE / "templates/haproxy.cfg.j2"),
                    "dest": str(folder / "haproxy.cfg"),
                    "mode": "0600",
                }
            }
        ],
    }
    if not (folder / "group_vars").exists():
        (folder / "group_vars").symlink_to(PROJECT / "group_vars")
    (folder / "inventory.yml").write_text(yaml.safe_dump(inventory))
    (folder / "play.yml").write_text(yaml.safe_dump([play]))
    command = ["ansible-playbook", "-i", "inventory.yml", "-e", json.dumps(variables | extra), "play.yml"]
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "haproxy.cfg").read_text()


@pytest.mark.parametrize("case", CASES)
def test_any_set_of_groups_gives_a_valid_configuration(
    case: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    machine = request.getfixturevalue("machine")("haproxy1")
    assert isinstance(machine, Host)
    name, groups, extra, sections = CASES[case]
    config = render(tmp_path, name, groups, extra)
    assert set(re.findall(r"^(?:frontend|backend|listen) (\S+)", config, re.MULTILINE)) == sections
    judged = machine.run("cat > /run/rendered.cfg <<'CONFIG'\n" + config + "\nCONFIG\nhaproxy -c -f /run/rendered.cfg")
    assert judged.rc == 0, judged.stdout + judged.stderr


def test_rendering_twice_gives_the_same(tmp_path: Path) -> None:
    name, groups, extra, _ = CASES["balancer"]
    assert render(tmp_path, name, groups, extra) == render(tmp_path, name, groups, extra)
