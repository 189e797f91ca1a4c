"""The pipeline's own code, without Airflow and Spark: names, reader, averages, settings, and the SQL's order."""

import csv
import datetime
import importlib.util
import io
import json
import sys
from decimal import Decimal
from pathlib import Path

import pytest
from pipelib import settings, storage, xetra

PROJECT = Path(__file__).resolve().parents[2]
DAY = datetime.date(2026, 3, 2)
HEADER = ",".join(xetra.COLUMNS)
GOOD = 'DE0001,QAA,"ALBER ETF, ACC",ETF,EUR,1,2026-03-02,08:00,10,11,9,{price},100,5'


def ingest(*lines, end="\n"):
    target = io.StringIO()
    source = io.StringIO(end.join([HEADER, *lines]) + end, newline="")
    result = xetra.ingest_lines(source, DAY, "file.csv", target)
    return result, list(csv.reader(io.StringIO(target.getvalue())))


class TestNames:
    def test_day_is_the_logical_dates_in_utc(self):
        assert xetra.trading_day(datetime.datetime.fromisoformat("2026-03-02T23:59:59+00:00")) == DAY
        assert xetra.trading_day(datetime.datetime.fromisoformat("2026-03-03T00:30:00+01:00")) == DAY

    def test_no_logical_date_is_an_error(self):
        with pytest.raises(ValueError, match="no logical date"):
            xetra.trading_day(None)

    def test_pattern_skips_other_markets(self, tmp_path):
        for name in ("2026-03-02_BINS_XETR08.csv", "2026-03-02_BINS_XEUR08.csv", "2026-03-02_BINS_XETR08.csv.part"):
            (tmp_path / name).touch()
        assert [path.name for path in tmp_path.glob(xetra.file_pattern(DAY))] == ["2026-03-02_BINS_XETR08.csv"]

    def test_staging_folders_differ_and_suit_hadoop(self):
        runs = ["manual__2026-03-02T08:00:00+00:00", "manual__2026-03-02T08:00:00-00:00", "x" * 250, "../../etc"]
        folders = [xetra.run_folder(DAY, run) for run in runs]
        assert len(set(folders)) == len(runs)
        for folder in folders:
            assert folder.startswith("xetra_daily_average/2026-03-02/")
            assert folder.count("/") == 2
            assert ":" not in folder
            assert len(folder) < 160


class TestReader:
    def test_quoted_commas(self):
        result, rows = ingest(GOOD.format(price="10.50"))
        assert (result.rows, result.rejects) == (1, [])
        assert rows == [list(xetra.BAR_COLUMNS), ["2026-03-02", "08:00", "QAA", "10.50"]]

    def test_only_a_header(self):
        result, rows = ingest()
        assert (result.rows, result.reject_share(), rows) == (0, 0.0, [list(xetra.BAR_COLUMNS)])

    def test_windows_line_ends_blank_lines_and_byte_order_mark(self):
        source = io.StringIO("\ufeff" + HEADER + "\r\n\r\n" + GOOD.format(price="1") + "\r\n\r\n", newline="")
        result = xetra.ingest_lines(source, DAY, "file.csv", io.StringIO())
        assert (result.rows, result.rejects) == (1, [])

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ("a,b", "2 columns"),
            (GOOD.format(price="1") + ",0", "15 columns"),
            (GOOD.format(price="n/a"), "EndPrice"),
            (GOOD.format(price=""), "EndPrice"),
            (GOOD.format(price="NaN"), "EndPrice"),
            (GOOD.format(price="1_000"), "EndPrice"),
            (GOOD.format(price='"1,5"'), "EndPrice"),
            (GOOD.format(price="1e50"), "EndPrice"),
            (GOOD.format(price="0.1234567890123456789"), "EndPrice"),
            (GOOD.format(price="1").replace("QAA", " "), "Mnemonic"),
            (GOOD.format(price="1").replace("2026-03-02", "2026-03-01"), "Date"),
            (GOOD.format(price="1").replace(' ACC"', ' ACC"x'), "not CSV"),
            (GOOD.format(price="1").replace(' ACC"', " ACC"), "not CSV"),
        ],
    )
    def test_bad_lines_are_refused_alone(self, line, reason):
        result, rows = ingest(GOOD.format(price="1"), line, GOOD.format(price="3"))
        assert result.rows == 2
        assert len(rows) == 3
        ((number, why, text),) = result.rejects
        assert number == 3
        assert reason in why
        assert text == line
        assert result.reject_share() == pytest.approx(1 / 3)

    @pytest.mark.parametrize("text", ["", "\n", "ISIN,Mnemonic\n", HEADER + ",More\n", GOOD.format(price="1") + "\n"])
    def test_another_header_leaves_nothing(self, text):
        target = io.StringIO()
        with pytest.raises(xetra.FormatError, match=r"file\.csv"):
            xetra.ingest_lines(io.StringIO(text), DAY, "file.csv", target)
        assert target.getvalue() == ""

    @pytest.mark.parametrize(
        ("text", "price"),
        [("10", "10"), ("1.50", "1.50"), (".5", "0.5"), ("1e2", "100"), ("+7", "7"), (" 3.1 ", "3.1")],
    )
    def test_prices_stay_exact(self, text, price):
        assert xetra.parse_price(text) == price


class TestAverages:
    def test_rounds_half_up_once(self):
        assert xetra.exact_average(Decimal("0.00000000005"), 1) == Decimal("1E-10")
        assert xetra.exact_average(Decimal(2), 3) == Decimal("0.6666666667")
        assert xetra.exact_average(Decimal("0.00000000009999999999"), 2) == Decimal("0E-10")

    def test_result_is_read_completely(self):
        text = "trading_date,ticker,avg_price,bars\n2026-03-02,QAA,1.5000000000,2\n2026-03-02,QAB,2,3\n"
        assert xetra.read_averages(io.StringIO(text), DAY) == ([("QAA", Decimal("1.5")), ("QAB", Decimal(2))], 5)

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "ticker,avg_price\n",
            "trading_date,ticker,avg_price,bars\n2026-03-01,QAA,1,1\n",
            "trading_date,ticker,avg_price,bars\n2026-03-02,QAA,1\n",
            "trading_date,ticker,avg_price,bars\n2026-03-02,QAA,1,1\n2026-03-02,QAA,1,1\n",
        ],
    )
    def test_a_damaged_result_is_refused(self, text):
        with pytest.raises(xetra.FormatError):
            xetra.read_averages(io.StringIO(text), DAY)

    def test_spark_job_and_library_round_alike(self, monkeypatch):
        job = load_job(monkeypatch)
        for total, bars in [(Decimal("100.05"), 7), (Decimal("0.00000000005"), 1), (Decimal(1), 3), (Decimal(-1), 8)]:
            assert job.average(total, bars) == xetra.exact_average(total, bars)

    def test_spark_job_writes_all_or_nothing(self, monkeypatch, tmp_path):
        job = load_job(monkeypatch)
        target = job.local_path(f"file://{tmp_path}/averages.csv")
        job.write_result(target, [("2026-03-02", "QAA", "1.5", 2)])
        assert [path.name for path in tmp_path.iterdir()] == ["averages.csv"]
        assert xetra.read_averages(target.open(), DAY) == ([("QAA", Decimal("1.5"))], 2)
        with pytest.raises(ValueError, match="file://"):
            job.local_path("s3://bucket/averages.csv")


def load_job(monkeypatch):
    """The Spark job's module, with an empty stand-in for pyspark, which the controller does not have."""
    for name in ("pyspark", "pyspark.sql"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))
    sql = sys.modules["pyspark.sql"]
    sql.DataFrame = sql.SparkSession = sql.functions = object
    spec = importlib.util.spec_from_file_location("job", PROJECT / "files/spark/xetra_daily_average.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeConnection:
    """Records what happens, in order; the statements run for real in the scenario default."""

    rowcount = 3

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def cursor(self):
        return self

    def execute(self, statement, parameters=None):
        self.calls.append(statement.split(" ")[0])
        if self.fails_at == self.calls[-1]:
            raise RuntimeError("the connection is gone")

    def close(self):
        self.calls.append("close")

    def commit(self):
        self.calls.append("commit")

    def rollback(self):
        self.calls.append("rollback")


class TestUpsert:
    def test_one_transaction(self):
        connection = FakeConnection()
        assert xetra.upsert_averages(connection, DAY, [("QAA", Decimal(1))]) == (3, 3)
        assert connection.calls == ["SELECT", "CREATE", "DELETE", "INSERT", "close", "commit"]

    @pytest.mark.parametrize("statement", ["SELECT", "CREATE", "DELETE", "INSERT"])
    def test_a_failure_changes_nothing(self, statement):
        connection = FakeConnection(fails_at=statement)
        with pytest.raises(RuntimeError):
            xetra.upsert_averages(connection, DAY, [])
        assert connection.calls[-1] == "rollback"
        assert "commit" not in connection.calls


class LocalPath(type(Path())):
    """A path that looks like Airflow's: it knows its protocol and its path without it."""

    protocol = "file"
    path = property(str)


class TestStorage:
    def test_publish_is_all_or_nothing_and_readable(self, tmp_path):
        target = LocalPath(tmp_path / "a.csv")
        assert storage.publish(target, lambda file: file.write("good\n")) == 5

        def fail(file):
            file.write("half")
            raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            storage.publish(target, fail)
        assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
        assert target.read_text() == "good\n"
        assert target.stat().st_mode & 0o777 == 0o644

    def test_folders_are_open_to_the_executors(self, tmp_path):
        tmp_path.chmod(0o700)
        root = LocalPath(tmp_path)
        storage.make_folders(root, root / "x" / "y")
        assert (tmp_path / "x").stat().st_mode & 0o777 == (tmp_path / "x/y").stat().st_mode & 0o777 == 0o755
        assert tmp_path.stat().st_mode & 0o777 == 0o700, "the folder that was given is left alone"


SETTINGS = {
    "landing_url": "file:///l", "staging_url": "file:///s", "storage_conn_id": None, "schedule": None,
    "start_date": "2017-06-17", "max_active_runs": 1, "max_reject_share": 0, "retries": 1, "retry_delay_s": 1,
    "task_timeout_s": 1, "owner": "o", "postgres_conn_id": "p", "spark_conn_id": "s", "spark_conf": {},
}  # fmt: skip


class TestSettings:
    def load(self, tmp_path, **changes):
        file = tmp_path / "settings.json"
        file.write_text(json.dumps({"xetra": SETTINGS | changes}))
        return settings.load_xetra(file)

    def test_good(self, tmp_path):
        assert self.load(tmp_path).start() == datetime.datetime(2017, 6, 17, tzinfo=datetime.UTC)

    @pytest.mark.parametrize(
        "changes", [{"retries": "3"}, {"retries": True}, {"landing_url": None}, {"spark_conf": "x"}, {"colour": "blue"}]
    )
    def test_bad(self, tmp_path, changes):
        with pytest.raises(settings.SettingsError, match=f"xetra.{next(iter(changes))}"):
            self.load(tmp_path, **changes)
