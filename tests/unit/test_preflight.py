"""What preflight refuses, one row per case: the line must name the variable or the host."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
ROLE = PROJECT / "roles" / "preflight"


def load(path: Path) -> ModuleType:
    """Import a plugin by its path."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


preflight = load(ROLE / "filter_plugins" / "preflight.py")


def make_rules() -> dict[str, Any]:
    """The role's defaults and private variables, as the tasks pass them."""
    defaults = yaml.safe_load((ROLE / "defaults" / "main.yml").read_text())
    private = yaml.safe_load((ROLE / "vars" / "main.yml").read_text())
    private["_preflight_ports"]["http"]["port"] = 80
    return {name: (defaults | private)[str(value).strip("{} ")] for name, value in private["_preflight_rules"].items()}


RULES = make_rules()
OPTIONS = preflight.read_options(PROJECT / "roles")
SECRETS = list(yaml.safe_load((PROJECT / "files" / "secrets.template.yml").read_text()))
PORTS = yaml.safe_load((PROJECT / "group_vars" / "all.yml").read_text())["cluster_ports"]
FERNET_KEY = "bW9sZWN1bGUgZmVybmV0IGtleSBvZiAzMiBieXRlcyE="

# --- the inventory -----------------------------------------------------------------------------


class Inventory:
    """A sound inventory of nine hosts that each row damages in its own way."""

    def __init__(self) -> None:
        """Two racks and a witness, as in inventories/lab."""
        names = ["lb1", "lb2", "airflow1", "airflow2", "data1", "data2", "worker1", "worker2", "witness1"]
        self.hosts: dict[str, dict[str, Any]] = {
            name: {"rack": "abc"[(int(name[-1]) - 1) if name != "witness1" else 2], "node_address": f"10.0.0.{number}"}
            for number, name in enumerate(names, start=11)
        }
        self.groups: dict[str, list[str]] = {
            "loadbalancers": ["lb1", "lb2"],
            "airflow_servers": ["airflow1", "airflow2"],
            "airflow_workers": ["worker1", "worker2"],
            "postgresql": ["data1", "data2"],
            "redis": ["data1", "data2"],
            "zookeeper": ["data1", "data2", "witness1"],
            "spark_masters": ["airflow1", "airflow2"],
            "spark_workers": ["worker1", "worker2"],
            "backup": ["witness1"],
        }
        self.cluster: dict[str, Any] = {
            "cluster_profile": "ha",
            "cluster_vip": "10.0.0.100",
            "allow_same_rack": False,
            "cluster_ports": dict(PORTS),
            **{name: FERNET_KEY if name.endswith("_fernet_key") else "x" * 32 for name in SECRETS},
        }

    def single(self) -> None:
        """Make it the one-machine profile instead."""
        self.hosts = {"one": {"rack": "a", "node_address": "10.0.0.11"}}
        self.groups = {group: ["one"] for group in ("loadbalancers", "airflow_servers", "postgresql", "spark_masters")}
        self.cluster |= {"cluster_profile": "single", "cluster_vip": ""}
        for name in SECRETS:
            if name.startswith(("secret_redis_", "secret_airflow_flower_", "secret_backup_")):
                del self.cluster[name]

    def report(self) -> Any:
        """Let preflight look at it."""
        hosts = [preflight.Host(name, self.cluster | own) for name, own in self.hosts.items()]
        return preflight.check_inventory(
            hosts,
            self.groups,
            self.cluster,
            rules=RULES,
            secret_names=SECRETS,
            options=OPTIONS,
            environment="lab",
        )


def setting(**values: Any) -> Callable[[Inventory], None]:
    """Damage variables of the whole cluster."""
    return lambda inventory: inventory.cluster.update(values)


def host(name: str, **values: Any) -> Callable[[Inventory], None]:
    """Damage variables of one host."""
    return lambda inventory: inventory.hosts[name].update(values)


def group(name: str, *members: str) -> Callable[[Inventory], None]:
    """Replace a group's members."""
    return lambda inventory: inventory.groups.update({name: list(members)})


def without(name: str) -> Callable[[Inventory], None]:
    """Remove a variable of the whole cluster."""
    return lambda inventory: inventory.cluster.pop(name) and None


def all_of(*damages: Callable[[Inventory], None]) -> Callable[[Inventory], None]:
    """Damage in several ways."""

    def apply(inventory: Inventory) -> None:
        for damage in damages:
            damage(inventory)

    return apply


SINGLE = Inventory.single

BAD_INVENTORIES = {
    "airflow servers on one rack": (
        host("airflow2", rack="a"),
        ["airflow_servers: airflow1, airflow2 are all on rack 'a'; put them on different racks"],
    ),
    "data nodes on one rack": (
        host("data2", rack="a"),
        ["postgresql: data1, data2 are all on rack 'a'", "redis: data1, data2 are all on rack 'a'"],
    ),
    "load balancers on one rack": (host("lb1", rack="b"), ["loadbalancers: lb1, lb2 are all on rack 'b'"]),
    "three data nodes on one rack": (
        all_of(group("postgresql", "data1", "airflow1", "worker1"), group("zookeeper", "witness1")),
        ["postgresql: airflow1, data1, worker1 are all on rack 'a'"],
    ),
    "racks that YAML reads as numbers": (
        all_of(host("airflow1", rack=1), host("airflow2", rack="1")),
        ["airflow_servers: airflow1, airflow2 are all on rack '1'"],
    ),
    "missing secret": (
        without("secret_airflow_jwt_secret"),
        ["secret_airflow_jwt_secret: missing; run `make secrets ENV=lab`"],
    ),
    "empty secret": (setting(secret_redis_airflow_password=""), ["secret_redis_airflow_password: empty"]),
    "null secret": (setting(secret_redis_airflow_password=None), ["secret_redis_airflow_password: empty"]),
    "blank secret": (setting(secret_redis_airflow_password="  "), ["secret_redis_airflow_password: empty"]),
    "short secret": (setting(secret_spark_auth_secret="changeme"), ["secret_spark_auth_secret: shorter than 16"]),
    "number as secret": (setting(secret_spark_auth_secret=12345678901234567), ["secret_spark_auth_secret: not a str"]),
    "broken Fernet key": (setting(secret_airflow_fernet_key="x" * 44), ["secret_airflow_fernet_key: not a Fernet"]),
    "unreadable secret": (
        setting(secret_spark_auth_secret=preflight.Unreadable("Decryption failed")),
        ["secret_spark_auth_secret: cannot be read; is the vault password of inventories/lab the right one?"],
    ),
    "one PostgreSQL node": (
        group("postgresql", "data1"),
        ["postgresql: 1 data nodes, at least 2 needed with cluster_profile 'ha'"],
    ),
    "no Redis node": (group("redis"), ["redis: 0 data nodes, at least 2 needed"]),
    "one Airflow server": (group("airflow_servers", "airflow1"), ["airflow_servers: 1 hosts, at least 2 needed"]),
    "no worker": (group("airflow_workers"), ["airflow_workers: 0 hosts, at least 1 needed"]),
    "three load balancers": (
        group("loadbalancers", "lb1", "lb2", "witness1"),
        ["loadbalancers: 3 hosts, at most 2 allowed"],
    ),
    "boolean as a string": (
        setting(allow_same_rack="false"),
        ["allow_same_rack: the string 'false' where a boolean is needed"],
    ),
    "boolean of a role as a string, on one host": (
        host("data1", common_ntp_adjust_clock="yes"),
        ["common_ntp_adjust_clock (on data1): the string 'yes' where a boolean is needed"],
    ),
    "word as a number": (
        setting(preflight_memory_base_mb="much"),
        ["preflight_memory_base_mb: 'much' where a number (int) is needed"],
    ),
    "string as a list": (setting(common_ntp_pools="pool"), ["common_ntp_pools: 'pool' where a list is needed"]),
    "unknown item of a list": (
        setting(airflow_components=["scheduler", "webserver"]),
        ["airflow_components: 'webserver' where one of "],
    ),
    "list as a dictionary": (
        setting(cluster_ports=[443]),
        ["cluster_ports: '[443]' where a dictionary is needed"],
    ),
    "boolean as a rack": (
        host("witness1", rack=False),
        ["rack (on witness1): the boolean 'False' where a string is needed: write it in quotes"],
    ),
    "port that is none": (
        setting(cluster_ports=PORTS | {"redis": "6379"}),
        ["cluster_ports.redis: '6379' is not a port number"],
    ),
    "one port for two": (
        setting(cluster_ports=PORTS | {"flower": 8080}),
        ["cluster_ports.airflow_api, cluster_ports.flower: have the same port 8080"],
    ),
    "VIP that is a name": (
        setting(cluster_vip="airflow.example.com"),
        ["cluster_vip: 'airflow.example.com' is not an IP address"],
    ),
    "VIP with a prefix length": (setting(cluster_vip="10.0.0.100/24"), ["cluster_vip: '10.0.0.100/24' is not an"]),
    "VIP that is a node's": (setting(cluster_vip="10.0.0.12"), ["cluster_vip: 10.0.0.12 is the address of lb2"]),
    "duplicate address": (
        host("worker2", node_address="10.0.0.17"),
        ["worker1, worker2: share the address 10.0.0.17; every host needs its own"],
    ),
    "address that is a name": (
        host("worker2", node_address="worker2.example.com"),
        ["worker2: node_address 'worker2.example.com' is not an IP address"],
    ),
    "no rack": (host("witness1", rack=None), ["witness1: has no `rack`"]),
    "empty rack": (host("lb1", rack=""), ["lb1: has no `rack`"]),
    "unknown profile": (
        setting(cluster_profile="huge"),
        ["cluster_profile: 'huge' where one of ha, single is needed"],
    ),
    "Spark masters without ZooKeeper": (
        group("zookeeper"),
        ["zookeeper: empty, but 2 spark_masters need it to elect a leader"],
    ),
    "two ZooKeeper members": (group("zookeeper", "data1", "data2"), ["zookeeper: 2 hosts, an ensemble has 1 or 3"]),
    "backups beside what they back up": (
        group("backup", "data1"),
        ["backup: data1 is in postgresql too; keep backups on a machine that they do not back up"],
    ),
    "Spark workers without a master": (
        group("spark_masters"),
        ["spark_masters: empty, but spark_workers has hosts"],
    ),
    "upstream that is no member": (
        host("data2", postgresql_upstream="lb1"),
        ["data2: postgresql_upstream 'lb1' is not a member of postgresql (data1, data2)"],
    ),
    "standbys in a circle": (
        all_of(host("data1", postgresql_upstream="data2"), host("data2", postgresql_upstream="data1")),
        [
            "data1: postgresql_upstream 'data2' makes a circle: data1 from data2 from data1",
            "data2: postgresql_upstream 'data1' makes a circle: data2 from data1 from data2",
        ],
    ),
    "standby of itself": (
        host("data2", postgresql_upstream="data2"),
        ["data2: postgresql_upstream 'data2' makes a circle: data2 from data2"],
    ),
    "standby of a warm one": (
        all_of(host("data2", postgresql_upstream="data1"), host("data1", postgresql_hot_standby=False)),
        ["data2: postgresql_upstream 'data1' is a warm standby (postgresql_hot_standby)"],
    ),
    "unknown synchronous mode": (
        setting(postgresql_synchronous_mode="maybe"),
        ["postgresql_synchronous_mode: 'maybe' where one of off, on, remote_apply"],
    ),
    "single with Redis": (
        all_of(
            SINGLE,
            group("redis", "one"),
            setting(**{name: "x" * 32 for name in SECRETS if name.startswith("secret_redis_")}),
        ),
        ["redis: 1 data nodes, must be empty with cluster_profile 'single'"],
    ),
}


@pytest.mark.parametrize("case", BAD_INVENTORIES)
def test_bad_inventory_gets_its_lines_and_no_others(case: str) -> None:
    damage, expected = BAD_INVENTORIES[case]
    inventory = Inventory()
    damage(inventory)
    errors = inventory.report().errors
    assert len(errors) == len(expected), errors
    for line, beginning in zip(sorted(errors), sorted(expected), strict=True):
        assert line.startswith(beginning)
        assert "\n" not in line


GOOD_INVENTORIES: dict[str, Callable[[Inventory], None]] = {
    "high availability": lambda _: None,
    "single": SINGLE,
    "one Spark master without ZooKeeper": all_of(group("spark_masters", "airflow1"), group("zookeeper")),
    "no Spark, and none of its secrets": all_of(
        group("spark_masters"), group("spark_workers"), group("zookeeper"), without("secret_spark_auth_secret")
    ),
    "no backups, and none of their secrets": all_of(
        group("backup"), without("secret_backup_cipher_pass"), without("secret_backup_redis_password")
    ),
    "no VIP": all_of(setting(cluster_vip=""), group("loadbalancers", "lb1")),
    "IPv6": host("worker1", node_address="fd00::11"),
    "a list of known items": setting(airflow_components=["scheduler"]),
    "numbers as racks": all_of(host("airflow1", rack=1), host("airflow2", rack=2)),
    "three data nodes on two racks": group("postgresql", "data1", "data2", "worker1"),
    "a standby of a standby": all_of(
        group("postgresql", "data1", "data2", "worker1"), host("worker1", postgresql_upstream="data2")
    ),
    "synchronous without quotes": setting(postgresql_synchronous_mode=True),
}


@pytest.mark.parametrize("case", GOOD_INVENTORIES)
def test_good_inventory_passes(case: str) -> None:
    inventory = Inventory()
    GOOD_INVENTORIES[case](inventory)
    report = inventory.report()
    assert (report.errors, report.warnings) == ([], [])


def test_allow_same_rack_leaves_a_warning() -> None:
    inventory = Inventory()
    all_of(host("airflow2", rack="a"), setting(allow_same_rack=True))(inventory)
    report = inventory.report()
    assert report.errors == []
    assert report.warnings == [
        "Warning: airflow_servers: airflow1, airflow2 are all on rack 'a' (allow_same_rack is true)"
    ]


def test_two_load_balancers_without_a_vip_leave_a_warning() -> None:
    inventory = Inventory()
    inventory.cluster["cluster_vip"] = ""
    assert [line.split(": ")[1] for line in inventory.report().warnings] == ["cluster_vip"]


def test_no_secrets_at_all_is_one_line() -> None:
    inventory = Inventory()
    for name in SECRETS:
        del inventory.cluster[name]
    (line,) = inventory.report().errors
    assert line.startswith("secret_airflow_admin_password, ")
    assert line.endswith(f"and {len(SECRETS) - 5} more: missing, as are all secrets; run `make secrets ENV=lab`")


def test_all_findings_are_reported_at_once() -> None:
    inventory = Inventory()
    all_of(host("airflow2", rack="a"), setting(cluster_vip="x"), without("secret_airflow_jwt_secret"))(inventory)
    assert len(inventory.report().errors) == 3


def test_no_line_contains_a_secret() -> None:
    inventory = Inventory()
    for name in SECRETS:
        inventory.cluster[name] = "hunter2"
    assert "hunter2" not in "\n".join(inventory.report().errors)


GOOD_PRECEDENCE = ["all_plugins_play", "groups_plugins_play", "all_plugins_inventory"]


@pytest.mark.parametrize(
    ("ansible_core", "precedence", "beginning"),
    [
        ("2.19.14", GOOD_PRECEDENCE, ""),
        ("2.17.0", GOOD_PRECEDENCE, ""),
        (f"{RULES['ansible_core_max']}.99", GOOD_PRECEDENCE, ""),
        ("2.16.14", GOOD_PRECEDENCE, "ansible-core 2.16.14: too old, 2.17 or newer"),
        ("2.99.0rc1", GOOD_PRECEDENCE, "ansible-core 2.99.0rc1: newer than"),
        ("2.19.14", ["all_plugins_inventory", "all_plugins_play"], "ansible.cfg: the project's own is not in use"),
    ],
)
def test_controller(ansible_core: str, precedence: list[str], beginning: str) -> None:
    lines = preflight.controller_findings(ansible_core, precedence, RULES)
    assert len(lines) == (1 if beginning else 0)
    assert "".join(lines).startswith(beginning)


# --- the machines ------------------------------------------------------------------------------

OUTPUT = [
    "python 3.13.5",
    "os debian 13",
    "memory_kb 8000000",
    "disk /opt 20000000 /",
    "disk /var 20000000 /var",
    "sockets yes",
    'listen 0.0.0.0:22 users:(("sshd",pid=74,fd=6))',
]
GROUPS = {"postgresql": ["n1"], "redis": ["n1"], "airflow_workers": ["n2"]}
OURS = ['listen [::]:5432 users:(("postgres",pid=80,fd=6))', "unit 80 postgresql@17-main.service"]


def machine(*lines: str, groups: tuple[str, ...] = ("postgresql", "redis"), **result: Any) -> Any:
    """A machine whose probe said OUTPUT, where a line of the same kind in `lines` replaces it (`-kind` removes it)."""
    kinds = {line.split()[0].lstrip("-") for line in lines} - {"listen", "unit"}
    output = [line for line in OUTPUT if line.split()[0] not in kinds] + [ln for ln in lines if ln[0] != "-"]
    return preflight.parse_probe(
        "n1", groups, {"problem": "", "reason": "", "offset": [-0.1, 0.1], "output": output} | result, PORTS
    )


BAD_MACHINES = {
    "unreachable": (
        machine(problem="unreachable", reason="Warning: x\nssh: connect to host n1 port 22: No route to host\r\n"),
        ["n1: unreachable: ssh: connect to host n1 port 22: No route to host"],
    ),
    "unreachable, in Ansible's words": (
        machine(problem="unreachable", reason="Data could not be sent. Make sure … over ssh: ssh: no\r\n"),
        ["n1: unreachable: ssh: no"],
    ),
    "no sudo": (
        machine(problem="failed", reason="Missing sudo password"),
        ["n1: cannot run commands as root: Missing sudo password"],
    ),
    "other distribution": (
        machine("os fedora 44"),
        ["n1: operating system fedora 44 is not supported; debian 12/13"],
    ),
    "old release": (machine("os debian 11"), ["n1: operating system debian 11 is not supported"]),
    "no release": (machine("os debian unknown"), ["n1: operating system debian unknown is not supported"]),
    "no Python": (machine("python "), ["n1: no Python 3"]),
    "old Python": (machine("python 3.9.2"), ["n1: Python 3.9.2 is too old, 3.11 or newer is needed"]),
    "clock ahead": (machine(offset=[2.5, 3.0]), ["n1: the clock is at least 2.5 s ahead of the controller's"]),
    "clock behind": (machine(offset=[-4.0, -3.5]), ["n1: the clock is at least 3.5 s behind the controller's"]),
    "memory": (machine("memory_kb 1000000"), ["n1: 976 MiB of memory, 1088 needed for postgresql, redis"]),
    "disk": (
        machine("disk /var 5000000 /var"),
        ["n1: 4882 MiB free for /var on /var, 5120 needed (preflight_disk_mb)"],
    ),
    "disk of a deployed machine": (
        machine("disk /var 100000 /var", "deployed yes"),
        ["n1: 97 MiB free for /var on /var, 256 needed (preflight_disk_reserve_mb)"],
    ),
    "port taken by a program": (
        machine('listen *:6379 users:(("nc",pid=9,fd=3))', "unit 9 session-3.scope"),
        ["n1: port 6379 (redis) is taken by nc; stop it or change cluster_ports.redis"],
    ),
    "port taken on loopback by another unit": (
        machine('listen 127.0.0.1:5432 users:(("pgbouncer",pid=9,fd=3))', "unit 9 pgbouncer.service"),
        ["n1: port 5432 (postgresql) is taken by pgbouncer"],
    ),
    "port taken by nobody visible": (
        machine("listen 0.0.0.0:5432 "),
        ["n1: port 5432 (postgresql) is taken by a p"],
    ),
    "two programs with blanks in their names": (
        machine('listen 0.0.0.0:5432 users:(("my db: a",pid=8,fd=1),("my db: b",pid=9,fd=1))'),
        ["n1: port 5432 (postgresql) is taken by my db: a, my db: b"],
    ),
    "port of a role's own variable": (
        machine('listen *:80 users:(("apache2",pid=9,fd=3))', "unit 9 apache2.service", groups=("loadbalancers",)),
        ["n1: port 80 (http) is taken by apache2; stop it or change haproxy_redirect_port"],
    ),
    "no ss": (machine("-sockets"), ["n1: `ss` is missing"]),
}


@pytest.mark.parametrize("case", BAD_MACHINES)
def test_bad_machine_gets_its_lines_and_no_others(case: str) -> None:
    bad, expected = BAD_MACHINES[case]
    lines = preflight.check_machine(bad, GROUPS, RULES)
    assert len(lines) == len(expected), lines
    for line, beginning in zip(lines, expected, strict=True):
        assert line.startswith(beginning)
        assert "\n" not in line


GOOD_MACHINES = {
    "bare": machine(),
    "Debian 12": machine("os debian 12", "python 3.11.2"),
    "deployed, with our own services listening": machine(*OURS, "deployed yes", "disk /var 5000000 /var"),
    "a port of another group is taken": machine('listen *:8080 users:(("nc",pid=9,fd=3))'),
    "a slow connection hides the clock": machine(offset=[-30.0, 0.5]),
    "clock just inside": machine(offset=[1.9, 2.1]),
    "local Redis proxy where there is Redis": machine(
        'listen 127.0.0.1:16379 users:(("haproxy",pid=7,fd=3))', "unit 7 haproxy.service", groups=("airflow_workers",)
    ),
}


@pytest.mark.parametrize("case", GOOD_MACHINES)
def test_good_machine_passes(case: str) -> None:
    assert preflight.check_machine(GOOD_MACHINES[case], GROUPS, RULES) == []


def test_needs_of_folders_on_one_file_system_add_up() -> None:
    small = machine("disk /opt 3000000 /", "disk /var 3000000 /", groups=("airflow_workers",))
    assert preflight.check_machine(small, GROUPS, RULES) == [
        "n1: 2929 MiB free for /opt, /var on /, 4096 needed (preflight_disk_mb)"
    ]


def test_every_port_of_the_cluster_has_an_owner() -> None:
    assert {name for name, rule in RULES["ports"].items() if "port" not in rule} == PORTS.keys()


def test_unreadable_variables_do_not_stop_the_others() -> None:
    from ansible.errors import AnsibleError

    class Variables(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            if name == "broken":
                raise AnsibleError("'ansible_facts' is undefined")
            return super().__getitem__(name)

    values = preflight.read_variables(Variables(broken=1, sound=[{"a": (1, 2)}]), ["broken", "sound", "unset"])
    assert values["sound"] == [{"a": [1, 2]}]
    assert isinstance(values["broken"], preflight.Unreadable)
    assert "unset" not in values
