#!/usr/bin/env bash
# Runs molecule scenarios one after the other, all of them whatever happens, and ends with a table.
set -uo pipefail
cd "$(dirname "$0")/../.."
. playbooks/lab/phase.sh
export ANSIBLE_FORCE_COLOR=0 NO_COLOR=1

passed=0
failed=0
for scenario in "$@"; do
  if [ "$scenario" = default ]; then lab=test; else lab=roles; fi
  if LAB_NAME=$lab phase "molecule test -s $scenario" molecule test -s "$scenario" </dev/null; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    # What is left of it would slow down the others.
    LAB_NAME=$lab molecule destroy -s "$scenario" </dev/null || true
  fi
done
times
echo "scenarios: $passed passed, $failed failed"
[ "$failed" -eq 0 ]
