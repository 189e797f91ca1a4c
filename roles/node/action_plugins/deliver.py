"""Bring folders and files to a node in one call: the controller renders, the node compares and writes what differs.

A task per file costs about a third of a second of processor time per node, also when nothing differs; most of a second
run of a playbook would be that. The options of a file are those of `ansible.builtin.template`, and `notify` of a file
reaches only the handlers of files that differ, which a loop with one `notify` cannot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.template import trust_as_template

FILE_OPTIONS = {"src", "content", "dest", "owner", "group", "mode", "validate", "notify", "secret", "block", "drop"}
MANAGED = "Managed by Ansible: a change made here is lost"
FOLDER_OPTIONS = {"path", "owner", "group", "mode"}
LINK_OPTIONS = {"path", "target"}
DEFAULTS = {"owner": "root", "group": "root"}
FILE_DEFAULTS = {"mode": "0644", "validate": "", "secret": False, "block": False, "drop": ""}


class ActionModule(ActionBase):  # type: ignore[misc]
    """`deliver: {folders: [{path, …}], links: [{path, target}], files: [{src | content, dest, …}]}`, in this order.

    folders: `mode` 0755 unless given.
    links: switched in one step.
    files: `src` ends in `.j2` (a template, in which the file's own keys are variables too) or is copied as it is;
        `content` instead of it is taken literally. `mode` 0644 unless given; `validate` is a command with `%s` for the
        new file; `notify` names handlers; `secret: true` keeps the content out of diffs. With `block: true` the content
        is a marked block of a file whose rest stays, but for the lines that match the regular expression `drop`. Keys
        that are none of these are variables for the template.
    Owner and group are root unless given. Returns `changed`, `delivered` (the paths that differed) and `diff`.
    """

    _supports_check_mode = True

    def run(self, tmp: str | None = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Render, send, and notify the handlers of the files that the node says it has changed."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        variables = task_vars or {}
        folders = [
            {"mode": "0755", **self._checked(item, FOLDER_OPTIONS)} for item in self._task.args.get("folders", [])
        ]
        links = [self._checked(item, LINK_OPTIONS) for item in self._task.args.get("links", [])]
        files = [self._file(file, variables) for file in self._task.args.get("files", [])]
        plan = json.dumps({"folders": folders, "links": links, "files": files})
        result.update(self._execute_module("deliver", {"plan": plan}, task_vars=variables))
        delivered = set(result.get("delivered", []))
        wanted = [file.get("notify", []) for file in self._task.args.get("files", []) if file["dest"] in delivered]
        handlers = [name for names in wanted for name in ([names] if isinstance(names, str) else names)]
        # What the strategy reads after the task; a task's own `notify` holds for every change and stays.
        self._task.notify = list(dict.fromkeys([*(self._task.notify or []), *map(str, handlers)]))
        return result

    def _checked(self, entry: dict[str, Any], options: set[str]) -> dict[str, Any]:
        unknown = set(entry) - options
        if unknown:
            raise AnsibleActionFail(f"{entry.get('path')}: unknown option {', '.join(sorted(unknown))}")
        return {**DEFAULTS, **entry}

    def _file(self, file: dict[str, Any], variables: dict[str, Any]) -> dict[str, Any]:
        if "dest" not in file or ("src" in file) == ("content" in file):
            raise AnsibleActionFail(f"file {file.get('dest', file)}: it needs `dest`, and either `src` or `content`")
        content = file["content"] if "content" in file else self._read(file, variables)
        options = {name: value for name, value in file.items() if name in FILE_OPTIONS - {"src", "notify"}}
        return {**FILE_DEFAULTS, **DEFAULTS, **options, "content": content}

    def _read(self, file: dict[str, Any], variables: dict[str, Any]) -> str:
        source = str(file["src"])
        if not source.endswith(".j2"):
            return Path(self._find_needle("files", source)).read_text(encoding="utf-8")
        path = self._find_needle("templates", source)
        own = {name: value for name, value in file.items() if name not in FILE_OPTIONS}
        templar = self._templar.copy_with_new_env(
            searchpath=[str(Path(path).parent)], available_variables={"ansible_managed": MANAGED, **variables, **own}
        )
        template = trust_as_template(self._loader.get_text_file_contents(path))
        rendered = templar.template(template, escape_backslashes=False, overrides={"trim_blocks": True})
        return "" if rendered is None else str(rendered)
