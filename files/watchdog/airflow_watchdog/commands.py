"""What the commands do, but for `run` and `permit`.

`status` and `check` ask the watchdogs themselves, so they work anywhere and while the database is away; `history`,
`pause`, `resume` and `switchover` need the database, whose credential only Airflow servers have.
"""

import getpass
import json
import os
import ssl
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_watchdog import client, status
from airflow_watchdog.config import Config, ConfigError, read_secret
from airflow_watchdog.snapshot import State
from airflow_watchdog.status import Cluster, Level

if TYPE_CHECKING:
    from airflow_watchdog.store import Control

LOOK_AGAIN_S = 0.2
T = TypeVar("T")


class CommandError(Exception):
    """A command was refused or failed; str() is one line that says why."""


def show(config: Config, options: Namespace) -> int:
    """Show the cluster. Exit code 0 if this node's own watchdog answers."""
    cluster = _look(config)
    found = status.problems(cluster, options.max_lag)
    if options.json:
        _print_json(status.as_dict(cluster, found))
    else:
        print(status.render(cluster, found, _colour()))
    return 0 if config.node.name in cluster.answering else 1


def check(config: Config, options: Namespace) -> int:
    """Say in one line how well the cluster is, and return the level."""
    try:
        cluster = _look(config)
    except CommandError as error:
        print(f"UNKNOWN: {error}")
        return Level.UNKNOWN
    found = status.problems(cluster, options.max_lag)
    worst = status.level(found)
    if options.json:
        _print_json(status.as_dict(cluster, found))
    else:
        what = "; ".join(map(str, found)) or f"{len(cluster.nodes)} nodes"
        print(f"{worst.name}: {what}")
    return worst


def history(config: Config, options: Namespace) -> int:
    """Show events, the newest last."""
    events = _with_control(config, lambda control: control.history(options.limit))
    if options.json:
        _print_json([
            {"at": datetime.fromtimestamp(event.at).astimezone().isoformat(timespec="milliseconds"), "kind": event.kind,
             "severity": event.severity, "node": event.node, "component": event.component, "message": event.message}
            for event in events
        ])  # fmt: skip
        return 0
    tones = {"warning": "yellow", "critical": "red"}
    for event in events:
        at = datetime.fromtimestamp(event.at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
        line = f"{at}  {event.node:<12}  {event.severity:<8}  {event.message}"
        print(status.paint(line, tones.get(event.severity, ""), _colour()))
    return 0


def pause(config: Config, options: Namespace) -> int:
    """Let no scheduler move, and wait until all servers know."""
    _with_control(config, lambda control: control.pause(options.seconds, options.reason, _who()))
    return _known(config, options, True, f"paused for {status.duration(options.seconds)}: {options.reason}")


def resume(config: Config, options: Namespace) -> int:
    """End a pause, and wait until all servers know."""
    was = _with_control(config, lambda control: control.resume(_who()))
    return _known(config, options, False, "resumed" if was else "there was no pause")


def switchover(config: Config, options: Namespace) -> int:
    """Hand the scheduler over, and wait until it runs on the other node."""
    if options.to and options.to not in {config.node.name, *(peer.name for peer in config.peer)}:
        raise CommandError(f"{options.to}: no such node")
    before = _look(config)
    if why := status.refusal(before, options.to):
        raise CommandError(f"refused: {why}")
    old = before.lease.holder if before.lease else None
    begin = time.monotonic()
    _with_control(config, lambda control: control.switchover(options.to, _who()))
    # The holder ends its scheduler, another takes the lease and starts its own.
    patience_s = 3 * config.loop.ttl_s + (config.scheduler.start_grace_s if config.scheduler else 0)
    while time.monotonic() - begin < patience_s:
        now = _look(config)
        runs = [name for name, view in now.leases.items() if view.held and name != old and _runs(now, name)]
        if runs:
            took_s = round(time.monotonic() - begin, 1)
            epoch = now.leases[runs[0]].epoch
            _say(options, {"from": old, "to": runs[0], "epoch": epoch, "seconds": took_s},
                 f"{runs[0]} runs the scheduler now, in place of {old} (epoch {epoch}, {took_s} s)")  # fmt: skip
            return 0
        time.sleep(LOOK_AGAIN_S)
    _with_control(config, lambda control: control.withdraw())
    holder = now.lease.holder if now.lease else None
    raise CommandError(f"not done after {patience_s:g} s; in charge now: {holder or 'nobody'}")


def _runs(cluster: Cluster, name: str) -> bool:
    scheduler = cluster.answering[name].scheduler
    return scheduler is not None and scheduler.state is State.RUNNING


def check_files(config: Config) -> None:
    """Raise ConfigError, one line, if a file that the configuration names can't be used."""
    own = config.http
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(own.certificate, own.key)
    except (OSError, ValueError) as error:
        reason = error.strerror or type(error).__name__ if isinstance(error, OSError) else type(error).__name__
        raise ConfigError(f"http.certificate, http.key: {own.certificate}, {own.key}: {reason}") from None
    for name, authority in (
        ("http.ca", own.ca),
        ("database.ca", config.database.ca if config.database else None),
        ("redis.ca", config.redis.ca if config.redis else None),
    ):
        try:
            if authority:
                ssl.create_default_context(cafile=str(authority))
        except OSError as error:
            raise ConfigError(f"{name}: {authority}: {error.strerror or type(error).__name__}") from None
    for name, secret in (
        ("database.password_file", config.database.password_file if config.database else None),
        ("redis.password_file", config.redis.password_file if config.redis else None),
        ("alerts.webhook_url_file", config.alerts.webhook_url_file),
    ):
        try:
            if secret and not read_secret(secret):
                raise ConfigError(f"{secret}: is empty")
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None


def _known(config: Config, options: Namespace, paused: bool, text: str) -> int:
    deadline = time.monotonic() + 2 * (config.loop.interval_s + config.loop.timeout_s)
    while True:
        late = [name for name, view in _look(config).leases.items() if view.paused is not paused]
        if not late or time.monotonic() > deadline:
            break
        time.sleep(LOOK_AGAIN_S)
    unaware = f" (not yet known to {', '.join(late)})" if late else ""
    _say(options, {"paused": paused, "unaware": late, "text": text}, text + unaware)
    return 0


def open_control(config: Config) -> "Control":
    """Return the database's side of the commands. Raises CommandError where there is none."""
    if config.database is None:
        raise CommandError("only Airflow servers hold the database's credential: run it on one of them")
    # Here, since psycopg takes a while to load.
    from airflow_watchdog.store import Control

    return Control(config)


def _with_control(config: Config, do: "Callable[[Control], T]") -> T:
    from airflow_watchdog.store import RefusedError, StoreError

    control = open_control(config)
    try:
        return do(control)
    except RefusedError as error:
        raise CommandError(f"refused: {error}") from None
    except StoreError as error:
        raise CommandError(f"the watchdogs' database: {error}") from None
    finally:
        control.close()


def _look(config: Config) -> Cluster:
    try:
        return client.look(config)
    except OSError as error:
        raise CommandError(f"{config.http.ca}: {error.strerror or type(error).__name__}") from None


def _who() -> str:
    user = os.environ.get("SUDO_USER")
    try:
        return user or getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _say(options: Namespace, content: Any, text: str) -> None:
    if options.json:
        _print_json(content)
    else:
        print(text)


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=2))


def _colour() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


COMMANDS: dict[str, Callable[[Config, Namespace], int]] = {
    "status": show,
    "check": check,
    "history": history,
    "pause": pause,
    "resume": resume,
    "switchover": switchover,
}
