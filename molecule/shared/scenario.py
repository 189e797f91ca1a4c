"""Where a role's scenario runs: its lab, by the name in LAB_NAME, as molecule/shared/inventory computes it too."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
# "roles", or "roles<N>" for one of several that run side by side.
LAB_NAME = os.environ.get("LAB_NAME", "roles")
LAB = PROJECT / ".lab" / LAB_NAME
SUBNET = "10.77.3" if LAB_NAME == "roles" else f"10.77.1{LAB_NAME.removeprefix('roles')}"
CA = LAB / "pki" / "ca.crt"
