# To be sourced by quickstart.sh and test.sh: creates .venv or reuses it, and sets $python to its interpreter. Set PYTHON
# to choose the Python that .venv is created with.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
venv="$root/.venv"
python="$venv/bin/python"

fail() { echo "error: $*" >&2; exit 1; }

set_up() {
    local base=${PYTHON:-python3} wanted stamp
    wanted=$(cat requirements.txt pyproject.toml | sha256sum | cut -d' ' -f1)
    stamp="$venv/.installed-$wanted"
    [ -e "$stamp" ] && return
    command -v "$base" >/dev/null || fail "$base not found; install Python 3.11 or newer, or set PYTHON"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$base is $("$base" --version 2>&1); Python 3.11 or newer is needed (set PYTHON to choose another)"
    command -v cc >/dev/null || command -v gcc >/dev/null || fail "no C compiler found; install one, such as gcc"
    if [ ! -x "$python" ]; then
        echo "creating $venv"
        "$base" -m venv "$venv" || fail "$base cannot create virtual environments; install its venv module"
    fi
    echo "installing the requirements (once; a few minutes)"
    "$python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
    rm -f "$venv"/.installed-*
    touch "$stamp"
}

set_up
