# shellcheck shell=bash
# Sourced by the scripts beside it: goes to the checkout's root and leaves a complete .venv there.
# Needs Python 3.11 or newer with pip and venv; PYTHON names another interpreter than python3.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup_environment() {
    local stamp=.venv/mmkd-setup.sha256 wanted
    # Hashed in Python because sha256sum is not on every machine.
    wanted=$("${PYTHON:-python3}" - pyproject.toml constraints.txt <<'PYTHON'
import hashlib, pathlib, sys
if sys.version_info < (3, 11):
    sys.exit(f"mmkd needs Python 3.11 or newer, but {sys.executable} is {sys.version.split()[0]}; set PYTHON to another.")
print(hashlib.sha256(b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])).hexdigest())
PYTHON
    )
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    echo "Installing mmkd and what it needs in .venv (about 2 GB; a few minutes the first time) ..." >&2
    # pip is the last thing that venv installs: without it, .venv is missing or was left half made.
    [[ -x .venv/bin/pip ]] || "${PYTHON:-python3}" -m venv .venv
    local install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt)
    # torch by its exact version, before a range in some other package can ask for the newest build and its CUDA packages.
    "${install[@]}" torch==2.13.0 hatchling
    # With hatchling at hand, building needs no environment of its own and follows constraints.txt too.
    "${install[@]}" --no-build-isolation --editable '.[dev]'
    echo "$wanted" >"$stamp"
}

setup_environment
