#!/usr/bin/env bash
# Set up, check style and types, run all tests. Further arguments go to pytest: launch/test.sh -k metrics
#
#   --oldest    run them with the lowest versions that pyproject.toml admits, in .venv-oldest, without checks of style
#   --slow      run the tests that take minutes too, and start every process from a fresh interpreter
#   --slurm     run only those on a real Slurm, installed first where it is missing (Debian's packages, as root)
#   --browser   run only those in headless Chromium, installed likewise
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
if [ "${1:-}" = --oldest ]; then set_up_oldest; else set_up test style; fi

# COMMAND PACKAGE...: install the packages unless the command exists.
install_unless() {
    command -v "$1" >/dev/null || { apt-get update -q && apt-get install -y -q "${@:2}"; }
}

case "${1:-}" in
--slurm)
    install_unless slurmctld slurm-wlm munge
    SPIKETUNE_SLURM=1 OMP_NUM_THREADS=1 exec "$python" -m pytest tests/launch/test_slurm.py "${@:2}"
    ;;
--browser)
    install_unless chromium chromium
    SPIKETUNE_BROWSER=1 OMP_NUM_THREADS=1 exec "$python" -m pytest tests/project/test_browser.py "${@:2}"
    ;;
--slow)
    export SPIKETUNE_SLOW=1
    shift
    ;;
esac

types=
if [ "${1:-}" = --oldest ]; then
    shift
else
    "$python" -m ruff check .
    "$python" -m ruff format --check .
    # Types are checked while the tests run, which wait for one another now and then.
    "$python" -m mypy &
    types=$!
fi
unset PYTHONDONTWRITEBYTECODE  # as set in containers: the hundreds of processes would each compile what they import
# Most tests start processes that compute little: as many files at a time as there are cores, up to four, with one thread
# each.
cores=$(env -u OMP_NUM_THREADS nproc)  # which would count threads instead
workers=$((cores < 4 ? cores : 4))
failed=
OMP_NUM_THREADS=1 "$python" -m pytest \
    --numprocesses "$workers" --dist loadfile --no-loadscope-reorder --durations 25 "$@" || failed=tests
[ -z "$types" ] || wait "$types" || failed="$failed types"
[ -z "$failed" ] || fail "$failed"
