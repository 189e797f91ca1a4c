#!/bin/sh
# Runs the watchdog's tests with the given Python: the simulation beside the rest, which alone is measured for coverage
# (tracing would double the simulation's time).
set -eu
python=$(realpath -s "$1")
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
"$python" -m pytest tests/test_simulation.py >"$log" 2>&1 &
simulation=$!
status=0
COVERAGE_FILE="$log.coverage" "$python" -m pytest tests --ignore=tests/test_simulation.py --cov || status=$?
rm -f "$log.coverage"
wait "$simulation" || status=$?
cat "$log"
exit "$status"
