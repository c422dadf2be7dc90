#!/usr/bin/env bash
# The main job on real data, twice: text students of SmolLM2-135M-Instruct by SFT, KD and TAID, and vision-language
# students of easy-VQA in three stages with LLaVA-KD. Ends in two tables and a picture of questions and answers.
# Under ten minutes on two cores after the installation: scripts/quickstart.py measures the machine and says how long it
# will take. Safe to run again: what is finished is kept.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

export TOKENIZERS_PARALLELISM=false
# Everything is on this machine or comes by pip; a look at the Hub would only wait for a network.
export HF_HUB_DISABLE_TELEMETRY=1 HF_HUB_OFFLINE=1
# Each half has a core to itself: the small models of the second make no use of two.
export OMP_NUM_THREADS=1

echo "Measuring this machine ..."
exec .venv/bin/python scripts/quickstart.py "$@"
