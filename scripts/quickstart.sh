#!/usr/bin/env bash
# The main job on real data, twice: text students of SmolLM2-135M-Instruct by SFT, KD and TAID, and vision-language
# students of easy-VQA in three stages with LLaVA-KD. Ends in two tables and a picture of questions and answers.
# Seven minutes on two cores after the installation. Safe to run again: what is finished is kept.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

export TOKENIZERS_PARALLELISM=false
# Everything is on this machine from here on; a look at the Hub would only wait for a network.
export HF_HUB_DISABLE_TELEMETRY=1
# Each half has a core to itself: the small models of the second make no use of two.
export OMP_NUM_THREADS=1

mkdir -p runs/quickstart
.venv/bin/python scripts/get_teacher.py
.venv/bin/python scripts/make_python_docs.py
echo "Vision-language students meanwhile: runs/quickstart/easy_vqa.log"
HF_HUB_OFFLINE=1 .venv/bin/python scripts/quickstart_vlm.py --disable_tqdm true >runs/quickstart/easy_vqa.log 2>&1 &
vlm=$!
# A half that is left alone would go on in the background.
trap 'kill "$vlm" 2>/dev/null || true' EXIT
# Half of the held-out pages, for time; the tables in trainers/ are of all.
HF_HUB_OFFLINE=1 .venv/bin/mmkd compare sft/quickstart kd/quickstart taid/quickstart \
    --output runs/quickstart --max_eval_rows 18 "$@"
wait "$vlm" || { tail -n 20 runs/quickstart/easy_vqa.log >&2; exit 1; }
trap - EXIT
tail -n 9 runs/quickstart/easy_vqa.log
