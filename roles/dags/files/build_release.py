"""Pack DAGs, Spark jobs and their settings into one release; runs on the controller.

    build_release.py < spec.json

``spec.json`` is ``{"folders": [{"source": "files/dags", "target": ""}, …], "settings": {…}, "output": "…"}``: the
folders are laid over one another in that order, and the settings become ``settings.json`` at the top. Prints
``{"hash": …, "archive": …}``. The hash depends on names and contents alone, so the same input is the same release.

Python files that do not compile are refused: exit code 1, one line for each.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

HASH_DIGITS = 12
# Written last: a folder without it is a delivery that was cut short.
SETTINGS = "settings.json"


class BuildError(Exception):
    """Why there is no release; one line for each reason."""


def collect(folders: list[dict[str, str]]) -> dict[str, bytes]:
    """Return all files, by their name in the release."""
    files: dict[str, bytes] = {}
    for folder in folders:
        source = Path(folder["source"])
        if not source.is_dir():
            raise BuildError(f"{source}: no such folder")
        for path in sorted(source.rglob("*")):
            relative = path.relative_to(source)
            hidden = any(part.startswith(".") or part == "__pycache__" for part in relative.parts)
            if path.is_file() and (not hidden or path.name == ".airflowignore") and path.suffix != ".pyc":
                files[(Path(folder["target"]) / relative).as_posix()] = path.read_bytes()
    if SETTINGS in files:
        raise BuildError(f"{SETTINGS}: the name is taken by the release's settings")
    return files


def check(files: dict[str, bytes]) -> None:
    """Refuse Python files that do not compile."""
    errors = []
    for name, content in files.items():
        if name.endswith(".py"):
            try:
                compile(content, name, "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as error:
                line = error.lineno if isinstance(error, SyntaxError) else None
                reason = error.msg if isinstance(error, SyntaxError) else str(error)
                errors.append(f"{name}:{line or 1}: {reason}")
    if errors:
        raise BuildError("\n".join(errors))


def pack(files: dict[str, bytes], archive: Path) -> None:
    """Write the archive, complete or not at all."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=archive.parent)
    try:
        with os.fdopen(handle, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
            now = int(time.time())
            folders = {parent.as_posix() for name in files for parent in Path(name).parents} - {"."}
            for name in sorted(folders):
                entry = tarfile.TarInfo(name)
                entry.type, entry.mode, entry.mtime = tarfile.DIRTYPE, 0o755, now
                tar.addfile(entry)
            for name in sorted(files, key=lambda name: (name == SETTINGS, name)):
                entry = tarfile.TarInfo(name)
                entry.size, entry.mode, entry.mtime = len(files[name]), 0o644, now
                tar.addfile(entry, io.BytesIO(files[name]))
        os.replace(part, archive)
    except BaseException:
        os.unlink(part)
        raise


def build(spec: dict[str, Any]) -> dict[str, str]:
    """Build the release unless it is there; return its hash and archive."""
    files = collect(spec["folders"])
    check(files)
    files[SETTINGS] = (json.dumps(spec["settings"], indent=2, sort_keys=True) + "\n").encode()
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    release = digest.hexdigest()[:HASH_DIGITS]
    archive = Path(spec["output"]).resolve() / f"dags-{release}.tar.gz"
    if not archive.exists():
        pack(files, archive)
    return {"hash": release, "archive": str(archive)}


def main() -> int:
    """Entry point."""
    try:
        print(json.dumps(build(json.load(sys.stdin))))
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
