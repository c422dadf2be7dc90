"""What runs leave about themselves: a log that is written while they train, and their recipe with its flags."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.trainer_callback import TrainerCallback

from mmkd.methods.kd import KDTrainer
from mmkd.publish.runs import read_log, read_run
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run_record import RECORD, data_facts
from mmkd.training.log import LOG
from tests.classes import dho


class Reader(TrainerCallback):
    """Reads the run's folder while it trains, and dies after a step."""

    def __init__(self, dies_after: int = 1000) -> None:
        self.seen: list[str] = []
        self.dies_after = dies_after

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(read_run(Path(args.output_dir)).state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.dies_after:
            raise RuntimeError("killed")


def steps_of(folder: Path) -> list[int]:
    return [entry["step"] for entry in read_log(folder) if "loss" in entry]


def test_the_log_is_there_while_the_run_goes_on(build, texts, tmp_path):
    reader = Reader()
    trainer = build(KDTrainer, texts, trainer={"callbacks": [reader]})
    trainer.train()
    assert reader.seen[0] == "step 1 of 4: not finished, or still running."
    # What only the file says: how many steps there will be, and what one has cost.
    apart = {"max_steps", "step_runtime", "step_cpu_runtime"}
    logged = [{key: value for key, value in entry.items() if key not in apart} for entry in read_log(tmp_path / "run")]
    assert logged == trainer.state.log_history


def test_no_step_stands_there_twice_after_a_resume(build, texts, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    with pytest.raises(RuntimeError, match="killed"):
        build(KDTrainer, texts, trainer={"callbacks": [Reader(dies_after=3)]}, **saving).train()
    assert steps_of(tmp_path / "run") == [1, 2, 3]
    build(KDTrainer, texts, **saving).train(resume_from_checkpoint=True)
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


def test_a_second_run_starts_a_log_of_its_own(build, texts, tmp_path):
    for _ in range(2):
        build(KDTrainer, texts, max_steps=2).train()
    assert steps_of(tmp_path / "run") == [1, 2]


def test_classifiers_write_it_too(tmp_path):
    dho(tmp_path / "run").train()
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4]


def test_evaluating_alone_leaves_nothing(build, texts, tmp_path):
    build(KDTrainer, texts, trainer={"eval_dataset": texts}).evaluate()
    assert not (tmp_path / "run" / LOG).exists()
    assert not (tmp_path / "run" / RECORD).exists()


def test_flags_as_keys():
    flags = ["--learning_rate", "1e-3", "--max_steps=2", "--save_strategy", "no", "--use_cpu", "--bf16", "false"]
    flags += ["--student_layers", "0", "3", "--run_name", "a: b"]
    expected = {"learning_rate": 1e-3, "max_steps": 2, "save_strategy": "no", "use_cpu": True, "bf16": False}
    assert recipe_of("kd/quickstart", flags).overrides == expected | {"student_layers": [0, 3], "run_name": "a: b"}


def test_licences_of_all_parts_of_a_mixture_and_of_classes():
    facts = data_facts("kd", "chat_mixture")
    assert [part["license"] for part in facts["parts"]] == [
        "apache-2.0 (the new Smol-* sets; the public sets in it keep their own)",
        "mit",
        "odc-by (the collection; its sets keep their own, No Robots cc-by-nc-4.0)",
    ]
    assert data_facts("dho", "classification/dtd")["license"] == "research use, see homepage"
    json.dumps(facts)
