"""The command `airflow-watchdog`: what it takes, and which part of the package does it.

Imports nothing that not every command needs: `permit` stands before each start of a scheduler and has to be quick.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Sequence

DONE, REFUSED, BAD_USE, UNKNOWN = 0, 1, 2, 3


def main(arguments: "Sequence[str] | None" = None) -> int:
    """Run the command; return its exit code: 0 done, 1 refused or failed, 2 bad configuration or use.

    `check` returns what monitoring systems expect: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN (also for its configuration).
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["permit"]:
        from airflow_watchdog import permit

        return permit.main(words[1:])
    from airflow_watchdog import commands, config

    options = parser().parse_args(words)
    if options.command == "permit":
        return main(["permit"])
    try:
        settings = config.load(options.config)
        if options.command == "run":
            commands.check_files(settings)
            if options.check_config:
                return DONE
            from airflow_watchdog import daemon

            return daemon.run(settings)
        return int(commands.COMMANDS[options.command](settings, options))
    except config.ConfigError as error:
        print(f"airflow-watchdog: {error}", file=sys.stderr)
        return UNKNOWN if options.command == "check" else config.EXIT_CODE
    except commands.CommandError as error:
        print(f"airflow-watchdog: {error}", file=sys.stderr)
        return REFUSED
    except (KeyboardInterrupt, BrokenPipeError):
        return REFUSED


def parse_duration(text: str) -> float:
    """Return seconds from 90, 90s, 30m, 2h or 1d; up to 30 days. Raises ValueError."""
    import re

    found = re.fullmatch(r"([0-9]{1,8}(?:\.[0-9]{1,3})?)([smhd]?)", text)
    seconds = float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]] if found else 0.0
    if not 0 < seconds <= 30 * 86400:
        raise ValueError("not a time like 90s, 30m, 2h or 1d, up to 30 days")
    return seconds


def parser() -> "ArgumentParser":
    """Return the parser; --json and --config may stand before or after the command."""
    from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError
    from pathlib import Path
    from typing import NoReturn

    from airflow_watchdog import __version__
    from airflow_watchdog.config import DEFAULT_PATH
    from airflow_watchdog.endpoints import parse_lag

    class OneLine(ArgumentParser):
        """Tells what is wrong in one line."""

        def error(self, message: str) -> "NoReturn":
            self.exit(BAD_USE, f"{self.prog}: {message}\n")

    def a_duration(text: str) -> float:
        try:
            return parse_duration(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from None

    def a_size(text: str) -> int:
        try:
            return parse_lag(text)
        except ValueError:
            raise ArgumentTypeError("not a size like 1048576, 64MB or 1GB") from None

    def a_count(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not 0 < int(text) <= 100_000:
            raise ArgumentTypeError("not a number from 1 to 100000")
        return int(text)

    def a_reason(text: str) -> str:
        words = " ".join(text.split())
        if not words or len(words) > 500 or not words.isprintable():
            raise ArgumentTypeError("needs 1 to 500 printable characters")
        return words

    # Not set by the command's own copy when absent there, or it would undo what stands before the command.
    common = OneLine(add_help=False)
    common.add_argument("--json", action="store_true", default=SUPPRESS, help="print JSON")
    common.add_argument("--config", type=Path, default=SUPPRESS, metavar="FILE", help=f"default: {DEFAULT_PATH}")
    top = OneLine("airflow-watchdog", description="Keeps one Airflow scheduler in charge.", allow_abbrev=False)
    top.add_argument("--version", action="version", version=__version__)
    top.add_argument("--json", action="store_true", default=False, help="print JSON")
    top.add_argument("--config", type=Path, default=DEFAULT_PATH, metavar="FILE", help=f"default: {DEFAULT_PATH}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=OneLine)

    def add(name: str, text: str) -> ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[common], allow_abbrev=False)

    run = add("run", "be the daemon; systemd starts it")
    run.add_argument("--check-config", action="store_true", help="only say whether the configuration can be used")
    for name, text in (
        ("status", "show nodes, components, who is in charge, roles and lag"),
        ("check", "say in one line and the exit code how well the cluster is, for monitoring systems"),
    ):
        command = add(name, text)
        command.add_argument(
            "--max-lag", type=a_size, default=64 << 20, help="replication lag to warn of; default 64MB"
        )
    history = add("history", "show what happened, the newest last; on Airflow servers")
    history.add_argument("--limit", type=a_count, default=50, metavar="N", help="so many events; default 50")
    pause = add("pause", "let no scheduler move; on Airflow servers")
    pause.add_argument("--for", dest="seconds", type=a_duration, required=True, metavar="TIME", help="30m, 2h, ...")
    pause.add_argument("--reason", type=a_reason, required=True)
    add("resume", "end a pause; on Airflow servers")
    switchover = add("switchover", "hand the scheduler over to another node; on Airflow servers")
    switchover.add_argument("what", choices=["scheduler"])
    switchover.add_argument("--to", metavar="NODE", help="default: whichever is quickest")
    add("permit", "exit code 0 if this node may start its scheduler now; stands before each start")
    return top


if __name__ == "__main__":
    sys.exit(main())
