#!/usr/bin/env bash
# Runs molecule scenarios, all of them whatever happens, and ends with a table: the first by itself, in the lab "test",
# since it needs the whole machine; the others two at a time, each lane in a lab of its own.
set -uo pipefail
cd "$(dirname "$0")/../.."
export ANSIBLE_FORCE_COLOR=0 NO_COLOR=1
export LOGS=.cache/molecule
rm -rf "$LOGS" && mkdir -p "$LOGS"

# scenario <lab> <name>: runs one; writes its line of the table to $LOGS/<name>.row.
scenario() {
  local lab=$1 name=$2 from result=ok
  from=$(date +%s)
  if ! LAB_NAME=$lab molecule test -s "$name" </dev/null; then
    result=FAILED
    # What is left of it would slow down the others.
    LAB_NAME=$lab molecule destroy -s "$name" </dev/null || true
  fi
  printf '%5d s  %-6s  molecule test -s %s\n' $(($(date +%s) - from)) "$result" "$name" >"$LOGS/$name.row"
}

# in_lane <name>: one of the scenarios that run side by side. Its output is shown whole when it is over, so that two never mix.
in_lane() {
  printf '==> molecule test -s %s …\n' "$1"
  scenario "roles$LANE" "$1" >"$LOGS/$1.log" 2>&1
  {
    flock 9
    printf '\n==> molecule test -s %s\n' "$1"
    cat "$LOGS/$1.log" "$LOGS/$1.row"
  } 9>"$LOGS/lock"
}
export -f scenario in_lane

started=$(date +%s)
printf '\n==> molecule test -s %s\n' "$1"
scenario test "$1"
cat "$LOGS/$1.row"
printf '%s\0' "${@:2}" | xargs --null --max-procs=2 --max-args=1 --process-slot-var=LANE bash -c 'in_lane "$0"'

printf '\n'
cat "$LOGS"/*.row
printf '%5d s          all together\n' $(($(date +%s) - started))
failed=$(grep -l FAILED "$LOGS"/*.row | wc -l)
echo "scenarios: $(($# - failed)) passed, $failed failed"
[ "$failed" -eq 0 ] && [ "$(ls "$LOGS"/*.row | wc -l)" -eq $# ]
