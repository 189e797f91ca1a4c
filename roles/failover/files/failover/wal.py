"""What the texts of PostgreSQL's programs say about the WAL, and who keeps WAL for whom."""

from __future__ import annotations

import re
from collections.abc import Mapping

# The record that a clean shutdown writes last, as pg_waldump shows it.
SHUTDOWN_RECORD = re.compile(r"desc: CHECKPOINT_SHUTDOWN\b")
# What the process that replays calls itself: timeline, and the two parts of the segment's number.
REPLAYING = re.compile(r"\bstartup (?:recovering|waiting for) ([0-9A-F]{8})([0-9A-F]{8})([0-9A-F]{8})")
# Where pg_waldump gives up, which is where the WAL ends.
_END = re.compile(r"(?:\bat|LSN) ([0-9A-F]+)/([0-9A-F]+)")


def _position(high: str, low: str) -> int:
    return (int(high, 16) << 32) + int(low, 16)


def lsn_text(position: int) -> str:
    """A position in bytes from 0/0 as PostgreSQL writes it."""
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"


def segment_start(replay: re.Match[str], segment_bytes: int) -> int:
    """Where the segment that is being replayed begins, in bytes from 0/0; replay: a match of REPLAYING."""
    return _position(replay[2], "0") + int(replay[3], 16) * segment_bytes


def end_of_wal(begin: int, complaint: str) -> int:
    """Where the WAL ends, in bytes from 0/0, from what pg_waldump complains of when it has read from `begin` on."""
    return max([begin, *(_position(high, low) for high, low in _END.findall(complaint))])


def wanted_slots(here: str, primary: str, slots: Mapping[str, str], upstreams: Mapping[str, str]) -> set[str]:
    """Slots of the members that stream from `here` while that one is the primary.

    slots: the other members' own; upstreams: from whom each streams, "" for the primary. A primary streams from nobody.
    """
    senders = {host: upstreams[host] or primary for host in slots if host != primary}
    return {slots[host] for host, sender in senders.items() if sender == here}
