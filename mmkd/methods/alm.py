"""ALM: student and teacher agree on how likely chunks of text are, with tokenizers of their own (2503.20083)."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmkd.alignment.nearest_tokens import nearest_tokens
from mmkd.alignment.pieces import boundary_mask
from mmkd.errors import UserError
from mmkd.losses import divergences
from mmkd.losses.chunks import ChunkGroups, binarised, chunk_log_probs, group_chunks
from mmkd.losses.combine import combination_weights
from mmkd.losses.fused import fused_loss
from mmkd.losses.likelihood import token_log_probs
from mmkd.losses.other_vocabulary import MappedTargets, SortedTargets, uld
from mmkd.models.backbone import base_of, full_head
from mmkd.models.load import tokenizer_of
from mmkd.preparation.pairs import (
    QUESTION,
    AlignedSide,
)
from mmkd.teachers.batch import ONLY, Batch
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.signals import ChunkAlignment, ChunkSignal, DenseSignal, LabelSignal
from mmkd.teachers.teacher import Teacher
from mmkd.training.answer_text import said
from mmkd.training.answers import Placed
from mmkd.training.base import DistillationTrainer
from mmkd.training.items import ItemLosses, Supervised
from mmkd.training.method import Method
from mmkd.training.teaching import StudentSide, Teaching

from .alm_config import DIVERGENCES
from .alm_config import ALMConfig as ALMConfig
from .alm_readings import TwoReadings
from .alm_teachers import asked, check_told, fitted, width_of
from .pair_rollouts import as_teacher_reads

_PROJECTION = "alm_projection"

_ITEMS = {"divergence": "chunk", "ce": "token", "hidden": "end"}
"""Term of the loss -> kind of the items that it sums."""


class ALMTrainer(DistillationTrainer[ChunkSignal]):
    """Minimises a divergence of likelihoods per chunk of text that ends a token on both sides.

    The teacher reads the same rows in its own tokens and by its own chat template. Besides the base's arguments:

        teacher_processing_class: the teacher's tokenizer; by default found by the teacher's name.

    Raises UserError too for tokenizers whose tokens cannot be placed in a text, and where student and teacher share no
    text at all.
    """

    method = "alm"
    config_class = ALMConfig
    accepts = (DenseSignal, LabelSignal)
    one_vocabulary = False
    args: ALMConfig

    @classmethod
    def check_teacher(cls, teacher: Teacher, args: ALMConfig) -> None:
        """Raises UserError too where a cache of log-probs, or a server's text, does not tell enough for the settings.

        Of a server that generates, only the log-probs of the text's own tokens are asked.
        """
        super().check_teacher(asked(teacher), args)
        check_told(teacher, args)

    # Two readings of the data

    @cached_property
    def _readings(self) -> TwoReadings:
        # Data come before the Trainer itself is made.
        return TwoReadings(*self._given_teacher)

    def prepared(self, rows: Any, args: Any, packing: bool, formatting_func: Any, split: str) -> Any:
        """The rows as both sides read them, paired."""
        as_student = partial(super().prepared, packing=False, formatting_func=formatting_func, split=split)
        labelling = self.labelling
        given = labelling.given(args)
        return self._readings.pair(
            rows, split, given, packing, formatting_func, labelling.processing_class, as_student
        )

    def columns_to_keep(self) -> list[str]:
        """The teacher's reading of rows of text, too."""
        theirs = ["teacher_input_ids", "teacher_labels", "teacher_seq_lengths", QUESTION]
        return [*super().columns_to_keep(), *([] if self.labelling.vision else theirs)]

    # The teacher

    def build_teacher(self, student: StudentSide, teacher: Any, processing_class: Any) -> Teaching:
        """The teacher, who reads the batch in its own tokens."""
        rows = self._readings.reader(self.train_dataset, self.args)
        reader = rows.labelling
        align = self._readings.aligner(self.processing_class, self.args)
        boundaries = boundary_mask(align.aligner.teacher)
        teacher = fitted(teacher, self.args, reader, student.splits, boundaries)
        cached = teacher if isinstance(teacher, CachedTeacher) else None
        self._aligned = AlignedSide(rows.collator, align, cached, teacher.served)
        device, pieces = self.accelerator.device, align.aligner
        self._boundaries, self._teacher_boundaries = (
            torch.from_numpy(boundary_mask(side)).to(device) if self.args.needs_boundaries else None
            for side in (pieces.student, pieces.teacher)
        )
        self._bytes = torch.from_numpy(pieces.student.lengths).to(device)
        if self.args.objective == "mined":
            ours, theirs = ([side[index] for index in range(len(side))] for side in (pieces.student, pieces.teacher))
            self._teacher_tokens = torch.from_numpy(nearest_tokens(ours, theirs)).to(device)
        if self.args.hidden_weight:
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise UserError(
                    "hidden_weight learns a projection, which FSDP and DeepSpeed do not know. Set it to 0.",
                    because="not built",
                )
            widths = full_head(self.model).weight.shape[1], width_of(teacher)
            # A part of the student, so that optimizer and ranks treat it like all others; files keep it apart.
            base_of(self.model).add_module(_PROJECTION, nn.Linear(*widths, bias=False, device=device))
        tokens = min(full_head(self.model).vocab_size, len(tokenizer_of(self.processing_class)))
        return Teaching(teacher, tokens, self._aligned)

    def with_rollouts(self, batch: Batch, placed: Mapping[int, Placed]) -> Batch:
        """The batch with the text of the rollouts in the teacher's tokens, aligned anew."""
        if not placed:
            return batch
        examples, tokenizer = list(batch.rows), tokenizer_of(self.processing_class)
        reader = self._readings.reader(self.train_dataset, self.args).labelling
        for row, placing in placed.items():
            text, whole = said(tokenizer, batch["input_ids"][row].tolist(), placing)
            examples[row] = as_teacher_reads(examples[row], text, whole, placing.rollout.ended, reader)
        aligned = self._aligned(batch.to("cpu"), examples).to(self.accelerator.device)
        return replace(batch, readings=aligned.readings)

    def ask(self, batch: Batch) -> ChunkSignal:
        """How likely the teacher finds each chunk of the batch."""
        signal = batch.readings[ONLY].signal
        if signal is None or (self.args.needs_hidden and signal.dense is None):
            signal = self._ask(batch)
        return signal.of_first_tokens(int(batch.student.supervised.sum()))

    def ask_ahead(self, batch: Batch, alone: bool) -> Batch:
        """The batch with the numbers of its chunks, where it is the teacher who says which chunks are compared.

        Its hidden states, which are large, stay only with a batch that is alone.
        """
        if not self.args.needs_boundaries:
            return batch
        signal = self._ask(batch)
        signal = signal if alone else signal.without_states()
        return replace(batch, readings={ONLY: replace(batch.readings[ONLY], signal=signal)})

    def _ask(self, batch: Batch) -> ChunkSignal:
        view, alignment = batch.readings[ONLY].view, batch.readings[ONLY].alignment
        assert alignment is not None
        signal = self.teacher.ask(view, view.supervised)
        if isinstance(signal, LabelSignal):
            log_probs, boundary = signal.log_probs, signal.boundary_log_probs
        else:
            assert isinstance(signal, DenseSignal)
            labels = view.labels[:, 1:][view.supervised]
            with torch.no_grad():
                log_probs, boundary = token_log_probs(
                    signal.hidden, signal.head, labels, self._teacher_boundaries, chunk_size=self.args.chunk_size
                )
        return ChunkSignal(
            chunk_log_probs(log_probs, alignment.teacher_chunk, len(alignment)),
            alignment,
            None if boundary is None else _after(boundary, alignment.teacher_next),
            signal if isinstance(signal, DenseSignal) and self.args.needs_hidden else None,
        )

    # The loss

    def count_items(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens, chunks as the policy leaves them, and ends of chunks with hidden states to compare."""
        counts = super().count_items(batch)
        reading = batch.readings[ONLY]
        assert reading.alignment is not None
        alignment = reading.alignment.of_first_tokens(int(counts["token"]))
        ends = None if reading.signal is None else reading.signal.boundary_log_probs
        groups = self._groups(alignment, None if ends is None else ends[: len(alignment)])
        counts["chunk"] = torch.tensor(len(groups), device=counts["token"].device)
        if self.args.hidden_weight:
            counts["end"] = (alignment.student_next >= 0).sum()
        return counts

    def _groups(self, alignment: ChunkAlignment, boundary_log_probs: Tensor | None) -> ChunkGroups:
        policy = self.args.chunks if self.args.objective == "alm" else "all"
        return group_chunks(policy, alignment.row, boundary_log_probs, self.args.gamma)

    def item_losses(self, student: Supervised, signal: ChunkSignal) -> ItemLosses:
        """One divergence per chunk; cross-entropy per token and hidden states per end of a chunk where they count."""
        args, alignment = self.args, signal.alignment
        log_probs, boundary = token_log_probs(
            student.hidden,
            student.head,
            student.labels,
            self._boundaries,
            chunk_size=args.chunk_size,
            precise=args.precise_logits,
        )
        items = self._groups(alignment, signal.boundary_log_probs)
        of_chunks = chunk_log_probs(log_probs, alignment.student_chunk, len(alignment))
        after = None if boundary is None else _after(boundary, alignment.student_next)
        ours = items.log_probs(of_chunks, after)
        theirs = items.log_probs(signal.log_probs, signal.boundary_log_probs)
        terms = {"divergence": self._divergence(student, signal, ours, theirs), "ce": -log_probs.sum()}
        if args.hidden_weight:
            terms["hidden"] = self._hidden_distance(student, signal)
        tokens, aligned = len(student.labels), (alignment.student_chunk >= 0).sum()
        reports = {
            "divergence": (terms["divergence"], len(items)),
            "ce": (terms["ce"], tokens),
            # Of all chunks as they are, so that runs with different settings can be compared.
            "chunk_gap": ((of_chunks - signal.log_probs).abs().sum(), len(alignment)),
            "chunk_kl": (binarised(of_chunks, signal.log_probs, temperature=1).sum(), len(alignment)),
            "aligned": (aligned, tokens),
            "bits_per_byte": (terms["ce"] / math.log(2), self._bytes[student.labels].sum()),
        }
        return ItemLosses(self._combined(terms, args.term_weights), reports)

    def _divergence(self, student: Supervised, signal: ChunkSignal, ours: Tensor, theirs: Tensor) -> Tensor:
        """The sum over chunks of what the objective compares."""
        args = self.args
        if args.objective == "alm":
            return DIVERGENCES[args.divergence](args)(ours, theirs).sum()
        assert signal.dense is not None
        first, teacher_first = signal.alignment.first_tokens()
        targets: Any = DenseSignal(signal.dense.hidden[teacher_first], signal.dense.head)
        if args.objective == "uld":
            objective, targets = uld, SortedTargets(targets)
        else:
            objective, targets = divergences.forward_kl, MappedTargets(targets, self._teacher_tokens)
        labels = student.labels[first]
        chunk = {"chunk_size": args.chunk_size, "precise": args.precise_logits, "repeatable": self.balances}
        return fused_loss(student.hidden[first], student.head, labels, targets, objective, **chunk).total

    def _hidden_distance(self, student: Supervised, signal: ChunkSignal) -> Tensor:
        """The squared distance at the ends of chunks, in each channel relative to the teacher's mean square there."""
        assert signal.dense is not None
        alignment = signal.alignment
        ends = alignment.student_next >= 0
        ours = student.hidden[alignment.student_next[ends]]
        theirs = signal.dense.hidden[alignment.teacher_next[ends]].float()
        distance = (getattr(base_of(self.model), _PROJECTION)(ours).float() - theirs).square()
        return (distance / (theirs.square().mean(0) + 1e-8)).mean(-1).sum()

    def _combined(self, terms: dict[str, Tensor], shares: dict[str, float]) -> dict[str, Tensor]:
        """The terms that count, each times its factor, by the kind of their items."""
        counted = {name: terms[name] for name, share in shares.items() if share}
        if self.balances:
            # All alike, whatever their weights: so do the authors.
            return self.balanced({name: {_ITEMS[name]: total} for name, total in counted.items()})
        weighted = self.args.combine == "weights"
        weights = {name: shares[name] for name in counted} if weighted else None
        factors = combination_weights("weights" if weighted else "sum", list(counted), weights)
        return {_ITEMS[name]: total * factors[name] for name, total in counted.items()}

    # The projection of hidden states, which no one needs after training

    def weights_to_save(self, folder: Path, weights: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """The student's own; the projection goes into a file beside them."""
        weights = super().weights_to_save(folder, weights)
        if not self.args.hidden_weight:
            return weights
        everything: Any = self.model.state_dict() if weights is None else weights
        own = {name: value for name, value in everything.items() if _PROJECTION in name.split(".")}
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"weight": next(iter(own.values())).contiguous()}, folder / f"{_PROJECTION}.safetensors")
        return {name: value for name, value in everything.items() if name not in own}

    def weights_restored(self, checkpoint: Path) -> None:
        """The projection's, too."""
        super().weights_restored(checkpoint)
        if self.args.hidden_weight:
            saved = load_file(checkpoint / f"{_PROJECTION}.safetensors")
            getattr(base_of(self.model), _PROJECTION).load_state_dict(saved)


METHOD = Method(ALMTrainer)


def _after(boundary: Tensor, following: Int[Tensor, "chunk"]) -> Tensor:
    """The log-prob of a boundary after each chunk: that of the place of the following token, certain without one."""
    if not len(boundary):
        return boundary.new_zeros(len(following))
    return boundary[following.clamp(min=0)].where(following >= 0, 0)
