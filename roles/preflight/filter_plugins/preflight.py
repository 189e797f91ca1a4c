"""What preflight refuses, as pure functions from an inventory or from what the machines said to lines of text.

Every line begins with the variable or the host it is about, and says what to do. The functions know nothing of
Ansible; those at the end of the file hand Ansible's data to them.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import ipaddress
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ansible.errors import AnsibleError
from jinja2 import TemplateError, Undefined, UndefinedError

Groups = Mapping[str, Sequence[str]]
Rules = Mapping[str, Any]
SHORTEST_SECRET = 16


# --- the inventory -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """Type and choices of one variable, as its role's argument_specs has them."""

    type: str
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Host:
    """What the inventory says about one host: the values of its variables, and the groups it is in."""

    name: str
    variables: Mapping[str, Any]
    groups: frozenset[str] = frozenset()


@dataclass
class Report:
    """Findings that stop the play, and those that only warn."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class Unreadable(str):
    """A variable's value that could not be evaluated; the text is the reason."""


def is_address(value: object) -> bool:
    """True for an IPv4 or IPv6 address without a prefix length."""
    try:
        ipaddress.ip_address(str(value))
    except ValueError:
        return False
    return True


def shown(value: object) -> str:
    """A value in a message: short, on one line."""
    text = " ".join(str(value).split())
    return f"'{text}'" if len(text) <= 60 else f"'{text[:57]}…'"


def listed(names: Iterable[str]) -> str:
    """Names in a message; only the first few of many."""
    all_names = sorted(names)
    rest = f" and {len(all_names) - 5} more" if len(all_names) > 5 else ""
    return ", ".join(all_names[:5]) + rest


def wrong_type(value: object, option: Option) -> str:
    """Why the value is not what the option wants, or an empty string."""
    if value is None or isinstance(value, Unreadable):
        return ""
    if option.type == "bool" and not isinstance(value, bool):
        if isinstance(value, str):
            return (
                f"the string {shown(value)} where a boolean is needed: write true or false without quotes,"
                " on the command line -e '{\"name\": false}'"
            )
        return f"{shown(value)} where a boolean is needed"
    if option.type in ("int", "float"):
        number = int if option.type == "int" else float
        try:
            number("" if isinstance(value, bool) else str(value))
        except ValueError:
            return f"{shown(value)} where a number ({option.type}) is needed"
    if option.type == "list" and (isinstance(value, (str, Mapping)) or not isinstance(value, Sequence)):
        return f"{shown(value)} where a list is needed"
    if option.type == "dict" and not isinstance(value, Mapping):
        return f"{shown(value)} where a dictionary is needed"
    if option.type in ("str", "path"):
        if isinstance(value, bool):
            return f"the boolean {shown(value)} where a string is needed: write it in quotes"
        if isinstance(value, (list, Mapping)):
            return f"{shown(value)} where a string is needed"
    for item in value if isinstance(value, list) else [value]:
        if option.choices and item not in option.choices:
            return f"{shown(item)} where one of {', '.join(map(str, option.choices))} is needed"
    return ""


def type_findings(hosts: Sequence[Host], options: Mapping[str, Option]) -> list[str]:
    """Variables of a wrong type; one line for all hosts that share the mistake."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for host in hosts:
        for name in options.keys() & host.variables.keys():
            if problem := wrong_type(host.variables[name], options[name]):
                found[name, problem.replace('"name"', f'"{name}"')].append(host.name)
    lines = []
    for (name, problem), names in sorted(found.items()):
        where = "" if len(names) == len(hosts) else f" (on {listed(names)})"
        lines.append(f"{name}{where}: {problem}")
    return lines


def version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version, comparable."""
    match = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()


def controller_findings(ansible_core: str, precedence: Sequence[str], rules: Rules) -> list[str]:
    """What is wrong with the Ansible that runs this."""
    lines = []
    oldest, newest = str(rules["ansible_core_min"]), str(rules["ansible_core_max"])
    if version(ansible_core) < version(oldest):
        lines.append(f"ansible-core {ansible_core}: too old, {oldest} or newer is needed on the controller")
    elif version(ansible_core)[:2] > version(newest)[:2]:
        lines.append(
            f"ansible-core {ansible_core}: newer than {newest}, the last one these roles were tried with;"
            " raise preflight_ansible_core_max to use it"
        )
    order = list(precedence)
    if order.index("all_plugins_play") > order.index("all_plugins_inventory"):
        lines.append(
            "ansible.cfg: the project's own is not in use (see `precedence` in it), so that group_vars/all.yml would"
            " override the inventory; run ansible-playbook in the project's folder or set ANSIBLE_CONFIG"
        )
    return lines


def host_findings(hosts: Sequence[Host]) -> list[str]:
    """Hosts without a rack, or whose address is none or another's."""
    lines = []
    owners: dict[str, list[str]] = defaultdict(list)
    for host in hosts:
        if host.variables.get("rack") in (None, ""):
            lines.append(f"{host.name}: has no `rack`; every host needs one")
        address = host.variables.get("node_address")
        if isinstance(address, Unreadable):
            lines.append(f"{host.name}: node_address cannot be evaluated: {address}")
        elif not is_address(address):
            lines.append(f"{host.name}: node_address {shown(address)} is not an IP address; set ansible_host to one")
        else:
            owners[str(ipaddress.ip_address(str(address)))].append(host.name)
    lines += [
        f"{listed(names)}: share the address {address}; every host needs its own"
        for address, names in sorted(owners.items())
        if len(names) > 1
    ]
    return lines


def vip_findings(vip: object, hosts: Sequence[Host]) -> list[str]:
    """A virtual address that is none, or that a node has already."""
    if vip in (None, ""):
        return []
    if isinstance(vip, Unreadable):
        return [f"cluster_vip: cannot be evaluated: {vip}"]
    if not is_address(vip):
        return [f"cluster_vip: {shown(vip)} is not an IP address"]
    return [
        f"cluster_vip: {vip} is the address of {host.name}; it must be an address no node has"
        for host in hosts
        if str(host.variables.get("node_address")) == str(vip)
    ]


def size_findings(groups: Groups, profile: str, rules: Rules) -> list[str]:
    """Groups with too few or too many hosts for the profile."""
    lines = []
    for group, (least, most) in rules["group_sizes"].get(profile, {}).items():
        count = len(groups.get(group, ()))
        data = " data nodes" if group in ("postgresql", "redis") else " hosts"
        if count < least:
            lines.append(f"{group}: {count}{data}, at least {least} needed with cluster_profile '{profile}'")
        elif most is not None and count > most:
            many = "must be empty" if most == 0 else f"at most {most} allowed"
            lines.append(f"{group}: {count}{data}, {many} with cluster_profile '{profile}'")
    masters, keepers = len(groups.get("spark_masters", ())), len(groups.get("zookeeper", ()))
    if keepers not in (0, 1, 3):
        lines.append(f"zookeeper: {keepers} hosts, an ensemble has 1 or 3")
    if masters > 1 and keepers == 0:
        lines.append(f"zookeeper: empty, but {masters} spark_masters need it to elect a leader")
    if groups.get("spark_workers") and masters == 0:
        lines.append("spark_masters: empty, but spark_workers has hosts")
    if both := set(groups.get("backup", ())) & set(groups.get("postgresql", ())):
        lines.append(f"backup: {listed(both)} is in postgresql too; keep backups on a machine that they do not back up")
    return lines


def rack_findings(hosts: Sequence[Host], groups: Groups, rules: Rules) -> list[str]:
    """Redundant groups that one rack would take down."""
    racks = {host.name: host.variables.get("rack") for host in hosts}
    lines = []
    for group in rules["redundant_groups"]:
        members = groups.get(group, ())
        used = {str(racks.get(name)) for name in members}
        known = all(racks.get(name) not in (None, "") for name in members)
        if known and len(members) > 1 and len(used) == 1:
            lines.append(
                f"{group}: {listed(members)} are all on rack {shown(*used)}; put them on different racks"
                " or set allow_same_rack: true"
            )
    return lines


def upstream_findings(hosts: Sequence[Host], groups: Groups) -> list[str]:
    """Standbys that would stream from nobody, from themselves in a circle, or from one that takes no connections."""
    members = groups.get("postgresql", ())
    variables = {host.name: host.variables for host in hosts if host.name in members}
    upstreams = {name: str(values.get("postgresql_upstream") or "") for name, values in variables.items()}
    lines = []
    for name, upstream in upstreams.items():
        where = f"{name}: postgresql_upstream {shown(upstream)}"
        path = [name]
        while upstreams.get(path[-1]) and upstreams[path[-1]] not in path:
            path.append(upstreams[path[-1]])
        if upstream and upstream not in members:
            lines.append(f"{where} is not a member of postgresql ({listed(members)})")
        elif upstreams.get(path[-1]) == name:
            lines.append(f"{where} makes a circle: {' from '.join([*path, name])}")
        elif upstream and variables[upstream].get("postgresql_hot_standby") is False:
            lines.append(f"{where} is a warm standby (postgresql_hot_standby), from which nobody can stream")
    return lines


def fernet_key_is_valid(value: str) -> bool:
    """True for 32 bytes in URL-safe base64."""
    try:
        return len(base64.urlsafe_b64decode(value.encode())) == 32
    except (binascii.Error, ValueError):
        return False


def secret_findings(
    variables: Mapping[str, Any], names: Iterable[str], groups: Groups, rules: Rules, environment: str
) -> list[str]:
    """Secrets that are missing, empty or no use. Never says what a secret is."""
    make = f"run `make secrets ENV={environment}`"
    idle = tuple(prefix for prefix, group in rules["secret_groups"].items() if not groups.get(group))
    needed = [name for name in names if not name.startswith(idle)]
    if needed and not any(name in variables for name in needed):
        return [f"{listed(needed)}: missing, as are all secrets; {make}"]
    lines = []
    for name in needed:
        value = variables.get(name)
        if name not in variables:
            lines.append(f"{name}: missing; {make}")
        elif isinstance(value, Unreadable):
            lines.append(f"{name}: cannot be read; is the vault password of inventories/{environment} the right one?")
        elif not isinstance(value, str):
            problem = "empty" if value is None else "not a string"
            lines.append(f"{name}: {problem}; {make}" if value is None else f"{name}: {problem}; write it in quotes")
        elif not value.strip():
            lines.append(f"{name}: empty; {make}")
        elif name.endswith("_fernet_key") and not fernet_key_is_valid(value):
            lines.append(f"{name}: not a Fernet key (32 bytes in URL-safe base64); remove it and {make}")
        elif len(value) < SHORTEST_SECRET:
            lines.append(f"{name}: shorter than {SHORTEST_SECRET} characters; remove it and {make}")
    return lines


def port_number_findings(ports: object) -> list[str]:
    """Entries of cluster_ports that are no port, or the same port twice."""
    if not isinstance(ports, Mapping):
        return []
    lines = []
    for name, port in ports.items():
        if isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536:
            lines.append(f"cluster_ports.{name}: {shown(port)} is not a port number")
    for port, times in Counter(map(str, ports.values())).items():
        if times > 1:
            names = listed(f"cluster_ports.{name}" for name, value in ports.items() if str(value) == port)
            lines.append(f"{names}: have the same port {port}")
    return lines


def check_inventory(
    hosts: Sequence[Host],
    groups: Groups,
    cluster: Mapping[str, Any],
    *,
    rules: Rules,
    secret_names: Iterable[str],
    options: Mapping[str, Option],
    environment: str,
) -> Report:
    """Everything that can be known from the inventory alone; `cluster` has the variables all hosts share."""
    report = Report()
    profile = cluster.get("cluster_profile")
    report.errors += type_findings(hosts, options)
    report.errors += host_findings(hosts)
    report.errors += vip_findings(cluster.get("cluster_vip"), hosts)
    report.errors += port_number_findings(cluster.get("cluster_ports"))
    report.errors += upstream_findings(hosts, groups)
    report.errors += size_findings(groups, str(profile), rules)
    report.errors += secret_findings(cluster, secret_names, groups, rules, environment)
    same_rack = rack_findings(hosts, groups, rules)
    if cluster.get("allow_same_rack") is True:
        report.warnings += [f"Warning: {line.split(';')[0]} (allow_same_rack is true)" for line in same_rack]
    else:
        report.errors += same_rack
    if len(groups.get("loadbalancers", ())) > 1 and not cluster.get("cluster_vip"):
        report.warnings.append(
            "Warning: cluster_vip: empty, so users must be sent to both loadbalancers by other means"
        )
    return report


# --- the machines ------------------------------------------------------------------------------


@dataclass
class Machine:
    """What the probe found on one machine."""

    name: str
    groups: frozenset[str] = frozenset()
    problem: str = ""  # "", "unreachable" or "failed"
    reason: str = ""
    offset: tuple[float, float] = (0.0, 0.0)  # the node's clock minus the controller's, somewhere in here
    python: str = ""
    os: tuple[str, str] = ("", "")
    memory_mb: int = 0
    deployed: bool = False
    disks: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # folder: (free MiB, mount point)
    listeners: Sequence[tuple[int, str, str]] = ()  # port, process, systemd unit
    sockets_seen: bool = False
    ports: Mapping[str, int] = field(default_factory=dict)


def parse_listener(address: str, processes: str, units: Mapping[str, str]) -> list[tuple[int, str, str]]:
    """The listeners of one line of `ss`: its port with each process, or without any that is visible."""
    port = address.rpartition(":")[2]
    if not port.isdigit():
        return []
    owners = re.findall(r'"([^"]*)",pid=(\d+)', processes) or [("", "")]
    return [(int(port), name, units.get(pid, "")) for name, pid in owners]


def parse_probe(name: str, groups: Iterable[str], result: Mapping[str, Any], ports: Mapping[str, int]) -> Machine:
    """Read the result of the action plugin for one machine."""
    machine = Machine(name, frozenset(groups), ports=ports)
    machine.problem, machine.reason = str(result.get("problem", "failed")), str(result.get("reason", ""))
    if machine.problem:
        return machine
    low, high = result["offset"]
    machine.offset = (float(low), float(high))
    disks: dict[str, tuple[int, str]] = {}
    sockets: list[tuple[str, str]] = []
    units: dict[str, str] = {}
    for line in result["output"]:
        key, _, rest = str(line).partition(" ")
        words = rest.split()
        if key == "python":
            machine.python = rest.strip()
        elif key == "os" and len(words) == 2:
            machine.os = (words[0], words[1])
        elif key == "memory_kb":
            machine.memory_mb = int(rest) // 1024
        elif key == "deployed":
            machine.deployed = True
        elif key == "disk" and len(words) == 3:
            disks[words[0]] = (int(words[1]) // 1024, words[2])
        elif key == "sockets":
            machine.sockets_seen = True
        elif key == "listen":
            sockets.append((words[0], " ".join(words[1:])))
        elif key == "unit" and len(words) == 2:
            units[words[0]] = words[1]
    machine.disks = disks
    machine.listeners = [row for address, text in sockets for row in parse_listener(address, text, units)]
    return machine


def last_line(text: str) -> str:
    """The last line that says something: where ssh and sudo put their reason."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^.*(over|via) ssh: ", "", lines[-1]) if lines else "no reason given"


def clock_findings(machine: Machine, rules: Rules) -> list[str]:
    """A clock that is certainly further off than allowed, whatever the connection took."""
    low, high = machine.offset
    tolerance = float(rules["clock_tolerance_s"])
    if low <= tolerance and high >= -tolerance:
        return []
    off = f"at least {low:.1f} s ahead of" if low > tolerance else f"at least {-high:.1f} s behind"
    allowed = f"{tolerance:g} s allowed, preflight_clock_tolerance_s"
    return [f"{machine.name}: the clock is {off} the controller's ({allowed}); synchronise both"]


def system_findings(machine: Machine, rules: Rules) -> list[str]:
    """A distribution, release or Python that is not supported."""
    lines = []
    distribution, release = machine.os
    supported = {name: [str(item) for item in releases] for name, releases in rules["supported_os"].items()}
    if release not in supported.get(distribution, []):
        wanted = ", ".join(f"{name} {'/'.join(releases)}" for name, releases in supported.items())
        lines.append(f"{machine.name}: operating system {distribution} {release} is not supported; {wanted} is")
    oldest = str(rules["python_min"])
    if not machine.python:
        lines.append(f"{machine.name}: no Python 3 at ansible_python_interpreter; install python3")
    elif version(machine.python) < version(oldest):
        lines.append(f"{machine.name}: Python {machine.python} is too old, {oldest} or newer is needed")
    return lines


def memory_findings(machine: Machine, rules: Rules) -> list[str]:
    """Less memory than the host's groups need together."""
    needs = {group: int(rules["memory_mb"][group]) for group in sorted(machine.groups & rules["memory_mb"].keys())}
    needed = int(rules["memory_base_mb"]) + sum(needs.values())
    if machine.memory_mb >= needed:
        return []
    purpose = ", ".join(needs) or "the operating system"
    return [f"{machine.name}: {machine.memory_mb} MiB of memory, {needed} needed for {purpose} (preflight_memory_mb)"]


def disk_findings(machine: Machine, rules: Rules) -> list[str]:
    """Less free space than the host's groups need together on a file system."""
    needed: dict[str, int] = defaultdict(int)
    folders: dict[str, set[str]] = defaultdict(set)
    free: dict[str, int] = {}
    for group in machine.groups & rules["disk_mb"].keys():
        for folder, size in rules["disk_mb"][group].items():
            if folder not in machine.disks:
                continue
            free_mb, mount = machine.disks[folder]
            free[mount] = free_mb
            folders[mount].add(folder)
            needed[mount] += int(size)
    if machine.deployed:
        needed = defaultdict(int, dict.fromkeys(needed, int(rules["disk_reserve_mb"])))
    name = "preflight_disk_reserve_mb" if machine.deployed else "preflight_disk_mb"
    return [
        f"{machine.name}: {free[mount]} MiB free for {', '.join(sorted(folders[mount]))} on {mount},"
        f" {needed[mount]} needed ({name})"
        for mount in sorted(needed)
        if free[mount] < needed[mount]
    ]


def port_findings(machine: Machine, groups: Groups, rules: Rules) -> list[str]:
    """Ports of the host's groups on which something listens that is not the cluster's own."""
    if not machine.sockets_seen:
        return [f"{machine.name}: `ss` is missing, so taken ports cannot be seen; install iproute2"]
    lines = []
    for purpose, rule in rules["ports"].items():
        wanted = machine.groups & set(rule["groups"])
        companion = rule.get("unless_empty")
        if not wanted or (companion and not groups.get(companion)):
            continue
        variable = rule.get("variable", f"cluster_ports.{purpose}")
        port = int(rule["port"] if "port" in rule else machine.ports.get(purpose, 0))
        strangers = {
            process or "a process that is not visible"
            for listening, process, unit in machine.listeners
            if listening == port
            and not any(fnmatch.fnmatchcase(name, pattern) for name in (unit, process) for pattern in rule["owners"])
        }
        if strangers:
            lines.append(
                f"{machine.name}: port {port} ({purpose}) is taken by {listed(strangers)}; stop it or change {variable}"
            )
    return lines


def check_machine(machine: Machine, groups: Groups, rules: Rules) -> list[str]:
    """Everything that stands in the way on one machine."""
    if machine.problem == "unreachable":
        return [f"{machine.name}: unreachable: {last_line(machine.reason)}"]
    if machine.problem:
        return [f"{machine.name}: cannot run commands as root: {last_line(machine.reason)}"]
    return [
        *system_findings(machine, rules),
        *clock_findings(machine, rules),
        *memory_findings(machine, rules),
        *disk_findings(machine, rules),
        *port_findings(machine, groups, rules),
    ]


# --- the way from and to Ansible ---------------------------------------------------------------


def read_options(roles: Path) -> dict[str, Option]:
    """Every variable that some role's argument_specs describes."""
    options: dict[str, Option] = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted(roles.glob("*/meta/argument_specs.yml")):
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=loader) or {}
        for entry in document.get("argument_specs", {}).values():
            for name, spec in (entry.get("options") or {}).items():
                options[name] = Option(str(spec.get("type", "str")), tuple(spec.get("choices", ())))
    return options


def plain(value: Any) -> Any:
    """The value with its containers copied, so that every template in it has been evaluated."""
    if isinstance(value, Undefined):
        raise UndefinedError(getattr(value, "_undefined_message", None) or "something in it is undefined")
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def read_variables(variables: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The values of those names that are set. A value that needs facts or is broken becomes Unreadable."""
    values: dict[str, Any] = {}
    for name in names:
        if name not in variables:
            continue
        try:
            values[name] = plain(variables[name])
        except (AnsibleError, TemplateError, KeyError) as error:
            values[name] = Unreadable(" ".join(str(error).split())[:120])
    return values


def _groups_of(host: str, groups: Groups) -> frozenset[str]:
    return frozenset(group for group, members in groups.items() if host in members)


def preflight_inventory(
    hostvars: Mapping[str, Mapping[str, Any]],
    groups: Groups,
    first: str,
    rules: Rules,
    secret_names: Sequence[str],
    roles: str,
    ansible_core: str,
    precedence: Sequence[str],
) -> dict[str, list[str]]:
    """Filter: errors and warnings about the whole inventory; `first` is a host whose shared variables count."""
    options = read_options(Path(roles))
    members = {group: list(names) for group, names in groups.items()}
    names = [name for name in members.get("all", []) if name != "localhost"]
    hosts = [Host(name, read_variables(hostvars[name], options), _groups_of(name, members)) for name in names]
    cluster = read_variables(hostvars[first], [*options, *secret_names])
    environment = Path(str(hostvars[first]["inventory_dir"] or "lab")).name
    report = check_inventory(
        hosts, members, cluster, rules=rules, secret_names=secret_names, options=options, environment=environment
    )
    return {
        "errors": controller_findings(ansible_core, precedence, rules) + report.errors,
        "warnings": report.warnings,
    }


def preflight_machines(
    hostvars: Mapping[str, Mapping[str, Any]], names: Sequence[str], groups: Groups, rules: Rules
) -> list[str]:
    """Filter: findings about the machines that the action plugin has looked at."""
    members = {group: list(hosts) for group, hosts in groups.items()}
    lines: list[str] = []
    for name in names:
        result = hostvars[name]["__preflight_probe"]
        machine = parse_probe(name, _groups_of(name, members), result, dict(hostvars[name]["cluster_ports"]))
        lines += check_machine(machine, members, rules)
    return lines


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., Any]]:
        """The filters of this file by name."""
        return {"preflight_inventory": preflight_inventory, "preflight_machines": preflight_machines}
