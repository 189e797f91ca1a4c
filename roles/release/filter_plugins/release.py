"""What a release is named by."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from ansible.errors import AnsibleFilterError


def _wheelhouse(folder: Path) -> ModuleType:
    """The wheelhouse builder beside the locks: it names its archives by the same hash."""
    spec = importlib.util.spec_from_file_location("wheelhouse", folder / "wheelhouse.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look themselves up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def release_hash(lock: str, source: str = "") -> str:
    """The hash of a lock, or of a lock and the project in the folder `source`; AnsibleFilterError without them."""
    path = Path(lock)
    try:
        return str(_wheelhouse(path.parent).release_hash(path, Path(source) if source else None))
    except OSError as error:
        raise AnsibleFilterError(f"release_hash: {error}") from error


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., object]]:
        """Names of the filters and the functions behind them."""
        return {"release_hash": release_hash}
