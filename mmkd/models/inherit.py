"""Weight inheritance of TinyCLIP (2309.12314), by hand: a small encoder that begins with weights of a large one.

Of the layers every n-th is taken, beginning with the first, and of every tensor the front: the first channels, the
first heads, the first neurons. What is left computes something else than the teacher did, and is trained from there.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from mmkd.errors import UserError
from mmkd.seams.transformers_seam import empty_like

TOWERS = {"vision": "vision_model.", "text": "text_model."}
"""The towers of a dual encoder of transformers, and what the names of their weights begin with."""

_FUSED = re.compile(r"(in_proj_|qkv\.)(weight|bias)$")
_ROWS = re.compile(r"(q_proj|k_proj|v_proj|query|key|value)\.(weight|bias)$")
_COLUMNS = re.compile(r"((attn|attention)\.out_proj|o_proj|attention\.output\.dense)\.weight$")


@dataclass(frozen=True)
class Heads:
    """Attention heads of a part of a student and of the same part of its teacher."""

    student: int
    teacher: int


@dataclass(frozen=True)
class TowerSize:
    """The sizes of a tower of transformer layers. Width and heads belong together: a head keeps its channels."""

    layers: int
    width: int
    heads: int
    ffn: int

    @staticmethod
    def of(config: Any) -> "TowerSize":
        """The sizes in a tower's config. Raises UserError for a tower that is no plain transformer."""
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        values: list[Any] = [getattr(config, name, None) for name in names]
        if not all(isinstance(value, int) for value in values):
            raise UserError(
                f"Weights are inherited from transformer layers, and a {config.model_type} has none of the usual "
                "sizes. Take a teacher whose towers are transformers, such as CLIP or SigLIP.",
                because="not built",
            )
        return TowerSize(*values)

    @property
    def weights(self) -> int:
        """The weights of all layers, without biases and norms."""
        return self.layers * self.width * (4 * self.width + 2 * self.ffn)

    @property
    def channels(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    def share(self, share: float) -> "TowerSize":
        """About this share of the layers' weights: depth and width shrink alike, and the FFN takes what is left.

        Heads keep their channels, so that small towers come in coarse steps.
        """
        root = share ** (1 / 3)
        layers, heads = max(1, round(self.layers * root)), max(1, round(self.heads * root))
        return self.filled(layers, heads, share)

    def filled(self, layers: int, heads: int, share: float) -> "TowerSize":
        """A tower of so many layers and heads whose FFN is as wide as makes up a share of the weights of this one."""
        width = heads * self.channels
        ffn = round((share * self.weights / (layers * width) - 4 * width) / 2)
        return TowerSize(layers, width, heads, min(max(ffn, 1), self.ffn))

    def with_sizes(self, tower: str, sizes: Mapping[str, int]) -> "TowerSize":
        """This tower with some of layers, width and ffn of its own; an FFN that is not named follows the width.

        Raises UserError for sizes that this tower cannot be cut to.
        """
        layers, width = sizes.get("layers", self.layers), sizes.get("width", self.width)
        ffn = sizes.get("ffn", self.ffn * width // self.width)
        for name, value, most in (
            ("layers", layers, self.layers),
            ("width", width, self.width),
            ("ffn", ffn, self.ffn),
        ):
            if not 1 <= value <= most:
                raise UserError(
                    f"inherit_target asks for {name}: {value} of the {tower} tower, of which the teacher has {most}. "
                    f"Name 1 to {most}."
                )
        if width % self.channels:
            nearest = max(self.channels, round(width / self.channels) * self.channels)
            raise UserError(
                f"inherit_target asks for width: {width} of the {tower} tower. Heads of {self.channels} channels stay "
                f"whole, so that the width is a multiple of {self.channels}: name {nearest}.",
                because="meaning",
            )
        return TowerSize(layers, width, width // self.channels, ffn)

    def put(self, config: Any) -> None:
        """Writes these sizes into a tower's config."""
        config.num_hidden_layers, config.hidden_size = self.layers, self.width
        config.num_attention_heads, config.intermediate_size = self.heads, self.ffn


def inherited_weights(
    shapes: Mapping[str, Sequence[int]], teacher: Mapping[str, Tensor], heads: Mapping[str, Heads] | None = None
) -> dict[str, Tensor]:
    """Weights of a student with these names and shapes, cut out of the teacher's: no values but the teacher's.

    `heads` are by the beginning of names, the longest that fits; they are needed where queries, keys and values are
    one tensor, and where heads of student and teacher differ in their channels. Raises UserError for a weight that
    the teacher lacks, or that is larger than the teacher's.
    """
    depths = _depths(shapes), _depths(teacher)
    heads = dict(sorted((heads or {}).items(), key=lambda pair: -len(pair[0])))
    weights = {}
    for name, shape in shapes.items():
        source = _source_name(name, *depths)
        if source not in teacher:
            raise UserError(
                f"The student has a weight {name} and the teacher no {source} to inherit it from. Both must be of one "
                "architecture.",
                because="meaning",
            )
        own = next((entry for prefix, entry in heads.items() if name.startswith(prefix)), None)
        weights[name] = _front(name, teacher[source], tuple(shape), own).clone()
    return weights


def inherit_config(teacher: PreTrainedConfig, sizes: Mapping[str, TowerSize]) -> PreTrainedConfig:
    """The config of a dual encoder with towers of these sizes, which otherwise is the teacher's."""
    config: Any = copy.deepcopy(teacher)
    for tower, size in sizes.items():
        size.put(getattr(config, f"{tower}_config"))
    if getattr(config.text_config, "projection_size", None) is not None:
        # SigLIP projects texts to the width of its vision tower, whose output nothing projects.
        config.text_config.projection_size = config.vision_config.hidden_size
    return config


def tower_sizes(config: Any) -> dict[str, TowerSize]:
    """The sizes of both towers of a dual encoder of transformers."""
    return {tower: TowerSize.of(getattr(config, f"{tower}_config")) for tower in TOWERS}


def inherit_model(config: PreTrainedConfig, teacher: PreTrainedModel) -> Any:
    """A model of a config with the fronts of the teacher's weights; the teacher is not changed.

    Raises UserError for a config that is larger than the teacher, or of another architecture.
    """
    if type(config) is not type(teacher.config):
        raise UserError(
            f"The student is a {config.model_type} and the teacher a {teacher.config.model_type}; weights are "
            "inherited within one architecture. Name a student of the teacher's, or remove student_init: inherit.",
            because="meaning",
        )
    student = empty_like(type(teacher), config, teacher.dtype)
    ours, theirs = tower_sizes(config), tower_sizes(teacher.config)
    heads = {prefix: Heads(ours[tower].heads, theirs[tower].heads) for tower, prefix in TOWERS.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in student.state_dict().items()}
    for name, shape in shapes.items():
        if name.endswith("position_embedding.weight") and shape[0] != teacher.state_dict()[name].shape[0]:
            raise UserError(
                f"{name} has {shape[0]} positions in the student and {teacher.state_dict()[name].shape[0]} in the "
                "teacher. Weights are inherited between models of one image size, patch size and text length.",
                because="not built",
            )
    student.load_state_dict(inherited_weights(shapes, teacher.state_dict(), heads))
    return student


def _depths(names: Mapping[str, Any]) -> dict[str, int]:
    """How many numbered children each module has, by its name."""
    depths: dict[str, int] = {}
    for name in names:
        words = name.split(".")
        for place, word in enumerate(words):
            if word.isdigit():
                parent = ".".join(words[:place])
                depths[parent] = max(depths.get(parent, 0), int(word) + 1)
    return depths


def _source_name(name: str, ours: Mapping[str, int], theirs: Mapping[str, int]) -> str:
    """The name of the teacher's weight that a student's is cut from."""
    words = name.split(".")
    source = list(words)
    for place, word in enumerate(words):
        if word.isdigit():
            depth, available = ours[".".join(words[:place])], theirs.get(".".join(source[:place]), 0)
            if depth > available:
                raise UserError(
                    f"The student has {depth} layers in {'.'.join(words[:place])}, and the teacher {available}; a "
                    "student inherits of a teacher that is as deep or deeper.",
                    because="meaning",
                )
            source[place] = str(int(word) * (available // depth))
    return ".".join(source)


def _front(name: str, tensor: Tensor, shape: tuple[int, ...], heads: Heads | None) -> Tensor:
    """The front of a tensor in each dimension; in those of attention heads the front of the first heads."""
    fits = tensor.ndim == len(shape) and all(ours <= theirs for ours, theirs in zip(shape, tensor.shape, strict=True))
    if not fits:
        raise UserError(
            f"The student's {name} has the shape {list(shape)} and the teacher's {list(tensor.shape)}; a student "
            "inherits of a teacher that is as wide or wider.",
            because="meaning",
        )
    for pattern, dimension, parts in ((_FUSED, 0, 3), (_ROWS, 0, 1), (_COLUMNS, 1, 1)):
        if pattern.search(name) and heads is not None:
            tensor = _first_heads(tensor, dimension, parts, shape[dimension], heads)
    return tensor[tuple(slice(size) for size in shape)]


def _first_heads(tensor: Tensor, dimension: int, parts: int, size: int, heads: Heads) -> Tensor:
    """A tensor whose dimension of `parts` times all heads has only the student's heads, cut to their channels."""
    channels = size // (parts * heads.student)
    grouped = tensor.unflatten(dimension, (parts, heads.teacher, -1))
    chosen = grouped.narrow(dimension + 1, 0, heads.student).narrow(dimension + 2, 0, channels)
    return chosen.flatten(dimension, dimension + 2)
