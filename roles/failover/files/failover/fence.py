"""The firewall's part of a fence: nobody but this machine itself reaches the service's ports, also after a boot.

One nftables table of our own per service, in a file that `airflow-ha-fence.service` loads at boot. Other rules cannot
undo it: what one table drops stays dropped.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from journal import FailoverError

FOLDER = Path("/etc/airflow-ha/fence")
RULES = """\
table inet {table}
delete table inet {table}
table inet {table} {{
  chain input {{
    type filter hook input priority -10; policy accept;
    iifname != "lo" tcp dport {{ {ports} }} drop
  }}
}}
"""


def _table(service: str) -> str:
    return f"airflow_ha_fence_{service}"


def rules(service: str, ports: Sequence[int]) -> str:
    """What nft reads to close the ports; the same again changes nothing."""
    return RULES.format(table=_table(service), ports=", ".join(map(str, ports)))


def _nft(*arguments: str) -> None:
    try:
        done = subprocess.run(["nft", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise FailoverError("nft is not installed") from error
    if done.returncode != 0:
        raise FailoverError(f"nft: {(done.stderr.strip() or 'failed').splitlines()[0]}")


def close(service: str, ports: Sequence[int], folder: Path = FOLDER) -> str:
    """Close the ports now and after every boot; returns what the journal should say.

    A firewall that refuses is no error: the service is stopped and masked already, and others wait for the promotion.
    """
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    file = folder / f"{service}.nft"
    file.write_text(rules(service, ports))
    try:
        _nft("--file", str(file))
    except FailoverError as error:
        return f"fenced, but not by the firewall: {error}"
    return f"fenced: {', '.join(map(str, ports))} closed by the firewall"


def closed(service: str, folder: Path = FOLDER) -> bool:
    """Whether the service is fenced by the firewall."""
    return (folder / f"{service}.nft").exists()


def release(service: str, folder: Path = FOLDER) -> None:
    """Open the ports again, if they were closed."""
    if closed(service, folder):
        table = _table(service)
        _nft(f"table inet {table}; delete table inet {table}")
        (folder / f"{service}.nft").unlink()
