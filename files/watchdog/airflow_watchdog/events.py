"""An event: something that changed, as it is kept in the database, told to the hooks and written to the journal."""

from dataclasses import asdict, dataclass
from typing import Literal

Severity = Literal["info", "warning", "critical"]


@dataclass(frozen=True)
class Event:
    """`kind` is for programs, `message` for people; `at` is the wall clock's time, for display only."""

    kind: str
    node: str
    message: str
    component: str = ""
    severity: Severity = "info"
    at: float = 0.0

    def as_dict(self) -> dict[str, str | float]:
        """Return what hooks get as JSON."""
        return asdict(self)
