#!/usr/bin/env bash
# `make lab`: from a machine with git, make and Python to a cluster that has run a DAG. Run again, it converges in place.
set -euo pipefail
cd "$(dirname "$0")/../.."
. playbooks/lab/phase.sh
trap 'times; echo "make lab failed: see above; \`make lab\` goes on from here, \`make destroy\` starts over." >&2' ERR

play() { ansible-playbook -i inventories/lab/hosts.yml "$@"; }

phase "Packages of this machine" make --no-print-directory host
phase "Virtual environment" make --no-print-directory .venv/.complete
# Both are cached; the first time they are long, so they share the cores.
make --no-print-directory wheelhouse >.cache/wheelhouse.log 2>&1 &
wheels=$!
phase "Machine image" playbooks/lab/as-root.sh playbooks/lab/machines.py image debian-13
phase "Nine machines" play playbooks/lab/create.yml
phase "Secrets" make --no-print-directory secrets
phase "Wheels of Airflow and Spark" wait "$wheels" || { cat .cache/wheelhouse.log >&2; false; }
phase "site.yml" play site.yml
phase "Sample DAG" play playbooks/lab/sample.yml
trap - ERR
times
play playbooks/lab/summary.yml
