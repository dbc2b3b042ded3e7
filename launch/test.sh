#!/usr/bin/env bash
# Set up, check the style, run all tests. Further words go to pytest: launch/test.sh -k metrics
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

"$python" -m ruff check .
"$python" -m ruff format --check .
exec "$python" -m pytest "$@"
