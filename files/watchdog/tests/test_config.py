"""What a configuration may say, and that a mistake is one line that names the key and quotes no value."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from airflow_watchdog import cli
from airflow_watchdog.config import Config, ConfigError, check_files, load, read_secret
from pydantic import BaseModel

EXAMPLE = Path(__file__).parents[1] / "example.toml"
LEAST = """
[node]
name = "worker1"
[http]
certificate = "/c"
key = "/k"
ca = "/a"
"""
SERVER = '[scheduler]\n[database]\nhosts = ["d1"]\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def test_the_example_holds_every_key_of_every_section() -> None:
    config = load(EXAMPLE)
    content = tomllib.loads(EXAMPLE.read_text())

    def compare(section: Any, found: dict[str, Any], where: str) -> None:
        for key in type(section).model_fields:
            value = getattr(section, key)
            if isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
                for field in type(value[0]).model_fields:
                    assert any(field in entry for entry in found[key]), f"{where}{key}.{field}"
                continue
            assert key in found, f"{where}{key}"
            if isinstance(value, BaseModel):
                compare(value, found[key], f"{where}{key}.")

    compare(config, content, "")


def test_the_least_and_its_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, LEAST))
    assert (config.loop.interval_s, config.loop.timeout_s, config.loop.ttl_s) == (2, 2, 10)
    assert config.http.port == 8008
    assert config.scheduler is None
    server = load(write(tmp_path, LEAST + SERVER))
    assert server.scheduler is not None
    assert server.scheduler.mode == "active_standby"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "node: is missing (and 1 more)"),
        (LEAST + "[loop]\ntypo = 1\n", "loop.typo: is not a known key"),
        (LEAST + "[loops]\n", "loops: is not a known key"),
        (LEAST.replace('ca = "/a"', ""), "http.ca: is missing"),
        (LEAST.replace('"/a"', '"a"'), "http.ca: must be an absolute path"),
        (LEAST.replace('"worker1"', '"wor ker"'), "node.name: "),
        (LEAST + "[loop]\nttl_s = 5.9\n", "loop: interval_s + 2 * timeout_s must be at most ttl_s"),
        (LEAST + "[loop]\nttl_s = nan\n", "loop.ttl_s: "),
        (LEAST + "[loop]\nttl_s = -1\n", "loop.ttl_s: "),
        (LEAST + SERVER + "[loop]\nttl_s = 9.9\n", "interval_s + 2 * timeout_s + scheduler.stop_timeout_s"),
        (LEAST + "[scheduler]\n", "[scheduler] and [database] need each other"),
        (LEAST + "[database]\nhosts = []\n", "database.hosts: "),
        (LEAST + '[scheduler]\nmode = "both"\n', "scheduler.mode: "),
        (
            LEAST + '[[component]]\nname = "a"\nunit = "a.service"\nurl = "ftp://x"\n',
            "component.0.url: must begin with",
        ),
        (LEAST + '[[component]]\nname = "a"\nunit = "a"\n' * 2, "component.name: a name is used twice"),
        (LEAST + '[[peer]]\nname = "worker1"\naddress = "x"\n', "peer.name: a name is used twice"),
        (LEAST + '[[peer]]\nname = "a"\naddress = "x"\nport = 99999\n', "peer.0.port: "),
        ("[node\n", "not TOML: "),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, line: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load(path)
    told = str(error.value)
    assert told.startswith(f"{path}: {line}")
    assert "\n" not in told
    assert cli.main(["run", "--check-config", "--config", str(path)]) == 2
    assert capsys.readouterr().err == f"airflow-watchdog: {told}\n"


def test_active_active_needs_no_time_to_end_a_scheduler(tmp_path: Path) -> None:
    text = LEAST + SERVER.replace("[scheduler]", '[scheduler]\nmode = "active_active"') + "[loop]\nttl_s = 6\n"
    assert load(write(tmp_path, text)).loop.ttl_s == 6


def test_no_value_is_quoted(tmp_path: Path) -> None:
    secret = "hunter2-hunter2"
    for text in (
        LEAST + f"[database]\nhosts = ['d']\npassword = '{secret}'\n[scheduler]\n",
        LEAST + f"[alerts]\nwebhook_url_file = '{secret}'\n",
        LEAST + f"[alerts]\nwebhook_url = '{secret}'\n",
        LEAST + f"[database]\nhosts = ['d']\nport = '{secret}'\n[scheduler]\n",
    ):
        with pytest.raises(ConfigError) as error:
            load(write(tmp_path, text))
        assert secret not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none: No such file"):
        load(tmp_path / "none")
    latin = tmp_path / "latin"
    latin.write_bytes(b"\xe4")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        load(latin)
    secret = tmp_path / "secret"
    secret.write_text("s3cret\n")
    assert read_secret(secret) == "s3cret"
    with pytest.raises(ConfigError, match="cannot be read: FileNotFoundError"):
        read_secret(tmp_path / "none")


def test_named_files_are_looked_at_before_the_start(tmp_path: Path) -> None:
    for name in ("c", "k", "a", "p", "r", "w"):
        (tmp_path / name).write_text("x")
    config = Config.model_validate(
        {
            "node": {"name": "n"},
            "http": {"certificate": tmp_path / "c", "key": tmp_path / "k", "ca": tmp_path / "a"},
            "scheduler": {},
            "database": {"hosts": ["d"], "password_file": tmp_path / "p"},
            "redis": {"password_file": tmp_path / "r"},
            "alerts": {"webhook_url_file": tmp_path / "w"},
        }
    )
    check_files(config)
    (tmp_path / "p").unlink()
    with pytest.raises(ConfigError, match=r"^database.password_file: .*/p: No such file or directory$"):
        check_files(config)
