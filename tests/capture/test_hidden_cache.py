"""Caches of hidden states: training from one is training with the teacher itself, whoever the states came from."""

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from mmkd.cache.manifest import Manifest
from mmkd.cache.merge import merge_parts
from mmkd.cache.side_files import HEAD, read_head
from mmkd.cache.store import Cache
from mmkd.capture.fidelity import measure_fidelity
from mmkd.commands.main import main
from mmkd.methods.kd import KDTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.several import SeveralTeachers
from mmkd.teachers.signals import DenseSignal
from scripts.make_tiny_models import sentences
from tests.helpers import Build, losses_of
from tests.teachers.caches import build_cache, contents, write_recipe
from tests.teachers.fake_vllm import ServedStates, fake_vllm
from tests.teachers.fake_vlm import ServedVLM
from tests.vlms import make_llava, picture


def completion_rows(count: int, seed: int) -> Dataset:
    completions = [f" {text}" for text in sentences(count, seed=seed + 1)]
    return Dataset.from_dict({"prompt": sentences(count, seed=seed), "completion": completions})


TRAIN, EVAL = completion_rows(24, seed=3), completion_rows(9, seed=11)
DATA = {"train": TRAIN, "eval": EVAL}


def states_recipe(folder: Path, tiny: dict[str, Path], dtype: str, **keys: Any) -> Path:
    return write_recipe(folder, tiny, DATA, cache_signal="hidden", cache_hidden_dtype=dtype, **keys)


@pytest.fixture(scope="module")
def recipe(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose cache keeps the states of the teacher, which is in float32, as they are."""
    recipe = states_recipe(tmp_path_factory.mktemp("states"), tiny, "float32")
    build_cache(recipe)
    return recipe


@pytest.fixture(scope="module")
def exact(recipe: Path) -> Path:
    return recipe.parent / "cache"


@pytest.fixture(scope="module")
def server(tiny: dict[str, Path]) -> Iterator[Any]:
    """The teacher behind a server of hidden states."""
    model = AutoModelForCausalLM.from_pretrained(tiny["teacher"])
    tokenizer = AutoTokenizer.from_pretrained(tiny["teacher"])
    with fake_vllm(ServedStates, served=model, tokenizer=tokenizer, root=str(tiny["teacher"])) as running:
        yield running


def steps(trainer: Any) -> list[float]:
    trainer.train()
    return [*losses_of(trainer), *losses_of(trainer, "grad_norm"), trainer.evaluate()["eval_loss"]]


# The same losses

METHODS: dict[str, dict[str, Any]] = {
    "forward_kl at another temperature": {"divergence": "forward_kl", "temperature": 2.0},
    "reverse_kl, packed": {"divergence": "reverse_kl", "packing": True},
    "jsd with cross-entropy": {"divergence": "jsd", "ce_weight": 0.3, "chunk_size": 3},
    "adaptive_kl": {"divergence": "adaptive_kl"},
    "balanced": {"combine": "gradmag", "ce_weight": 0.3},
    "taid": {"trainer": TAIDTrainer},
}


@pytest.mark.parametrize("name", METHODS)
def test_losses_are_those_of_the_live_teacher(build: Build, tiny: dict[str, Path], exact: Path, name: str) -> None:
    settings = {"max_steps": 2, **METHODS[name]}
    cls: Any = settings.pop("trainer", KDTrainer)
    cached, live = (
        steps(build(cls, TRAIN, trainer={"teacher": teacher, "eval_dataset": EVAL}, **settings))
        for teacher in (CachedTeacher(exact), str(tiny["teacher"]))
    )
    assert cached == pytest.approx(live, rel=1e-5)


def test_states_in_bfloat16_are_those_of_a_teacher_in_bfloat16(
    build: Build, tiny: dict[str, Path], tmp_path: Path
) -> None:
    recipe = states_recipe(tmp_path, tiny, "bfloat16", teacher_dtype="bfloat16", cache_batch_tokens=64)
    cache = build_cache(recipe)
    teacher = AutoModelForCausalLM.from_pretrained(tiny["teacher"], dtype=torch.bfloat16)
    live, cached = (
        steps(build(KDTrainer, TRAIN, trainer={"teacher": teacher, "eval_dataset": EVAL}, max_steps=1))
        for teacher in (teacher, CachedTeacher(cache))
    )
    # A batch of other rows rounds otherwise in bfloat16.
    assert cached == pytest.approx(live, rel=2e-3)


def test_states_in_8_bits_are_near(build: Build, tiny: dict[str, Path], exact: Path, tmp_path: Path) -> None:
    recipe = states_recipe(tmp_path, tiny, "int8")
    cache = build_cache(recipe)
    losses = [
        steps(build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(one), "eval_dataset": EVAL}, max_steps=1))
        for one in (exact, cache)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    fidelity = measure_fidelity(recipe_of(str(recipe)).parse(), Cache(cache), 8)
    assert fidelity["rows"] == 8
    assert 1e-8 < fidelity["kl_live_cache"] < 1e-4
    assert Manifest.read(cache).identity["signal"]["block"] == 64


@pytest.mark.slow
def test_several_teachers_mixed_and_routed(build: Build, tiny: dict[str, Path], exact: Path) -> None:
    named = TRAIN.add_column("who", ["first", "second"] * 12)  # pyright: ignore[reportCallIssue]
    ways: list[tuple[dict[str, Any], Dataset]] = [
        ({"weights": {"first": 1, "second": 3}}, TRAIN),
        ({"column": "who"}, named),
    ]
    for how, data in ways:
        ran = []
        for second in (CachedTeacher(exact), str(tiny["teacher"])):
            teachers = SeveralTeachers({"first": str(tiny["student"]), "second": second}, **how)
            trainer: Any = build(KDTrainer, data, trainer={"teacher": teachers}, max_steps=1)
            trainer.train()
            ran.append(losses_of(trainer))
        assert ran[0] == pytest.approx(ran[1], rel=1e-5)


def test_it_answers_with_a_dense_signal_whose_head_stays_behind(exact: Path) -> None:
    teacher = CachedTeacher(exact)
    assert teacher.signal_type is DenseSignal
    assert teacher.can_temper
    assert teacher.over_tokens(100).vocab_size == 100
    assert teacher.states is not None
    teacher.states.place(torch.device("cpu"))
    assert len(pickle.dumps(teacher)) < (exact / HEAD).stat().st_size
    with pytest.raises(ValueError, match="no tail to treat as teacher_tail: unbiased says"):
        CachedTeacher(exact, "unbiased")


# From a server


@pytest.mark.parametrize(
    "keys",
    [
        {"cache_signal": "hidden", "cache_hidden_dtype": "float32"},
        {"cache_signal": "top_k", "teacher_top_k": 5, "cache_tail_draws": 7},
        pytest.param({"cache_signal": "top_k", "teacher_top_k": 0, "cache_tail_draws": 9}, marks=pytest.mark.slow),
        {"method": "alm", "cache_signal": "log_probs", "chunks": "merge"},
    ],
    ids=lambda keys: f"{keys['cache_signal']} {keys.get('teacher_top_k', '')}",
)
def test_a_server_of_hidden_states_gives_the_cache_of_a_local_teacher(
    tiny: dict[str, Path], tmp_path: Path, server: Any, keys: dict[str, Any]
) -> None:
    local = Cache(build_cache(write_recipe(tmp_path / "local", tiny, DATA, **keys)))
    urls = {"teacher_server": [server.url]}
    served = Cache(build_cache(write_recipe(tmp_path / "served", tiny, DATA, **keys, **urls)))
    assert len(served) == len(local) == 33
    assert "hidden states in float32" in served.manifest.identity["teacher"]["backend"]
    for row in range(len(local)):
        if keys["cache_signal"] == "hidden":
            ours, theirs = served.states(row), local.states(row)
            torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=1e-4, atol=1e-4)
            continue
        ours, theirs = served.scores(row), local.scores(row)
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_allclose(ours.log_probs, theirs.log_probs, atol=1e-3)
        if keys["cache_signal"] == "log_probs":
            assert ours.boundary_log_probs is not None
            assert theirs.boundary_log_probs is not None
            np.testing.assert_allclose(ours.boundary_log_probs, theirs.boundary_log_probs, atol=1e-2)
            continue
        # A draw at the edge of a token may fall to its neighbour.
        assert (np.sort(ours.draws) == np.sort(theirs.draws)).mean() > 0.99


def test_a_row_that_the_server_refuses_is_left_out(tiny: dict[str, Path], tmp_path: Path, server: Any) -> None:
    keys = {"cache_signal": "hidden", "teacher_server": [server.url], "max_length": None, "max_skipped": 1.0}
    room, server.max_model_len = server.max_model_len, 40
    try:
        cache = build_cache(write_recipe(tmp_path, tiny, DATA, **keys, on_error="skip"))
    finally:
        server.max_model_len = room
    manifest = Manifest.read(cache)
    assert 0 < manifest.skipped_rows() < 33
    assert "do not fit into the server's 40" in manifest.skipped_summary()
    assert len(Cache(cache)) == 33 - manifest.skipped_rows()


def test_a_server_of_likely_tokens_cannot_give_states(tiny: dict[str, Path], tmp_path: Path) -> None:
    for keys, reason in (
        ({"cache_signal": "hidden"}, "needs the teacher's hidden states"),
        ({"cache_tail_draws": 4}, "Serve the teacher's hidden states"),
    ):
        urls = {"teacher_server": ["http://127.0.0.1:1"], "teacher_server_signal": "top_k"}
        with pytest.raises(ValueError, match=reason):
            build_cache(write_recipe(tmp_path, tiny, DATA, **keys, **urls))


def test_a_server_of_hidden_states_cannot_answer(tiny: dict[str, Path], tmp_path: Path, server: Any) -> None:
    recipe = write_recipe(tmp_path, tiny, DATA, job="generate", teacher_server=[server.url])
    with pytest.raises(ValueError, match=r"Answers are generated.*without --signal hidden"):
        build_cache(recipe)


# On disk


def test_parts_merge_to_the_same_cache(recipe: Path, exact: Path, tmp_path: Path) -> None:
    flags = ["--teacher_cache", str(tmp_path / "joined")]
    parts = [build_cache(recipe, *flags, "--shard", part) for part in ("0/2", "1/2")]
    merge_parts(tmp_path / "joined", parts)
    ignored = ("log.jsonl", ".lock")
    assert contents(tmp_path / "joined", ignored) == contents(exact, ignored)


@pytest.mark.parametrize("how", ["edited", "missing"])
def test_a_damaged_head_is_found_and_mended(recipe: Path, exact: Path, tmp_path: Path, how: str) -> None:
    folder = Path(shutil.copytree(exact, tmp_path / "cache"))
    content = bytearray((folder / HEAD).read_bytes())
    content[-1] ^= 1
    (folder / HEAD).write_bytes(content) if how == "edited" else (folder / HEAD).unlink()
    with pytest.raises(ValueError, match=r"head.safetensors is missing or damaged; run `mmkd cache build` again"):
        CachedTeacher(folder)
    assert main(["cache", "verify", str(folder)]) == 1
    build_cache(recipe, "--teacher_cache", str(folder))
    assert (folder / HEAD).read_bytes() == (exact / HEAD).read_bytes()
    CachedTeacher(folder)


def test_damaged_states_are_found_and_mended(recipe: Path, exact: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(exact, tmp_path / "cache"))
    shard = folder / "train" / "00001.arrow"
    content = bytearray(shard.read_bytes())
    content[-len(content) // 2] ^= 4
    shard.write_bytes(content)
    teacher = CachedTeacher(folder)
    with pytest.raises(ValueError, match="its crc32 does not fit"):
        _ = [teacher.cache.states(row) for row in range(len(teacher.cache))]
    build_cache(recipe, "--teacher_cache", str(folder))
    assert shard.read_bytes() == (exact / "train" / "00001.arrow").read_bytes()


def test_the_head_is_that_of_the_teacher(tiny: dict[str, Path], exact: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny["teacher"])
    head = read_head(exact, Manifest.read(exact))
    assert torch.equal(head.weight, model.get_output_embeddings().weight[: head.vocab_size])


def test_commands_know_the_kind(recipe: Path, exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "build", str(recipe), "--dry_run"]) == 0
    assert "bytes per supervised token" in capsys.readouterr().out
    assert main(["cache", "info", str(exact)]) == 0
    assert "kind hidden, dtype float32" in capsys.readouterr().out
    assert main(["cache", "verify", str(recipe), "--rows", "4"]) == 0
    assert "KL(live || cache) on 4 sequences" in capsys.readouterr().out
    assert main(["train", str(recipe), "--output_dir", str(tmp_path / "run"), "--temperature", "2"]) == 0
    new = ["--teacher_cache", str(tmp_path / "new")]
    for command in (["doctor", str(recipe), *new], ["plan", str(recipe), *new, "--memory", "24"]):
        assert main(command) == 0
        assert "bytes per token" in capsys.readouterr().out


# Images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of method llava_kd with a LLaVA student and teacher, and rows with no, one and two images."""
    data: dict[str, Dataset] = {}
    folder = tmp_path_factory.mktemp("pictures")
    vlms = {
        "teacher": make_llava(folder / "teacher", seed=1, layers=3, width=48),
        "student": make_llava(folder / "student", seed=2),
    }
    numbers = [1, 0, 2, 1, 1, 2]
    questions, answers = sentences(len(numbers), seed=5), sentences(len(numbers), seed=6)
    for split in ("train", "eval"):
        rows = []
        for number, count in enumerate(numbers):
            paths = [folder / f"{split}-{number}-{index}.png" for index in range(count)]
            for index, path in enumerate(paths):
                picture(10 * number + index).save(path)
            messages = [
                {"role": "user", "content": "<image>" * count + questions[number]},
                {"role": "assistant", "content": answers[number]},
            ]
            rows.append({"messages": messages, "images": [str(path) for path in paths]})
        data[split] = Dataset.from_list(rows)
    keys = {"method": "llava_kd", "max_length": 200, "assistant_only_loss": True, "cache_shard_rows": 4}
    keys |= {"cache_signal": "hidden", "cache_hidden_dtype": "float32", "per_device_train_batch_size": 3}
    return write_recipe(folder, vlms, data, **keys)


def test_llava_kd_learns_from_states_at_visual_tokens(pictures: Path, tmp_path: Path) -> None:
    build_cache(pictures)
    results = []
    for flags in ([], ["--teacher_cache", "null"]):
        flags = [*flags, "--output_dir", str(tmp_path / f"run{len(flags)}"), "--max_steps", "2"]
        trainer: Any = build_trainer(recipe_of(str(pictures), flags).parse())
        results.append([*steps(trainer), *losses_of(trainer, "visual_kl"), *losses_of(trainer, "relation_distance")])
    assert min(results[0]) > 0
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    # kd reads the states at the answers of the same cache.
    flags = ["--method", "kd", "--output_dir", str(tmp_path / "kd"), "--max_steps", "1"]
    losses = [
        steps(build_trainer(recipe_of(str(pictures), [*flags, *more]).parse()))
        for more in ([], ["--teacher_cache", "null"])
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_cache_of_kd_has_no_visual_tokens(pictures: Path, tmp_path: Path) -> None:
    flags = ["--teacher_cache", str(tmp_path / "cache")]
    build_cache(pictures, *flags, "--method", "kd")
    with pytest.raises(ValueError, match="hidden states at the answers only"):
        build_trainer(recipe_of(str(pictures), [*flags, "--output_dir", str(tmp_path / "run")]).parse())


def test_a_server_gives_the_states_of_rows_with_images(pictures: Path, tmp_path: Path) -> None:
    folder = pictures.parent / "teacher"
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    settings = {"served": model, "processor": processor, "root": str(folder), "runs": "pooling"}
    local = Cache(build_cache(pictures, "--teacher_cache", str(tmp_path / "local")))
    with fake_vllm(ServedVLM, **settings) as fake:
        flags = ["--teacher_server", fake.url, "--teacher_cache", str(tmp_path / "served")]
        served = Cache(build_cache(pictures, *flags))
    assert len(served) == len(local) == 12
    for row in range(len(local)):
        ours, theirs = served.states(row), local.states(row)
        assert ours.visual == theirs.visual
        torch.testing.assert_close(ours.hidden, theirs.hidden, rtol=1e-4, atol=1e-4)
    assert max(local.states(row).visual for row in range(len(local))) > 0
