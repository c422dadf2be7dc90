"""Exported students as models of lm-eval, each read by its own runtime."""

from collections.abc import Sequence
from typing import Any

from mmkd.export.exported import Exported
from mmkd.export.exported_answers import stops_of
from mmkd.export.loading import runtime_of
from mmkd.export.runtimes import Runtime
from mmkd.generation.generator import Sampling
from mmkd.models.load import tokenizer_of
from mmkd.seams.lm_eval_seam import base_of_models

from .model import EvalModel

CONTEXT, NEW_TOKENS = 2048, 256
"""Tokens of a prompt at most, and of an answer where the task does not say."""


def exported_model(name: str, exported: Exported, plain: EvalModel) -> EvalModel:
    """An exported student as what is evaluated; `plain` is the student itself, whose tokenizer it has."""
    folder = exported.folder if (exported.folder / "config.json").is_file() else plain.path
    # FP4 meets states of another type where transformers alone unpacks it.
    if exported.spec.format in ("gguf", "onnx") or exported.spec.quantization in ("nvfp4", "mxfp4"):
        return EvalModel(name, str(folder), trust_remote_code=plain.trust_remote_code, exported=exported)
    return EvalModel(name, str(exported.folder), trust_remote_code=plain.trust_remote_code)


def exported_lm(model: EvalModel, device: str) -> Any:
    """A model of lm-eval that asks the runtime of an exported student, one request at a time."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokenizer: Any = tokenizer_of(model.processing_class)
    assert model.exported is not None
    runtime, ends = runtime_of(model.exported, device, CONTEXT), stops_of(model.exported, tokenizer)

    class ExportedLM(base_of_models()):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return self.eot_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        @property
        def tokenizer_name(self) -> str:
            return str(tokenizer.name_or_path).replace("/", "__")

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            return tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            return [_likelihood(runtime, before, after) for _, before, after in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            likelihoods = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                windows = get_rolling_token_windows(ids, self.prefix_token_id, CONTEXT, 1)
                parts = [_likelihood(runtime, *window)[0] for window in map(make_disjoint_window, windows)]
                likelihoods.append(sum(parts))
            return likelihoods

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            return [
                _answer(runtime, tokenizer, self.tok_encode(asked.args[0]), asked.args[1], ends) for asked in requests
            ]

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True, **kwargs: Any) -> str:
            return tokenizer.apply_chat_template(
                chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )  # fmt: skip

    return ExportedLM()


def _likelihood(runtime: Runtime, before: Sequence[int], after: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of tokens after others, and whether each was the likeliest."""
    ids = [*before, *after][-(CONTEXT + 1) :]
    scored = runtime.scored(ids)
    own = slice(len(ids) - 1 - len(after), None)
    return scored.of_labels[own].sum().item(), bool((scored.top[own] == scored.labels[own]).all())


def _answer(runtime: Runtime, tokenizer: Any, ids: list[int], settings: Any, ends: Sequence[int]) -> str:
    """The answer to a prompt, up to the words at which a task ends it."""
    until = settings.get("until") or []
    until = [until] if isinstance(until, str) else [word for word in until if word]
    most = int(settings.get("max_gen_toks", settings.get("max_new_tokens", NEW_TOKENS)))
    warmth = float(settings.get("temperature") or 0) if settings.get("do_sample") else 0.0
    tokens: list[int] = []
    for token in runtime.tokens(ids[-(CONTEXT - most) :], Sampling(most, warmth), ends):
        tokens.append(token)
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if any(word in text for word in until):
            break
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return text[: min((text.find(word) for word in until if word in text), default=len(text))]
