#!/bin/sh
# Runs one of the lab's Python scripts as root, with sudo where the caller is not.
set -eu
script=$1
shift
python="$(dirname "$0")/../../.venv/bin/python"
[ "$(id -u)" -eq 0 ] && exec "$python" "$script" "$@"
exec sudo "$python" "$script" "$@"
