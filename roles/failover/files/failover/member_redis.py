"""Redis' part: what this member is, and the steps that move the role of the primary."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import fence
import redis
from journal import FailoverError, Journal, wait_for
from redis.backoff import NoBackoff
from redis.retry import Retry

SWITCH_TIMEOUT_S = 15
SYNC_TIMEOUT_S = 60
# A replica says once a second how far it is (replicationCron), and FAILOVER waits for that: it starts shortly before.
ACKNOWLEDGE_PERIOD_S = 1.0
ACKNOWLEDGE_HEADSTART_S = 0.15


class Redis:
    """This node's member. `settings`: as its role writes them to /etc/airflow-ha/failover/."""

    def __init__(self, settings: dict[str, Any], journal: Journal) -> None:
        self._unit = settings["unit"]
        self._link: Any = redis.Redis(
            unix_socket_path=settings["socket"], username="admin", password=settings["password"], socket_timeout=5,
            decode_responses=True,
        )  # fmt: skip
        self._port, self._ca = settings["port"], settings["ca"]
        self._config, self._peers = Path(settings["config_file"]), settings["peers"]
        self._monitor = settings["monitor_password"]
        self._journal = journal

    # --- looking ---------------------------------------------------------------------------------

    def state(self, _seen: dict[str, Any]) -> dict[str, Any]:
        """What this member says of itself. Offsets are bytes of the replication stream."""
        state: dict[str, Any] = {
            "running": self._systemctl("is-active", check=False).strip() == "active",
            "masked": self._systemctl("is-enabled", check=False).startswith("masked"),
            "firewalled": fence.closed("redis"),
        }
        try:
            info = self._info()
        except FailoverError as error:
            return {**state, "role": "unknown" if state["running"] else "stopped", "problem": str(error)}
        role = "primary" if info["role"] == "master" else "standby"
        standbys = [value for name, value in info.items() if name.startswith("slave") and isinstance(value, dict)]
        offset = info["master_repl_offset"]
        return {
            **state,
            "role": role,
            "loading": bool(info["loading"]),
            "replication_id": info["master_replid"],
            "lsn": info.get("slave_repl_offset", offset),
            "primary": info.get("master_host", ""),
            "receiver": {
                "status": "streaming" if info.get("master_link_status") == "up" else "down",
                "silent_s": info.get("master_last_io_seconds_ago", -1),
            },
            "standbys": [
                {"address": item["ip"], "state": "streaming" if item["state"] == "online" else item["state"],
                 "lag": offset - item["offset"]} for item in standbys
            ],
            "switching": info["master_failover_state"] != "no-failover",
            "keys": info.get("db0", {}).get("keys", 0),
        }  # fmt: skip

    def probe(self, address: str) -> dict[str, Any]:
        """Whether another member can be reached from here as a running primary."""
        link = redis.Redis(
            host=address, port=self._port, username="monitor", password=self._monitor, ssl=True, ssl_ca_certs=self._ca,
            socket_timeout=3, socket_connect_timeout=3, retry=Retry(NoBackoff(), 0),
        )  # fmt: skip
        try:
            return {"role": "primary" if link.info("replication")["role"] == "master" else "standby"}
        except redis.RedisError as error:
            return {"role": "unknown", "problem": str(error)}

    # --- changing --------------------------------------------------------------------------------

    def demote(self, candidate: str) -> None:
        """Hand the role over: Redis pauses writers, waits until the candidate has everything, and swaps the roles.

        Source: Redis' documentation of FAILOVER. Its own time-out makes it give up with nothing changed.
        """
        self._before_an_acknowledgement(candidate)
        self._do("FAILOVER", "TO", candidate, self._port, "TIMEOUT", SWITCH_TIMEOUT_S * 500)
        self._journal.step("writers paused, roles being swapped")
        if not wait_for(lambda: self._info()["master_failover_state"] == "no-failover", SWITCH_TIMEOUT_S):
            raise FailoverError(f"FAILOVER has not ended after {SWITCH_TIMEOUT_S} s")
        if self._info()["role"] != "slave":
            raise FailoverError("the candidate did not catch up in time; nothing was changed")
        # Who stayed connected would only be told that this server is read-only.
        self._do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        self._journal.step("this member is a replica")
        self._settle()

    def take_over(self) -> None:
        """Keep the role that the primary hands over, beyond a restart."""
        if not wait_for(lambda: self._info()["role"] == "master", 2 * SWITCH_TIMEOUT_S):
            raise FailoverError("the primary did not hand its role over; nothing was changed here")
        self._journal.step("this member is the primary")
        self._keep()

    def promote(self, _alone: str = "") -> None:
        """Make this replica the primary."""
        self._do("REPLICAOF", "NO", "ONE")
        self._journal.step("promoted")
        self._keep()

    def follow(self, primary: str) -> None:
        """Be a replica of the primary at this address; what only this member has is given up."""
        self.release()
        self._systemctl("start")
        self._do("REPLICAOF", primary, self._port)
        self._do("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        self._journal.step("follows the new primary")
        self._settle()

    def wake(self) -> None:
        """Start this stopped member."""
        self._systemctl("start")
        self._journal.step("started")

    def guard(self) -> None:
        """Before every start: a former primary that sees another one comes up as its replica, never beside it."""
        text = self._config.read_text()
        if any(line.startswith("replicaof ") for line in text.splitlines()):
            return
        for host, address in self._peers.items():
            if self.probe(address)["role"] == "primary":
                with self._config.open("a") as stream:
                    stream.write(f"replicaof {address} {self._port}\n")
                self._journal.step(f"{host} is the primary: this former primary starts as its replica")
                return

    def release(self) -> None:
        """Undo a fence."""
        self._systemctl("unmask")
        self._systemctl("reset-failed", check=False)
        fence.release("redis")

    def fence(self) -> None:
        """Stop this member for good: it starts neither now nor after a boot, and if it did, nobody would reach it."""
        self._systemctl("mask")
        self._systemctl("kill", "--signal=SIGKILL", check=False)
        self._systemctl("stop", check=False)
        self._journal.step("fenced: stopped and masked")
        self._journal.step(fence.close("redis", [int(self._port)]))

    # --- helpers ---------------------------------------------------------------------------------

    def _settle(self) -> None:
        if not wait_for(lambda: self._info().get("master_link_status") == "up", SYNC_TIMEOUT_S, 0.1):
            raise FailoverError(f"the replica has no link to the primary after {SYNC_TIMEOUT_S} s")
        self._journal.step("in step with the primary")
        self._keep()

    def _keep(self) -> None:
        """Have the role survive a restart."""
        self._do("CONFIG", "REWRITE")

    def _before_an_acknowledgement(self, candidate: str) -> None:
        """Return when the candidate is about to acknowledge what it has; soon, when it can't be seen doing so."""

        def acknowledged() -> int:
            info = self._do("INFO", "replication")
            items = [value for name, value in info.items() if name.startswith("slave") and isinstance(value, dict)]
            return next((item["offset"] for item in items if item["ip"] == candidate), 0)

        self._do("SET", "airflow-ha:failover", "begins", "EX", 60)
        before = acknowledged()
        if wait_for(lambda: acknowledged() != before, 2 * ACKNOWLEDGE_PERIOD_S, 0.005):
            time.sleep(ACKNOWLEDGE_PERIOD_S - ACKNOWLEDGE_HEADSTART_S)

    def _info(self) -> dict[str, Any]:
        return dict(self._do("INFO"))

    def _do(self, *command: Any) -> Any:
        """The server's answer."""
        try:
            return self._link.execute_command(*command)
        except redis.RedisError as error:
            raise FailoverError(f"Redis, asked to {' '.join(map(str, command[:2]))}: {error}") from error

    def _systemctl(self, verb: str, *options: str, check: bool = True) -> str:
        done = subprocess.run(["systemctl", verb, *options, self._unit], capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            raise FailoverError(f"systemctl {verb} {self._unit}: {done.stderr.strip().splitlines()[-1]}")
        return done.stdout
