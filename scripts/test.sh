#!/usr/bin/env bash
# Everything CI checks: style, types, documentation, tests, packaging. With arguments, only pytest, with those arguments.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

# One thread per process. Tests start further processes (torchrun, the CLI); when two of them with two threads each
# share two cores, OpenMP's barriers wait for threads that are not scheduled and everything runs 5 to 30 times slower.
export OMP_NUM_THREADS=1
# Tokenizers' own threads compete in the same way, and warn when a process forks after they were used.
export TOKENIZERS_PARALLELISM=false
# Tests bring their own models and data: one that asks a hub must fail at once, not hang or pass on some machines only.
export HF_HUB_OFFLINE=1
export HF_HUB_DISABLE_TELEMETRY=1
# pyright would ask the network for a newer version of itself, which constraints.txt rules out anyway.
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1

if (($#)); then
    exec .venv/bin/python -m pytest "$@"
fi

.venv/bin/ruff check .
.venv/bin/ruff format --check .

# Beside the tests, whose workers wait for servers and files now and then: a vLLM for the tests that ask a real server,
# without which they are skipped, and all other checks. What they say is shown when the tests are through.
scripts/serve_teacher.sh --setup &
vllm=$!
checks() {
    set -e
    .venv/bin/pyright
    # Fails for a link or an anchor that leads nowhere. Its own news about other products is not for a log.
    NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
    .venv/bin/python scripts/check_wheel.py
}
said=$(mktemp)
trap 'rm -f "$said"' EXIT
checks >"$said" 2>&1 &
checked=$!

# A worker per core. Files in the order of tests/schedule.py, which has the long ones first.
tests=0
.venv/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder || tests=$?
wait "$vllm" || echo "vLLM could not be installed: tests against a real server were skipped." >&2
others=0
wait "$checked" || others=$?
cat "$said"
exit $((tests ? tests : others))
