#!/usr/bin/env python3
"""Write one invented day of minute bars in the format of Deutsche Börse's public XETRA data set.

    xetra_generator.py --date 2026-03-02 --output /srv/landing/xetra --expected /tmp/expected.csv

writes ``<output>/2026-03-02/2026-03-02_BINS_XETRhh.csv``, one file per hour. Hours outside the trading day hold
only the header, as in the original. Names, prices and volumes are made up, and depend on nothing but the arguments:
the same seed and date give the same bytes.

``--expected`` writes the right daily averages (``trading_date,ticker,avg_price``), summed up as exact fractions
while the bars are written. It shares no code with the pipeline, so the two can be compared.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import random
import sys
from collections.abc import Iterator, Sequence
from decimal import ROUND_HALF_UP, Decimal, localcontext
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

HEADER = [
    "ISIN", "Mnemonic", "SecurityDesc", "SecurityType", "Currency", "SecurityID", "Date", "Time",
    "StartPrice", "MaxPrice", "MinPrice", "EndPrice", "TradedVolume", "NumberOfTrades",
]  # fmt: skip

# Hours (UTC) with bars; the market is closed in all others.
TRADING_HOURS = range(8, 17)

SYLLABLES = ("al", "ber", "cor", "dan", "el", "fin", "gra", "hel", "in", "ka", "lor", "mer", "nor", "ost", "ra", "tel")
# Some descriptions hold a comma: they are quoted in the file, and naive splitting breaks on them.
LEGAL_FORMS = ("AG O.N.", "SE NA O.N.", "ETF, ACC", "INH. EO 1,50", "HLDG PLC", "VZO O.N.", "A, B & CO.")


class Security(NamedTuple):
    """One security with the price its day starts from, in hundredths of a cent (1/10,000 EUR)."""

    isin: str
    mnemonic: str
    description: str
    kind: str
    identifier: int
    price: int


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--date", required=True, type=datetime.date.fromisoformat, help="trading date, YYYY-MM-DD")
    parser.add_argument("--output", required=True, type=Path, help="landing folder; the day's own folder is made in it")
    parser.add_argument("--rows", type=int, default=10_000, help="bars in all files together (default 10,000)")
    parser.add_argument("--tickers", type=int, default=100, help="securities (default 100)")
    parser.add_argument("--seed", type=int, default=1, help="another seed gives other data (default 1)")
    parser.add_argument("--hours", default="7-20", help="first and last hour with a file, UTC (default 7-20)")
    parser.add_argument("--malformed", type=int, default=0, help="broken rows to mix in; never part of the averages")
    parser.add_argument("--other-market", action="store_true", help="also write an XEUR file, which must be skipped")
    parser.add_argument("--expected", type=Path, help="write the right daily averages to this CSV file")
    options = parser.parse_args(argv)
    if options.tickers < 1 or options.rows < 0 or options.malformed < 0:
        parser.error("--tickers must be at least 1, --rows and --malformed at least 0")
    try:
        first, last = (int(part) for part in options.hours.split("-"))
    except ValueError:
        parser.error("--hours must be two hours, such as 7-20")
    if not 0 <= first <= last <= 23:
        parser.error("--hours must lie between 0 and 23")
    options.hours = range(first, last + 1)
    return options


def make_mnemonic(index: int) -> str:
    """Return a ticker of two to five characters, another one for every index."""
    letters = ""
    while True:
        index, digit = divmod(index, 26)
        letters = chr(ord("A") + digit) + letters
        if index == 0:
            break
    return "Q" + letters.rjust(2, "A")


def make_securities(dice: random.Random, count: int) -> list[Security]:
    """Invent securities."""
    securities = []
    for index in range(count):
        word = "".join(dice.choices(SYLLABLES, k=dice.randint(2, 3))).upper()
        securities.append(
            Security(
                isin=f"DE000{index:06d}{index % 10}",
                mnemonic=make_mnemonic(index),
                description=f"{word} {LEGAL_FORMS[index % len(LEGAL_FORMS)]}",
                kind="ETF" if "ETF" in LEGAL_FORMS[index % len(LEGAL_FORMS)] else "Common stock",
                identifier=2_504_000 + index,
                price=dice.randint(5_000, 3_000_000),
            )
        )
    return securities


def price_text(price: int) -> str:
    """Write a price the way the data set does: no more digits than it needs."""
    return f"{price / 10_000:.4f}".rstrip("0").rstrip(".")


def make_bars(
    dice: random.Random, day: datetime.date, securities: Sequence[Security], hours: Sequence[int], rows: int
) -> Iterator[tuple[int, int, list[str], int]]:
    """Yield ``(hour, index of the security, the row, its EndPrice)`` in the order of time.

    Every minute holds each security at most once, so no more bars can be made than there are minutes for.
    """
    minutes = [(hour, minute) for hour in hours for minute in range(60)]
    if rows > len(minutes) * len(securities):
        raise SystemExit(
            f"xetra_generator: {rows} rows need more securities: {len(securities)} in {len(minutes)} trading minutes"
            f" give at most {len(minutes) * len(securities)}"
        )
    prices = [security.price for security in securities]
    for number, (hour, minute) in enumerate(minutes):
        share = rows * (number + 1) // len(minutes) - rows * number // len(minutes)
        for index in sorted(dice.sample(range(len(securities)), share)):
            start = prices[index]
            end = max(1, start + dice.randint(-start // 400 - 1, start // 400 + 1))
            prices[index] = end
            security = securities[index]
            trades = dice.randint(1, 60)
            row = [
                security.isin, security.mnemonic, security.description, security.kind, "EUR",
                str(security.identifier), day.isoformat(), f"{hour:02d}:{minute:02d}",
                price_text(start), price_text(max(start, end)), price_text(min(start, end)), price_text(end),
                str(trades * dice.randint(1, 500)), str(trades),
            ]  # fmt: skip
            yield hour, index, row, end


def break_row(dice: random.Random, row: list[str]) -> list[str]:
    """Return a row no reader may accept: a column too few, one too many, or a price that is none."""
    kind = dice.randrange(3)
    if kind == 0:
        return row[:-1]
    if kind == 1:
        return [*row, "0"]
    return [*row[:11], "n/a", *row[12:]]


def write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    """Write a file so that a reader sees all of it or nothing."""
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    os.replace(part, path)


def expected_rows(
    day: datetime.date, securities: Sequence[Security], sums: Sequence[Fraction], counts: Sequence[int]
) -> list[list[str]]:
    """Return header and averages, rounded half up to ten digits, in the order of the tickers."""
    rows = []
    with localcontext() as context:
        context.prec = 60
        for security, total, count in zip(securities, sums, counts, strict=True):
            if count:
                mean = total / count
                average = (Decimal(mean.numerator) / Decimal(mean.denominator)).quantize(
                    Decimal("1e-10"), rounding=ROUND_HALF_UP
                )
                rows.append([day.isoformat(), security.mnemonic, f"{average:f}"])
    return [["trading_date", "ticker", "avg_price"], *sorted(rows)]


def generate(options: argparse.Namespace) -> int:
    """Write the day's files and, if asked for, the averages; return the number of good bars."""
    day: datetime.date = options.date
    dice = random.Random(f"{options.seed}/{day.isoformat()}")
    securities = make_securities(dice, options.tickers)
    files: dict[int, list[list[str]]] = {hour: [HEADER] for hour in options.hours}
    sums = [Fraction(0)] * len(securities)
    counts = [0] * len(securities)
    trading = [hour for hour in options.hours if hour in TRADING_HOURS]
    if options.rows and not trading:
        raise SystemExit("xetra_generator: no trading hour (8-16) in --hours: only --rows 0 is possible")
    for hour, index, row, end in make_bars(dice, day, securities, trading, options.rows) if options.rows else ():
        files[hour].append(row)
        sums[index] += Fraction(end, 10_000)
        counts[index] += 1
    good = [(hour, row) for hour in trading for row in files[hour][1:]]
    for _ in range(options.malformed if good else 0):
        hour, row = dice.choice(good)
        files[hour].insert(dice.randint(1, len(files[hour])), break_row(dice, row))

    folder: Path = options.output / day.isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    for hour, rows in files.items():
        write_csv(folder / f"{day.isoformat()}_BINS_XETR{hour:02d}.csv", rows)
    if options.other_market:
        other = Security("DE0009999999", "FREMD", "ANDERER MARKT", "Future", 1, 77_700)
        bar = [other.isin, other.mnemonic, other.description, other.kind, "EUR", "1", day.isoformat(), "08:00",
               "7.77", "7.77", "7.77", "7.77", "1", "1"]  # fmt: skip
        write_csv(folder / f"{day.isoformat()}_BINS_XEUR08.csv", [HEADER, bar])
    if options.expected:
        write_csv(options.expected, expected_rows(day, securities, sums, counts))
    return sum(counts)


def main(argv: Sequence[str]) -> int:
    """Entry point."""
    options = parse_arguments(argv)
    bars = generate(options)
    print(f"{options.date}: {bars} bars of {options.tickers} securities in {len(options.hours)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
