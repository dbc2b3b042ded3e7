#!/usr/bin/env bash
# Set up, check the style, run all tests. Further words go to pytest: launch/test.sh -k metrics
# `launch/test.sh --slurm` runs those on a real Slurm instead, and installs it (Debian's packages, as root);
# `launch/test.sh --browser` opens reports and TensorBoard in headless Chromium, and installs that;
# `launch/test.sh --slow` runs all the others, with those that take too long for every day.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

if [ "${1:-}" = --slurm ]; then
    shift
    command -v slurmctld sbatch munged >/dev/null || { apt-get update -q && apt-get install -y -q slurm-wlm munge; }
    SPIKETUNE_SLURM=1 OMP_NUM_THREADS=1 exec "$python" -m pytest tests/launch/test_slurm.py "$@"
fi

if [ "${1:-}" = --browser ]; then
    shift
    command -v chromium >/dev/null || { apt-get update -q && apt-get install -y -q chromium; }
    SPIKETUNE_BROWSER=1 OMP_NUM_THREADS=1 exec "$python" -m pytest tests/project/test_browser.py "$@"
fi

if [ "${1:-}" = --slow ]; then
    shift
    export SPIKETUNE_SLOW=1
fi

"$python" -m ruff check .
"$python" -m ruff format --check .
# Most of the time goes into starting processes that compute little: as many files at a time as there are cores, up to
# four, and one thread each.
workers=$(($(nproc) < 4 ? $(nproc) : 4))
OMP_NUM_THREADS=1 exec "$python" -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder --durations 25 "$@"
