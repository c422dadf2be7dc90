"""A served teacher and rows with images: a student learns what it learns of the same teacher in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDTrainer
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.served_head import head_of_checkpoint
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.several import SeveralTeachers
from tests.helpers import Build, losses_of
from tests.teachers.fake_vllm import fake_vllm
from tests.teachers.fake_vlm import ServedVLM
from tests.vlms import vision_rows

ROWS = vision_rows([1, 2, 0, 1])
SETTINGS: dict[str, Any] = {
    "assistant_only_loss": True,
    "max_length": 128,
    "max_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
}


@contextmanager
def served(folder: Path, **settings: Any) -> Iterator[ServedVLM]:
    """A fake vLLM of a LLaVA."""
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    with fake_vllm(ServedVLM, served=model, processor=processor, root=str(folder), **settings) as fake:
        yield fake


@contextmanager
def teachers(folder: Path, signal: str, **settings: Any) -> Iterator[tuple[Any, ServedVLM]]:
    """A teacher behind a fake vLLM that tells everything, by its hidden states or the log-probs of all tokens."""
    runs = "pooling" if signal == "hidden" else "generate"
    with served(folder, runs=runs, **settings) as fake:
        if signal == "hidden":
            teacher: Any = HiddenServerTeacher(fake.url, head_of_checkpoint(str(folder)))
        else:
            teacher = ServerTeacher(fake.url, k=fake.vocab_size, vocab_size=fake.vocab_size)
        with teacher.client:
            yield teacher, fake


def trained(build: Build, cls: Any, student: Path, teacher: Any, data: Any = ROWS, **settings: Any) -> Any:
    trainer = build(cls, data, trainer={"model": str(student), "teacher": teacher}, **{**SETTINGS, **settings})
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("signal", "how"),
    [("hidden", {}), ("top_k", {}), ("top_k", {"takes_tokens": False})],
    ids=["hidden", "tokens", "messages"],
)
def test_kd_learns_what_it_learns_of_a_local_teacher(build: Build, vlms: dict[str, Path], signal: str, how: Any):
    local = losses_of(trained(build, KDTrainer, vlms["student"], str(vlms["teacher"])))
    with teachers(vlms["teacher"], signal, **how) as (teacher, fake):
        assert losses_of(trained(build, KDTrainer, vlms["student"], teacher)) == pytest.approx(local, abs=1e-5)
        assert any("data:image/png" in str(body) for body in fake.requests)


@pytest.mark.parametrize("signal", ["hidden", "top_k"])
def test_rollouts_about_images_are_judged_by_their_own_tokens(build: Build, vlms: dict[str, Path], signal: str):
    """A server of log-probs reads all of them; one of hidden states those that its tokenizer makes of the text too."""
    settings = {"on_policy_fraction": 1.0, "rollout_max_tokens": 6, "rollout_patience": 0}
    local = trained(build, KDTrainer, vlms["student"], str(vlms["teacher"]), **settings)
    with teachers(vlms["teacher"], signal) as (teacher, _):
        trainer = trained(build, KDTrainer, vlms["student"], teacher, **settings)
    (cut, *_), losses = losses_of(trainer, "rollouts_retokenised"), losses_of(trainer)
    if signal == "top_k":
        assert cut == 0
        assert losses == pytest.approx(losses_of(local), abs=1e-5)
    else:
        # Tiny random students write what no tokenizer would.
        assert 0 < cut <= 1
        assert all(0 < loss < 100 for loss in losses)
        assert losses != pytest.approx(losses_of(local), abs=1e-5)


def test_a_row_of_which_the_server_makes_other_tokens_is_named(build: Build, vlms: dict[str, Path]):
    with teachers(vlms["teacher"], "hidden") as (teacher, fake):
        fake.processor.image_processor.crop_size = {"height": 16, "width": 16}
        fake.processor.image_processor.size = {"shortest_edge": 16}
        with pytest.raises(ValueError, match=r"Row 0 of the train data.*16 image tokens instead of 4"):
            trained(build, KDTrainer, vlms["student"], teacher)


@pytest.mark.parametrize(("signal", "gamma"), [("hidden", 0.5), ("top_k", 0.0)])
def test_llava_kd_learns_of_visual_tokens_too(build: Build, vlms: dict[str, Path], signal: str, gamma: float):
    settings = {"gamma": gamma, "max_steps": 1}
    names = ("loss", "visual_kl", "relation_distance")
    local = trained(build, LLaVAKDTrainer, vlms["student"], str(vlms["teacher"]), **settings)
    with teachers(vlms["teacher"], signal) as (teacher, _):
        trainer = trained(build, LLaVAKDTrainer, vlms["student"], teacher, **settings)
        for name in names:
            assert losses_of(trainer, name) == pytest.approx(losses_of(local, name), abs=1e-5)
        assert losses_of(trainer, "visual_kl")[0] > 0
        if signal == "top_k":
            with pytest.raises(ValueError, match="gamma relates visual tokens by the teacher's hidden states"):
                trained(build, LLaVAKDTrainer, vlms["student"], teacher)


@pytest.mark.parametrize("signal", ["hidden", "top_k"])
def test_alm_reads_images_by_a_server(build: Build, vlms: dict[str, Path], signal: str):
    """The teacher's own reading of the rows, and of the student's answers to them."""
    settings: dict[str, Any] = {
        "max_steps": 1,
        "on_policy_fraction": 0.5,
        "rollout_max_tokens": 6,
        "rollout_patience": 0,
    }
    settings |= {"chunks": "all" if signal == "top_k" else "merge"}
    reader = AutoProcessor.from_pretrained(vlms["teacher"])
    local = trained(build, ALMTrainer, vlms["student"], str(vlms["teacher"]), **settings)
    with teachers(vlms["teacher"], signal) as (teacher, _):
        models = {"model": str(vlms["student"]), "teacher": teacher, "teacher_processing_class": reader}
        trainer = build(ALMTrainer, ROWS, trainer=models, **{**SETTINGS, **settings})
        trainer.train()
    assert losses_of(trainer, "chunk_gap")[0] > 0.1
    assert losses_of(trainer, "chunk_gap") == pytest.approx(losses_of(local, "chunk_gap"), rel=1e-4)


@pytest.mark.parametrize("weights", [True, False], ids=["mixed", "routed"])
def test_a_served_teacher_among_several(build: Build, vlms: dict[str, Path], weights: bool):
    """One in this process and one behind a server, which reads images with a processor of its own."""
    data = ROWS if weights else ROWS.add_column("domain", ["a", "b", "a", "b"])
    column = None if weights else "domain"
    with teachers(vlms["teacher"], "hidden") as (teacher, _):
        losses = [
            losses_of(
                trained(
                    build,
                    KDTrainer,
                    vlms["student"],
                    SeveralTeachers({"a": str(vlms["teacher"]), "b": other}, column=column),
                    data,
                    max_steps=1,
                )
            )
            for other in (str(vlms["teacher"]), teacher)
        ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_a_served_teacher_reads_images_with_its_own_processor(build: Build, vlms: dict[str, Path]):
    """It makes 16 tokens of an image of which the student makes 4."""
    local = losses_of(trained(build, KDTrainer, vlms["student"], str(vlms["fine"]), max_steps=1))
    with teachers(vlms["fine"], "hidden") as (teacher, fake):
        teacher.processor = fake.processor
        assert losses_of(trained(build, KDTrainer, vlms["student"], teacher, max_steps=1)) == pytest.approx(local)
