#!/usr/bin/env bash
# Check and measure on one GPU what cannot be known without one; docs/gpu.md says what it tells. It needs no network.
#
#     bash benchmarks/gpu_check.sh [--kit DIR] [--parts P,P,...] [--only WORD,...] [--seconds 400] [--device cuda|cpu]
#                                  [--out DIR]
#
#   --kit DIR   first install what is missing from a folder of `launch/offline.sh make`
#   PYTHON      the interpreter, which has torch; default: that of .venv if it exists, else python
#   the others  see benchmarks/gpu_check.py
source "$(dirname "${BASH_SOURCE[0]}")/../launch/interpreter.sh"
root=$(cd "$here/.." && pwd)

options=()
while [ $# -gt 0 ]; do
    case $1 in
        --kit)
            [ $# -gt 1 ] || { echo "error: --kit needs a folder" >&2; exit 2; }
            PYTHON=$python bash "$here/offline.sh" install "$2"
            shift 2 ;;
        *) options+=("$1"); shift ;;
    esac
done
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" "$root/benchmarks/gpu_check.py" "${options[@]}"
