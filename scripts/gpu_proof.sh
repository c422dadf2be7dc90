#!/usr/bin/env bash
# What mmkd does on this machine's GPU, in at most eight minutes after the environment is there: gpu_proof.md and
# gpu_proof.json in runs/gpu_proof. PYTHON_GPU names an interpreter with mmkd and a torch for this GPU; otherwise .venv
# is used, and made if it is missing.
#
#   bash scripts/gpu_proof.sh
#   bash scripts/gpu_proof.sh --device cpu --output runs/tried     # tries the script itself, tiny
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ -z ${PYTHON_GPU:-} ]]; then
    source scripts/_setup.sh
    PYTHON_GPU=.venv/bin/python
fi
exec "$PYTHON_GPU" scripts/gpu_proof.py "$@"
