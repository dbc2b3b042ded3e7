#!/usr/bin/env bash
# Check this machine, or several together, in about two minutes: versions, devices, network, the same losses on one
# process and on all, speed and memory of a large network's step under DDP and ZeRO-2, and whether the loader keeps up.
#
#     launch/check.sh [-n N] [--json FILE] [--rates-only] [--recipe RECIPE.yaml [--data DIR] [--section.key value ...]]
#     launch/check.sh --host ADDRESS[:PORT] --machines N --job NAME [-n N] [--json FILE]     # on each machine
#
#   -n N          number of processes (per machine); default: one per GPU, or one without GPUs
#   --json FILE   write what was measured to FILE, from which train/plan.py --rates FILE tells how long a run takes
#   --rates-only  measure rates, and check nothing
#   --recipe ...  also measure this recipe of a training or a probe, as it is given to train/finetune.py or
#                 train/probe.py (without --out); the last option, as all that follows belongs to it; a minute more
#   --host, --machines, --job, --join-seconds, PYTHON, GLOO_SOCKET_IFNAME ...    see launch/local.sh, launch/machines.sh
#
# Exit code 1 if a check failed; every line that failed says what to do. docs/launching.md shows it under Slurm.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

launcher=local
launch=() check=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        sed -n '2,/^set/{/^set/d;s/^# \?//;p}' "${BASH_SOURCE[0]}"
        exit
        ;;
    --json)
        [ $# -gt 1 ] || { echo "error: --json needs a file" >&2; exit 2; }
        check+=(--json "$2")
        shift
        ;;
    --rates-only) check+=(--rates-only) ;;
    --recipe)
        check+=("$@")
        break
        ;;
    *)
        [ "$1" != --host ] || launcher=machines
        launch+=("$1")
        ;;
    esac
    shift
done
CHECK_LAUNCHED=$(date +%s.%N) exec "$here/$launcher.sh" "${launch[@]}" "$here/../benchmarks/check.py" "${check[@]}"
