"""The pipelines' settings: ``settings.json`` at the top of the release, written by the role dags.

``PIPELINE_SETTINGS`` names another file; tests and a developer's machine use that.
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import dataclass
from pathlib import Path

SETTINGS_FILE = Path(__file__).parent.parent / "settings.json"


_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "str | None": (str, type(None)),
    "int": (int,),
    "float": (int, float),
    "dict[str, str]": (dict,),
}


class SettingsError(ValueError):
    """A setting is missing or of the wrong kind; the message names it."""


@dataclass(frozen=True)
class XetraSettings:
    """Settings of the DAG ``xetra_daily_average``; defaults/main.yml of the role dags explains each."""

    landing_url: str
    staging_url: str
    storage_conn_id: str | None
    schedule: str | None
    start_date: str
    max_active_runs: int
    max_reject_share: float
    retries: int
    retry_delay_s: int
    task_timeout_s: int
    owner: str
    postgres_conn_id: str
    spark_conn_id: str
    spark_conf: dict[str, str]

    def start(self) -> datetime.datetime:
        """Return the first moment the schedule knows, in UTC."""
        return datetime.datetime.fromisoformat(self.start_date).replace(tzinfo=datetime.UTC)


def load_xetra(path: Path | None = None) -> XetraSettings:
    """Read the settings.

    Raises:
        SettingsError: a setting is missing, unknown or of the wrong type.
        OSError: the file cannot be read.
    """
    file = path or Path(os.environ.get("PIPELINE_SETTINGS", SETTINGS_FILE))
    values = json.loads(file.read_text(encoding="utf-8")).get("xetra", {})
    known = XetraSettings.__annotations__
    if odd := sorted(set(values) ^ set(known)):
        raise SettingsError(f"{file}: missing or unknown: {', '.join('xetra.' + name for name in odd)}")
    for name, annotation in known.items():
        kinds = _KINDS[annotation]
        if not isinstance(values[name], kinds) or isinstance(values[name], bool):
            raise SettingsError(f"{file}: xetra.{name} must be {annotation}, not {values[name]!r}")
    return XetraSettings(**values)
