"""XETRA minute bars: the names of the files, the strict reader, and the table of averages.

The exactness promised from end to end: prices stay decimal from the file to the table. The average is the exact
mean, rounded half up to ``AVERAGE_DIGITS`` digits, whatever the order in which the bars were added up.
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal, localcontext
from typing import Any, TextIO

COLUMNS = (
    "ISIN", "Mnemonic", "SecurityDesc", "SecurityType", "Currency", "SecurityID", "Date", "Time",
    "StartPrice", "MaxPrice", "MinPrice", "EndPrice", "TradedVolume", "NumberOfTrades",
)  # fmt: skip
MNEMONIC, DATE, TIME, END_PRICE = (COLUMNS.index(name) for name in ("Mnemonic", "Date", "Time", "EndPrice"))

BAR_COLUMNS = ("trading_date", "trading_time", "ticker", "end_price")
AVERAGE_COLUMNS = ("trading_date", "ticker", "avg_price", "bars")
REJECT_COLUMNS = ("file", "line", "reason", "row")
AVERAGE_DIGITS = 10
# What DECIMAL(38,18) of the Spark job holds.
PRICE_DIGITS = 18

_NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,2})?", re.ASCII)
_TABLE = "avg_xetra"


class FormatError(ValueError):
    """The file as a whole is not what it should be; the message names file and line."""


# --- names ---------------------------------------------------------------------------------------


def trading_day(logical_date: datetime.datetime | None) -> datetime.date:
    """Return the day a run is for: the logical date's, in UTC. The clock is never asked.

    Raises:
        ValueError: the run has no logical date, as a trigger without one makes it.
    """
    if logical_date is None:
        raise ValueError("this run has no logical date, so it is for no day: trigger it with a logical_date")
    return logical_date.astimezone(datetime.UTC).date()


def file_pattern(day: datetime.date) -> str:
    """Return the glob of a day's files; other markets' (XEUR) do not match."""
    return f"{day.isoformat()}_BINS_XETR*.csv"


def run_folder(day: datetime.date, run_id: str) -> str:
    """Return the staging folder of one run, relative to the staging URL.

    Hadoop's file systems accept no colon in a name, and a run's id has some.
    """
    digest = hashlib.sha256(run_id.encode()).hexdigest()[:8]
    return f"xetra_daily_average/{day.isoformat()}/{re.sub(r'[^A-Za-z0-9.-]+', '_', run_id)[:80]}-{digest}"


# --- the reader ----------------------------------------------------------------------------------


@dataclass
class Ingested:
    """What became of one file.

    Attributes:
        rows: bars that were accepted.
        rejects: ``(line number, reason, the line)`` of each that was not.
    """

    rows: int = 0
    rejects: list[tuple[int, str, str]] = field(default_factory=list)

    def reject_share(self) -> float:
        """Return the share of refused rows among all, 0 for a file without rows."""
        total = self.rows + len(self.rejects)
        return len(self.rejects) / total if total else 0.0


def parse_price(text: str) -> str | None:
    """Return a price in plain decimal notation, or None when it is no number that can be kept exactly."""
    if not _NUMBER.fullmatch(text.strip()):
        return None
    price = Decimal(text.strip())
    exponent = price.as_tuple().exponent
    if not isinstance(exponent, int) or -exponent > PRICE_DIGITS or price.adjusted() >= PRICE_DIGITS:
        return None
    return f"{price:f}"


def parse_line(line: str, day: datetime.date) -> tuple[str, str, str, str]:
    """Return the bar in one line, as BAR_COLUMNS.

    Raises:
        ValueError: the line is no bar of that day; the message is the reason.
    """
    try:
        # One line at a time: an unclosed quote must not swallow the lines that follow.
        (fields,) = csv.reader([line], strict=True)
    except csv.Error as error:
        raise ValueError(f"not CSV: {error}") from None
    if len(fields) != len(COLUMNS):
        raise ValueError(f"{len(fields)} columns instead of {len(COLUMNS)}")
    ticker = fields[MNEMONIC].strip()
    if not ticker:
        raise ValueError("no Mnemonic")
    if fields[DATE].strip() != day.isoformat():
        raise ValueError(f"Date is {fields[DATE].strip()!r}, not {day.isoformat()}")
    price = parse_price(fields[END_PRICE])
    if price is None:
        raise ValueError(f"EndPrice is {fields[END_PRICE]!r}, which is no price")
    return day.isoformat(), fields[TIME].strip(), ticker, price


def read_bars(source: Iterable[str], day: datetime.date, name: str, result: Ingested) -> Iterator[Sequence[str]]:
    """Yield the bars of a file and count them, and the refused lines, in ``result``.

    Args:
        source: the file's lines, opened with ``newline=""``.
        day: the only trading date accepted.
        name: the file's name for messages.
        result: is filled while the bars are consumed.

    Raises:
        FormatError: there is no header, or another one.
    """
    lines = iter(source)
    header = next(lines, "").rstrip("\r\n").removeprefix("\ufeff")
    if not header:
        raise FormatError(f"{name}: empty; even a file without bars has a header")
    if tuple(next(csv.reader([header]), ())) != COLUMNS:
        raise FormatError(f"{name}: line 1 is not the header of a XETRA file but {header[:120]!r}")
    for number, raw in enumerate(lines, start=2):
        line = raw.rstrip("\r\n")
        if not line:
            continue
        try:
            bar = parse_line(line, day)
        except ValueError as error:
            result.rejects.append((number, str(error), line))
            continue
        result.rows += 1
        yield bar


def ingest_lines(source: Iterable[str], day: datetime.date, name: str, target: TextIO) -> Ingested:
    """Copy a file's bars into ``target`` as normalised CSV with the header BAR_COLUMNS.

    Raises:
        FormatError: there is no header, or another one.
    """
    result = Ingested()
    writer = csv.writer(target, lineterminator="\n")
    bars = read_bars(source, day, name, result)
    # The first bar is asked for before anything is written: a file with a wrong header leaves nothing behind.
    first = next(bars, None)
    writer.writerow(BAR_COLUMNS)
    if first is not None:
        writer.writerow(first)
        writer.writerows(bars)
    return result


# --- averages ------------------------------------------------------------------------------------


def exact_average(total: Decimal, count: int) -> Decimal:
    """Return total / count, rounded half up to AVERAGE_DIGITS digits."""
    with localcontext() as context:
        context.prec = 60
        return (total / count).quantize(Decimal(1).scaleb(-AVERAGE_DIGITS), rounding=ROUND_HALF_UP)


def read_averages(source: Iterable[str], day: datetime.date) -> tuple[list[tuple[str, Decimal]], int]:
    """Read the Spark job's result: ``(ticker, average)`` of each ticker, and the number of bars behind them.

    Raises:
        FormatError: the file is not a complete result for that day.
    """
    reader = csv.reader(source, strict=True)
    if tuple(next(reader, ())) != AVERAGE_COLUMNS:
        raise FormatError("the averages have no header or another one")
    averages: dict[str, Decimal] = {}
    bars = 0
    for number, row in enumerate(reader, start=2):
        if len(row) != len(AVERAGE_COLUMNS) or row[0] != day.isoformat() or row[1] in averages:
            raise FormatError(f"the averages' line {number} is not one ticker of {day.isoformat()}: {row}")
        averages[row[1]] = Decimal(row[2])
        bars += int(row[3])
    return list(averages.items()), bars


def upsert_averages(connection: Any, day: datetime.date, averages: Sequence[tuple[str, Decimal]]) -> tuple[int, int]:
    """Make the table hold exactly these averages for the day, in one transaction.

    Args:
        connection: an open DB-API connection to PostgreSQL, psycopg 2 or 3, not in autocommit mode.
        day: the trading date; rows of other days are not touched.
        averages: ``(ticker, average)``.

    Returns:
        how many rows were written (new or changed) and how many deleted (no longer among the averages).
    """
    tickers = [ticker for ticker, _ in averages]
    prices = [price for _, price in averages]
    try:
        with closing(connection.cursor()) as cursor:
            # Two runs for one day come one after the other, and so do two that both want to create the table.
            cursor.execute("SELECT pg_advisory_xact_lock(hashtext(%s))", (_TABLE,))
            cursor.execute(
                f"CREATE TABLE IF NOT EXISTS {_TABLE} (trading_date date NOT NULL, ticker text NOT NULL,"
                " avg_price numeric NOT NULL, PRIMARY KEY (trading_date, ticker))"
            )
            cursor.execute(
                f"DELETE FROM {_TABLE} WHERE trading_date = %s AND NOT (ticker = ANY(%s::text[]))", (day, tickers)
            )
            deleted = cursor.rowcount
            cursor.execute(
                f"INSERT INTO {_TABLE} AS old (trading_date, ticker, avg_price)"
                " SELECT %s, ticker, trim_scale(price)"
                " FROM unnest(%s::text[], %s::numeric[]) AS new (ticker, price)"
                " ON CONFLICT (trading_date, ticker) DO UPDATE SET avg_price = excluded.avg_price"
                " WHERE old.avg_price IS DISTINCT FROM excluded.avg_price",
                (day, tickers, prices),
            )
            written = cursor.rowcount
        connection.commit()
    except BaseException:
        connection.rollback()
        raise
    return written, deleted
