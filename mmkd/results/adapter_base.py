"""The model that an adapter belongs to. Imports neither torch nor transformers."""

import json
from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"

BASE = "base"
"""Folder in that of a run which trains an adapter on new weights: those weights."""

MERGED = "merged"
"""Folder in that of a stage which trains an adapter: the whole student, from which the next stage starts."""


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """Name or folder, and revision, of the model that the adapter in a folder was trained on.

    New weights lie beside the adapter, or beside its checkpoint, wherever their run was moved to.
    """
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name, revision = str(config["base_model_name_or_path"]), config.get("revision")
    if Path(name).name == BASE:
        for beside in (folder / BASE, folder.parent / BASE):
            if (beside / "config.json").is_file():
                return str(beside), None
    return name, revision
