"""A classifier that is masked for one student: what MST-Distill teaches with in its last stage."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.cache.identity import weights_sha256
from mmkd.errors import UserError
from mmkd.losses.gated_teachers import teacher_losses
from mmkd.models.captured_features import feature_of, named_modules_of
from mmkd.models.mask_net import MaskNet, mask_net_for, replaced_feature

from .classifiers import ClassifierTeacher

_TEMPERATURE = 4.0


class MaskedTeacher(ClassifierTeacher):
    """A classifier, one layer of which passes through a MaskNet that brings its answers near those of a student.

    The mask is learnt once, when answers are first asked for, from what the student says of the rows by then; neither
    model changes. In the authors' code the masks of several layers end up in one teacher, although each was trained
    alone; here each masked layer is a teacher of its own.
    """

    kind = "masked"

    def __init__(self, teacher: ClassifierTeacher, student: ClassifierTeacher, layer: str, student_name: str):
        super().__init__(teacher.model, teacher.processor, teacher.class_names)
        modules = named_modules_of(self.model)
        if layer not in modules:
            raise UserError(
                f"mask_layer is {layer!r}, and the teacher has no such module. Some that it has: "
                f"{', '.join(list(modules)[1:8])}."
            )
        self.student, self.layer, self.student_name = student, layer, student_name
        self.net: MaskNet | None = None
        self._fit: Callable[[], None] | None = None
        self._learnt: dict[str, Any] = {}
        modules[layer].register_forward_hook(self._masked)

    def learn_from(
        self, read: Callable[[int], Any], rows: int, batch_size: int, epochs: int, rate: float, seed: int
    ) -> None:
        """Has the mask learnt from such rows when it is needed."""
        self._learnt = {"epochs": epochs, "rate": rate, "batch": batch_size, "seed": seed}
        self._fit = partial(self._learn, read, rows, batch_size, epochs, rate, seed)

    def logits(self, rows: Sequence[Any]) -> Float[Tensor, "row class"]:
        """Class logits of the masked teacher, in fp32."""
        if self._fit is not None:
            fit, self._fit = self._fit, None
            fit()
        return super().logits(rows)

    def _learn(
        self, read: Callable[[int], Any], rows: int, batch_size: int, epochs: int, rate: float, seed: int
    ) -> None:
        print(f"Learning the mask of {self.layer} from {rows:,} rows", file=sys.stderr)
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            # Answers once, so that it has the size of the features.
            super().logits([read(0)])
        net = self.net
        assert net is not None
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        for _ in range(epochs):
            order = torch.randperm(rows, generator=generator)
            for batch in order.split(batch_size):
                images = [read(int(row)) for row in batch]
                wanted = self.student.logits(images)
                with torch.enable_grad():
                    said = self.answers(images)
                    loss = teacher_losses(said, wanted.to(said.device)[:, None], _TEMPERATURE).mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        net.requires_grad_(False)

    def _masked(self, _: Any, __: Any, output: Any) -> Any:
        feature = feature_of(output)
        if feature is not None and self.net is None:
            self.net = mask_net_for(feature)
        if feature is None or self.net is None:
            raise UserError(
                f"mask_layer {self.layer} returns no vectors, tokens or feature maps. Name another module, such as a "
                "block."
            )
        return replaced_feature(output, feature, self.net(feature))

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the mask besides the teacher's weights and the rows."""
        folder = Path(self.student_name).is_dir()
        weights = weights_sha256(self.student_name, None) if folder else self.student_name
        return {"mask_layer": self.layer, "mask_student": weights, **self._learnt}
