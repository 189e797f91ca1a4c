"""The generator of sample data: the original's format, the same bytes for the same seed, the right averages."""

import csv
from decimal import Decimal

import pytest
import xetra_generator as generator

DAY = "2026-03-02"
HEADER = (
    "ISIN,Mnemonic,SecurityDesc,SecurityType,Currency,SecurityID,Date,Time,"
    "StartPrice,MaxPrice,MinPrice,EndPrice,TradedVolume,NumberOfTrades"
)


def generate(folder, *extra):
    assert generator.main(["--date", DAY, "--output", str(folder), "--expected", str(folder / "e.csv"), *extra]) == 0
    return {path.name: path.read_text() for path in sorted((folder / DAY).iterdir())}


def read(files):
    for name, text in files.items():
        for row in list(csv.reader(text.splitlines(), strict=True))[1:]:
            yield name, row


def test_format(tmp_path):
    files = generate(tmp_path, "--rows", "2000", "--tickers", "20")
    assert list(files) == [f"{DAY}_BINS_XETR{hour:02d}.csv" for hour in range(7, 21)]
    assert {text.splitlines()[0] for text in files.values()} == {HEADER}
    assert files[f"{DAY}_BINS_XETR19.csv"] == HEADER + "\n", "hours without trading hold only the header"
    rows = list(read(files))
    assert len(rows) == 2000
    for name, row in rows:
        assert len(row) == 14
        assert row[6] == DAY
        assert row[7].startswith(name[-6:-4] + ":")
        start, high, low, end = map(Decimal, row[8:12])
        assert 0 < low <= min(start, end) <= max(start, end) <= high
    assert any("," in row[2] for _, row in rows), "some descriptions need quotes"
    assert len({(row[1], row[7]) for _, row in rows}) == 2000, "one bar per ticker and minute"


def test_expected_averages_are_the_means_of_what_was_written(tmp_path):
    files = generate(tmp_path, "--rows", "1500", "--tickers", "30", "--malformed", "25")
    prices = {}
    for _, row in read(files):
        if len(row) == 14 and row[11] != "n/a":
            prices.setdefault(row[1], []).append(Decimal(row[11]))
    expected = list(csv.reader((tmp_path / "e.csv").open()))
    assert expected[0] == ["trading_date", "ticker", "avg_price"]
    assert [row[1] for row in expected[1:]] == sorted(prices)
    for _, ticker, average in expected[1:]:
        assert abs(Decimal(average) - sum(prices[ticker]) / len(prices[ticker])) <= Decimal("5e-11")


def test_deterministic(tmp_path):
    first = generate(tmp_path / "1", "--rows", "300")
    assert generate(tmp_path / "2", "--rows", "300") == first
    assert generate(tmp_path / "3", "--rows", "300", "--seed", "2") != first


def test_a_day_without_bars_and_other_markets(tmp_path):
    files = generate(tmp_path, "--rows", "0", "--hours", "0-23", "--other-market")
    assert len(files) == 25
    assert f"{DAY}_BINS_XEUR08.csv" in files
    assert all(text == HEADER + "\n" for name, text in files.items() if "XETR" in name)
    assert (tmp_path / "e.csv").read_text() == "trading_date,ticker,avg_price\n"


def test_every_security_has_a_ticker_of_its_own():
    names = [generator.make_mnemonic(index) for index in range(5000)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("arguments", [["--rows", "999999", "--tickers", "2"], ["--hours", "20-7"], ["--tickers", "0"]])
def test_impossible_requests_are_refused(tmp_path, arguments):
    with pytest.raises(SystemExit):
        generate(tmp_path, *arguments)
    assert not (tmp_path / DAY).exists()
