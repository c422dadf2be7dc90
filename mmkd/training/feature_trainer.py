"""Distillation that also compares what modules inside student and teacher compute: the key `features`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from mmkd.errors import UserError
from mmkd.losses.combine import gradients_of
from mmkd.models.captured_features import INPUT, attention_map_of, capturing, feature_of, named_modules_of
from mmkd.models.parts import part_of
from mmkd.models.sharded_weights import is_sharded
from mmkd.teachers.batch import ONLY, Batch, View
from mmkd.teachers.local import ModelTeacher
from mmkd.teachers.several import is_routed, pairs_of
from mmkd.teachers.signals import DenseSignal, MixedSignal
from mmkd.teachers.teacher import Teacher

from .base import DistillationTrainer
from .feature_config import FeatureConfig
from .feature_distances import distance
from .feature_items import FeatureItems, attention_items, image_items, positions_of, sizes_at, text_items
from .feature_pairs import STATES, FeaturePair, pairs_of_terms
from .feature_projectors import FeatureProjectors
from .items import ItemLosses, ReadStudent, Reports, Terms, add_share, kind_of
from .teacher_views import teacher_views_of
from .teaching import StudentSide, Teaching

Signal = TypeVar("Signal")


@dataclass(frozen=True)
class FeatureSignal(Generic[Signal]):
    """What a teacher says, and what its modules computed while it was asked: by the name of a pair."""

    said: Signal
    features: Mapping[str, FeatureItems]


class FeatureTrainer(DistillationTrainer[Signal], Generic[Signal]):
    """A trainer whose loss may have terms of `features` besides those of the method."""

    args: FeatureConfig
    _pairs: Sequence[FeaturePair] = ()
    _projectors: FeatureProjectors
    _captured: Mapping[str, Any]
    """What modules of the student computed in the pass that goes on, and of what."""
    _view: View
    _apart: tuple[Terms, Mapping[str, float]] = ({}, {})
    """Terms of features, with their weights, that are still to be balanced with those of the method."""

    # Before training

    def build_teacher(self, student: StudentSide, teacher: Any, processing_class: Any) -> Teaching:
        """The base's, with the modules that are compared. Raises UserError for modules that cannot be."""
        teaching = super().build_teacher(student, teacher, processing_class)
        terms = self.args.feature_terms
        if not terms:
            return teaching
        alike = not teacher_views_of(teacher, self.args)
        self._pairs = pairs_of_terms(terms, student.model, teaching.teacher, student.labelling.vision, alike)
        names = [
            _projector_of(pair, name)
            for pair in self._pairs
            for name in pair.teachers
            if pair.term.kind in ("mse", "cosine") and pair.term.projector != "none"
        ]
        self.reports_by_teacher = (*self.reports_by_teacher, *(pair.report for pair in self._pairs))
        self._projectors = FeatureProjectors(self.args, self.accelerator, names)
        self.add_callback(_Stepping(self))
        if self.args.combine == "gradmag":
            self._check_balanced()
        return teaching

    def _check_balanced(self) -> None:
        """Raises UserError where the gradients of a term cannot be compared with those of others."""
        if is_sharded(self.accelerator):
            raise UserError(
                "combine: gradmag compares gradients of features in the modules that compute them, which FSDP2 and "
                "ZeRO-3 have cut. Use accelerate_config ddp or zero2, or set combine: weights.",
                because="not built",
            )
        for pair in self._pairs:
            if not self._parameters_of(pair):
                raise UserError(
                    f"combine: gradmag compares gradients, and nothing of {pair.student} is trained, which "
                    f"{pair.report} is about. Set combine: weights, or train that module too.",
                    because="not built",
                )

    def _fit(self, teacher: Any, teacher_processing_class: Any) -> None:
        super()._fit(teacher, teacher_processing_class)
        # A student that is to be sharded is not in its place yet.
        if self._pairs and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            for row in islice(iter(self.train_dataset), 1):
                self._try(self.on_device(self.data_collator([dict(row)])))

    def _try(self, batch: Batch) -> None:
        """Compares the features of a batch once, so that what does not fit is said before training."""
        training = self.model.training
        self.model.eval()
        # Whether features have a gradient is known without what a backward pass would need.
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
            signal: Any = self.ask(batch)
            self.forward(self.model, batch, lambda read: self._terms_alone(read, signal))
        self.model.train(training)

    def _terms_alone(self, read: ReadStudent, signal: Any) -> ItemLosses:
        parts = getattr(signal, "masks", {})
        for name, part in signal.signals.items() if parts else ((ONLY, signal),):
            self._feature_terms(read(parts.get(name)).hidden, MixedSignal.of(part), name, parts.get(name))
        return ItemLosses()

    # The teacher

    def listen(self, teacher: Teacher[Any], name: str, view: View) -> Any:
        """What a teacher says, with what its modules compute meanwhile."""
        pairs = [pair for pair in self._pairs if name in pair.teachers]
        if not pairs:
            return super().listen(teacher, name, view)
        if isinstance(teacher, ModelTeacher):
            with capturing(teacher.model, [pair.teachers[name] for pair in pairs]) as captured:
                said = self.ask_teacher(teacher, name, view)
                features = {pair.name: _items(pair, captured, pair.teachers[name], view) for pair in pairs}
            return FeatureSignal(said, features)
        said = self.ask_teacher(teacher, name, view)
        positions = positions_of(view, "answer")
        items = FeatureItems(self.answer_states(said), sizes_at(view, positions, "answer"))
        return FeatureSignal(said, dict.fromkeys((pair.name for pair in pairs), items))

    def answer_states(self, said: Any) -> Float[Tensor, "token width"]:
        """The last hidden states at the answer, of what a teacher says that answers with them."""
        assert isinstance(said, DenseSignal)
        return said.hidden

    # The loss

    def count_items(self, batch: Batch) -> dict[str, Tensor]:
        """The base's, and for each term the tokens, images or sequences that it compares."""
        counts = super().count_items(batch)
        for name, (student, _) in pairs_of(self.teacher, batch).items() if self._pairs else ():
            for pair in self._pairs:
                if name not in pair.teachers:
                    continue
                kind = kind_of(pair.report, "" if is_routed(self.teacher) else name)
                number = _count(pair, student)
                counts[kind] = counts[kind] + number if kind in counts else number
        return counts

    def forward(self, model: Any, batch: Batch, losses_of: Callable[[ReadStudent], ItemLosses]) -> ItemLosses:
        """The base's, which keeps what the named modules compute until the losses are made of it."""
        if not self._pairs:
            return super().forward(model, batch, losses_of)
        with capturing(self.model, [pair.student for pair in self._pairs]) as captured:
            self._captured, self._view = captured, batch.student
            return super().forward(model, batch, losses_of)

    def part_losses(
        self, read: ReadStudent, signal: Any, name: str = ONLY, chosen: Tensor | None = None
    ) -> ItemLosses:
        """The method's losses and those of features, of the tokens of one teacher or of all."""
        if not self._pairs:
            return super().part_losses(read, signal, name, chosen)
        mixed = MixedSignal.of(signal)
        terms, weights, reports = self._feature_terms(read(chosen).hidden, mixed, name, chosen)
        self._apart = (terms, weights) if self.balances else ({}, {})
        plain = mixed.map(_without_features)
        losses = super().part_losses(
            read, plain if isinstance(signal, MixedSignal) else plain.signals[ONLY], name, chosen
        )
        if not self.balances:
            weighted = [{kind: weights[term] * total for kind, total in own.items()} for term, own in terms.items()]
            losses.totals = ItemLosses.added([losses.totals, *weighted])
        losses.reports |= reports
        return losses

    def _feature_terms(
        self, hidden: Tensor, mixed: MixedSignal[Any], name: str, chosen: Tensor | None
    ) -> tuple[dict[str, dict[str, Tensor]], dict[str, float], Reports]:
        """The terms of features, with weights and reports; `name` is that of the teacher that is asked alone."""
        view = self._view if chosen is None else self._view.learnt_from(chosen)
        terms: dict[str, dict[str, Tensor]] = {}
        reports: Reports = {}
        for pair in self._pairs:
            ours = _items(pair, self._captured, pair.student, view)
            self._check_learns(pair, ours)
            for mixed_name, said in mixed.signals.items():
                teacher = mixed_name or name
                if teacher not in pair.teachers:
                    continue
                project = partial(self._projected, pair, teacher)
                total, count = distance(pair.term, pair.tokens, ours, said.features[pair.name], project, pair.report)
                # A term without items still belongs to the graph.
                total = total if count else hidden.float().sum() * 0
                weight = mixed.weights[mixed_name]
                terms.setdefault(pair.report, {})[kind_of(pair.report, mixed_name)] = weight * total
                add_share(reports, pair.report, (total, count), weight, mixed_name)
        return terms, {pair.report: pair.weight for pair in self._pairs if pair.report in terms}, reports

    def _projected(self, pair: FeaturePair, teacher: str, features: Tensor, width: int) -> Tensor:
        return self._projectors.projected(_projector_of(pair, teacher), features, width, pair.term.projector)

    def _check_learns(self, pair: FeaturePair, ours: FeatureItems) -> None:
        """Raises UserError where nothing of the student has an influence on what is compared."""
        if torch.is_grad_enabled() and len(ours.features) and not ours.features.requires_grad:
            raise UserError(
                f"{pair.report} compares {pair.student}, and nothing up to there is trained: the term teaches the "
                "student nothing. Train that part too (trainable, lora_target_modules), or remove the term.",
                because="meaning",
            )

    # Balance

    def balanced(self, terms: Terms, weights: Mapping[str, float] | None = None) -> dict[str, Tensor]:
        """The base's, of the method's terms and those of features."""
        (features, own), self._apart = self._apart, ({}, {})
        return super().balanced({**terms, **features}, weights if weights is None else {**weights, **own})

    def gradients_in(self, means: Mapping[str, Tensor]) -> Float[Tensor, "loss parameter"]:
        """The base's; of features in the module that computes them, if that is not the last layer."""
        features = {pair.report: pair for pair in self._pairs if pair.report in means}
        if not features:
            return super().gradients_in(means)
        others = super().gradients_in({name: mean for name, mean in means.items() if name not in features})
        rows = dict(zip((name for name in means if name not in features), others, strict=True))
        for name, pair in features.items():
            rows[name] = gradients_of([means[name]], self._parameters_of(pair))[0]
        longest = max(len(row) for row in rows.values())
        return torch.stack([torch.nn.functional.pad(rows[name], (0, longest - len(rows[name]))) for name in means])

    def _parameters_of(self, pair: FeaturePair) -> list[torch.nn.Parameter]:
        """What is trained in the module that computes the student's features, or in the tower before a connector."""
        modules = named_modules_of(self.model)
        if not pair.student.endswith(INPUT):
            found = list(modules[pair.student].parameters())
        elif not pair.by_image:
            # What the first block is given.
            found = list(self.model.get_input_embeddings().parameters())
        else:
            given = modules[pair.student.removesuffix(INPUT)]
            inside = set(given.parameters())
            towers = [own for name, own in self.model.named_parameters() if part_of(name) == "vision_tower"]
            found = [own for own in towers if own not in inside]
        return [parameter for parameter in found if parameter.requires_grad]

    # The projectors

    def projectors_step(self) -> None:
        """Called before each optimizer step, when its gradients are whole."""
        rate = max(group["lr"] for group in self.optimizer.param_groups)
        self._projectors.step(rate)

    def checkpoint_to_save(self, folder: Path) -> None:
        """Saves the projectors beside the student."""
        super().checkpoint_to_save(folder)
        if self._pairs:
            self._projectors.save(folder, self.args.should_save)

    def checkpoint_restored(self, folder: Path) -> None:
        """Goes on with the projectors of the checkpoint."""
        super().checkpoint_restored(folder)
        if self._pairs:
            self._projectors.load(folder)


def _items(pair: FeaturePair, captured: Mapping[str, Any], module: str, view: View) -> FeatureItems:
    """The items of one side of a pair; none where the module was not run, since there was nothing to ask."""
    assert module != STATES
    value = captured.get(module)
    if value is None:
        return FeatureItems(torch.zeros(0, 1, device=view.labels.device), [])
    if pair.term.of_attention:
        weights = attention_map_of(value)
        if weights is None:
            raise UserError(
                f"{pair.report} compares maps of attention, and {module} returns none. Name a module of "
                "self-attention, such as layers.5.self_attn.",
                because="meaning",
            )
        return attention_items(weights, view, pair.tokens)
    feature = feature_of(value)
    if feature is None:
        raise UserError(f"{pair.report} names {module}, which has no tensor to compare. Name another module.")
    if pair.by_image:
        return image_items(feature, view, module)
    if feature.shape[:-1] != view.labels.shape:
        raise UserError(
            f"{pair.report} names {module}, whose features {tuple(feature.shape)} are not one of each of "
            f"{tuple(view.labels.shape)} positions. Name another module, such as a block.",
            because="meaning",
        )
    return text_items(feature, view, pair.tokens)


def _without_features(signal: Any) -> Any:
    return signal.said if isinstance(signal, FeatureSignal) else signal


def _projector_of(pair: FeaturePair, teacher: str) -> str:
    return f"{pair.name}/{teacher}" if teacher else pair.name


def _count(pair: FeaturePair, view: View) -> Tensor:
    if pair.tokens == "visual":
        return torch.tensor(len(view.images), device=view.labels.device)
    positions = positions_of(view, pair.tokens)
    if pair.counts_tokens:
        return positions.sum()
    return torch.tensor(len(sizes_at(view, positions, pair.tokens)), device=view.labels.device)


class _Stepping(TrainerCallback):
    """Tells when a step of the optimizer comes."""

    def __init__(self, trainer: FeatureTrainer[Any]):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.projectors_step()
