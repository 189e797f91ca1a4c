"""Wait for a job that an asynchronous task has started, and show how far it is while it runs."""

from __future__ import annotations

import shlex
import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

POLL_S = 1


class ActionModule(ActionBase):  # type: ignore[misc]
    """`watch_job: {job: <ansible_job_id>, ask: [<word of a command>, …], every: <seconds>}`.

    `ask` runs on the node and prints one line, which is shown every so many seconds; none, or a failure, shows nothing.
    Returns what the job returned, and fails when it failed.
    """

    _requires_connection = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Poll until the job has finished."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        job = {
            "jid": self._task.args["job"],
            "mode": "status",
            "_async_dir": self.get_shell_option("async_dir", "~/.ansible_async"),
        }
        shown = float("-inf")
        while True:
            if time.monotonic() - shown >= float(self._task.args["every"]):
                self._show(str((task_vars or {}).get("inventory_hostname", "")))
                shown = time.monotonic()
            status = self._execute_module("ansible.legacy.async_status", job, task_vars=task_vars)
            if status.get("finished") or status.get("failed"):
                return {**result, **status, "finished": True, "changed": bool(status.get("changed"))}
            time.sleep(POLL_S)

    def _show(self, host: str) -> None:
        answer = self._low_level_execute_command(shlex.join(map(str, self._task.args["ask"])))
        if answer["rc"] == 0 and answer["stdout"].strip():
            Display().display(f"{host}: {answer['stdout'].strip().splitlines()[-1]}")
