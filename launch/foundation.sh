#!/usr/bin/env bash
# Read new recordings with what the sites of others have learned to read from a network (docs/foundation.md).
#
#     bash launch/foundation.sh DATA [DATA ...] --new DIR [DIR ...] --out RUNS [--compare] [-n N]
#
#   PYTHON   the interpreter; default: that of .venv if it exists
#
# The same line goes on where it was stopped. --help explains the options.
source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
exec "$python" "$here/../train/foundation.py" "$@"
