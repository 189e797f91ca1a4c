"""The cluster under test: where it is, and its REST API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import requests

PROJECT = Path(__file__).resolve().parents[3]
LAB = PROJECT / ".lab" / "test"
SUBNET = "10.77.2"
VIP = f"{SUBNET}.100"
CA = LAB / "pki" / "ca.crt"


class Api:
    """Airflow's REST API behind one address; logs in as the administrator."""

    def __init__(self, address: str, password: str) -> None:
        """address: host or host:port. Raises requests.HTTPError when the login is refused."""
        self.url = f"https://{address}"
        self.session = requests.Session()
        # Set on the session, an environment's REQUESTS_CA_BUNDLE would win.
        self.session.trust_env = False
        self.session.verify = str(CA)
        login = self.session.post(
            f"{self.url}/auth/token", json={"username": "admin", "password": password}, timeout=10
        )
        login.raise_for_status()
        self.session.headers["Authorization"] = f"Bearer {login.json()['access_token']}"

    def call(self, method: str, path: str, **arguments: Any) -> Any:
        """The decoded answer of /api/v2<path>. Raises requests.HTTPError."""
        answer = self.session.request(method, f"{self.url}/api/v2{path}", timeout=20, **arguments)
        answer.raise_for_status()
        return answer.json()
