#!/usr/bin/env bash
# One run over several machines: sbatch scripts/slurm/train.sh RECIPE [--key value ...]
# Change the four lines of #SBATCH to your cluster; everything else follows from them.
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
# One task per machine: accelerate starts a process per GPU.
#SBATCH --ntasks-per-node=1
#SBATCH --job-name=mmkd
set -euo pipefail

if (($# == 0)); then
    echo "Usage: sbatch $0 RECIPE [--key value ...]" >&2
    exit 2
fi

MAIN=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN GPUS=${SLURM_GPUS_ON_NODE:-8} PORT=$((29500 + SLURM_JOB_ID % 1000))
export TOKENIZERS_PARALLELISM=false
# A collective that waits longer than this for a machine that is gone ends the run.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

# --kill-on-bad-exit: a rank that dies ends its machine's task, and the others must not wait for it.
# In single quotes: each machine has a number of its own.
srun --kill-on-bad-exit=1 bash -c '
    exec mmkd-train "$@" \
        --accelerate_config "${ACCELERATE_CONFIG:-fsdp2}" \
        --num_machines "$SLURM_NNODES" \
        --num_processes "$((SLURM_NNODES * GPUS))" \
        --machine_rank "$SLURM_NODEID" \
        --main_process_ip "$MAIN" \
        --main_process_port "$PORT" \
        --resume_from_checkpoint true
' mmkd-train "$@"
