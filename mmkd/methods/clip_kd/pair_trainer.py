"""What the trainer of pairs needs besides its loss: batches, evaluation, and files of the student and its heads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmkd.errors import UserError
from mmkd.models.dual_encoder import DualEncoder
from mmkd.models.open_clip_format import save_open_clip
from mmkd.models.pair_heads import pair_heads
from mmkd.models.sharded_weights import called, is_sharded, whole_weights
from mmkd.models.whole_student import (
    WholeStudent,
    give_dimension,
    is_of_transformers,
    load_trained,
    save_trained,
)
from mmkd.preparation.pair_batches import (
    CAPTIONS,
    FIRST,
    ROWS,
    SECOND,
    STUDENT,
    TEACHERS,
    PairCollator,
    PairRows,
    PairSampler,
)
from mmkd.seams.accelerate_seam import has_no_embeddings
from mmkd.training.run_trainer import RunTrainer

from .clip_config import ContrastiveKDConfig
from .learnt_masks import LearntMasks
from .pair_evaluation import EvaluatedPairs
from .pair_inputs import cached_pairs, pair_rows
from .pair_terms import PairFacts, PairFeatures

HEADS_FILE = "pair_heads.safetensors"
"""The heads in a checkpoint."""

TRAINED_FILE = "trained_weights.safetensors"
"""What an adapter trains, in a checkpoint, whose model it is merged into."""

Reports = dict[str, tuple[Tensor, Any]]


class PairTrainer(RunTrainer):
    """transformers' Trainer for a dual encoder; a subclass has the loss."""

    args: ContrastiveKDConfig
    model: Any
    train_dataset: Any
    student: DualEncoder
    teachers: dict[str, DualEncoder]
    collate: PairCollator
    masks: LearntMasks | None
    whole: WholeStudent
    evaluated_rows: PairRows
    """Those of the evaluation that goes on."""
    _evaluated: EvaluatedPairs

    def losses(
        self,
        features: PairFeatures,
        asked: Mapping[str, PairFeatures],
        facts: PairFacts,
        everywhere: bool = True,
    ) -> tuple[Tensor, Reports]:
        """This rank's share of the loss of all pairs `everywhere`, else of its own by themselves, and reports."""
        raise NotImplementedError

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's; FSDP2 gets a student whose numbers have a dimension. Raises UserError for masks in shards."""
        super().create_accelerator_and_postprocess()
        if self.masks is not None and is_sharded(self.accelerator):
            raise UserError(
                "inherit: auto masks what whole modules compute, which FSDP2 and ZeRO-3 cut up. Use accelerate_config "
                "ddp or zero2; gradient_accumulation_steps makes large batches of small ones.",
                because="not built",
            )
        if self.is_fsdp_enabled:
            give_dimension(self.student.model)
            has_no_embeddings(self.student.model)

    # Batches

    @property
    def pairs_per_step(self) -> int:
        """The pairs of an optimizer step: of all ranks and accumulated parts, each of which is compared with all."""
        args = self.args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def get_train_dataloader(self) -> Any:
        """Batches of pairs, in an order and with captions that depend on the seed and the epoch alone."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = PairSampler(len(self.train_dataset), self.pairs_per_step, seed)
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda dataset: sampler,
            is_training=True,
        )

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """The Trainer's, without scales: CLIP does not pull its temperature to 1."""
        scalars = {name for name, parameter in model.named_parameters() if parameter.ndim < 2}
        return [name for name in super().get_decay_parameter_names(model) if name not in scalars]

    def floating_point_ops(self, inputs: Any) -> int:
        """None: the Trainer would estimate them from tokens, and looks for those of one text."""
        return 0

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any]) -> dict[str, PairFeatures]:
        """What each teacher says of the pairs of a part."""
        with self.compute_loss_context_manager():
            return {name: self.encode(teacher, inputs[TEACHERS][name]) for name, teacher in self.teachers.items()}

    def encode(self, encoder: DualEncoder, inputs: Mapping[str, Any]) -> PairFeatures:
        """Features of both sides of pairs."""
        first = encoder.encode_images if self.train_dataset.has_images else encoder.encode_texts
        return PairFeatures(first(inputs[FIRST]), encoder.encode_texts(inputs[SECOND]))

    # Evaluation

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Keeps what student and teachers say of a batch; the loss is computed of all of them in the end."""
        inputs = self.on_device(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            said = {"": model(reader=lambda: self.encode(self.student, inputs[STUDENT]))}
            said |= {f"teacher {name}": features for name, features in self.ask(inputs).items()}
        own = {name: (features.images.float(), features.texts.float()) for name, features in said.items()}
        batch: Any = self.accelerator.gather_for_metrics((own, inputs[CAPTIONS], inputs[ROWS]))
        self._evaluated.add(batch)
        return None, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; then the loss in batches as large as those of training, and what is found among all pairs."""
        self._evaluated = EvaluatedPairs()
        result = super().evaluation_loop(*args, **kwargs)
        with called(self.model, self.accelerator) as model:
            # In the forward, where weights that are cut over ranks are whole.
            self._record(model(reader=lambda: self._evaluated.reports(self)), "eval")
        return result

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's, also of rows as the constructor takes them."""
        if isinstance(eval_dataset, Dataset):
            eval_dataset = pair_rows(eval_dataset, self.args, "eval", cached_pairs(self.teachers, self.args))
        rows: Any = eval_dataset
        if eval_dataset is None or isinstance(eval_dataset, str):
            own: Any = self.eval_dataset
            rows = own if eval_dataset is None else own[eval_dataset]
        self.evaluated_rows = rows
        return super().get_eval_dataloader(eval_dataset)

    def collator_of(self, training: bool) -> Any:
        """The same of both."""
        return self.collate

    # What is left

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's; the final student is cut where it has masks, and also written for open_clip if asked for.

        A student in shards is written whole with every checkpoint, so that none has to be consolidated.
        """
        folder = Path(output_dir or self.args.output_dir or ".")
        weights = whole_weights(self.model, self.accelerator)
        if weights is None:
            super().save_model(output_dir, _internal_call)
        else:
            self.saved_otherwise(folder, weights)
        if _internal_call or not self.args.should_save:
            return
        student = self.left(weights)
        if self.masks is not None:
            student = self.masks.cut(student)
            for path in folder.glob("model*.safetensors*"):
                path.unlink()
            student.save(folder)
        if self.args.save_open_clip:
            save_open_clip(student, folder / "open_clip")

    def left(self, weights: dict[str, Tensor] | None) -> DualEncoder:
        """The student as an ordinary model, with its adapter merged; `weights` are those that ranks have gathered."""
        if weights is None and not self.whole.has_adapter:
            return self.student
        return self.whole.filled(self.student.model.state_dict() if weights is None else weights)

    def saved_otherwise(self, folder: Path, weights: dict[str, Tensor] | None) -> bool:
        """Writes students with adapters, in shards, and of other packages than transformers, whole and merged."""
        if is_of_transformers(self.student) and not self.whole.has_adapter and not is_sharded(self.accelerator):
            return False
        if self.args.should_save:
            self.left(weights).save(folder)
        return True

    def restored_otherwise(self, checkpoint: Path) -> bool:
        """Reads what is trained of students with adapters, and students of other packages; not those in shards."""
        if self._in_engine:
            return False
        if self.whole.has_adapter:
            load_trained(self.student.model, checkpoint / TRAINED_FILE)
            return True
        if is_of_transformers(self.student):
            return False
        self.student.restore(checkpoint)
        return True

    @property
    def _in_engine(self) -> bool:
        """Whether FSDP2 or DeepSpeed keeps all that is trained in files of its own, heads among it."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def checkpoint_to_save(self, folder: Path) -> None:
        """Keeps the heads, which the student's own files leave out, and an adapter, which those have merged."""
        super().checkpoint_to_save(folder)
        if not self.args.should_save:
            return
        if self.masks is not None:
            self.masks.save(folder)
        if self._in_engine:
            return
        weights = {name: tensor.contiguous() for name, tensor in pair_heads(self.student).state_dict().items()}
        if weights:
            save_file(weights, str(folder / HEADS_FILE))
        if self.whole.has_adapter:
            save_trained(self.student.model, folder / TRAINED_FILE)

    def weights_restored(self, checkpoint: Path) -> None:
        """Loads the heads of a checkpoint, too."""
        super().weights_restored(checkpoint)
        path = checkpoint / HEADS_FILE
        if path.is_file() and not self._in_engine:
            pair_heads(self.student).load_state_dict(load_file(str(path)))
        if self.masks is not None:
            self.masks.restore(checkpoint)

    def checkpoint_restored(self, folder: Path) -> None:
        """Goes on with the masks of a checkpoint whose weights DeepSpeed has restored by itself."""
        super().checkpoint_restored(folder)
        if self.masks is not None and self.is_deepspeed_enabled:
            self.masks.restore(folder)
