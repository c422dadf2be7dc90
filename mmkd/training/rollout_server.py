"""Rollouts by vLLM servers that carry the student: they get its weights, and are checked to speak with them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mmkd.errors import UserError
from mmkd.generation.generator import Advance, Answer, Prompt, RowError, Sampling
from mmkd.generation.local_generation import AnswerTokens
from mmkd.generation.served_generation import ServerGenerator
from mmkd.models.backbone import base_of
from mmkd.models.sharded_weights import reshard, whole_weights
from mmkd.teachers.served_weights import ServedWeights
from mmkd.teachers.vllm_client import PROBE, ScoreRequest, TopK, VLLMClient

from .rollout_config import RolloutConfig
from .rollouts import RolloutPrompt

# Nats per token between student and server that types and kernels may make when the servers first get the weights;
# later so many times what they made then, and this share of what training has changed.
ROUNDING, GROWTH, SHARE, EXACT = 0.1, 4.0, 0.1, 1e-3
_PROBED = 48


class ServedStudent(ServerGenerator[RolloutPrompt]):
    """vLLM servers, which read the student's weights from a folder before each accumulated batch.

    Raises UserError when a server is down, tokenises in another way, does not take weights, or goes on speaking with
    old ones.
    """

    def __init__(
        self,
        model: Any,
        tokens: AnswerTokens,
        tokenizer: Any,
        accelerator: Accelerator,
        args: RolloutConfig,
        folder: Path,
    ):
        assert args.rollout_server is not None
        super().__init__(VLLMClient(args.rollout_server), lambda prompt: Prompt(prompt.ids), tokens)
        self.model, self.accelerator, self.args, self.folder = model, accelerator, args, folder
        # Each on its own, where the probe must come to every server.
        self.probed = [VLLMClient(url) for url in args.rollout_server]
        # Generation ends within max_length; the longest text that is scored is the probe.
        self.client.check(max_length=args.max_length or args.rollout_max_tokens, tokenizer=tokenizer)
        self.weights = ServedWeights(args.rollout_server)
        self.probe: list[int] = tokenizer(PROBE, add_special_tokens=False)["input_ids"][:_PROBED]
        self._first: tuple[np.ndarray, float] | None = None

    def generate(
        self,
        prompts: Sequence[RolloutPrompt],
        sampling: Sampling,
        samples: int = 1,
        advance: Advance = lambda tokens: None,
    ) -> list[list[Answer] | RowError]:
        self._hand_over()
        return super().generate(prompts, sampling, samples, advance)

    def _hand_over(self) -> None:
        # A rank that still waits for answers must not get them from the next weights.
        self.accelerator.wait_for_everyone()
        weights = whole_weights(self.model, self.accelerator)
        if self.accelerator.is_main_process:
            base_of(self.model).save_pretrained(self.folder, state_dict=weights)
            self.weights.load(self.folder)
        self.accelerator.wait_for_everyone()
        self._check()

    def _check(self) -> None:
        """Raises UserError when the servers' log-probs of a text are not the student's of now."""
        now, furthest = self._own_log_probs(), 0.0
        question = ScoreRequest(self.probe, np.arange(len(self.probe)) > 0)
        for client in self.probed:
            (served,) = client.score([question], 1)
            if not isinstance(served, TopK):
                raise UserError(f"The rollout server cannot read a text of {len(self.probe)} tokens: {served.reason}")
            distance = float(np.abs(served.label_log_probs - now).mean())
            moved, limit = 0.0, ROUNDING
            if self._first is not None:
                moved = float(np.abs(now - self._first[0]).mean())
                limit = max(EXACT, GROWTH * self._first[1], SHARE * moved)
            if distance > limit:
                raise UserError(
                    "The weights of the rollout server are out of date: after it took the student's, its log-probs of "
                    f"a text differ from the student's by {distance:.4f} nats per token, of which {limit:.4f} may be "
                    f"rounding; training has changed the student's by {moved:.4f}. Serve what is trained. On "
                    "a CPU, vLLM does not renew a head that is tied to the embeddings: untie it "
                    "(tie_word_embeddings: false) before you train and serve it."
                )
            furthest = max(furthest, distance)
        self._first = self._first or (now, furthest)

    @torch.no_grad()
    def _own_log_probs(self) -> np.ndarray:
        training = self.model.training
        self.model.eval()
        ids = torch.tensor([self.probe], device=self.accelerator.device)
        with self.accelerator.autocast():
            log_probs = base_of(self.model)(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        reshard(self.model)
        self.model.train(training)
        return log_probs.gather(-1, ids[0, 1:, None])[:, 0].cpu().numpy()
