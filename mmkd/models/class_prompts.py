"""Class names as texts: sets of prompt templates, and the mean feature of each class."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from mmkd.errors import UserError, nearest
from mmkd.shipped import recipe_root

SUFFIX = ".txt"


def prompt_sets() -> list[str]:
    """The names of the prompt sets that ship with mmkd."""
    return sorted(path.stem for path in (recipe_root("eval") / "prompts").glob(f"*{SUFFIX}"))


def load_prompts(name: str) -> tuple[str, ...]:
    """The templates of a set that ships, or of a file with one template per line.

    Raises UserError for a name that is neither, and for a line that has `{}` not exactly once.
    """
    path = Path(name)
    if not path.is_file():
        if name not in prompt_sets():
            raise UserError(
                f"{name!r} is neither a file nor a set of prompts; did you mean {nearest(name, prompt_sets())!r}? "
                f"There are: {', '.join(prompt_sets())}. A file has one template per line, such as: a photo of a {{}}."
            )
        path = recipe_root("eval") / "prompts" / f"{name}{SUFFIX}"
    templates = tuple(line for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if not templates:
        raise UserError(f"{path} has no template. Write one per line, such as: a photo of a {{}}.")
    for template in templates:
        if template.count("{}") != 1:
            raise UserError(f"{path}: the template {template!r} needs {{}} once, where the class name goes.")
    return templates


def prompt_mean(
    features: Float[Tensor, "class prompt width"], normalize_mean: bool = True
) -> Float[Tensor, "class width"]:
    """The mean of the unit features of each class's prompts, of unit length again unless `normalize_mean` is off.

    As CLIP builds its zero-shot classifiers (2103.00020, section 3.1.4).
    """
    weights = normalize(features.float(), dim=-1).mean(1)
    return normalize(weights, dim=-1) if normalize_mean else weights


def class_features(
    encode: Callable[[Sequence[str]], Float[Tensor, "text width"]],
    class_names: Sequence[str],
    templates: Sequence[str],
    batch_size: int = 256,
) -> Float[Tensor, "class width"]:
    """The features of classes: `prompt_mean` of what a text tower says of each class name in each template."""
    texts = [template.replace("{}", name) for name in class_names for template in templates]
    parts = [encode(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    return prompt_mean(torch.cat(parts).view(len(class_names), len(templates), -1))


def check_class_prompts(
    prepare: Callable[[Sequence[str]], Mapping[str, Tensor]], class_names: Sequence[str], templates: Sequence[str]
) -> None:
    """Raises UserError where two classes are the same tokens in every template: no text tower tells them apart.

    `prepare` gives what the model reads of texts. Names can differ in what a tokenizer does not keep, their words can
    be unknown to it, and a long template can be cut off before the name.
    """
    read: dict[tuple[bytes, ...], str] = {}
    for name in class_names:
        inputs = prepare([template.replace("{}", name) for template in templates])
        key = tuple(tensor.numpy().tobytes() for tensor in inputs.values())
        if key in read:
            raise UserError(
                f"The classes {read[key]!r} and {name!r} are the same tokens for the model in all prompts, so that "
                "nothing tells them apart. Rename one of them under class_names, or shorten the prompts."
            )
        read[key] = name
