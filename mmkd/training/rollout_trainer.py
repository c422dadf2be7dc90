"""The part of a training in which the student answers prompts: what becomes of an accumulated batch."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from trl.data_utils import get_dataset_column_names

from mmkd.errors import UserError
from mmkd.losses.fused import fused_loss
from mmkd.models.heads import LMHead
from mmkd.models.load import tokenizer_of
from mmkd.preparation.checks import check_stream
from mmkd.preparation.paired_streams import packed_stream
from mmkd.preparation.pairs import packed
from mmkd.teachers.batch import Batch, View

from .answers import Placed
from .items import Reports
from .log_lines import GUARD
from .reports import ReportingTrainer
from .rewards import RATED, RewardFunction, Rewards, with_advantages
from .rollout_ahead import RolloutsAhead
from .rollout_guards import SUMS, RolloutWatch, checkpoints_in, sums_of
from .rollouts import Mixed, Rollouts
from .served_rollouts import is_served
from .teacher_views import image_columns

logger = logging.getLogger(__name__)

ENTROPY = "rollout_entropy"
"""The report of the student's entropy at the tokens that it said itself."""


class RolloutTrainer(ReportingTrainer):
    """trl's SFTTrainer whose accumulated batches may hold what the student says itself, in the place of the data."""

    args: Any
    teacher: Any
    rollouts: Rollouts | None = None
    _ahead: RolloutsAhead | None = None
    _watch: RolloutWatch | None = None
    _rewards: Rewards | None = None
    _entropy: Tensor
    """Nats of the student on its rollouts of the step before, and of how many of their tokens."""

    def start_rollouts(self, rollouts: Rollouts) -> None:
        """From now on the student answers prompts of the batches it trains on.

        Raises UserError for a reward that there is not, or that asks for what the data does not have.
        """
        self.rollouts = rollouts
        if self.args.reward is not None:
            processing_class: Any = self.processing_class
            function, pictures = RewardFunction(self.args.reward), image_columns(self.teacher, self.args)
            self._rewards = Rewards(function, tokenizer_of(processing_class), gather_object, pictures)
            rows: Any = self.train_dataset
            self._rewards.check(dict(next(iter(rows))))
        self._start_watch()
        self._ahead = RolloutsAhead(rollouts, self.early_question()) if self.args.rollout_ahead else None

    def with_rollouts(self, batch: Batch, placed: Mapping[int, Placed]) -> Batch:
        """A micro-batch whose rollouts (row -> rollout) are in place, as the method's teacher reads it."""
        return batch

    def early_question(self) -> Callable[[Batch], Batch] | None:
        """What adds to a batch what the teacher says of it, where that can be asked while another one is learnt from.

        It is called in another thread: neither a model of this process nor other ranks may be needed.
        """
        return None

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The Trainer's accumulated batch, with the student's answers."""
        held = [] if self._ahead is None else self._ahead.held(epoch_iterator)
        batches, num_items = super().get_batch_samples(chain(held, epoch_iterator), num_batches, device)
        if 0 < len(batches) < num_batches:
            # A stream ends. The Trainer takes no step of too few, and would add their gradient to the next epoch's.
            check_stream(len(batches), num_batches, self.state.global_step)
            batches = []
        if self.rollouts is not None:
            batches = self._with_answers(self.rollouts, batches)
        if self._ahead is not None and self.state.global_step + 1 < self.state.max_steps:
            steps = self.args.gradient_accumulation_steps
            self._ahead.begin(epoch_iterator, steps, self.state.global_step + 1)
        return batches, num_items

    def _with_answers(self, rollouts: Rollouts, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of an optimizer step, the student's answers among them; told in the logs."""
        source = rollouts if self._ahead is None else self._ahead
        batches, mixed = source.mix(batches, self.state.global_step, self.with_rollouts)
        self._record(mixed.reports(self.accelerator.device), "train")
        if self.args.rollouts == "interleaved":
            replaced = sum(sum(rollout.replaced or ()) for rollout in mixed.rollouts)
            count = torch.tensor(replaced, device=self.accelerator.device)
            self._record({"rollouts_replaced": (count, mixed.facts["tokens"])}, "train")
        if any(is_served(batch) for batch in batches):
            others = torch.tensor(sum(batch.retokenised for batch in batches), device=self.accelerator.device)
            self._record({"rollouts_retokenised": (others, len(mixed.rollouts))}, "train")
        rollouts.judge(mixed.totals(self._summed, self.accelerator.device))
        self._watch_over(mixed)
        if self._rewards is not None:
            batches = self._rated(self._rewards, batches, mixed)
        return [replace(batch, rows=()) for batch in batches]

    def _rated(self, rewards: Rewards, batches: list[Batch], mixed: Mixed) -> list[Batch]:
        """The micro-batches whose rollouts know by how much their rewards are better than the others."""
        advantages, reports = rewards.advantages(mixed, rewards.of(mixed, self.state))
        device = self.accelerator.device
        self._record({name: (total.to(device), count) for name, (total, count) in reports.items()}, "train")
        return [with_advantages(batch, mixed, number, advantages) for number, batch in enumerate(batches)]

    def columns_to_keep(self) -> list[str]:
        """What a reward function is told: of rows with images, which are read as they are, every column."""
        names = list(getattr(self.train_dataset, "column_names", None) or ()) if self.args.reward is not None else []
        return [*super().columns_to_keep(), *names]

    def prepared(self, rows: Any, args: Any, packing: bool, formatting_func: Any, split: str) -> Any:
        """The rows of a split as the collator takes them, each of a pack with what a reward function is told of it."""
        names = get_dataset_column_names(rows)
        if not packing or RATED not in names or "seq_lengths" in names:
            return super().prepared(rows, args, packing, formatting_func, split)
        if args.packing_strategy != "bfd":
            raise UserError(
                f"packing_strategy: {args.packing_strategy} cuts rows, so that a reward function would not know which "
                "row an answer belongs to. Set packing_strategy: bfd, or packing: false.",
                because="meaning",
            )
        alone = super().prepared(rows, args, False, formatting_func, split)
        alone = alone.select_columns(["input_ids", "labels", RATED])
        return packed(alone, args) if isinstance(alone, Dataset) else packed_stream(alone, args)

    def _record(self, reports: Reports, mode: str | None = None) -> None:
        super()._record(reports, mode)
        if ENTROPY in reports and self.model.training:
            total, count = reports[ENTROPY]
            self._entropy += torch.stack([total.float(), torch.as_tensor(count).to(total).float()])

    @torch.no_grad()
    def rollout_entropy(self, hidden: Float[Tensor, "batch position width"], head: LMHead, view: View) -> Reports:
        """The student's entropy at the tokens that it said itself, in the steps that are logged."""
        if self.rollouts is None or not self.model.training or not self._reports_now():
            return {}
        own, nothing = view.own, view.labels.new_zeros(0)
        states = hidden[:, :-1][own].detach()
        loss = fused_loss(
            states,
            head,
            view.labels[:, 1:][own],
            chunk_size=self.args.chunk_size,
            precise=self.args.precise_logits,
            diagnostics=True,
        )
        # All ranks have the same reports, also those without such tokens.
        return {ENTROPY: (loss.sums.get("student_entropy", nothing.sum().float()), len(states))}

    def _watch_over(self, mixed: Mixed) -> None:
        """The guards' view of a step: logged, and where a guard has reached a limit said or raised, on all ranks."""
        watch, device = self._watch, self.accelerator.device
        assert watch is not None
        processing_class: Any = self.processing_class
        own = sums_of(mixed, tokenizer_of(processing_class), self.args.rollout_max_tokens)
        counts = {name: torch.tensor(own[name], device=device) for name in ("repeated", "other_script")}
        self._record({f"rollouts_{name}": (count, own["rollouts"]) for name, count in counts.items()}, "train")
        # Entropies are known one step later, once the student has read what it said.
        sums = torch.cat([torch.tensor([*own.values()], dtype=torch.float32, device=device), self._entropy])
        self._entropy = torch.zeros_like(self._entropy)
        step, every = self.state.global_step, 1
        if self.args.logging_strategy == "steps":
            every = max(1, int(self.state.logging_steps))
        for warned in watch.look(dict(zip(SUMS, self._summed(sums).tolist(), strict=True)), step, every):
            if self.accelerator.is_main_process:
                logger.warning(warned.message)
            log = {f"{GUARD}{warned.name}": warned.value}
            self.state.log_history.append({**log, "step": step})
            self.callback_handler.on_log(self.args, self.state, self.control, log)
        watch.stop(step, checkpoints_in(self.args.output_dir))

    def _start_watch(self) -> None:
        self._watch = RolloutWatch(self.args.guards)
        self._entropy = torch.zeros(2, device=self.accelerator.device)

    def training_starts(self) -> None:
        """Nothing is asked ahead yet, and nothing is known of what the student says."""
        super().training_starts()
        if self.rollouts is not None:
            self._start_watch()
        if self._ahead is not None:
            self._ahead.start_over()

    def state_to_save(self) -> dict[str, Any]:
        """The rollouts of the step after the checkpoint, too."""
        ahead = {} if self._ahead is None else {"rollouts_ahead": self._ahead.state()}
        watch: dict[str, Any] = {}
        if self._watch is not None:
            watch = {"rollout_guards": self._watch.state(), "rollout_entropy": self._summed(self._entropy).tolist()}
        return super().state_to_save() | ahead | watch

    def state_restored(self, state: dict[str, Any] | None) -> None:
        """The rollouts of the step after the checkpoint, too, and what the guards have seen before it."""
        super().state_restored(state)
        if self._watch is not None and state is not None and "rollout_guards" in state:
            self._watch.restore(state["rollout_guards"])
            if self.is_world_process_zero():
                # It is that of all ranks together.
                self._entropy += torch.tensor(state["rollout_entropy"], device=self._entropy.device)
        if self._ahead is not None and state is not None and "rollouts_ahead" in state:
            self._ahead.restore(state["rollouts_ahead"])
