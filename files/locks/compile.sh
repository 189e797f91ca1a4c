#!/bin/sh
# Regenerates every lock from its .in file; `make locks` calls it. UV names the uv to use (default: the one in PATH).
#
# The locks depend on the .in files and the two dates alone: --upgrade ignores the pins of the existing locks, and
# --exclude-newer hides whatever was published later. To take newer releases, move the date.
set -eu

uv=$(command -v "${UV:-uv}") || { echo "compile.sh: no uv: set UV or PATH" >&2; exit 2; }
uv=$(realpath "$uv")
# Relative names, so that the "via" comments hold no path of this machine.
cd "$(dirname "$0")"

# The last day whose releases ran the whole stack; see airflow.in.
nodes_date=2026-09-18T00:00:00Z
controller_date=2026-11-18T00:00:00Z

# --no-config and --no-emit-index-url: a site's own index may be used (UV_DEFAULT_INDEX), but is not written down.
compile() {
    "$uv" pip compile --quiet --upgrade --no-config --no-python-downloads --generate-hashes --no-emit-index-url \
        --custom-compile-command "make locks" "$@"
}

for name in airflow spark watchdog; do
    for python in 3.11 3.13; do
        # wheelhouse.py reads the build options: they say what has to be built from source.
        compile "$name.in" --output-file "$name-py$python.txt" --exclude-newer "$nodes_date" \
            --python-version "$python" --python-platform x86_64-manylinux_2_28 --emit-build-options
    done
done

# One set of versions for every Python (`fewest`): two developers never deploy with two Ansibles.
compile controller.in --output-file controller.txt --exclude-newer "$controller_date" \
    --universal --python-version 3.11 --fork-strategy fewest
compile watchdog-dev.in --output-file watchdog-dev.txt --exclude-newer "$controller_date" \
    --universal --python-version 3.11 --fork-strategy fewest
