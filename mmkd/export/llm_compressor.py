"""Students quantised by AWQ and GPTQ, through llm-compressor, which may be installed beside another transformers."""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmkd.errors import UserError, last_line

VARIABLE = "LLM_COMPRESSOR"
_OWN = Path(".cache/llm-compressor/bin/python")
_WORKER = Path(__file__).with_name("llm_compressor_worker.py")


@dataclass(frozen=True)
class LLMCompressor:
    """The Python that has llm-compressor."""

    python: str
    version: str

    @classmethod
    def find(cls, python: str | None) -> "LLMCompressor":
        """The named one, that in the environment, this one, or that in .cache. Raises UserError without any."""
        named = python or os.environ.get(VARIABLE)
        if named is None and importlib.util.find_spec("llmcompressor") is not None:
            named = sys.executable
        if named is None and _OWN.is_file():
            named = str(_OWN)
        if named is None:
            raise UserError(
                "Formats awq and gptq need llm-compressor, which pins another transformers than mmkd. Give it an "
                f"environment of its own: python -m venv {_OWN.parents[1]} && {_OWN.parent}/pip install llmcompressor."
                f" mmkd finds that one; another Python is named with --llm_compressor or in {VARIABLE}."
            )
        question = "import importlib.metadata as m; print(m.version('llmcompressor'))"
        asked = subprocess.run([named, "-c", question], capture_output=True, text=True) if _runs(named) else None
        if asked is None or asked.returncode:
            raise UserError(f"{named} is no Python that has llm-compressor: pip install llmcompressor there.")
        return cls(named, asked.stdout.strip())

    def write(
        self, student: str, folder: Path, modifier: str, bits: int, group: int | None, ignore: Sequence[str], rows: Any
    ) -> None:
        """Writes a student, quantised with the help of rows of token ids. Raises UserError where it fails."""
        with tempfile.TemporaryDirectory() as scratch:
            texts, settings = Path(scratch, "rows.json"), Path(scratch, "settings.json")
            texts.write_text(json.dumps(rows))
            settings.write_text(
                json.dumps({"modifier": modifier, "bits": bits, "group": group, "ignore": list(ignore)})
            )
            command = [self.python, str(_WORKER), student, str(folder), str(texts), str(settings)]
            done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = last_line(done.stderr) or f"exit status {done.returncode}."
            raise UserError(
                f"llm-compressor could not quantise the student with {modifier}: {reason} "
                "Format compressed-tensors needs no llm-compressor.",
                because="upstream",
            )


def _runs(python: str) -> bool:
    return Path(python).is_file() and os.access(python, os.X_OK)
