"""The configuration, /etc/airflow-watchdog/config.toml: its sections, its rules, and how a mistake in it is told."""

import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

DEFAULT_PATH = Path("/etc/airflow-watchdog/config.toml")
EXIT_CODE = 2

Name = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:@-]*$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]


class ConfigError(Exception):
    """A configuration that cannot be used; str() is one line that names the key and never quotes a value."""


class Section(BaseModel):
    """What all sections share: unknown keys are errors, and nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="after")
    @classmethod
    def _absolute(cls, value: object) -> object:
        if isinstance(value, Path) and not value.is_absolute():
            raise ValueError("must be an absolute path")
        return value


class Node(Section):
    """This machine."""

    name: Name
    rack: str = ""


class Http(Section):
    """The HTTPS server: where it listens and what it proves itself with; `ca` also checks the peers."""

    address: str = "0.0.0.0"  # the firewall says who may ask
    port: Port = 8008
    certificate: Path
    key: Path
    ca: Path


class Loop(Section):
    """The three times that everything follows from, in seconds."""

    interval_s: Seconds = 2.0
    timeout_s: Seconds = 2.0
    ttl_s: Seconds = 10.0

    @model_validator(mode="after")
    def _two_tries(self) -> Self:
        # Patroni's rule: a holder has two tries, each as slow as allowed, before the lease ends.
        if self.interval_s + 2 * self.timeout_s > self.ttl_s:
            raise ValueError("interval_s + 2 * timeout_s must be at most ttl_s")
        return self


class Component(Section):
    """A part that runs here: its unit has to be active; its URL, if any, has to answer 200 with `match` in it."""

    name: Name
    unit: Name
    url: str | None = None
    match: str | None = None

    @field_validator("url")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        return None if value is None else _http_url(value)


class Scheduler(Section):
    """The scheduler of an Airflow server, and when it is taken away from it. Times in seconds."""

    mode: Literal["active_standby", "active_active"] = "active_standby"
    unit: Name = "airflow-scheduler.service"
    # Without it only the unit's state counts, and a hung scheduler is not noticed.
    health_url: str | None = "http://127.0.0.1:8974/health"
    hung_after_s: Seconds = 15.0  # answering badly for so long, it is restarted; and once more, given up
    start_grace_s: Seconds = 30.0  # so long may a start take until health_url answers well
    down_after_s: Seconds = 6.0  # not running for so long, although systemd restarts it, it is given up
    cooldown_s: Seconds = 30.0  # who gave it up takes it back after this, unless another node was quicker
    stop_timeout_s: Seconds = 3.0  # from SIGTERM to SIGKILL
    kill_margin_s: Seconds = 1.0  # from SIGKILL to the end of the lease
    permit_file: Path = Path("/run/airflow-watchdog/permit.json")

    @field_validator("health_url")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        return None if value is None else _http_url(value)


class Database(Section):
    """Where the lease and the heartbeats are: PostgreSQL itself, not a proxy. Airflow servers only."""

    hosts: Annotated[tuple[str, ...], Field(min_length=1)]
    port: Port = 5432
    name: Name = "watchdog"
    user: Name = "watchdog"
    password_file: Path | None = None
    # With a CA the server's certificate is checked against its name; without one there is no TLS (a local socket).
    ca: Path | None = None
    event_retention_days: Annotated[int, Field(ge=1)] = 30


class Peer(Section):
    """Another node: its watchdog's address, and what runs there."""

    name: Name
    rack: str = ""
    address: Annotated[str, Field(min_length=1)]
    port: Port = 8008
    airflow_server: bool = False
    postgresql: bool = False
    redis: bool = False


class Postgresql(Section):
    """The PostgreSQL of this data node, asked over its local socket."""

    unit: Name
    port: Port = 5432
    socket: Path = Path("/var/run/postgresql")
    user: Name = "airflow-watchdog"
    database: Name = "postgres"
    # Stop PostgreSQL here when a peer is primary on a newer timeline.
    fence: bool = True
    # /replica without ?lag= answers 503 beyond this many bytes; absent: any lag will do.
    max_lag_bytes: Count | None = None


class Redis(Section):
    """The Redis of this data node. `ca` absent: no TLS. `host` is the name in its certificate."""

    unit: Name = "redis-server.service"
    address: str = "127.0.0.1"
    port: Port = 6379
    host: str | None = None
    ca: Path | None = None
    user: str | None = None
    password_file: Path | None = None


class Email(Section):
    """Mail for every alert, through a relay that asks for no login."""

    smtp: str
    port: Port = 25
    sender: str
    to: Annotated[tuple[str, ...], Field(min_length=1)]
    starttls: bool = False


class Alerts(Section):
    """Where changes are told: a command, a webhook, e-mail; none of them if the section is empty."""

    # The event comes as JSON on its standard input.
    command: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    # The URL is a secret: most webhooks need nothing else to be written to.
    webhook_url_file: Path | None = None
    email: Email | None = None
    timeout_s: Seconds = 10.0
    per_minute: Annotated[int, Field(ge=1)] = 20  # further events of that minute are summed up in one
    attempts: Annotated[int, Field(ge=1)] = 5
    retry_s: Seconds = 5.0  # doubled after each attempt
    queue: Annotated[int, Field(ge=1)] = 1000


class Config(Section):
    """The whole file. Raises ValueError where sections contradict each other."""

    node: Node
    http: Http
    loop: Loop = Loop()
    component: tuple[Component, ...] = ()
    scheduler: Scheduler | None = None
    database: Database | None = None
    peer: tuple[Peer, ...] = ()
    postgresql: Postgresql | None = None
    redis: Redis | None = None
    alerts: Alerts = Alerts()

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.scheduler is None) != (self.database is None):
            raise ValueError("[scheduler] and [database] need each other: both on an Airflow server, none elsewhere")
        for what, names in (
            ("component.name", [c.name for c in self.component]),
            ("peer.name", [p.name for p in self.peer] + [self.node.name]),
        ):
            if len(names) != len(set(names)):
                raise ValueError(f"{what}: a name is used twice")
        if self.scheduler and self.scheduler.mode == "active_standby":
            loop, own = self.loop, self.scheduler
            # Two tries, and then still the time to end the scheduler before the lease does.
            if loop.interval_s + 2 * loop.timeout_s + own.stop_timeout_s + own.kill_margin_s > loop.ttl_s:
                raise ValueError(
                    "interval_s + 2 * timeout_s + scheduler.stop_timeout_s + scheduler.kill_margin_s "
                    "must be at most loop.ttl_s"
                )
        return self


def _http_url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise ValueError("must begin with http:// or https://")
    return value


def load(path: Path = DEFAULT_PATH) -> Config:
    """Read the configuration. Raises ConfigError, one line, for a file that cannot be read or used."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or type(error).__name__}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {' '.join(str(error).split())}") from None
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        # From None: pydantic's own text quotes values.
        raise ConfigError(f"{path}: {_one_line(error)}") from None


def read_secret(path: Path) -> str:
    """Return the content of a secret's file, without the newline at its end. Raises ConfigError."""
    try:
        return path.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {type(error).__name__}") from None


def _one_line(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    text = {"missing": "is missing", "extra_forbidden": "is not a known key"}.get(first["type"], first["msg"])
    text = text.removeprefix("Value error, ")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{key}: {text}{more}" if key else f"{text}{more}"


def check_files(config: Config) -> None:
    """Raise ConfigError for the first file named in the configuration that this process cannot read."""
    named: list[tuple[str, Path | None]] = [
        ("http.certificate", config.http.certificate),
        ("http.key", config.http.key),
        ("http.ca", config.http.ca),
    ]
    if config.database:
        named += [("database.password_file", config.database.password_file), ("database.ca", config.database.ca)]
    if config.redis:
        named += [("redis.password_file", config.redis.password_file), ("redis.ca", config.redis.ca)]
    named.append(("alerts.webhook_url_file", config.alerts.webhook_url_file))
    for key, path in named:
        try:
            if path is not None:
                path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{key}: {path}: {error.strerror or type(error).__name__}") from None
