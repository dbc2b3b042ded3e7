# To be sourced by the launchers: sets $python to the interpreter and $here to the folder of the launchers.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-$here/../.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=$(command -v python || echo python3)
export PYTHONPATH=${here%/*}${PYTHONPATH:+:$PYTHONPATH}  # the packages of this folder, installed or not
