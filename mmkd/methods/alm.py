"""ALM: student and teacher agree on how likely chunks of text are, with tokenizers of their own (2503.20083)."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mmkd.alignment.pieces import boundary_mask
from mmkd.losses import divergences
from mmkd.losses.chunks import ChunkGroups, binarised, chunk_log_probs, group_chunks
from mmkd.losses.combine import combination_weights
from mmkd.losses.fused import fused_loss
from mmkd.losses.likelihood import token_log_probs
from mmkd.losses.other_vocabulary import MappedTargets, SortedTargets, uld
from mmkd.models.backbone import base_of, full_head
from mmkd.models.load import tokenizer_of
from mmkd.preparation.aligned_sides import AlignedSides
from mmkd.preparation.pairs import QUESTION
from mmkd.teachers.batch import ONLY, Batch
from mmkd.teachers.several import SeveralTeachers, is_routed, named_parts, student_views_of
from mmkd.teachers.signals import ChunkAlignment, ChunkSignal, DenseSignal, LabelSignal, MixedSignal, RoutedSignal
from mmkd.teachers.teacher import Teacher
from mmkd.training.answer_text import said
from mmkd.training.answers import Placed
from mmkd.training.base import DistillationTrainer
from mmkd.training.items import DATA_TOKEN, ItemLosses, Reports, Supervised, Terms, add_share, kind_of
from mmkd.training.method import Method
from mmkd.training.teaching import StudentSide, Teaching, check_all_teach

from .alm_config import DIVERGENCES
from .alm_config import ALMConfig as ALMConfig
from .alm_readings import Readings
from .alm_teachers import PROJECTION, add_projections, after, aligned_sides, asked, check_told, fitted, projection_of
from .pair_rollouts import as_teacher_reads


class ALMTrainer(DistillationTrainer[ChunkSignal | MixedSignal[ChunkSignal]]):
    """Minimises a divergence of likelihoods per chunk of text that ends a token on both sides.

    The teacher reads the same rows in its own tokens and by its own chat template. Besides the base's arguments:

        teacher_processing_class: the teacher's tokenizer, of several a mapping from their names; by default found by
            the teacher's name.

    Raises UserError too for tokenizers whose tokens cannot be placed in a text, and where student and teacher share no
    text at all.
    """

    method = "alm"
    config_class = ALMConfig
    accepts = (DenseSignal, LabelSignal)
    one_vocabulary = False
    takes_several = True
    reports_by_teacher = ("chunk_gap", "chunk_kl", "aligned")
    args: ALMConfig

    @classmethod
    def check_teacher(cls, teacher: Teacher, args: ALMConfig) -> None:
        """Raises UserError too where a cache of log-probs, or a server's text, does not tell enough for the settings.

        Of a server that generates, only the log-probs of the text's own tokens are asked.
        """
        super().check_teacher(asked(teacher), args)
        check_told(teacher, args)

    # Readings of the data

    @cached_property
    def _readings(self) -> Readings:
        # Data come before the Trainer itself is made.
        return Readings(*self._given_teacher)

    def prepared(self, rows: Any, args: Any, packing: bool, formatting_func: Any, split: str) -> Any:
        """The rows as student and teachers read them, side by side."""
        as_student = partial(super().prepared, packing=False, formatting_func=formatting_func, split=split)
        labelling = self.labelling
        return self._readings.pair(
            rows, split, labelling.given(args), packing, formatting_func, labelling.processing_class, as_student
        )

    def columns_to_keep(self) -> list[str]:
        """The teachers' reading of rows of text, too."""
        theirs = [*self._readings.columns(), QUESTION]
        return [*super().columns_to_keep(), *([] if self.labelling.vision else theirs)]

    # The teacher

    def build_teacher(self, student: StudentSide, teacher: Any, processing_class: Any) -> Teaching:
        """The teacher, or several, who read the batch in their own tokens."""
        args, device = self.args, self.accelerator.device
        readers = self._readings.readers(self.train_dataset, args)
        self._readings.align_with(self.processing_class, args)
        column = teacher.column if isinstance(teacher, SeveralTeachers) else None
        if isinstance(teacher, SeveralTeachers):
            check_all_teach(teacher, self.train_dataset)
        self._paired = {
            name: fitted(
                part, args, readers[name], student.splits, column, (name, projection_of(number, name), device)
            )
            for number, (name, part) in enumerate(named_parts(teacher).items())
        }
        whole = {name: paired.teacher for name, paired in self._paired.items()}
        teacher = teacher.replaced_by(whole) if isinstance(teacher, SeveralTeachers) else whole[ONLY]
        self._aligned = AlignedSides(aligned_sides(self._paired, readers), column)
        pieces = next(iter(self._paired.values())).aligner.student
        boundaries = torch.from_numpy(boundary_mask(pieces)).to(device)
        self._boundaries = boundaries if args.needs_boundaries else None
        self._bytes = torch.from_numpy(pieces.lengths).to(device)
        if args.hidden_weight:
            add_projections(
                self.model, self._paired.values(), device, self.is_fsdp_enabled or self.is_deepspeed_enabled
            )
        tokens = min(full_head(self.model).vocab_size, len(tokenizer_of(self.processing_class)))
        return Teaching(teacher, tokens, self._aligned, columns={name: own.prefix for name, own in readers.items()})

    def with_rollouts(self, batch: Batch, placed: Mapping[int, Placed]) -> Batch:
        """The batch with the text of the rollouts in the teachers' tokens, aligned anew."""
        if not placed:
            return batch
        examples, tokenizer = list(batch.rows), tokenizer_of(self.processing_class)
        for row, placing in placed.items():
            text, whole = said(tokenizer, batch["input_ids"][row].tolist(), placing)
            for reader in self._readings.of_row(examples[row]):
                examples[row] = as_teacher_reads(examples[row], text, whole, placing.rollout.ended, reader)
        aligned = self._aligned(batch.to("cpu"), examples).to(self.accelerator.device)
        return replace(batch, readings=aligned.readings)

    def ask(self, batch: Batch) -> ChunkSignal | MixedSignal[ChunkSignal] | RoutedSignal[ChunkSignal]:
        """How likely the teacher finds each chunk of the batch, or each of several."""
        answers: dict[str, ChunkSignal] = {}
        for name, view in student_views_of(self.teacher, batch).items():
            signal = batch.readings[name].signal
            if signal is None or (self.args.needs_hidden and signal.dense is None):
                signal = self._ask(batch, name)
            answers[name] = signal.of_first_tokens(int(view.supervised.sum()))
        return self.teacher.together(batch, answers) if isinstance(self.teacher, SeveralTeachers) else answers[ONLY]

    def ask_ahead(self, batch: Batch, alone: bool) -> Batch:
        """The batch with the numbers of its chunks, where it is the teacher who says which chunks are compared.

        Its hidden states, which are large, stay only with a batch that is alone.
        """
        if not self.args.needs_boundaries:
            return batch
        readings = {}
        for name, reading in batch.readings.items():
            signal = self._ask(batch, name)
            readings[name] = replace(reading, signal=signal if alone else signal.without_states())
        return replace(batch, readings=readings)

    def _ask(self, batch: Batch, name: str) -> ChunkSignal:
        reading = batch.readings[name]
        several = isinstance(self.teacher, SeveralTeachers)
        view = self.teacher.own_rows(name, reading.view) if several else reading.view
        return self._paired[name].read(reading, view, self.args)

    # The loss

    def count_items(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens, chunks as the policy leaves them, and ends of chunks with hidden states to compare."""
        counts = super().count_items(batch)
        for name, view in student_views_of(self.teacher, batch).items():
            reading = batch.readings[name]
            assert reading.alignment is not None
            alignment = reading.alignment.of_first_tokens(int(view.supervised.sum()))
            ends = None if reading.signal is None else reading.signal.boundary_log_probs
            groups = self._groups(alignment, None if ends is None else ends[: len(alignment)])
            numbers = {"chunk": torch.tensor(len(groups), device=counts["token"].device)}
            if self.args.hidden_weight:
                numbers["end"] = (alignment.student_next >= 0).sum()
            for items, number in numbers.items():
                kind = items if is_routed(self.teacher) else kind_of(items, name)
                counts[kind] = counts[kind] + number if kind in counts else number
        return counts

    def _groups(self, alignment: ChunkAlignment, boundary_log_probs: Tensor | None) -> ChunkGroups:
        policy = self.args.chunks if self.args.objective == "alm" else "all"
        return group_chunks(policy, alignment.row, boundary_log_probs, self.args.gamma)

    def item_losses(self, student: Supervised, signal: ChunkSignal | MixedSignal[ChunkSignal]) -> ItemLosses:
        """One divergence per chunk; cross-entropy per token and hidden states per end of a chunk where they count."""
        args, mixed = self.args, MixedSignal.of(signal)
        log_probs, boundary = token_log_probs(
            student.hidden,
            student.head,
            student.labels,
            self._boundaries,
            chunk_size=args.chunk_size,
            precise=args.precise_logits,
        )
        nats, tokens = -log_probs.sum(), len(student.labels)
        ce, kind = (-log_probs[~student.own].sum(), DATA_TOKEN) if self.parts_tokens else (nats, "token")
        terms: dict[str, dict[str, Tensor]] = {"divergence": {}, "ce": {kind: ce}, "hidden": {}}
        reports: Reports = {
            "ce": (ce, (~student.own).sum() if self.parts_tokens else tokens),
            "bits_per_byte": (nats / math.log(2), self._bytes[student.labels].sum()),
        }
        for name, said_of_chunks in mixed.signals.items():
            alignment, weight = said_of_chunks.alignment, mixed.weights[name]
            items = self._groups(alignment, said_of_chunks.boundary_log_probs)
            of_chunks = chunk_log_probs(log_probs, alignment.student_chunk, len(alignment))
            ours = items.log_probs(of_chunks, None if boundary is None else after(boundary, alignment.student_next))
            theirs = items.log_probs(said_of_chunks.log_probs, said_of_chunks.boundary_log_probs)
            divergence = self._divergence(student, said_of_chunks, ours, theirs)
            terms["divergence"][kind_of("chunk", name)] = weight * divergence
            if args.hidden_weight:
                distance = self._hidden_distance(student, said_of_chunks)
                terms["hidden"][kind_of("end", name)] = weight * distance
            # Of all chunks as they are, so that runs with different settings can be compared.
            gap = (of_chunks - said_of_chunks.log_probs).abs().sum()
            kl = binarised(of_chunks, said_of_chunks.log_probs, temperature=1).sum()
            aligned = (alignment.student_chunk >= 0).sum()
            add_share(reports, "divergence", (divergence, len(items)), weight, name)
            add_share(reports, "chunk_gap", (gap, len(alignment)), weight, name)
            add_share(reports, "chunk_kl", (kl, len(alignment)), weight, name)
            add_share(reports, "aligned", (aligned, tokens), weight, name)
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
            nearest = self._paired[signal.teacher].nearest
            assert nearest is not None
            objective, targets = divergences.forward_kl, MappedTargets(targets, nearest)
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
        projection = getattr(base_of(self.model), self._paired[signal.teacher].projection)
        distance = (projection(ours).float() - theirs).square()
        return (distance / (theirs.square().mean(0) + 1e-8)).mean(-1).sum()

    def _combined(self, terms: Terms, shares: dict[str, float]) -> dict[str, Tensor]:
        """The terms that count, each times its factor, by the kind of their items."""
        counted = {name: terms[name] for name, share in shares.items() if share}
        if self.balances:
            # All alike, whatever their weights: so do the authors.
            return self.balanced(counted)
        weighted = self.args.combine == "weights"
        weights = {name: shares[name] for name in counted} if weighted else None
        factors = combination_weights("weights" if weighted else "sum", list(counted), weights)
        return ItemLosses.added(
            {kind: total * factors[name] for kind, total in term.items()} for name, term in counted.items()
        )

    # The projections of hidden states, which no one needs after training

    def weights_to_save(self, folder: Path, weights: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """The student's own; in a checkpoint the projections go into a file beside them."""
        weights = super().weights_to_save(folder, weights)
        if not self.args.hidden_weight:
            return weights
        everything: Any = self.model.state_dict() if weights is None else weights
        projections, own = {}, dict(everything)
        for paired in self._paired.values():
            (name,) = (name for name in everything if paired.projection in name.split("."))
            projections[paired.saved_as] = own.pop(name).contiguous()
        # Servers read every file of weights in the folder of a student.
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            folder.mkdir(parents=True, exist_ok=True)
            save_file(projections, folder / f"{PROJECTION}.safetensors")
        return own

    def weights_restored(self, checkpoint: Path) -> None:
        """The projections', too."""
        super().weights_restored(checkpoint)
        if self.args.hidden_weight:
            saved = load_file(checkpoint / f"{PROJECTION}.safetensors")
            for paired in self._paired.values():
                projection = getattr(base_of(self.model), paired.projection)
                projection.load_state_dict({"weight": saved[paired.saved_as]})


METHOD = Method(ALMTrainer)
