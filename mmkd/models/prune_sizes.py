"""The sizes that pruning leaves of a model, and whether the model can have them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from mmkd.errors import UserError

from .prune_axes import EXPERT_FFN, EXPERTS, FFN, GROUPS, HIDDEN, QUERIES, VISION, Part

KINDS = {
    "intermediate_size": FFN,
    "num_attention_heads": QUERIES,
    "num_key_value_heads": QUERIES,
    "hidden_size": HIDDEN,
    "num_experts": EXPERTS,
    "expert_intermediate_size": EXPERT_FFN,
    "vision_intermediate_size": VISION + FFN,
    "vision_num_attention_heads": VISION + HIDDEN,
    "vision_hidden_size": VISION + HIDDEN,
}
"""Size -> the kind of units that it counts. A tower's heads go with its width."""


@dataclass(frozen=True)
class PruneSizes:
    """What is to be left; None leaves all. Of layers a count, or ascending 0-based numbers."""

    layers: int | Sequence[int] | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    hidden_size: int | None = None
    num_experts: int | None = None
    expert_intermediate_size: int | None = None
    vision_layers: int | Sequence[int] | None = None
    vision_intermediate_size: int | None = None
    vision_num_attention_heads: int | None = None
    vision_hidden_size: int | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The sizes that are said."""
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def kinds(self) -> list[str]:
        """The kinds of units that are cut."""
        kinds = list(dict.fromkeys(KINDS[name] for name in self.given if name in KINDS))
        if self.vision_layers is not None and not any(kind.startswith(VISION) for kind in kinds):
            # Its layers alone: no dimension changes, and still the tower has to be looked for.
            kinds.append(VISION + FFN)
        return kinds

    def checked(self, config: Any, part: Part, whole_heads: bool) -> "PruneSizes":
        """These sizes with what they imply: key/value heads of heads, and heads of a width that is made of them.

        Raises UserError for a size that the part cannot have.
        """
        sizes = self
        for name, kind in ((n, k) for n, k in KINDS.items() if k.startswith(VISION) == bool(part.mark)):
            value = getattr(self, name)
            if value is None or kind in (QUERIES, VISION + HIDDEN) or (kind == HIDDEN and whole_heads):
                continue
            most = part.size(config, kind.removeprefix(VISION))
            assert most is not None
            if not 1 <= value <= most:
                raise UserError(f"{name}={value}, but the teacher's is {most}: pass 1 to {most}.")
        if whole_heads:
            return sizes._of_whole_heads(config, part)
        if not part.mark and (self.num_attention_heads is not None or self.num_key_value_heads is not None):
            sizes = sizes._with_groups(config, part)
        if self.num_experts is not None:
            chosen = getattr(part.config(config), "num_experts_per_tok", 1)
            if self.num_experts < chosen:
                raise UserError(
                    f"num_experts={self.num_experts}, but each token is read by {chosen} experts: pass {chosen} or "
                    "more.",
                    because="meaning",
                )
        return sizes

    def _with_groups(self, config: Any, part: Part) -> "PruneSizes":
        heads, groups = part.size(config, QUERIES), part.size(config, GROUPS)
        assert heads is not None
        assert groups is not None
        queries, asked, kept = heads // groups, self.num_attention_heads, self.num_key_value_heads
        if kept is None:
            assert asked is not None
            if not 1 <= asked <= heads or asked % queries:
                raise UserError(
                    f"num_attention_heads={asked}, but the teacher has {heads} query heads, of which each {queries} "
                    f"share a key/value head and stay together: pass a multiple of {queries} up to {heads}, or set "
                    "num_key_value_heads too."
                )
            return replace(self, num_key_value_heads=asked // queries)
        if not 1 <= kept <= groups:
            raise UserError(f"num_key_value_heads={kept}, but the teacher has {groups}: pass 1 to {groups}.")
        asked = kept * queries if asked is None else asked
        if asked % kept or not 1 <= asked // kept <= queries:
            raise UserError(
                f"num_attention_heads={asked} with num_key_value_heads={kept}: each key/value head keeps equally many "
                f"of its {queries} query heads, so pass a multiple of {kept} from {kept} to {kept * queries}."
            )
        return replace(self, num_attention_heads=asked)

    def _of_whole_heads(self, config: Any, part: Part) -> "PruneSizes":
        """With heads of a width that is heads times their channels."""
        vision = bool(part.mark)
        width = self.vision_hidden_size if vision else self.hidden_size
        heads = self.vision_num_attention_heads if vision else self.num_attention_heads
        prefix, width_of_head, most = part.mark, part.head_width(config), part.size(config, QUERIES)
        groups = part.size(config, GROUPS)
        assert most is not None
        assert groups is not None
        # Heads that share a key/value head stay together.
        queries, channels = most // groups, width_of_head * (most // groups)
        kept = None if vision else self.num_key_value_heads
        if width is None and heads is None and kept is not None:
            heads = kept * queries
        if width is None:
            assert heads is not None
            width = heads * width_of_head
        if width % channels or not 1 <= width // channels <= groups:
            raise UserError(
                f"{prefix}hidden_size={width}: the model's heads have {width_of_head} channels each and make up its "
                f"width, so pass a multiple of {channels} up to {groups * channels}."
            )
        if heads is not None and heads * width_of_head != width:
            raise UserError(
                f"{prefix}num_attention_heads={heads} and {prefix}hidden_size={width} do not go together: heads have "
                f"{width_of_head} channels each and make up the width. Set one of them.",
                because="meaning",
            )
        if kept is not None and kept * channels != width:
            raise UserError(
                f"num_key_value_heads={kept} and hidden_size={width} do not go together: {queries} query heads of "
                f"{width_of_head} channels share a key/value head, and make up the width. Set one of them.",
                because="meaning",
            )
        named = {f"{prefix}hidden_size": width, f"{prefix}num_attention_heads": width // width_of_head}
        if not vision:
            named["num_key_value_heads"] = width // width_of_head // queries
        return replace(self, **named)


def kept_layers(layers: int | Sequence[int] | None, depth: int) -> list[int]:
    """The layers that are kept: so many spread evenly, or those that are named.

    Raises UserError for layers that there are not.
    """
    if layers is None:
        return list(range(depth))
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise UserError(f"layers={layers}, but the teacher has {depth}: pass a count from 1 to {depth}.")
        return [round(i * (depth - 1) / max(layers - 1, 1)) for i in range(layers)]
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= depth:
        raise UserError(
            f"layers={kept} does not name layers of a teacher that has {depth}: pass at least one index from 0 to "
            f"{depth - 1}, ascending, none of them twice."
        )
    return kept
