"""What the role watchdog writes: its configuration is read back by the watchdog's own model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import watchdog as filters
import yaml
from airflow_watchdog.config import load

PROJECT = Path(__file__).resolve().parents[2]
ROLE = PROJECT / "roles" / "watchdog"
GROUPS = {
    "all": ["lb1", "air1", "air2", "data1", "data2", "redis3", "worker1"],
    "airflow_servers": ["air1", "air2"],
    "postgresql": ["data1", "data2"],
    "redis": ["data1", "data2", "redis3"],
}
HOSTVARS = {name: {"rack": number % 2, "node_address": f"10.0.0.{number}"} for number, name in enumerate(GROUPS["all"])}


def peers(own: str) -> list[dict[str, Any]]:
    return filters.watchdog_peers(HOSTVARS, GROUPS, own, 8008)


def test_a_server_asks_everybody_else() -> None:
    assert [peer["name"] for peer in peers("air1")] == ["air2", "data1", "data2", "lb1", "redis3", "worker1"]
    assert peers("air1")[1] == {
        "name": "data1", "rack": "1", "address": "10.0.0.3", "port": 8008,
        "airflow_server": False, "postgresql": True, "redis": True,
    }  # fmt: skip


def test_a_data_node_asks_data_nodes_and_the_rest_asks_nobody() -> None:
    assert [peer["name"] for peer in peers("data1")] == ["data2", "redis3"]
    assert peers("lb1") == peers("worker1") == []


def test_each_unit_is_looked_at_once_and_only_where_it_is_needed() -> None:
    table = yaml.safe_load((ROLE / "vars" / "main.yml").read_text())["_watchdog_components"]
    table["loadbalancers"][1]["needs"] = ""
    found = filters.watchdog_components(table, ["loadbalancers", "airflow_servers", "airflow_workers"])
    units = [part["unit"] for part in found]
    assert units.count("haproxy.service") == 1
    assert "keepalived.service" not in units
    assert "airflow-worker.service" in units
    assert not [part for part in found if "needs" in part]


@pytest.mark.parametrize("value", ['a "quoted" \\ word', "line\nbreak", "Überwachung 👍", "\x7f", "", 'x{"y": [1]}'])
def test_strings_survive_toml(value: str) -> None:
    assert tomllib.loads(filters.to_toml({"section": {"key": value}})) == {"section": {"key": value}}


def test_toml_keeps_types_and_nesting() -> None:
    config = {
        "one": {"b": True, "i": 3, "f": 2.5, "l": ["x", "y"], "inner": {"k": "v"}},
        "many": [{"name": "a"}, {"name": "b", "deep": {"x": 1}}],
    }
    assert tomllib.loads(filters.to_toml(config)) == config
    assert tomllib.loads(filters.to_toml({"top": 1, "empty": [], "none": None, "section": {}})) == {"top": 1}


@pytest.mark.parametrize("inventory", ["production", "single"])
def test_the_configuration_is_one_that_the_watchdog_takes(inventory: str, tmp_path: Path) -> None:
    variables = [ROLE / "defaults/main.yml", ROLE / "vars/Debian.yml", ROLE / "vars/main.yml",
                 *(PROJECT / f"roles/{role}/vars/Debian.yml" for role in ("postgresql", "redis"))]  # fmt: skip
    template = {"src": str(ROLE / "templates/config.toml.j2"), "dest": f"{tmp_path}/{{{{ inventory_hostname }}}}.toml"}
    play = {
        "hosts": "all",
        "connection": "local",
        "gather_facts": False,
        "vars_files": list(map(str, variables)),
        "vars": {"ansible_facts": {"distribution_major_version": "13"}, "ansible_become": False},
        "tasks": [{"ansible.builtin.template": template}],
    }
    (tmp_path / "play.yml").write_text(json.dumps([play]))
    (tmp_path / "group_vars").symlink_to(PROJECT / "group_vars")
    environment = {
        "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_FILTER_PLUGINS": str(ROLE / "filter_plugins"),
        "ENV": "none", "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
    }  # fmt: skip
    program = str(Path(sys.executable).parent / "ansible-playbook")
    command = [program, f"-i{PROJECT}/inventories/{inventory}/hosts.yml", str(tmp_path / "play.yml")]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    configs = {path.stem: load(path) for path in tmp_path.glob("*.toml")}
    assert len(configs) == (9 if inventory == "production" else 1)
    for host, config in configs.items():
        server = host.startswith("airflow")
        assert (config.node.name, bool(config.component)) == (host, True)
        assert (config.scheduler is not None, config.database is not None) == (server, server)
        if config.scheduler:
            assert config.scheduler.mode == ("active_standby" if inventory == "production" else "active_active")
            assert len(config.peer) == len(configs) - 1
        assert (config.redis is not None) == host.startswith("data")
