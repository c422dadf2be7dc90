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

# Meanwhile, a vLLM for the tests that ask a real server; without it they are skipped.
scripts/serve_teacher.sh --setup &
vllm=$!
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pyright
# Fails for a link or an anchor that leads nowhere. Its own news about other products is not for a log.
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
wait "$vllm" || echo "vLLM could not be installed: tests against a real server will be skipped." >&2
# A worker per core; one file stays with one worker, whose fixtures (models, servers) are made once.
.venv/bin/python -m pytest --numprocesses auto --dist loadfile
.venv/bin/python scripts/check_wheel.py
