"""Keys of a recipe whose value is a mapping with keys of its own."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.errors import UserError, nearest


def nested_keys(key: str, value: Any, names: Sequence[str], example: str) -> dict[str, Any]:
    """The mapping that a key of a recipe holds, or its JSON on a command line.

    Raises UserError for another value, and for keys in it that are not among `names`.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UserError(f"{key} is {value!r:.60}, which is no JSON ({error}). Write it as '{example}'.") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{key} is {value!r:.60}; write a mapping with some of {', '.join(names)}, such as {example}.")
    for name in value:
        if name not in names:
            raise UserError(f"{key} sets {name!r}, which it does not know; did you mean {nearest(name, names)!r}?")
    return dict(value)
