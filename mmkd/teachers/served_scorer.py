"""A vision-language or language model behind a chat server that is asked whether the two of a pair belong together."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from mmkd.errors import UserError

from .aspects import LISTED, yes_and_no
from .chat_api import Chat, ChatClient
from .pair_scorers import IMAGE_QUESTION, TEXT_QUESTION, PairScorer, Side
from .vllm_rows import RowError

logger = logging.getLogger(__name__)


class ServedScorer(PairScorer):
    """Asks a yes-or-no question about each pair: log p(yes) - log p(no) of the first token of the answer.

    Of the first tokens that the server lists, all ways to write yes and no count. One that is not among them is taken
    to be as likely as the last of the list, which is the most that it can be.
    """

    reads_images = True

    def __init__(self, client: ChatClient, question: str | None = None, batch_size: int = 32):
        super().__init__(client.model, batch_size)
        self.client, self.question = client, question

    def score(self, pairs: Sequence[tuple[Side, str]]) -> Float[Tensor, "pair"]:
        """Those logits. Raises UserError for a server without log-probs, and for a pair that it refuses."""
        sampling = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": LISTED}
        scores, undecided = [], 0
        for reply in self.client.replies([self._chat(*pair) for pair in pairs], sampling):
            if isinstance(reply, RowError):
                raise UserError(f"ranking_server refused a pair: {reply.reason}")
            if not reply.first_tokens:
                raise UserError(
                    "ranking_server tells no log-probs of its answers, from which the order of pairs is learnt. Take "
                    "vLLM or SGLang, or ranking_teacher."
                )
            odds = log_odds_of_yes(reply.first_tokens)
            undecided += odds is None
            scores.append(odds or 0.0)
        if undecided:
            logger.warning(
                "ranking_server answered neither yes nor no to %d of %d pairs, which count as undecided (p = 0.5). "
                "Reword ranking_question where these are many.",
                undecided,
                len(pairs),
            )
        return torch.tensor(scores)

    def _chat(self, first: Side, text: str) -> Chat:
        if isinstance(first, Image.Image):
            question = (self.question or IMAGE_QUESTION).format(text=text)
            return Chat(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}], [first]
            )
        question = (self.question or TEXT_QUESTION).format(first=first, text=text)
        return Chat([{"role": "user", "content": question}])

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the scores, as plain values; a server does not tell its weights."""
        asked = [self.question] if self.question else [IMAGE_QUESTION, TEXT_QUESTION]
        return {"scorer": self.name, "kind": type(self).__name__, "question": asked}


def log_odds_of_yes(tokens: Sequence[tuple[str, float]]) -> float | None:
    """log p(yes) - log p(no) of listed tokens with their log-probs; None where neither is among them."""
    yes, no = yes_and_no(tokens)
    if not yes + no:
        return None
    least = math.exp(min(log_prob for _, log_prob in tokens)) or math.ulp(0.0)
    return math.log(yes or least) - math.log(no or least)
