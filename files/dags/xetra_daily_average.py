"""Daily average prices of the XETRA minute bars; see the DAG's documentation below."""

from __future__ import annotations

import csv
import datetime
import logging
from contextlib import closing
from pathlib import Path
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.providers.postgres.hooks.postgres import PostgresHook
from airflow.sdk import ObjectStoragePath, dag, get_current_context, task
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException
from pipelib import storage, xetra
from pipelib.settings import load_xetra

DOC = """
### Daily average prices from XETRA minute bars

Reads the hourly files `<day>/<day>_BINS_XETR<hour>.csv` of **one day, the run's logical date in UTC**, and leaves the
unweighted mean of `EndPrice` over all minute bars of each `Mnemonic` in `avg_xetra(trading_date, ticker, avg_price)`.
The clock plays no part, so any day can be run again or back-filled; the table is the same each time.

| task | what it does |
| --- | --- |
| `list_files` | finds the day's files; **without any, the run is skipped** and the table stays as it is |
| `ingest` | one per file: checks every line and writes the bars to staging; refused lines go to `rejects/` there |
| `daily_average` | Spark batch on the cluster |
| `load` | one transaction: upserts the day's averages, and deletes tickers the day no longer has |
| `cleanup` | removes the run's staging, refused lines excepted |

Files with only a header are normal. If all of them are, the day has no bars and no rows in the table.
A file with more than the permitted share of refused lines fails its `ingest`, without retries; correct the file and
clear the failed tasks. After a failure, staging is kept; clear from `list_files` to start over.
"""

log = logging.getLogger(__name__)
settings = load_xetra()
SPARK_JOB = Path(__file__).parent / "spark" / "xetra_daily_average.py"


def storage_path(url: str) -> ObjectStoragePath:
    """Return the path for a URL, with the connection that holds its credentials, if any."""
    return ObjectStoragePath(url, conn_id=settings.storage_conn_id)


def staging_url(day: str, run_id: str) -> str:
    """Return the URL of a run's staging folder."""
    return f"{settings.staging_url.rstrip('/')}/{xetra.run_folder(datetime.date.fromisoformat(day), run_id)}"


def this_run() -> tuple[datetime.date, ObjectStoragePath]:
    """Return the day the running task is for, and its run's staging folder."""
    context = get_current_context()
    try:
        day = xetra.trading_day(context.get("logical_date"))
    except ValueError as error:
        raise AirflowFailException(str(error)) from None
    return day, storage_path(staging_url(day.isoformat(), context["run_id"]))


@dag(
    schedule=settings.schedule,
    start_date=settings.start(),
    catchup=False,
    max_active_runs=settings.max_active_runs,
    default_args={
        "owner": settings.owner,
        "retries": settings.retries,
        "retry_delay": datetime.timedelta(seconds=settings.retry_delay_s),
        "retry_exponential_backoff": True,
        "max_retry_delay": datetime.timedelta(seconds=settings.retry_delay_s * 8),
        "execution_timeout": datetime.timedelta(seconds=settings.task_timeout_s),
    },
    user_defined_macros={"staging_url": staging_url},
    tags=["xetra", "spark", "sample"],
    doc_md=DOC,
)
def xetra_daily_average() -> None:
    """Ingest a day's bars, average them on Spark, load the averages."""

    @task
    def list_files() -> list[str]:
        """Return the URLs of the day's files, and make the run's staging folder anew."""
        day, staging = this_run()
        folder = storage_path(settings.landing_url) / day.isoformat()
        pattern = xetra.file_pattern(day)
        files = sorted(str(path) for path in folder.glob(pattern)) if folder.is_dir() else []
        if not files:
            raise AirflowSkipException(f"no file {folder}/{pattern}: nothing was traded, or nothing has arrived")
        storage.remove(staging)
        for name in ("bars", "rejects"):
            storage.make_folders(storage_path(settings.staging_url), staging / name)
        log.info("%d files of %s", len(files), day)
        return files

    @task
    def ingest(url: str) -> dict[str, int]:
        """Check one file and write its bars to staging; return the number of bars and of refused lines."""
        day, staging = this_run()
        source = storage_path(url)
        size = source.stat().st_size

        def copy(target: Any) -> xetra.Ingested:
            # The description may be in another encoding; what is used of a bar is plain ASCII.
            with source.open("r", newline="", encoding="utf-8", errors="replace") as lines:
                return xetra.ingest_lines(lines, day, url, target)

        result = storage.publish(staging / "bars" / source.name, copy)
        if source.stat().st_size != size:
            raise RuntimeError(f"{url} grew or shrank while it was read")
        rejects = staging / "rejects" / source.name
        if result.rejects:
            rows = [(url, line, reason, text) for line, reason, text in result.rejects]
            storage.publish(rejects, lambda file: csv.writer(file).writerows([xetra.REJECT_COLUMNS, *rows]))
            for line, reason, _ in result.rejects[:5]:
                log.warning("%s line %d: %s", url, line, reason)
        else:
            storage.remove(rejects)
        log.info("%s: %d bars, %d lines refused", url, result.rows, len(result.rejects))
        if result.reject_share() > settings.max_reject_share:
            line, reason, _ = result.rejects[0]
            raise AirflowFailException(
                f"{url}: {len(result.rejects)} of {result.rows + len(result.rejects)} lines refused, more than"
                f" {settings.max_reject_share:.2%}; the first is line {line}: {reason}; all are in {rejects}"
            )
        return {"rows": result.rows, "rejects": len(result.rejects)}

    daily_average = SparkSubmitOperator(
        task_id="daily_average",
        conn_id=settings.spark_conn_id,
        application=str(SPARK_JOB),
        name="xetra_daily_average {{ ds }}",
        conf=settings.spark_conf,
        application_args=[
            "--date={{ ds }}",
            "--input={{ staging_url(ds, run_id) }}/bars",
            "--output={{ staging_url(ds, run_id) }}/averages.csv",
            "--expect-bars={{ ti.xcom_pull(task_ids='ingest') | sum(attribute='rows') }}",
        ],
    )

    @task
    def load() -> dict[str, int]:
        """Put the averages into the table; return how many rows were written and deleted."""
        day, staging = this_run()
        with (staging / "averages.csv").open("r", newline="", encoding="utf-8") as file:
            averages, bars = xetra.read_averages(file, day)
        with closing(PostgresHook(postgres_conn_id=settings.postgres_conn_id).get_conn()) as connection:
            written, deleted = xetra.upsert_averages(connection, day, averages)
        log.info("%s: %d tickers from %d bars, %d written, %d deleted", day, len(averages), bars, written, deleted)
        return {"tickers": len(averages), "bars": bars, "written": written, "deleted": deleted}

    @task
    def cleanup() -> None:
        """Remove the run's staging folder; files of refused lines stay."""
        _, staging = this_run()
        rejects = staging / "rejects"
        keep = rejects.is_dir() and any(rejects.iterdir())
        for path in [staging / "bars", staging / "averages.csv"] if keep else [staging]:
            storage.remove(path)

    ingest.expand(url=list_files()) >> daily_average >> load() >> cleanup()


xetra_daily_average()
