#!/usr/bin/env bash
# For machines without internet: collect packages and weights where there is internet, install them where there is none.
#
#     launch/offline.sh make [--python 3.X] [--without-torch | --have LIST] [--weights RECIPE ...] DIR
#     launch/offline.sh install [--target FOLDER] DIR
#
#   PYTHON   the interpreter; default: that of .venv if it exists. `install` installs into it.
#
# --help explains the options; docs/offline.md the whole way.
source "$(dirname "${BASH_SOURCE[0]}")/interpreter.sh"
exec "$python" "$here/offline.py" "$@"
