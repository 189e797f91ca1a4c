"""Tasks that take a while and each leave one row, which has to be there exactly once whatever fails around them."""

from __future__ import annotations

import datetime
import time
from typing import Any

from airflow.providers.postgres.hooks.postgres import PostgresHook
from airflow.sdk import dag, task


@dag(schedule=None, params={"count": 8, "seconds": 5}, tags=["faults"])
def fault_counter() -> None:
    """Count under failures."""

    @task(retries=3, retry_delay=datetime.timedelta(seconds=1))
    def numbers(params: dict[str, Any]) -> list[int]:
        PostgresHook("pipelines_db").run(
            "create table if not exists fault_rows (run_id text not null, number int not null)"
        )
        return list(range(int(params["count"])))

    @task(retries=3, retry_delay=datetime.timedelta(seconds=1))
    def count(number: int, run_id: str, params: dict[str, Any]) -> None:
        time.sleep(float(params["seconds"]))
        PostgresHook("pipelines_db").run(
            "insert into fault_rows (run_id, number) values (%s, %s)", parameters=(run_id, number)
        )

    count.expand(number=numbers())


fault_counter()
