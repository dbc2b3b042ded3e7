#!/usr/bin/env bash
# Check on one GPU what cannot be checked without one: every strategy, speed, memory. Set up as launch/test.sh does, then
# under 8 minutes; without a GPU it says so and checks the rest on the CPU in under 4.
#
#     bash benchmarks/gpu_check.sh [OUT]
#
#   OUT    folder for gpu_check.json, gpu_check.md and logs    (default runs/gpu_check)
set -euo pipefail
out=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../runs/gpu_check}")
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup.sh"

exec timeout --kill-after 10 475 "$python" benchmarks/gpu_check.py "$out"
