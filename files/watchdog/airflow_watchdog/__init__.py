"""One Airflow scheduler in charge, always; and who is the primary of PostgreSQL and Redis."""

__version__ = "0.1.0"
