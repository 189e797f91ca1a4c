"""Files on storage that several machines share, as paths of ``airflow.sdk.ObjectStoragePath`` or any other UPath."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar

Result = TypeVar("Result")


def make_folders(root: Any, folder: Any) -> None:
    """Create a folder somewhere below ``root``, and those between; on a file system every user may read them.

    The executors run as another user than the tasks, and a service's umask may be strict.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if folder.protocol == "file":
        for level in [folder, *folder.parents]:
            if level.path.rstrip("/") == root.path.rstrip("/"):
                break
            os.chmod(level.path, 0o755)


def publish(path: Any, write: Callable[[TextIO], Result]) -> Result:
    """Write a text file so that a reader sees all of it or nothing, also when an attempt dies half-way.

    Object stores publish an object when it is complete; on a file system the file is renamed into place.
    """
    if path.protocol != "file":
        with path.open("w", newline="", encoding="utf-8") as file:
            return write(file)
    target = Path(path.path)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            result = write(file)
        part.chmod(0o644)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    return result


def remove(path: Any) -> None:
    """Remove a folder and all in it, or a file; nothing happens when it is not there."""
    if path.exists():
        path.fs.rm(path.path, recursive=True)
