#!/usr/bin/python3
"""The node's half of `deliver`: compare, validate, write. Called by the action plugin of the same name."""

from __future__ import annotations

import json
import os
import re
import shlex
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule

BEGIN, END = "# BEGIN airflow-ha nodes", "# END airflow-ha nodes"


def _attributes(module: AnsibleModule, path: str, entry: dict[str, Any]) -> bool:
    """Set owner, group and mode; return whether any of them differed."""
    wanted = {"path": path, "owner": entry["owner"], "group": entry["group"], "mode": entry["mode"]}
    return bool(module.set_fs_attributes_if_different(module.load_file_common_arguments(wanted), changed=False))


def deliver_folder(module: AnsibleModule, folder: dict[str, Any]) -> bool:
    """Make the folder, with parents that everyone may enter; return whether anything differed."""
    path = folder["path"]
    missing = not os.path.isdir(path)
    if missing and os.path.lexists(path):
        module.fail_json(msg=f"{path} is there, and not a folder")
    if missing and module.check_mode:
        return True
    if missing:
        os.makedirs(path, mode=0o755)
    return _attributes(module, path, folder) or missing


def deliver_link(module: AnsibleModule, link: dict[str, Any]) -> bool:
    """Point the link at its target, in one step; return whether it pointed elsewhere."""
    path, target = link["path"], link["target"]
    if os.path.islink(path) and os.readlink(path) == target:
        return False
    if os.path.lexists(path) and not os.path.islink(path):
        module.fail_json(msg=f"{path} is there, and not a link")
    if not module.check_mode:
        new = f"{path}.{os.getpid()}"
        os.symlink(target, new)
        os.replace(new, path)
    return True


def with_block(present: str, block: str, drop: str) -> str:
    """Put the block between our marks, or at the end of the text; the rest stays, but for lines that match `drop`."""
    lines = present.splitlines()
    first = lines.index(BEGIN) if BEGIN in lines else len(lines)
    last = lines.index(END, first) if END in lines[first:] else first
    before, after = (
        [line for line in part if not (drop and re.search(drop, line))] for part in (lines[:first], lines[last + 1 :])
    )
    return "".join(f"{line}\n" for line in [*before, BEGIN, *block.splitlines(), END, *after])


def deliver_file(module: AnsibleModule, file: dict[str, Any]) -> tuple[bool, dict[str, str] | None]:
    """Write the file if its content or attributes differ; return whether they did, and the difference to show."""
    dest = os.path.realpath(file["dest"])
    present = None
    if os.path.isfile(dest):
        with open(dest, "rb") as stream:
            present = stream.read()
    elif os.path.lexists(dest):
        module.fail_json(msg=f"{dest} is there, and not a file")
    before = "" if present is None else present.decode(errors="replace")
    after = with_block(before, file["content"], file["drop"]) if file["block"] else file["content"]
    content = after.encode()
    if present == content:
        return _attributes(module, dest, file), None
    if not module.check_mode:
        _write(module, file, dest, content)
    if file["secret"]:
        return True, None
    return True, {"before_header": dest, "after_header": dest, "before": before, "after": after}


def _write(module: AnsibleModule, file: dict[str, Any], dest: str, content: bytes) -> None:
    """Put a complete and checked file in its place at once; nobody can read it before it has its mode."""
    handle, new = tempfile.mkstemp(prefix=f".{os.path.basename(dest)}.", dir=os.path.dirname(dest))
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        if file["validate"]:
            command = [word.replace("%s", new) for word in shlex.split(file["validate"])]
            code, output, errors = module.run_command(command)
            if code != 0:
                said = "" if file["secret"] else (errors or output).replace(new, dest).strip()
                module.fail_json(msg=f"{dest}: refused by {command[0]}: {said}")
        _attributes(module, new, file)
        os.replace(new, dest)
    finally:
        if os.path.lexists(new):
            os.unlink(new)


def main() -> None:
    """Deliver `plan`: JSON, a secret as a whole since files hold secrets."""
    module = AnsibleModule({"plan": {"type": "str", "required": True, "no_log": True}}, supports_check_mode=True)
    plan = json.loads(module.params["plan"])
    delivered = [folder["path"] for folder in plan["folders"] if deliver_folder(module, folder)]
    delivered += [link["path"] for link in plan["links"] if deliver_link(module, link)]
    diffs = []
    for file in plan["files"]:
        changed, diff = deliver_file(module, file)
        delivered += [file["dest"]] if changed else []
        diffs += [diff] if diff else []
    module.exit_json(changed=bool(delivered), delivered=delivered, diff=diffs)


if __name__ == "__main__":
    main()
