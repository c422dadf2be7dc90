#!/usr/bin/env bash
# The main job on a real teacher: SFT, KD and TAID students of SmolLM2-135M-Instruct on the same text, and a table.
# About five minutes on two cores after the installation. Safe to run again: what is finished is kept.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

export TOKENIZERS_PARALLELISM=false
# Everything is on this machine from here on; a look at the Hub would only wait for a network.
export HF_HUB_DISABLE_TELEMETRY=1

.venv/bin/python scripts/get_teacher.py
.venv/bin/python scripts/make_python_docs.py
HF_HUB_OFFLINE=1 .venv/bin/mmkd compare sft/quickstart kd/quickstart taid/quickstart \
    --output runs/quickstart "$@"
