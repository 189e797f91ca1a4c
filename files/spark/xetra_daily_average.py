"""Spark job: the unweighted mean of EndPrice over all minute bars, per ticker, of one trading date.

    spark-submit xetra_daily_average.py --date 2026-03-02 --input file:///…/bars --output file:///…/averages.csv

reads the normalised bars (CSV with the header ``trading_date,trading_time,ticker,end_price``) of all files in
``--input`` on the executors, and writes ``trading_date,ticker,avg_price,bars`` as one file, which appears complete or
not at all. No bars give a file with only the header.

The executors add up DECIMAL(38,18), which is exact in any order; the division is done once per ticker, in the driver,
and rounded half up to ten digits. A mean of doubles would depend on how the bars were partitioned. The driver writes
the result itself: it is one small row per ticker, and so only the driver's user needs to write to the shared storage.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal, localcontext
from pathlib import Path
from urllib.parse import unquote, urlsplit

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as f

SCHEMA = "trading_date STRING, trading_time STRING, ticker STRING, end_price DECIMAL(38,18)"


def sums_by_ticker(bars: DataFrame, day: str) -> DataFrame:
    """Return ticker, exact sum of end_price and number of bars of the day's bars."""
    return (
        bars.where(f.col("trading_date") == day)
        .groupBy("ticker")
        .agg(f.sum("end_price").alias("total"), f.count("*").alias("bars"))
    )


def average(total: Decimal, bars: int) -> Decimal:
    """Return the mean, rounded half up to ten digits."""
    with localcontext() as context:
        context.prec = 60
        return (total / bars).quantize(Decimal("1e-10"), rounding=ROUND_HALF_UP)


def local_path(url: str) -> Path:
    """Return the path of a file URL.

    Raises:
        ValueError: the URL is none of a mounted file system.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("", "file"):
        raise ValueError(f"--output must be a file:// URL on storage that all workers share, not {url}")
    return Path(unquote(parts.path))


def write_result(path: Path, rows: Sequence[Sequence[object]]) -> None:
    """Write the result so that a reader sees all of it or nothing, and every user may read it."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("trading_date", "ticker", "avg_price", "bars"))
        writer.writerows(rows)
    part.chmod(0o644)
    os.replace(part, path)


def main(argv: Sequence[str]) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--date", required=True, help="trading date, YYYY-MM-DD")
    parser.add_argument("--input", required=True, help="URL of the folder with the bars")
    parser.add_argument("--output", required=True, help="URL of the file to write")
    parser.add_argument("--expect-bars", type=int, help="fail unless --input holds exactly so many bars")
    options = parser.parse_args(argv)
    target = local_path(options.output)

    spark = SparkSession.builder.appName(f"xetra_daily_average {options.date}").getOrCreate()
    try:
        # FAILFAST: the bars were checked when they were written, so whatever is odd now is damage.
        bars = spark.read.csv(options.input, schema=SCHEMA, header=True, mode="FAILFAST", pathGlobFilter="*.csv")
        rows = sorted(
            (options.date, row["ticker"], f"{average(row['total'], row['bars']):f}", row["bars"])
            for row in sums_by_ticker(bars, options.date).collect()
        )
    finally:
        spark.stop()
    found = sum(row[3] for row in rows)
    if options.expect_bars is not None and found != options.expect_bars:
        # A network file system may show a folder as it was some seconds ago; a retry reads it anew.
        print(f"{options.input} holds {found} bars instead of {options.expect_bars}", file=sys.stderr)
        return 1
    write_result(target, rows)
    print(f"{options.date}: {found} bars of {len(rows)} tickers -> {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
