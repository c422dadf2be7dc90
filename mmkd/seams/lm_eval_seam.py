"""What mmkd borrows of lm-eval beyond `simple_evaluate` and `TaskManager`; it is imported where it is used only."""

import traceback
from typing import Any


def model_class(name: str) -> Any:
    """lm-eval's class of models of this name, such as `hf`, for models that its own loading does not know."""
    from lm_eval.api.registry import get_model

    return get_model(name)


def base_of_models() -> Any:
    """The class of lm-eval that models derive from which give log-likelihoods of tokens."""
    from lm_eval.api.model import TemplateLM

    return TemplateLM


def rolling_log_likelihoods(lm: Any, texts: list[str]) -> list[float]:
    """The log-likelihood of each text by a model of lm-eval, in nats, as its tasks of perplexity ask for it."""
    from lm_eval.api.instance import Instance

    asked = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=number)
        for number, text in enumerate(texts)
    ]
    return list(lm.loglikelihood_rolling(asked, disable_tqdm=True))


def is_of_a_long_answer(error: AssertionError) -> bool:
    """Whether lm-eval met an answer longer than the model's context, which it asserts without a word."""
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return "len(continuation_enc) <= self.max_length" in line
