"""Look at one machine without needing anything on it but a shell, and measure how far its clock is off.

Never fails and is never "unreachable": what went wrong is part of the result, so that one later task can report
all machines at once. The clock is measured as an interval. The controller's time is taken before and after the
node's, so the node's true offset is certainly inside; while that interval is wide, it is narrowed by asking again
over the connection that is now open.
"""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.plugins.action import ActionBase

WIDE_S = 0.5
ATTEMPTS = 4
FACTS = {"package", "passwd", "group", "service_file", "service_running"}


def node_facts(lines: list[str]) -> dict[str, dict[str, Any]]:
    """Facts from the script's lines about packages, accounts and services."""
    packages: dict[str, Any] = {}
    services: dict[str, Any] = {}
    accounts: dict[str, dict[str, list[str]]] = {"passwd": {}, "group": {}}
    for line in lines:
        kind, _, rest = line.partition(" ")
        name, _, value = rest.partition(" ")
        if kind == "package":
            packages[name] = [{"name": name, "version": value, "source": "apt"}]
        elif kind in accounts:
            entry = rest.split(":")
            accounts[kind][entry[0]] = entry[1:]
        elif kind == "service_file":
            services[name] = {"name": name, "source": "systemd", "state": "stopped", "status": value}
        elif kind == "service_running":
            status = services.get(name, {}).get("status", "unknown")
            services[name] = {"name": name, "source": "systemd", "state": "running", "status": status}
    return {
        "packages": packages,
        "services": services,
        "getent_passwd": accounts["passwd"],
        "getent_group": accounts["group"],
    }


class ActionModule(ActionBase):  # type: ignore[misc]
    """`preflight_probe: {script: <path on the controller>, folders: [<path>, …]}`."""

    _supports_check_mode = True
    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Return `problem` and `reason`, or `output` (the script's lines) and `offset` (seconds, [low, high]).

        Also facts in the form of package_facts, service_facts and getent.
        """
        result: dict[str, Any] = super().run(tmp, task_vars)
        arguments = self._task.args
        interpreter = str((task_vars or {}).get("ansible_python_interpreter", "/usr/bin/python3"))
        script = Path(arguments["script"]).read_text(encoding="utf-8")
        result["changed"] = False
        try:
            result["offset"] = self._offset()
            output = self._shell(script, interpreter, *map(str, arguments["folders"]))
        except AnsibleConnectionFailure as error:
            return result | {"problem": "unreachable", "reason": str(error)}
        except AnsibleError as error:
            return result | {"problem": "failed", "reason": str(error)}
        lines = output.splitlines()
        rest = [line for line in lines if line.partition(" ")[0] not in FACTS]
        return result | {"problem": "", "reason": "", "output": rest, "ansible_facts": node_facts(lines)}

    def _shell(self, script: str, *arguments: str) -> str:
        """Standard output of a script that is sent through standard input: no terminal then mixes errors into it."""
        command = shlex.join(["/bin/sh", "-s", *arguments])
        done = self._low_level_execute_command(command, in_data=script.encode())
        if done["rc"] != 0:
            raise AnsibleError(done["stderr"] or done["stdout"] or f"exit code {done['rc']}")
        return str(done["stdout"])

    def _offset(self) -> list[float]:
        low, high = float("-inf"), float("inf")
        for _ in range(ATTEMPTS):
            before = time.time()
            output = self._shell("date +%s.%N\n")
            after = time.time()
            seconds = re.search(r"^\d+\.\d+$", output.strip(), re.MULTILINE)
            if not seconds:
                raise AnsibleError(f"`date` said {output.strip()!r}")
            node = float(seconds[0])
            low, high = max(low, node - after), min(high, node - before)
            if high - low <= WIDE_S:
                break
        return [low, high]
