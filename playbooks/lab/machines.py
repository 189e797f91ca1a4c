#!/usr/bin/env python3
"""The lab's machines: podman containers that run systemd and are reached over real SSH.

    machines.py image <debian-12|debian-13>   build the machine image, unless it exists
    machines.py up      < spec.json           create what is missing, start what is stopped
    machines.py down    < spec.json           remove these machines, and the lab with its last one
    machines.py destroy                       remove every lab of this checkout, images included
    machines.py podman <arguments>            podman on the lab's own storage

`spec.json` is `{"lab": str, "subnet": "10.77.1", "machines": [{"name", "address", "image", "volumes"}]}`.

Everything lives below `.lab/` of this checkout: podman gets a storage and a network
configuration of its own there, so containers, images and networks of the machine's owner are
never seen, let alone touched. Run as root or with sudo.

Two kinds of host need help, both detected: where cgroups are mounted in the hybrid v1/v2 way,
podman runs inside a private mount namespace with a plain cgroup2 mount; and without
CAP_SYS_RESOURCE, limits are passed as they are, because they cannot be raised.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
LAB = PROJECT / ".lab"
# Short-lived podman state belongs on a tmpfs: it must not outlive a reboot.
RUN = Path("/run/airflow-ha-lab") / hashlib.sha256(str(PROJECT).encode()).hexdigest()[:12]
NAMESPACE = LAB / "ns" / "mnt"
SUITES = {"debian-12": "bookworm", "debian-13": "trixie"}
BOOT_TIMEOUT_S = 60
CAP_SYS_RESOURCE = 1 << 24

# What a freshly installed server has, and no more: the roles must bring the rest themselves.
IMAGE_PACKAGES = "ca-certificates,dbus,iproute2,openssh-server,procps,python3,python3-apt,sudo,systemd,systemd-sysv"
# Run in the new root by mmdebstrap. Host keys are made at first boot, one set per machine.
IMAGE_SETUP = """
set -eu
rm -f "$1"/etc/ssh/ssh_host_*
echo '127.0.0.1 localhost' > "$1"/etc/hosts
chroot "$1" systemctl mask --quiet systemd-modules-load.service systemd-udevd.service getty.target \
  console-getty.service systemd-logind.service proc-sys-fs-binfmt_misc.automount sys-kernel-debug.mount
chroot "$1" useradd --create-home --shell /bin/bash deploy
echo 'deploy ALL=(ALL) NOPASSWD:ALL' > "$1"/etc/sudoers.d/deploy
chmod 0440 "$1"/etc/sudoers.d/deploy
mkdir -p "$1"/etc/systemd/system/ssh.service.d
printf '[Service]\\nExecStartPre=\\nExecStartPre=/usr/bin/ssh-keygen -A\\nExecStartPre=/usr/sbin/sshd -t\\n' \
  > "$1"/etc/systemd/system/ssh.service.d/host-keys.conf
"""


class LabError(Exception):
    """Something the user has to know, in one line."""


def run(*argv: str, check: bool = True, quiet: bool = True, stdin: str | None = None) -> str:
    """Run a command and return its standard output; raise LabError with its last error line."""
    done = subprocess.run(argv, input=stdin, text=True, capture_output=quiet, check=False)
    if check and done.returncode != 0:
        lines = (done.stderr or "").strip().splitlines() or [f"exit code {done.returncode}"]
        raise LabError(f"{' '.join(argv[:4])} …: {lines[-1]}")
    return done.stdout or ""


def podman(*arguments: str, check: bool = True) -> str:
    """Run podman on the lab's own storage and return its standard output."""
    return run("podman", *arguments, check=check)


# --- the host ----------------------------------------------------------------------------------


def write_configuration() -> None:
    """Point podman at storage, networks and state below the checkout, through its environment."""
    storage, config = LAB / "storage.conf", LAB / "containers.conf"
    for folder in (LAB / "podman", LAB / "networks", RUN / "tmp"):
        folder.mkdir(parents=True, exist_ok=True)
    storage.write_text(f'[storage]\ndriver = "overlay"\ngraphroot = "{LAB / "podman"}"\nrunroot = "{RUN / "run"}"\n')
    config.write_text(
        '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\nruntime = "crun"\n'
        f'lock_type = "file"\ntmp_dir = "{RUN / "tmp"}"\n'
        f'[network]\nnetwork_backend = "netavark"\nnetwork_config_dir = "{LAB / "networks"}"\n'
    )
    os.environ["CONTAINERS_STORAGE_CONF"] = str(storage)
    os.environ["CONTAINERS_CONF"] = str(config)


def cgroups_are_unified() -> bool:
    """True where /sys/fs/cgroup is a cgroup2 mount, as systemd in a container needs it."""
    return run("stat", "-f", "-c", "%T", "/sys/fs/cgroup").strip() == "cgroup2fs"


def enter_namespace() -> None:
    """On a hybrid host, go on inside the lab's mount namespace, making it first if need be."""
    if cgroups_are_unified():
        return
    if not NAMESPACE.parent.is_dir():
        NAMESPACE.parent.mkdir(parents=True)
    alive = subprocess.run(["nsenter", f"--mount={NAMESPACE}", "true"], capture_output=True, check=False).returncode
    if alive != 0:
        remove_namespace()
        # A namespace can only be bound to a file on a mount that does not propagate.
        run("mount", "--bind", str(NAMESPACE.parent), str(NAMESPACE.parent))
        run("mount", "--make-private", str(NAMESPACE.parent))
        NAMESPACE.touch()
        run("unshare", f"--mount={NAMESPACE}", "--propagation", "private", "true")
        inside = "umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup"
        run("nsenter", f"--mount={NAMESPACE}", "sh", "-c", inside)
    os.execvp(
        "nsenter",
        ["nsenter", f"--mount={NAMESPACE}", f"--wd={os.getcwd()}", sys.executable, *sys.argv],
    )


def remove_namespace() -> None:
    """Unbind the lab's mount namespace, also one whose last process is long gone."""
    for target in (NAMESPACE, NAMESPACE.parent):
        while subprocess.run(["umount", str(target)], capture_output=True, check=False).returncode == 0:
            pass


def limit_arguments() -> list[str]:
    """Podman arguments for hosts on which limits cannot be raised or processes not be counted."""
    status = Path("/proc/self/status").read_text()
    effective = int(re.search(r"^CapEff:\s*(\w+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    arguments = []
    if not effective & CAP_SYS_RESOURCE:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        arguments += [f"--ulimit=nofile={hard}:{hard}", "--ulimit=nproc=4000:4000"]
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")
    if not controllers.exists() or "pids" not in controllers.read_text().split():
        arguments.append("--pids-limit=-1")
    return arguments


# --- leftovers ---------------------------------------------------------------------------------


def bridge_of(lab: str) -> str:
    """The bridge of a lab's network; fixed, so that a leftover is recognised."""
    return f"afha-{lab}"


def running_elsewhere(lab: str) -> str | None:
    """The checkout that runs machines of a lab of this name, if it is another one; told by their monitor processes."""
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = cmdline.read_text().split("\0")
            name, bundle = words[words.index("-n") + 1], words[words.index("-b") + 1]
            owner, found, _ = bundle.partition("/.lab/podman/")
            if found and name.startswith(f"{lab}-") and owner != str(PROJECT):
                return owner
    return None


def clear_network(lab: str, subnet: str) -> None:
    """Remove a bridge, its links, name spaces and NAT rules that a dead lab left on the host."""
    bridge = bridge_of(lab)
    if not Path(f"/sys/class/net/{bridge}").exists():
        return
    for link in Path(f"/sys/class/net/{bridge}/brif").glob("*"):
        run("ip", "link", "delete", link.name, check=False)
    run("ip", "link", "delete", bridge, check=False)
    for namespace in Path("/run/netns").glob("netns-*"):
        if f" {subnet}." in run("ip", "-n", namespace.name, "-4", "-o", "address", check=False):
            run("ip", "netns", "delete", namespace.name, check=False)
    for table in ("nat", "filter"):
        for rule in run("iptables", "-w", "-t", table, "-S", check=False).splitlines():
            if rule.startswith("-A") and f" {subnet}." in rule:
                run("iptables", "-w", "-t", table, "-D", *rule.split()[1:], check=False)


# --- images ------------------------------------------------------------------------------------


def image_reference(name: str) -> str:
    """The image's name with a tag that changes when its recipe does."""
    if name not in SUITES:
        raise LabError(f"unknown machine image '{name}': one of {', '.join(SUITES)}")
    recipe = hashlib.sha256((IMAGE_PACKAGES + IMAGE_SETUP).encode()).hexdigest()[:12]
    return f"localhost/airflow-ha-{name}:{recipe}"


def image_exists(name: str) -> bool:
    """True when podman has the image."""
    return bool(podman("images", "--quiet", image_reference(name)).strip())


def build_image(name: str) -> None:
    """Build a machine image from the distribution's own packages (about 20 s)."""
    if image_exists(name):
        return
    archive = LAB / f"{name}.tar"
    hook = f"--customize-hook={IMAGE_SETUP}"
    # The package index stays, as on an installed server.
    run("mmdebstrap", "--quiet", "--variant=minbase", "--skip=cleanup/apt/lists",
        f"--include={IMAGE_PACKAGES}", hook, SUITES[name], str(archive))  # fmt: skip
    podman("import", "--change", 'CMD ["/sbin/init"]', str(archive), image_reference(name))
    archive.unlink()


# --- machines ----------------------------------------------------------------------------------


def ensure_network(lab: str, subnet: str) -> None:
    """Create the lab's network, after clearing what a dead lab of another checkout left."""
    if owner := running_elsewhere(lab):
        raise LabError(f"the lab '{lab}' of {owner} is running: `make destroy` there first")
    bridge = bridge_of(lab)
    known = podman("network", "ls", "--format", "{{.Name}}").split()
    if bridge not in known:
        # Whatever stands in the way now belongs to nobody who is alive.
        clear_network(lab, subnet)
        # Written, not created: `podman network create` of 4.3 cannot name the bridge.
        config = {
            "name": bridge, "id": hashlib.sha256(bridge.encode()).hexdigest(), "driver": "bridge",
            "network_interface": bridge, "created": "2026-01-01T00:00:00Z",
            "subnets": [{"subnet": f"{subnet}.0/24", "gateway": f"{subnet}.1"}],
            "ipv6_enabled": False, "internal": False, "dns_enabled": False,
            "ipam_options": {"driver": "host-local"},
        }  # fmt: skip
        (LAB / "networks" / f"{bridge}.json").write_text(json.dumps(config))


def ensure_key(lab: str) -> Path:
    """The lab's SSH key pair, readable only by the user who called sudo; returns its public half."""
    folder = LAB / lab / "ssh"
    folder.mkdir(parents=True, exist_ok=True)
    key = folder / "id_ed25519"
    if not key.exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"airflow-ha {lab}", "-f", str(key))
    return key.with_suffix(".pub")


def states() -> dict[str, str]:
    """Name to state ("running", "exited", …) of all machines of this checkout."""
    rows = json.loads(podman("ps", "--all", "--format", "json") or "[]")
    return {row["Names"][0]: row["State"] for row in rows}


def alive(name: str) -> bool:
    """True when the machine's init answers; podman's own record may be older than a crash."""
    probe = subprocess.run(["podman", "exec", name, "true"], capture_output=True, check=False)
    return probe.returncode == 0


def ensure_machine(lab: str, machine: dict[str, Any], state: str | None, public_key: str) -> str:
    """Create or start one machine, wait until it has booted, and return its host key."""
    name = f"{lab}-{machine['name']}"
    if state == "running" and not alive(name):
        podman("rm", "--force", "--time=0", name)
        state = None
    if state is None:
        volumes = []
        for source, target in (v.split(":", 1) for v in machine.get("volumes", [])):
            Path(source).mkdir(parents=True, exist_ok=True)
            volumes.append(f"--volume={source}:{target}")
        podman(
            "run", "--detach", f"--name={name}", f"--hostname={machine['name']}",
            f"--network={bridge_of(lab)}", f"--ip={machine['address']}", f"--mac-address={mac_of(machine['address'])}",
            "--privileged", "--systemd=always", "--no-hosts", f"--label=airflow-ha.lab={lab}",
            *limit_arguments(), *volumes, image_reference(machine["image"]),
        )  # fmt: skip
    elif state != "running":
        podman("start", name)
    return wait_for_boot(name, public_key)


def mac_of(address: str) -> str:
    """A link address that belongs to the IPv4 address, so that a machine made anew is not behind a stale neighbour."""
    return "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))


def wait_for_boot(name: str, public_key: str) -> str:
    """Let the deploy user in and return the machine's host key; LabError after 60 s."""
    script = (
        "install -d -m 0700 -o deploy -g deploy /home/deploy/.ssh && "
        "cat > /home/deploy/.ssh/authorized_keys && chown deploy /home/deploy/.ssh/authorized_keys && "
        # As Debian's installer does; without it sudo complains.
        "{ grep -q $(hostname) /etc/hosts || echo 127.0.1.1 $(hostname) >> /etc/hosts; } && "
        "test -S /run/dbus/system_bus_socket && systemctl is-active --quiet ssh && "
        "cat /etc/ssh/ssh_host_ed25519_key.pub"
    )
    deadline = time.monotonic() + BOOT_TIMEOUT_S
    while time.monotonic() < deadline:
        done = subprocess.run(
            ["podman", "exec", "--interactive", name, "sh", "-c", script],
            input=public_key, text=True, capture_output=True, check=False,
        )  # fmt: skip
        if done.returncode == 0:
            return " ".join(done.stdout.split()[:2])
        time.sleep(0.5)
    raise LabError(f"{name} did not boot within {BOOT_TIMEOUT_S} s: {done.stderr.strip()[-200:]}")


def write_ssh_files(lab: str, machines: Sequence[dict[str, Any]], host_keys: Sequence[str]) -> bool:
    """Write known_hosts and a client configuration (`ssh -F …/config <name>`); returns whether a key was new."""
    folder = LAB / lab / "ssh"
    known_hosts, config = folder / "known_hosts", folder / "config"
    old = known_hosts.read_text().splitlines() if known_hosts.exists() else []
    names = {m["address"]: m["name"] for m in machines}
    # Neither the name nor the address of a machine that a killed run has left may stand beside the new one's.
    others = [line for line in old if not {*line.split()[0].split(",")} & {*names, *names.values()}]
    fresh = [f"{m['name']},{m['address']} {key}" for m, key in zip(machines, host_keys, strict=True)]
    known_hosts.write_text("\n".join(sorted(others + fresh)) + "\n")
    entries = (line.split()[0].split(",") for line in sorted(others + fresh))
    config.write_text(
        "".join(f"Host {name}\n  HostName {address}\n  HostKeyAlias {name}\n" for name, address in entries)
        + f"Host *\n  User deploy\n  IdentityFile {folder / 'id_ed25519'}\n"
        # Machines lose their power here; whoever was connected shall not wait for TCP to notice.
        "  ConnectTimeout 5\n  ServerAliveInterval 3\n  ServerAliveCountMax 3\n"
        f"  UserKnownHostsFile {known_hosts}\n  StrictHostKeyChecking yes\n"
    )
    return not set(fresh) <= set(old)


def up(spec: dict[str, Any]) -> bool:
    """Bring all machines of the specification up; returns whether anything was changed."""
    lab, subnet = spec["lab"], spec["subnet"]
    for image in sorted({machine["image"] for machine in spec["machines"]}):
        build_image(image)
    ensure_network(lab, subnet)
    public_key = ensure_key(lab).read_text()
    before = states()

    def one(machine: dict[str, Any]) -> str:
        return ensure_machine(lab, machine, before.get(f"{lab}-{machine['name']}"), public_key)

    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count() or 2) as pool:
        host_keys = list(pool.map(one, spec["machines"]))
    changed = write_ssh_files(lab, spec["machines"], host_keys)
    give_back(LAB / lab)
    return changed


def give_back(folder: Path) -> None:
    """Under sudo, hand a folder to the calling user: Ansible runs as that user."""
    if user := os.environ.get("SUDO_UID"):
        run("chown", "-R", f"{user}:{os.environ['SUDO_GID']}", str(folder))


def down(spec: dict[str, Any]) -> bool:
    """Remove the machines of the specification; returns whether there were any."""
    lab, existing = spec["lab"], states()
    names = [name for m in spec["machines"] if (name := f"{lab}-{m['name']}") in existing]
    if names:
        podman("rm", "--force", "--time=0", "--volumes", *names)
    if not any(name.startswith(f"{lab}-") for name in states()):
        remove_network(lab, spec["subnet"])
        shutil.rmtree(LAB / lab, ignore_errors=True)
    return bool(names)


def remove_network(lab: str, subnet: str) -> None:
    """Remove a lab's network, its configuration and what it left on the host, unless another checkout uses it."""
    (LAB / "networks" / f"{bridge_of(lab)}.json").unlink(missing_ok=True)
    if not running_elsewhere(lab):
        clear_network(lab, subnet)


def destroy() -> None:
    """Remove every lab of this checkout, its images, its storage and its mount namespace."""
    names = list(states())
    if names:
        podman("rm", "--force", "--time=0", "--volumes", *names)
    for config in (LAB / "networks").glob("afha-*.json"):
        network = json.loads(config.read_text())
        subnet = network["subnets"][0]["subnet"].rsplit(".", 1)[0]
        remove_network(network["name"].removeprefix("afha-"), subnet)
    podman("system", "reset", "--force", check=False)
    remove_namespace()
    shutil.rmtree(RUN, ignore_errors=True)
    shutil.rmtree(LAB, ignore_errors=True)


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """Hold the checkout's lab lock: two runs at once would trip over each other."""
    import fcntl

    LAB.mkdir(exist_ok=True)
    with (LAB / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main(argv: Sequence[str]) -> int:
    """Entry point; exit code 2 and one line on standard error when something is in the way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("image").add_argument("name")
    verbs.add_parser("up")
    verbs.add_parser("down")
    verbs.add_parser("destroy")
    verbs.add_parser("podman").add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args(argv)
    try:
        if os.geteuid() != 0:
            raise LabError("the lab's machines need root: run it with sudo")
        enter_namespace()
        write_configuration()
        if options.verb == "podman":
            os.execvp("podman", ["podman", *options.arguments])
        with exclusive():
            if options.verb == "image":
                build_image(options.name)
            elif options.verb == "destroy":
                destroy()
            else:
                verb = up if options.verb == "up" else down
                print("changed" if verb(json.load(sys.stdin)) else "unchanged")
    except LabError as error:
        print(f"machines.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
