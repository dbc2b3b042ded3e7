# To be sourced by quickstart.sh and test.sh, which call `set_up [EXTRA ...]`: it sets and exports PYTHON (and $python), an
# interpreter with the requirements.
#
#   PYTHON not set                     .venv is created with python3, or reused
#   PYTHON that has the requirements   it is used as it is: nothing is created, installed or downloaded
#   any other PYTHON                   .venv is created with it, or reused
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

fail() { echo "error: $*" >&2; exit 1; }

check_python() {
    command -v "$1" >/dev/null || fail "$1 not found; install Python 3.11 or newer, or set PYTHON"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$1 is $("$1" --version 2>&1); Python 3.11 or newer is needed (set PYTHON to choose another)"
}

# FOLDER PYTHON: a virtual environment, unless it exists.
create_environment() {
    [ ! -x "$1/bin/python" ] || return 0
    echo "creating $1 with $2"
    "$2" -m venv "$1" || fail "$2 cannot create virtual environments; install its venv module"
}

# FOLDER WORDS...: what pip would install into an environment. uv takes a third of the time where it is there; as it does
# not know the mirrors in pip's configuration, it is asked for an answer from its index first, and pip has the last word.
install() {
    if command -v uv >/dev/null && timeout 15 uv pip compile --quiet --no-cache - <<<pip >/dev/null 2>&1; then
        ! uv pip install --quiet --compile-bytecode --python "$1/bin/python" "${@:2}" || return 0
        echo "uv could not install this; trying pip"
    fi
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check "${@:2}"
}

# FOLDER PYTHON REQUIREMENTS: an environment with the requirements of a file and the project, made once for each content
# of that file and of pyproject.toml.
create_with_requirements() {
    local stamp
    stamp="$1/.installed-$(cat "$3" pyproject.toml | sha256sum | cut -d' ' -f1)"
    [ ! -e "$stamp" ] || return 0
    check_python "$2"
    command -v cc >/dev/null || command -v gcc >/dev/null || fail "no C compiler found; install one, such as gcc"
    create_environment "$1" "$2"
    echo "installing the requirements into $1 (once; a few minutes)"
    install "$1" -r "$3" || fail "the requirements could not be installed; without internet, see docs/offline.md"
    "$1/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    rm -f "$1"/.installed-*
    touch "$stamp"
}

# EXTRA...: the interpreter to use; the extras of pyproject.toml count as required.
set_up() {
    local lacking
    if [ -n "${PYTHON:-}" ]; then
        check_python "$PYTHON"
        if lacking=$("$PYTHON" launch/requirements.py missing "$@"); then
            echo "using $PYTHON, which has the requirements"
            use "$PYTHON"
            return
        fi
        echo "using $root/.venv: $PYTHON lacks $(paste -sd, <<<"$lacking")"
    fi
    create_with_requirements "$root/.venv" "${PYTHON:-python3}" requirements.txt
    use "$root/.venv/bin/python"
}

# The same with the lowest versions that pyproject.toml admits, in an environment of their own.
set_up_oldest() {
    local pins="$root/.venv-oldest.txt" base=${PYTHON:-python3}
    check_python "$base"
    "$base" launch/requirements.py lowest test >"$pins"
    create_with_requirements "$root/.venv-oldest" "$base" "$pins"
    use "$root/.venv-oldest/bin/python"
}

# PYTHON: for this script and for the launchers that it starts.
use() {
    python=$1
    export PYTHON=$1 PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
}
