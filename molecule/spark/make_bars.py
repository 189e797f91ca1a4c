"""Bring a day of files into the form in which the pipeline hands it to Spark.

PYTHONPATH=files/dags make_bars.py <folder of the day's files> <folder for the bars>
"""

import datetime
import sys
from pathlib import Path

from pipelib import xetra


def main(source: Path, target: Path) -> None:
    """Ingest every file of the day."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.glob(xetra.file_pattern(datetime.date.fromisoformat(source.name))):
        with path.open(newline="") as lines, (target / path.name).open("w", newline="") as bars:
            xetra.ingest_lines(lines, datetime.date.fromisoformat(source.name), path.name, bars)


main(Path(sys.argv[1]), Path(sys.argv[2]))
