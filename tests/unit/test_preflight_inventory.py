"""The same refusals through a real ansible-playbook: no machine is needed, and none is connected to.

The filter's own cases are in test_preflight.py. Here each row damages the files of a real inventory; rows are run
together, because all findings are reported at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
SECRETS = list(yaml.safe_load((PROJECT / "files" / "secrets.template.yml").read_text()))
PLAYBOOK = """
- name: Check the inventory
  hosts: all:!localhost
  gather_facts: false
  any_errors_fatal: true
  tasks:
    - name: Check the inventory
      ansible.builtin.import_role:
        name: preflight
        tasks_from: inventory
    - name: Prove that nothing comes after a refusal
      ansible.builtin.debug:
        msg: went-on
"""


class Files:
    """The content of an inventory: hosts.yml, and group_vars/all/."""

    def __init__(self, source: str) -> None:
        """Start from one of the project's own inventories, with a value for each secret."""
        folder = PROJECT / "inventories" / source
        self.hosts: dict[str, Any] = yaml.safe_load((folder / "hosts.yml").read_text())["all"]
        self.variables: dict[str, Any] = yaml.safe_load((folder / "group_vars" / "all" / "cluster.yml").read_text())
        for name in SECRETS:
            fernet = name.endswith("_fernet_key")
            self.variables[name] = "bW9sZWN1bGUgZmVybmV0IGtleSBvZiAzMiBieXRlcyE=" if fernet else "hunter2" * 5

    def host(self, start: str) -> dict[str, Any]:
        """The variables of the host whose name begins like this."""
        (found,) = [variables for name, variables in self.hosts["hosts"].items() if name.startswith(f"{start}.")]
        assert isinstance(found, dict)
        return found

    def group(self, name: str) -> dict[str, Any]:
        """The members of a group."""
        members = self.hosts["children"][name]["hosts"]
        assert isinstance(members, dict)
        return members


def play(folder: Path, files: Files, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Write the inventory and check it."""
    group_vars = folder / "inventories" / "site" / "group_vars" / "all"
    group_vars.mkdir(parents=True, exist_ok=True)
    (group_vars / "cluster.yml").write_text(yaml.safe_dump(files.variables))
    hosts = group_vars.parents[1] / "hosts.yml"
    hosts.write_text(yaml.safe_dump({"all": files.hosts}))
    (folder / "check.yml").write_text(PLAYBOOK)
    if not (folder / "group_vars").exists():
        (folder / "group_vars").symlink_to(PROJECT / "group_vars")
    program = shutil.which("ansible-playbook", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    settings = {"ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "ENV": "site"}
    plain = {name: value for name, value in os.environ.items() if name != "ANSIBLE_FORCE_COLOR"}
    return subprocess.run(
        [str(program), f"--inventory={hosts}", str(folder / "check.yml"), *arguments],
        env=plain | settings | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def findings(output: str) -> list[str]:
    """The lines below the last headline of what preflight says."""
    block = output.rpartition("Not deployed, nothing was changed:")[2].partition("PLAY RECAP")[0]
    return [line.strip() for line in block.splitlines() if line.strip()]


Damage = Callable[[Files], Any]

TOGETHER: dict[str, tuple[Damage, str]] = {
    "two Airflow servers on one rack": (
        lambda files: files.host("airflow2").update(rack="a"),
        "airflow_servers: airflow1.airflow.example.com, airflow2.airflow.example.com are all on rack 'a'",
    ),
    "missing secret": (
        lambda files: files.variables.pop("secret_airflow_jwt_secret"),
        "secret_airflow_jwt_secret: missing; run `make secrets ENV=site`",
    ),
    "empty secret": (
        lambda files: files.variables.update(secret_spark_auth_secret=""),
        "secret_spark_auth_secret: empty; run `make secrets ENV=site`",
    ),
    "one data node": (
        lambda files: files.group("postgresql").pop("data2.airflow.example.com"),
        "postgresql: 1 data nodes, at least 2 needed with cluster_profile 'ha'",
    ),
    "boolean as a string": (
        lambda files: files.variables.update(allow_same_rack="false"),
        "allow_same_rack: the string 'false' where a boolean is needed",
    ),
    "role's boolean as a string on one host": (
        lambda files: files.host("data1").update(common_ntp_adjust_clock="no way"),
        "common_ntp_adjust_clock (on data1.airflow.example.com): the string 'no way' where a boolean is needed",
    ),
    "VIP that is a node's address": (
        lambda files: files.variables.update(cluster_vip="10.11.12.11"),
        "cluster_vip: 10.11.12.11 is the address of lb1.airflow.example.com",
    ),
    "duplicate address": (
        lambda files: files.host("worker2").update(ansible_host="10.11.12.12"),
        "lb2.airflow.example.com, worker2.airflow.example.com: share the address 10.11.12.12",
    ),
    "address that cannot be evaluated": (
        lambda files: files.host("worker1").update(node_address="{{ no_such_variable }}"),
        "worker1.airflow.example.com: node_address cannot be evaluated: ",
    ),
    "host without a rack": (
        lambda files: files.host("witness1").pop("rack"),
        "witness1.airflow.example.com: has no `rack`",
    ),
    "two ZooKeeper members": (
        lambda files: files.group("zookeeper").pop("witness1.airflow.example.com"),
        "zookeeper: 2 hosts, an ensemble has 1 or 3",
    ),
    "ansible-core": (
        lambda files: files.variables.update(preflight_ansible_core_min="9.0"),
        "ansible-core 2.",
    ),
}


@pytest.fixture(scope="module")
def refusal(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """One run over an inventory with everything wrong that can be wrong at the same time."""
    files = Files("production")
    for damage, _ in TOGETHER.values():
        damage(files)
    return play(tmp_path_factory.mktemp("bad"), files)


@pytest.mark.parametrize("case", TOGETHER)
def test_bad_inventory_gets_one_line(case: str, refusal: subprocess.CompletedProcess[str]) -> None:
    beginning = TOGETHER[case][1]
    lines = [line for line in findings(refusal.stdout) if line.startswith(beginning)]
    assert len(lines) == 1, refusal.stdout


def test_refusal_stops_everything_and_tells_no_secret(refusal: subprocess.CompletedProcess[str]) -> None:
    assert refusal.returncode != 0
    assert len(findings(refusal.stdout)) == len(TOGETHER), refusal.stdout
    assert "went-on" not in refusal.stdout
    assert "changed=0" in refusal.stdout
    assert "hunter2" not in refusal.stdout + refusal.stderr


STRING_ON_COMMAND_LINE = (
    "allow_same_rack: the string 'true' where a boolean is needed: write true or false without quotes,"
    " on the command line -e '{\"allow_same_rack\": false}'"
)
FOREIGN_CONFIGURATION = (
    "ansible.cfg: the project's own is not in use (see `precedence` in it), so that group_vars/all.yml would"
    " override the inventory; run ansible-playbook in the project's folder or set ANSIBLE_CONFIG"
)

ALONE: dict[str, tuple[Damage, list[str], dict[str, str], list[str]]] = {
    "unknown profile, with a limit": (
        lambda files: files.variables.update(cluster_profile="huge"),
        ["--limit=data1*"],
        {},
        ["cluster_profile: 'huge' where one of ha, single is needed"],
    ),
    "boolean as a string on the command line, VIP that is none": (
        lambda files: files.variables.update(cluster_vip="airflow"),
        ["--extra-vars=allow_same_rack=true"],
        {},
        [STRING_ON_COMMAND_LINE, "cluster_vip: 'airflow' is not an IP address"],
    ),
    "ansible.cfg of somebody else": (
        lambda files: None,
        [],
        {"ANSIBLE_PRECEDENCE": "all_inventory,all_plugins_inventory,all_plugins_play"},
        [FOREIGN_CONFIGURATION],
    ),
}


@pytest.mark.parametrize("case", ALONE)
def test_bad_input_that_needs_a_run_of_its_own(case: str, tmp_path: Path) -> None:
    damage, arguments, environment, expected = ALONE[case]
    files = Files("production")
    damage(files)
    result = play(tmp_path, files, *arguments, **environment)
    assert result.returncode != 0
    lines = findings(result.stdout)
    assert set(expected) <= set(lines), result.stdout


def test_same_rack_can_be_allowed_with_a_warning(tmp_path: Path) -> None:
    files = Files("production")
    files.host("airflow2")["rack"] = "a"
    files.variables["allow_same_rack"] = True
    result = play(tmp_path, files)
    assert result.returncode == 0, result.stdout
    assert "Warning: airflow_servers: airflow1.airflow.example.com" in result.stdout


@pytest.mark.parametrize("source", ["production", "single"])
def test_inventories_of_the_project_are_sound(source: str, tmp_path: Path) -> None:
    result = play(tmp_path, Files(source))
    assert result.returncode == 0, result.stdout
    assert "The inventory is sound." in result.stdout
    assert "went-on" in result.stdout
