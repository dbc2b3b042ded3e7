#!/usr/bin/env bash
# Set up, check the style, run all tests. Further words go to pytest: launch/test.sh -k metrics
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

"$python" -m ruff check .
"$python" -m ruff format --check .
# Most of the time goes into starting processes that compute little: as many files at a time as there are cores, up to
# four, and one thread each.
workers=$(($(nproc) < 4 ? $(nproc) : 4))
OMP_NUM_THREADS=1 exec "$python" -m pytest --numprocesses "$workers" --dist loadfile "$@"
