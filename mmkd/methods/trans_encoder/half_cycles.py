"""The cycles of trans_encoder: each half in a folder of its own, so that a run goes on where it was cut off."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from rich.console import Console
from transformers.trainer_utils import set_seed

from mmkd.data.sentence_pairs import SentencePairs, load_pairs
from mmkd.errors import UserError
from mmkd.files import new_folder, write_file
from mmkd.recipe.recipe import Run
from mmkd.recipe.run_record import begin, finish

from .encoder_loading import cosines, load_bi_encoder, load_cross_encoder, probabilities, take_weights
from .trans_encoder_config import TransEncoderConfig
from .trans_encoder_run import check_arguments, members_of, pairs_of, settings_of
from .trans_encoder_trainer import TransEncoderTrainer

RECORD = "trans_encoder.json"
"""What each half of a cycle did: seconds, loss, and Spearman's correlation where there is dev_data."""

_OF_RUN = ("output_dir", "logging_dir", "report_to", "run_name", "dev_data", "cycles", "hub_token", "local_rank")
"""Settings that change nothing of a half that is trained."""

Labels = NDArray[np.float32]


@dataclass(frozen=True)
class Half:
    """One training: the encoders of one kind in one cycle."""

    cycle: int
    kind: str
    """cross_encoder or bi_encoder."""
    member: str = ""
    """Which of two students; empty for the only one."""

    def folder(self, output: Path) -> Path:
        """Where its encoder is once it is trained."""
        return output / f"cycle_{self.cycle}" / "_".join(filter(None, (self.kind, self.member)))


def train_cycles(run: Run, train: Callable[[Any], int]) -> int:
    """Trains all cycles, as far as they are not trained yet, and writes the student to output_dir."""
    return Cycles(run, Console()).run_all()


class Cycles:
    """A run of trans_encoder: its pairs, its students, and what was recorded of them."""

    def __init__(self, run: Run, console: Console):
        check_arguments(run)
        self.run, self.console = run, console
        self.args: TransEncoderConfig = settings_of(run)
        self.members = members_of(run)
        self.output = Path(self.args.output_dir or "runs/trans_encoder")
        self.hub = {"trust_remote_code": self.args.trust_remote_code}
        self.pairs = pairs_of(run)
        dev = self.args.dev_data
        self.dev = None if dev is None else load_pairs(dev, scored=True)
        self.record = self._opened()

    def _opened(self) -> dict[str, Any]:
        """The record of earlier sessions. Raises UserError where they had other settings."""
        given = {key: value for key, value in self.args.to_dict().items() if key not in _OF_RUN}
        given |= {"students": self.members, "data": self.run.arguments.data, "pairs": len(self.pairs)}
        settings = json.loads(json.dumps(given, default=str))
        path = self.output / RECORD
        if not path.is_file():
            return {"settings": settings, "halves": []}
        record = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(key for key in settings if settings[key] != record["settings"].get(key))
        if changed:
            raise UserError(
                f"{self.output} holds cycles of another run: {', '.join(changed)} differ. Choose another output_dir, "
                "delete that folder, or take the old settings."
            )
        return record

    def run_all(self) -> int:
        """Trains what is missing; 0."""
        begin(self.run, self.output)
        if self.dev is not None and not any(entry.get("kind") == "before" for entry in self.record["halves"]):
            for name in self.members:
                self._note({"kind": "before", "member": name, **self._measured(self._bi_encoder(name))})
        for cycle in range(1, self.args.cycles + 1):
            labels: Labels | None = None
            for kind in ("cross_encoder", "bi_encoder"):
                halves = [Half(cycle, kind, name) for name in self.members]
                missing = [half for half in halves if not half.folder(self.output).is_dir()]
                if missing:
                    labels = self._labels(cycle, kind)
                    for half in missing:
                        self._train(half, labels)
        self._write_result()
        return 0

    def _labels(self, cycle: int, kind: str) -> Labels:
        """What the encoders that were trained before say of the pairs, averaged over the students."""
        size = self.args.score_batch_size
        said: list[Labels] = []
        for name in self.members:
            if kind == "bi_encoder":
                folder = Half(cycle, "cross_encoder", name).folder(self.output)
                said.append(probabilities(self._cross_encoder(str(folder)), self.pairs, size))
            elif cycle == 1:
                said.append(cosines(self._bi_encoder(name), self.pairs, size))
            else:
                folder = Half(cycle - 1, "bi_encoder", name).folder(self.output)
                said.append(cosines(self._bi_encoder(name, folder), self.pairs, size))
        # A cosine below 0 would drive the cross-encoder's logit to minus infinity.
        return np.mean([np.clip(own, 0.0, 1.0) for own in said], 0)

    def _bi_encoder(self, name: str, folder: Path | None = None) -> Any:
        source = self.members[name][0] if folder is None else str(folder)
        encoder = load_bi_encoder(source, "student", device=self.args.device, **self.hub)
        encoder.max_seq_length = min(self.args.max_length, encoder.max_seq_length or self.args.max_length)
        return encoder

    def _cross_encoder(self, name: str) -> Any:
        length = self.args.cross_max_length
        return load_cross_encoder(name, "cross-encoder", device=self.args.device, max_length=length, **self.hub)

    def _beginning(self, half: Half) -> Any:
        """The encoder of a half before training."""
        set_seed(self.args.seed + 2 * half.cycle + (half.kind == "bi_encoder"))
        previous = self.args.begin_with == "previous"
        if half.kind == "cross_encoder":
            encoder = self._cross_encoder(self.members[half.member][1])
            if previous and half.cycle > 1:
                take_weights(encoder, str(Half(half.cycle - 1, "bi_encoder", half.member).folder(self.output)))
            return encoder
        encoder = self._bi_encoder(half.member)
        if previous:
            take_weights(encoder, str(Half(half.cycle, "cross_encoder", half.member).folder(self.output)))
        return encoder

    def _rows(self, half: Half, labels: Labels) -> Dataset:
        first, second, scores = self.pairs.first, self.pairs.second, labels.tolist()
        if half.kind == "cross_encoder" and self.args.symmetric:
            first, second, scores = [*first, *second], [*second, *first], [*scores, *scores]
        return Dataset.from_dict({"sentence1": first, "sentence2": second, "score": scores})

    def _train(self, half: Half, labels: Labels) -> None:
        place = f"Cycle {half.cycle} of {self.args.cycles}, {half.kind}{f' of {half.member}' if half.member else ''}"
        self.console.print(
            f"{place}: {len(labels):,} pairs, scores of {labels.mean():.3f} with a deviation of {labels.std():.3f}.",
            highlight=False,
        )
        start, folder = time.monotonic(), half.folder(self.output)
        trainer = self._trainer(half, labels)
        encoder = trainer.model
        trainer.train()
        entry: dict[str, Any] = {**asdict(half), "seconds": round(time.monotonic() - start, 1)}
        entry["loss"] = trainer.state.log_history[-1].get("train_loss")
        if half.kind == "bi_encoder":
            entry |= self._measured(encoder)
            encoder.max_seq_length = load_bi_encoder(
                self.members[half.member][0], "student", device="cpu", **self.hub
            ).max_seq_length
        with new_folder(folder) as complete:
            encoder.save_pretrained(str(complete))
        self._note(entry)

    def _trainer(self, half: Half, labels: Labels) -> TransEncoderTrainer:
        settings = self._settings(half, half.folder(self.output))
        return TransEncoderTrainer(self._beginning(half), settings, self._rows(half, labels))

    def trainer_of(self, half: Half, limit: int | None = None) -> TransEncoderTrainer:
        """The trainer of a half whose teachers are there, of all pairs or the first ones."""
        if limit is not None:
            self.pairs = SentencePairs(self.pairs.first[:limit], self.pairs.second[:limit])
        return self._trainer(half, self._labels(half.cycle, half.kind))

    def _settings(self, half: Half, folder: Path) -> TransEncoderConfig:
        """Those of one training, whose log stands beside the folder of its encoder."""
        args = self.args
        changes: dict[str, Any] = {"output_dir": str(folder.with_name(f"{folder.name}_log")), "save_strategy": "no"}
        changes |= {"eval_strategy": "no", "push_to_hub": False, "load_best_model_at_end": False}
        if half.kind == "cross_encoder":
            changes |= {
                "per_device_train_batch_size": args.cross_batch_size,
                "learning_rate": args.cross_learning_rate,
                "num_train_epochs": args.cross_epochs,
                "warmup_steps": args.cross_warmup,
            }
        return replace(args, **changes)

    def _measured(self, encoder: Any) -> dict[str, float]:
        if self.dev is None:
            return {}
        # Heavy, and needed by nobody without scored pairs.
        from scipy.stats import spearmanr

        said = cosines(encoder, self.dev, self.args.score_batch_size)
        result: Any = spearmanr(said, self.dev.scores)
        return {"spearman": float(result.statistic)}

    def _note(self, entry: dict[str, Any]) -> None:
        key = tuple(entry.get(name) for name in ("cycle", "kind", "member"))
        kept = [old for old in self.record["halves"] if tuple(old.get(n) for n in ("cycle", "kind", "member")) != key]
        self.record["halves"] = [*kept, entry]
        write_file(self.output / RECORD, json.dumps(self.record, indent=2))
        if "spearman" in entry:
            self.console.print(f"  Spearman on {self.args.dev_data}: {entry['spearman']:.4f}", highlight=False)

    def _before(self, member: str) -> dict[str, Any]:
        """What was measured of a student before training."""
        own = [entry for entry in self.record["halves"] if (entry["kind"], entry["member"]) == ("before", member)]
        return own[0] if own else {}

    def _write_result(self) -> None:
        """Copies the chosen bi-encoder to output_dir: the best on dev_data, else that of the last cycle."""
        trained = [entry for entry in self.record["halves"] if entry["kind"] == "bi_encoder"]
        trained = [entry for entry in trained if entry["cycle"] <= self.args.cycles]
        if self.dev is not None:
            chosen = max(trained, key=lambda entry: entry.get("spearman", float("-inf")))
            best, before = (entry.get("spearman", float("-inf")) for entry in (chosen, self._before(chosen["member"])))
            why = f"the best on {self.args.dev_data}, {best:.4f}, and {before:.4f} before training"
        else:
            first = next(iter(self.members))
            chosen = next(entry for entry in trained if (entry["cycle"], entry["member"]) == (self.args.cycles, first))
            why = "the last; set dev_data to choose by scored pairs"
        half = Half(chosen["cycle"], chosen["kind"], chosen["member"])
        for path in half.folder(self.output).rglob("*"):
            if path.is_file():
                write_file(self.output / path.relative_to(half.folder(self.output)), path.read_bytes())
        self.record["chosen"] = asdict(half)
        write_file(self.output / RECORD, json.dumps(self.record, indent=2))
        finish(self.output)
        self.console.print(f"The student is in {self.output}: cycle {half.cycle} ({why}).", highlight=False)
