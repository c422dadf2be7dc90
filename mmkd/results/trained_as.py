"""As what the model with an adapter was trained, from the files beside it. Imports neither torch nor transformers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .places import RECORD

FILE = "student_quantization.json"
"""Beside an adapter: as what the model with it was trained."""

BASE = "bitsandbytes"
"""Of FILE: how the base of an adapter was quantised when it was loaded."""


def trained_as(adapter: str | Path) -> dict[str, Any]:
    """What FILE says of an adapter; of a run before there was such a file, what its recipe loaded the base as."""
    folder = Path(adapter)
    if (folder / FILE).is_file():
        return json.loads((folder / FILE).read_text(encoding="utf-8"))
    for place in (folder, folder.resolve().parent):
        if (place / RECORD).is_file():
            keys = json.loads((place / RECORD).read_text(encoding="utf-8")).get("keys", {})
            base = _base_of(keys)
            return {BASE: base} if base else {}
    return {}


def described_base(base: Mapping[str, Any]) -> str:
    """How the base of an adapter was quantised, for a reader."""
    return f"a base in {'4' if base.get('load_in_4bit') else '8'} bits (bitsandbytes)"


def _base_of(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of transformers' BitsAndBytesConfig that a recipe's keys name."""
    if _is_on(keys.get("load_in_4bit")):
        kind, nested = keys.get("bnb_4bit_quant_type", "nf4"), _is_on(keys.get("use_bnb_nested_quant"))
        return {"load_in_4bit": True, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}
    return {"load_in_8bit": True} if _is_on(keys.get("load_in_8bit")) else {}


def _is_on(value: Any) -> bool:
    return str(value).lower() in ("true", "yes", "1")
