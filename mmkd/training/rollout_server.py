"""Rollouts by vLLM servers that carry the student: they get its weights, and are checked to speak with them."""

import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel

from mmkd.errors import UserError
from mmkd.generation.local_generation import AnswerTokens
from mmkd.generation.served_generation import ServerGenerator
from mmkd.models.backbone import base_of
from mmkd.models.sharded_weights import is_quantized, whole_weights
from mmkd.results.parameters import ADAPTER
from mmkd.teachers.served_weights import ServedWeights
from mmkd.teachers.vllm_client import TopK, VLLMClient

from .rollout_config import RolloutConfig
from .rollout_probes import Probe, served_prompt
from .rollouts import RolloutPrompt

logger = logging.getLogger(__name__)

# Nats per token between student and server that types and kernels may make when the servers first get the weights;
# later so many times what they made then, and this share of what training has changed.
ROUNDING, GROWTH, SHARE, EXACT = 0.1, 4.0, 0.1, 1e-3
# As ROUNDING, where the base is quantised in this process and not on the server.
QUANTIZED = 1.0

Weights = dict[str, Any] | None


class ServedStudent(ServerGenerator[RolloutPrompt]):
    """vLLM servers, which get the student's weights, or its adapter, through a folder.

    Args:
        model: the student.
        tokens: where its answers end, and what they must not hold.
        tokenizer: the student's, which must be the servers' too.
        accelerator: knows how the student is spread over ranks; all of them hand over together.
        args: the run's settings.
        folder: through which weights reach the servers.
        probes: texts, and images with them, on which student and servers are compared.
        saved: (folder, weights) -> the weights that are the student's, without what is learnt beside it.

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
        probes: list[Probe],
        saved: Callable[[Path, Weights], Weights],
    ):
        assert args.rollout_server is not None
        super().__init__(VLLMClient(args.rollout_server), served_prompt, tokens, log_probs=True)
        self.model, self.accelerator, self.args, self.folder, self.saved = model, accelerator, args, folder, saved
        self.probes = probes
        # Each on its own, where a probe must come to every server.
        self.probed = [VLLMClient(url) for url in args.rollout_server]
        # Generation ends within max_length; the longest text that is scored is a probe.
        self.client.check(max_length=args.max_length or args.rollout_max_tokens, tokenizer=tokenizer)
        self.weights = ServedWeights(args.rollout_server)
        self._first: list[tuple[np.ndarray, float]] = []
        # Nobody else's on these servers, which remember what they computed by an adapter's name.
        self._run: str = broadcast_object_list([secrets.token_hex(4)])[0]
        self._handed_over, self._adapter = 0, ""

    def hand_over(self) -> None:
        """The servers speak with the student as it is now; all ranks must call it together.

        Raises UserError where they do not.
        """
        # A rank that still waits for answers must not get them from the next weights.
        self.accelerator.wait_for_everyone()
        if isinstance(self.model, PeftModel):
            self._give_adapter(self.model)
        else:
            self._give_weights()
        self.accelerator.wait_for_everyone()
        self._check()

    def _give_weights(self) -> None:
        weights = whole_weights(self.model, self.accelerator)
        if self.accelerator.is_main_process:
            # A server reads every file of weights in the folder, also the adapter of an earlier run.
            (self.folder / ADAPTER).unlink(missing_ok=True)
            self.model.save_pretrained(self.folder, state_dict=self.saved(self.folder, weights))
            self.weights.load(self.folder, images=any(probe.question.images for probe in self.probes))

    def _give_adapter(self, model: PeftModel) -> None:
        """A new name each time: under an old one servers would go on with what they computed by it."""
        weights = whole_weights(model, self.accelerator, trained_only=True)
        last, self._adapter = self._adapter, f"rollout-{self._run}-{self._handed_over}"
        self._handed_over += 1
        if self.accelerator.is_main_process:
            name = model.active_adapters[0]
            # PEFT would look on the Hub for whether the vocabulary has grown.
            model.save_pretrained(
                str(self.folder), selected_adapters=[name], state_dict=weights, save_embedding_layers=False
            )
            # Before the new one comes, for which a server may have no other place.
            if last:
                self.weights.unload_adapter(last)
            self.weights.load_adapter(self._adapter, self.folder if name == "default" else self.folder / name)
        for client in (self.client, *self.probed):
            client.ask_adapter(self._adapter)

    def _check(self) -> None:
        """Raises UserError when the servers' log-probs of a probe are not the student's of now."""
        begun = []
        for number, probe in enumerate(self.probes):
            now, furthest = probe.log_probs(self.model, self.accelerator), 0.0
            for client in self.probed:
                (served,) = client.score([probe.question], 1)
                if not isinstance(served, TopK):
                    raise UserError(f"The rollout server cannot read {probe.name}: {served.reason}")
                distance = float(np.abs(served.label_log_probs - now).mean())
                self._compare(probe, distance, now, self._first[number] if self._first else None)
                furthest = max(furthest, distance)
            begun.append((now, furthest))
        if not self._first:
            self._first = begun
            self._say_quantized(max(furthest for _, furthest in begun))

    def _compare(self, probe: Probe, distance: float, now: np.ndarray, first: tuple[np.ndarray, float] | None) -> None:
        moved, limit = 0.0, QUANTIZED if self._quantized else ROUNDING
        if first is not None:
            moved = float(np.abs(now - first[0]).mean())
            limit = max(EXACT, GROWTH * first[1], SHARE * moved)
        if not distance <= limit:
            serve = "Serve the model that the adapter is trained on" if self._adapter else "Serve what is trained"
            if self._adapter and probe.question.images:
                serve += (
                    ". vLLM leaves the parts of an adapter out that are in a vision tower or a connector: choose "
                    "target_modules of the language model, or start it with --enable-tower-connector-lora"
                )
            tied = bool(getattr(base_of(self.model).config.get_text_config(), "tie_word_embeddings", False))
            advice = (
                " On a CPU, vLLM does not renew a head that is tied to the embeddings: untie it "
                "(tie_word_embeddings: false) before you train and serve it."
                if tied and not self._adapter
                else ""
            )
            raise UserError(
                "The weights of the rollout server are out of date: after it took the student's, its log-probs of "
                f"{probe.name} differ from the student's by {distance:.4f} nats per token, of which {limit:.4f} may "
                f"be rounding; training has changed the student's by {moved:.4f}. {serve}.{advice}"
            )

    @property
    def _quantized(self) -> bool:
        return is_quantized(base_of(self.model))

    def _say_quantized(self, distance: float) -> None:
        if self._quantized and self.accelerator.is_main_process:
            logger.warning(
                "The student's base is quantised in this process and served as it is on rollout_server: the answers "
                f"are those of a slightly different model, {distance:.3f} nats per token from the student. Weights "
                f"that are out of date are noticed only where they differ by more than {GROWTH * distance:.3f}. Serve "
                "the base quantised in the same way to narrow both."
            )
