#!/usr/bin/env bash
# The benchmarks one after the other, each into runs/bench/NAME.txt, and then one table of targets and the plots.
#
#   bash scripts/bench/run.sh                 # all; about two hours of one core
#   bash scripts/bench/run.sh --quick         # a few minutes: everything runs, nothing is judged
#   bash scripts/bench/run.sh b1 b7           # some of them; what was measured before stays in the table
#   bash scripts/bench/run.sh --dtype=float32 # flags go to every benchmark; those with a value need the =
#
# A benchmark that cannot run here, for want of a model or a peer, says so in its file and in the table.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/../_setup.sh"

export OMP_NUM_THREADS=1 TRL_EXPERIMENTAL_SILENCE=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

flags=() names=()
for word in "$@"; do
    if [[ $word == --* ]]; then flags+=("$word"); else names+=("$word"); fi
done
((${#names[@]})) || names=(b1 b2 b3 b4 b5 b6 b7 b8 b9 b10 b11 b12 b13 b14 b15)

mkdir -p runs/bench
for name in "${names[@]}"; do
    script=$(compgen -G "scripts/bench/${name}_*.py") || { echo "No benchmark is called $name." >&2; exit 2; }
    echo "$script ${flags[*]}" >&2
    # Written whole or not at all, so that a table never mixes two runs.
    .venv/bin/python "$script" "${flags[@]}" >"runs/bench/.$name.txt" 2>"runs/bench/$name.log" ||
        tail -n 1 "runs/bench/$name.log" >"runs/bench/.$name.txt"
    mv "runs/bench/.$name.txt" "runs/bench/$name.txt"
done
.venv/bin/python scripts/bench/summary.py runs/bench
