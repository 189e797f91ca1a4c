"""Asks watchdogs over HTTPS how their nodes are; for the command line."""

import http.client
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor

from airflow_watchdog.config import Config
from airflow_watchdog.snapshot import PeerView, Snapshot
from airflow_watchdog.status import Cluster, NodeView

MAX_BYTES = 4 << 20
AT_ONCE = 16


class AskError(Exception):
    """A watchdog gave no usable answer; str() says why."""


def ask(address: str, port: int, name: str, context: ssl.SSLContext, timeout_s: float) -> Snapshot:
    """Return what the watchdog at this address says; its certificate must be the node's. Raises AskError."""
    link = http.client.HTTPSConnection(address, port, timeout=timeout_s, context=context)
    try:
        raw = socket.create_connection((address, port), timeout=timeout_s)
        link.sock = context.wrap_socket(raw, server_hostname=name)
        link.request("GET", "/health", headers={"Connection": "close"})
        # 503 says that something is wrong there, and has the same body.
        return Snapshot.model_validate_json(link.getresponse().read(MAX_BYTES))
    except TimeoutError:
        raise AskError("no answer in time") from None
    except OSError as error:
        raise AskError(getattr(error, "verify_message", "") or error.strerror or type(error).__name__) from None
    except (ValueError, http.client.HTTPException):
        raise AskError("not the answer of a watchdog") from None
    finally:
        link.close()


def look(config: Config) -> Cluster:
    """Ask this node's watchdog and, at the same time, all its peers; return the cluster as it is at this moment.

    Not from the database: so it works, and tells the truth, while that is away. Raises OSError for a CA that can't be
    read.
    """
    context = ssl.create_default_context(cafile=str(config.http.ca))
    timeout_s = config.loop.timeout_s
    here = config.http.address
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(here, here)

    def one(address: str, port: int, name: str) -> Snapshot | str:
        try:
            return ask(address, port, name, context, timeout_s)
        except AskError as error:
            return str(error)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        mine = pool.submit(one, local, config.http.port, config.node.name)
        others = [(peer, pool.submit(one, peer.address, peer.port, peer.name)) for peer in config.peer]
        own = mine.result()
        known = {view.name: view for view in own.peers} if isinstance(own, Snapshot) else {}
        nodes = [
            _node(config.node.name, config.node.rack, own, None, config.database is not None,
                  bool(config.postgresql or config.redis)),
            *(_node(peer.name, peer.rack, asked.result(), known.get(peer.name), peer.airflow_server,
                    peer.postgresql or peer.redis) for peer, asked in others),
        ]  # fmt: skip
    return Cluster(config.node.name, tuple(sorted(nodes, key=lambda node: node.name)))


def _node(
    name: str, rack: str, answer: Snapshot | str, known: PeerView | None, airflow_server: bool, data_node: bool
) -> NodeView:
    if isinstance(answer, Snapshot):
        return NodeView(name, rack, answer, airflow_server=airflow_server, data_node=data_node)
    since = known.for_s if known and known.answering is False else None
    return NodeView(name, rack, None, since, answer, airflow_server, data_node)
