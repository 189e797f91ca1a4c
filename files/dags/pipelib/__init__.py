"""What the pipelines' DAGs share. Nothing in here needs Airflow, so that it can be tested without it."""
