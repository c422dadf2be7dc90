"""`mmkd cache` from the outside: what a user types, what lies on disk then, and what training makes of it."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from PIL import Image

from mmkd.cache.manifest import Manifest
from mmkd.cache.store import LOG, Cache
from mmkd.capture import answering
from mmkd.capture.distributed import shards_on_ray
from mmkd.commands.main import main
from mmkd.data.load_data import load_data
from mmkd.methods.sft import SFTBaselineConfig
from mmkd.models.load import load_model
from mmkd.preparation.prepared_rows import PreparedRows
from mmkd.recipe.cache_arguments import CacheArguments
from scripts.make_tiny_models import make_tokenizer, sentences
from tests.forked import Forked
from tests.teachers.vlm import make_image, make_vlm

Run = Callable[..., str]


@pytest.fixture
def workplace(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A folder with text, chats and `recipe.yaml`, a KD run of the tiny models from a cache of several shards."""
    for split, seed in (("train", 0), ("eval", 1)):
        texts, answers = sentences(48, seed=seed), sentences(48, seed=seed + 9)
        write_rows(tmp_path / f"{split}.jsonl", [{"text": text} for text in texts])
        write_rows(tmp_path / f"chat-{split}.jsonl", [chat(*pair) for pair in zip(texts, answers, strict=True)])
    write_data(tmp_path, "words", "", {"text": "text"})
    write_data(tmp_path, "chats", "chat-", {"messages": "messages"})
    write_recipe(tmp_path, student=str(tiny["student"]), teacher=str(tiny["teacher"]))
    return tmp_path


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def write_data(folder: Path, name: str, prefix: str, columns: dict[str, str]) -> None:
    splits = {"train": "train", "eval": "eval"}
    files = {split: f"{prefix}{split}.jsonl" for split in splits}
    data = {"name": name, "license": "CC0-1.0", "source": "json", "columns": columns, "data_files": files}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**data, "splits": splits}))


def write_recipe(folder: Path, name: str = "recipe.yaml", **keys: Any) -> None:
    common = {
        "method": "kd",
        "data": "words.yaml",
        "output_dir": "run",
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "teacher_cache": "cache",
        "teacher_top_k": 16,
        "cache_shard_rows": 8,
    }
    (folder / name).write_text(yaml.safe_dump({**common, **keys}))


@pytest.fixture
def mmkd(workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command of mmkd in the workplace; gives what it printed, and checks its exit status against `status`."""
    monkeypatch.chdir(workplace)

    def run(*arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        try:
            found = main(arguments)
        except SystemExit as error:
            found = error.code
        printed = capsys.readouterr()
        assert found == status, printed.err
        return printed.out + printed.err

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    """All that decides a cache, by name."""
    ignored = (LOG, ".lock")
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ignored
    }


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_a_killed_build_goes_on_to_the_same_cache(mmkd: Run, workplace: Path) -> None:
    mmkd("cache", "build", "recipe.yaml", "--teacher_cache", "whole")
    for shards in (1, 4):
        process = Forked(["-m", "mmkd.commands.main", "cache", "build", "recipe.yaml"], workplace)
        deadline = time.monotonic() + 100
        while len(list((workplace / "cache").glob("*/*.arrow"))) < shards and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
    mmkd("cache", "build", "recipe.yaml")
    assert files_of(workplace / "cache") == files_of(workplace / "whole")
    assert not list((workplace / "cache").rglob("*.tmp"))


def test_parts_built_apart_merge_to_the_same_cache(mmkd: Run, workplace: Path) -> None:
    mmkd("cache", "build", "recipe.yaml")
    for part in ("0/2", "1/2"):
        mmkd("cache", "build", "recipe.yaml", "--teacher_cache", "joined", "--shard", part)
    incomplete = mmkd("cache", "merge", "other", "joined.part-0-of-2", status=2)
    assert "missing: 1/2" in incomplete
    mmkd("cache", "merge", "joined")
    assert files_of(workplace / "joined") == files_of(workplace / "cache")


def test_ray_workers_build_the_same_cache(mmkd: Run, workplace: Path) -> None:
    pytest.importorskip("ray")
    mmkd("cache", "build", "recipe.yaml", "--cache_tail_draws", "4")
    mmkd("cache", "build", "recipe.yaml", "--cache_tail_draws", "4", "--teacher_cache", "ray", "--engine", "ray")
    assert files_of(workplace / "ray") == files_of(workplace / "cache")


@pytest.mark.slow
def test_a_failure_in_a_ray_worker_is_told_as_it_is(mmkd: Run, workplace: Path) -> None:
    pytest.importorskip("ray")
    damaged = workplace / "teacher"
    shutil.copytree(yaml.safe_load((workplace / "recipe.yaml").read_text())["teacher"], damaged)
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    done = mmkd("cache", "build", "recipe.yaml", "--teacher", "teacher", "--engine", "ray", status=2)
    assert "The teacher 'teacher' cannot be loaded" in done


def test_a_damaged_shard_is_named_and_alone_built_anew(mmkd: Run, workplace: Path) -> None:
    mmkd("cache", "build", "recipe.yaml")
    before = files_of(workplace / "cache")
    shard = workplace / "cache" / "train" / "00002.arrow"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "train/00002.arrow is damaged" in mmkd("cache", "verify", "cache", status=1)
    done = mmkd("cache", "build", "recipe.yaml")
    assert "11 of 12 shards are there and intact" in done
    assert files_of(workplace / "cache") == before


def test_info_verify_and_dry_run(mmkd: Run) -> None:
    estimate = mmkd("cache", "build", "recipe.yaml", "--dry_run")
    assert "bytes per supervised token" in estimate
    assert "hours" in estimate
    mmkd("cache", "build", "recipe.yaml")
    info = mmkd("cache", "info", "cache")
    assert "mass kept by the top-k" in info
    assert "complete" in info
    assert "KL(live || cache) on 8 sequences" in mmkd("cache", "verify", "recipe.yaml", "--rows", "8")
    assert "is no teacher cache" in mmkd("cache", "info", ".", status=2)


def test_training_from_a_cache_and_what_is_refused(mmkd: Run, workplace: Path) -> None:
    mmkd("cache", "build", "recipe.yaml")
    mmkd("train", "recipe.yaml")
    cached = losses(workplace / "run")
    assert len(cached) == 4
    for flags, words in (
        (["--max_length", "32"], "max_length: 32 here, 1024 there"),
        (["--data", "chats.yaml"], "was built on the data 'words'"),
        (["--divergence", "jsd", "--teacher_tail", "renormalise"], "jsd compares with the whole distribution"),
        (["--temperature", "2"], "known at temperature 1 only"),
        (["--teacher_tail", "unbiased"], "has no draws from the tail"),
        (["--teacher_tail", "buckets"], "choose one of bucket, unbiased, renormalise"),
    ):
        done = mmkd("train", "recipe.yaml", "--output_dir", "refused", *flags, status=2)
        assert words in done, done
    assert not list((workplace / "refused").glob("*"))


def test_a_cache_of_another_teacher_is_refused(mmkd: Run, workplace: Path, tiny: dict[str, Path]) -> None:
    mmkd("cache", "build", "recipe.yaml")
    other = mmkd("train", "recipe.yaml", "--teacher", str(tiny["student"]), status=2)
    assert "is of the teacher" in other
    again = mmkd("cache", "build", "recipe.yaml", "--teacher_top_k", "8", status=2)
    assert "signal.k: 8 here, 16 there" in again


def test_answers_are_data_to_train_on_and_to_score(mmkd: Run, workplace: Path) -> None:
    generation = ["--job", "generate", "--cache_samples", "2", "--cache_max_new_tokens", "60", "--data", "chats.yaml"]
    mmkd("cache", "build", "recipe.yaml", *generation, "--teacher_cache", "answers")
    mmkd("cache", "build", "recipe.yaml", *generation, "--teacher_cache", "again", "--shard", "1/3")
    answers: Any = datasets.load_from_disk(str(workplace / "answers"))
    assert len(answers["train"]) == 96
    row = answers["train"][0]
    assert [message["role"] for message in (*row["prompt"], *row["completion"])] == ["user", "assistant"]
    assert row["tokens"] <= 60
    assert "96 answers to 48 of 48 prompts" in mmkd("cache", "info", "answers")
    # A shard is the same whoever builds it.
    part = Manifest.read(workplace / "again.part-1-of-3").shards["train"][1]
    assert part == Manifest.read(workplace / "answers").shards["train"][1]
    score = ["--data", "answers/data.yaml", "--teacher_cache", "scores"]
    mmkd("cache", "build", "recipe.yaml", *score)
    finished = sum(reason == "stop" for reason in answers["train"]["finish_reason"])
    assert Manifest.read(workplace / "scores").total_rows["train"] <= finished
    mmkd("train", "recipe.yaml", *score, "--max_steps", "2")
    assert len(losses(workplace / "run")) == 2
    text = mmkd("cache", "build", "recipe.yaml", "--job", "generate", "--teacher_cache", "none_yet", status=2)
    assert "plain text without prompts" in text


def test_answers_that_were_cut_off_are_said_and_kept_when_asked(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    command = ["cache", "build", "recipe.yaml", "--job", "generate", "--data", "chats.yaml"]
    command += [
        "--teacher_cache",
        "short",
        "--cache_max_new_tokens",
        "3",
        "--max_train_rows",
        "12",
        "--max_eval_rows",
        "4",
    ]
    assert main(command) == 0
    saved: Any = datasets.load_from_disk("short")
    reasons = [row["finish_reason"] for part in saved.values() for row in part]
    cut = reasons.count("length")
    assert cut
    said = f"16 answers, {cut} of them cut off at cache_max_new_tokens 3"
    assert f"{said}: data.yaml leaves those out of training. Raise" in " ".join(capfd.readouterr().err.split())
    assert main(["cache", "info", "short"]) == 0
    told = " ".join(capfd.readouterr().out.replace("│", " ").split())
    assert "leaves those out" in told
    assert "train 12 answers to 12 of 12 prompts" in told
    before = Path("short/manifest.json").read_bytes()
    assert main([*command, "--cache_keep_truncated", "true"]) == 0
    assert f"{said}, which data.yaml trains on up to where they were cut" in " ".join(capfd.readouterr().err.split())
    assert Path("short/manifest.json").read_bytes() == before
    rows = load_data("short/data.yaml")
    assert sum(map(len, rows.values())) == sum(bool(text) for text in said_texts("short"))
    # Their words are learnt, and the end that the template writes after them is not.
    settings = SFTBaselineConfig("unused", bf16=False, use_cpu=True, max_length=None)
    for row in PreparedRows.of(settings, make_tokenizer(), rows["train"]).train:
        assert (row["labels"][-1] == -100) == (row["truncated"] == "length")


def said_texts(folder: str) -> list[str]:
    """What the teacher said, also nothing at all."""
    saved: Any = datasets.load_from_disk(folder)
    return [row["completion"][0]["content"] for part in saved.values() for row in part]


def test_every_prompt_is_answered_or_named(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    monkeypatch.chdir(workplace)
    rows = [{"question": text} for text in ["one cat", "", "two birds", None, "a dog"]]
    write_rows(workplace / "asked.jsonl", rows)
    data = {"source": "json", "data_files": {"train": "asked.jsonl"}, "columns": {"prompt": "question"}}
    (workplace / "asked.yaml").write_text(yaml.safe_dump({**data, "shuffle_seed": None}))
    command = [
        "cache",
        "build",
        "recipe.yaml",
        "--job",
        "generate",
        "--data",
        "asked.yaml",
        "--teacher_cache",
        "asked",
    ]
    assert main([*command, "--cache_max_new_tokens", "4", "--cache_temperature", "0"]) == 0
    answers: Any = datasets.load_from_disk("asked")["train"]
    assert answers["prompt"] == ["one cat", "two birds", "a dog"]
    assert "3 answers" in capfd.readouterr().err
    assert "2 of 5 asked train rows are left out" in caplog.text
    assert "rows 1, 3" in caplog.text


def test_a_build_goes_on_with_the_shards_it_began_with(mmkd: Run, workplace: Path) -> None:
    mmkd("cache", "build", "recipe.yaml")
    began = Manifest.read(workplace / "cache").shard_rows
    again = mmkd("cache", "build", "recipe.yaml", "--cache_shard_rows", "5", status=2)
    assert f"was begun with cache_shard_rows: {began}, and now it is 5. Set it back to {began} to go on (0 of" in again


def test_images_that_cannot_be_decoded(mmkd: Run, workplace: Path) -> None:
    make_vlm(workplace / "vlm")
    questions, answers = sentences(12, seed=5), sentences(12, seed=6)
    for split, numbers in (("train", range(8)), ("eval", range(8, 12))):
        rows = []
        for number in numbers:
            path = workplace / f"{number}.png"
            make_image(number).save(path)
            rows.append({**chat(questions[number], answers[number]), "images": [str(path)]})
        write_rows(workplace / f"pictures-{split}.jsonl", rows)
    write_data(workplace, "pictures", "pictures-", {"messages": "messages", "images": "images"})
    (workplace / "3.png").write_bytes(b"no image")
    flags = ["--student", "vlm", "--teacher", "vlm", "--data", "pictures.yaml", "--max_length", "200"]
    assert "data cannot be used: images[0]: UnidentifiedImageError" in mmkd(
        "cache", "build", "recipe.yaml", *flags, status=2
    )
    mmkd("cache", "build", "recipe.yaml", *flags, "--on_error", "skip")
    skipped = Manifest.read(workplace / "cache").skipped
    assert sum(len(rows) for rows in skipped.values()) == 1
    cache = Cache(workplace / "cache")
    assert len(cache) == 11
    table: Any = datasets.load_from_disk(str(workplace / "cache"))["eval"]
    assert all(len(images) == 1 and tokens > 0 for images, tokens in zip(table["images"], table["image_tokens"]))  # noqa: B905
    mmkd("train", "recipe.yaml", *flags, "--num_train_epochs", "1", "--max_steps", "-1", "--learning_rate", "1e-6")
    # The student is the teacher; what is left is the encoding.
    assert max(losses(workplace / "run")) < 1e-3
    # Other pixels are another question.
    Image.new("RGB", (64, 48)).save(workplace / "1.png")
    changed = mmkd("train", "recipe.yaml", *flags, "--output_dir", "other", "--max_steps", "2", status=2)
    assert "does not know a sequence" in changed


@pytest.fixture
def pictures(workplace: Path) -> list[str]:
    """Flags of a run on 8 and 4 rows with images, of which 3 cannot be read, and a VLM that is its own teacher."""
    make_vlm(workplace / "vlm")
    for split, numbers in (("train", range(8)), ("eval", range(8, 12))):
        rows = []
        for number in numbers:
            make_image(number).save(workplace / f"{number}.png")
            rows.append({**chat("one cat", f"{number} dogs"), "images": [str(workplace / f"{number}.png")]})
        write_rows(workplace / f"pictures-{split}.jsonl", rows)
    write_data(workplace, "pictures", "pictures-", {"messages": "messages", "images": "images"})
    for number in (1, 6, 7):
        (workplace / f"{number}.png").write_bytes(b"no image")
    return ["--student", "vlm", "--teacher", "vlm", "--data", "pictures.yaml", "--on_error", "skip"]


def test_too_many_skipped_rows_stop_a_build_that_keeps_what_was_done(
    mmkd: Run, workplace: Path, pictures: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = [*pictures, "--cache_shard_rows", "1"]
    stopped = mmkd("cache", "build", "recipe.yaml", *flags, status=2)
    assert "2 of 12 rows had to be skipped, more than the share of max_skipped: 0.1." in stopped
    manifest = Manifest.read(workplace / "cache")
    assert manifest.skipped_rows() == 2
    assert manifest.missing()
    summary = (
        "3 of 12 rows (25.0%) have no answer of the teacher's: 3 times: images[0]: UnidentifiedImageError: cannot"
    )
    # Lines are broken where the width of the console falls.
    done = " ".join(mmkd("cache", "build", "recipe.yaml", *flags, "--max_skipped", "0.3").split())
    assert f"Skipped: {summary}" in done
    assert done.count("Skipped row") == 1
    assert "intact" in done
    assert summary in " ".join(mmkd("cache", "info", "cache").replace("│", " ").split())
    # A cache that is complete still has too few rows for who allows no more than that.
    assert "had to be skipped" in mmkd("cache", "build", "recipe.yaml", *flags, status=2)
    caplog.clear()
    mmkd("train", "recipe.yaml", *flags, "--max_steps", "1")
    told = [record.getMessage() for record in caplog.records if "teaches nothing" in record.getMessage()]
    assert len(told) == 1
    assert summary in told[0]
    assert "max_skipped is 2" in mmkd("cache", "build", "recipe.yaml", "--max_skipped", "2", status=2)


def test_answers_to_images_are_those_of_images_decoded_at_once(
    mmkd: Run, workplace: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prompt at a time has its images decoded while a local teacher answers."""
    alive: list[int] = []
    inputs = answering.prompt_inputs

    def counted(processing_class: Any, prompts: Any) -> Any:
        gc.collect()
        alive.append(sum(type(one).__name__ == "PngImageFile" for one in gc.get_objects()))
        return inputs(processing_class, prompts)

    monkeypatch.setattr(answering, "prompt_inputs", counted)
    flags = ["--job", "generate", "--max_skipped", "1", "--cache_max_new_tokens", "8"]
    mmkd("cache", "build", "recipe.yaml", *pictures, *flags)
    assert len(alive) == 9
    assert max(alive) <= 1
    assert Manifest.read(workplace / "cache").skipped_rows() == 3
    # A prompt and its answer must fit into the teacher's positions.
    flags[-1] = "250"
    refused = " ".join(mmkd("cache", "build", "recipe.yaml", *pictures, *flags, "--teacher_cache", "other").split())
    assert "9 times: Its prompt has" in refused
    assert "the teacher has room for 6 before an answer" in refused


def test_flags_that_a_command_does_not_know_are_refused(mmkd: Run, workplace: Path) -> None:
    mmkd("cache", "build", "recipe.yaml")
    for arguments, words in (
        (["verify", "cache", "--rowss", "3"], "does not know '--rowss'; did you mean '--rows'?"),
        (["verify", "cache", "--teacher_top_k", "3"], "does not know '--teacher_top_k'; it takes --rows."),
        (["verify", "cache", "recipe.yaml"], "does not know 'recipe.yaml'; it takes --rows."),
        (["push", "cache", "user/name", "--privately"], "does not know '--privately'; did you mean '--private'?"),
        (["info", "cache", "--row", "3"], "unrecognized arguments: --row 3"),
        (["merge", "cache", "--typo"], "unrecognized arguments: --typo"),
        (["verify", "recipe.yaml", "--teacher_topk", "3"], "Did you mean 'teacher_top_k'"),
        (["verify", "recipe.yaml", "--rows", "0"], "--rows is 0; give the number of sequences"),
    ):
        found = mmkd("cache", *arguments, status=2)
        assert words in found, found
    assert not (workplace / "user").exists()


def test_a_folder_that_would_hide_a_cache_on_the_hub_is_not_made(mmkd: Run, workplace: Path) -> None:
    refused = mmkd("cache", "build", "recipe.yaml", "--teacher_cache", "user/words", status=2)
    assert "Write ./user/words for a folder" in refused
    assert not (workplace / "user").exists()
    mmkd("cache", "build", "recipe.yaml", "--teacher_cache", "./user/words")
    # What is there is gone on with.
    assert "12 of 12 shards are there" in mmkd("cache", "build", "recipe.yaml", "--teacher_cache", "user/words")


def test_a_cache_of_a_teacher_in_another_type_is_refused(mmkd: Run, workplace: Path, tiny: dict[str, Path]) -> None:
    mmkd("cache", "build", "recipe.yaml", "--teacher_dtype", "bfloat16")
    mmkd("train", "recipe.yaml", "--max_steps", "1")
    mmkd("train", "recipe.yaml", "--max_steps", "1", "--teacher_dtype", "bfloat16")
    refused = mmkd("train", "recipe.yaml", "--teacher_dtype", "float32", status=2)
    assert "computed by a teacher in bfloat16, the recipe's teacher_dtype is float32. Set teacher_dtype: bf" in refused


def test_the_type_that_auto_loads_is_written_down(mmkd: Run, workplace: Path, tiny: dict[str, Path]) -> None:
    """Also where the config names none: transformers then takes that of the weights."""
    teacher = Path(shutil.copytree(tiny["teacher"], workplace / "teacher"))
    config = json.loads((teacher / "config.json").read_text())
    del config["dtype"]
    (teacher / "config.json").write_text(json.dumps(config))
    mmkd("cache", "build", "recipe.yaml", "--teacher", "teacher")
    loaded = load_model(str(teacher), dtype="auto")
    recorded = Manifest.read(workplace / "cache").identity["teacher"]["dtype"]
    assert f"torch.{recorded}" == str(loaded.dtype) == "torch.float32"
    assert "None" not in mmkd("cache", "info", "cache")


def test_one_teacher_by_two_paths(mmkd: Run, workplace: Path, tiny: dict[str, Path]) -> None:
    shutil.copytree(tiny["teacher"], workplace / "teacher")
    mmkd("cache", "build", "recipe.yaml", "--teacher", "teacher", "--shard", "0/2")
    path = str(workplace / "teacher")
    mmkd("cache", "build", "recipe.yaml", "--teacher", path, "--shard", "1/2", "--cache_batch_tokens", "100")
    again = mmkd("cache", "build", "recipe.yaml", "--teacher", path, "--shard", "0/2")
    assert "6 of 6 shards are there" in again
    mmkd("cache", "merge", "cache")
    mmkd("train", "recipe.yaml", "--teacher", path, "--max_steps", "1")


def test_a_teacher_that_refuses_every_sampled_row(mmkd: Run, workplace: Path, tiny: dict[str, Path]) -> None:
    teacher = Path(shutil.copytree(tiny["teacher"], workplace / "teacher"))
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 2}))
    flags = ["--teacher", "teacher", "--on_error", "skip"]
    refused = mmkd("cache", "build", "recipe.yaml", *flags, "--dry_run", status=2)
    assert "The teacher refused all 32 sampled rows" in refused
    assert "the teacher is made for 2 (max_position_embeddings)" in refused
    stopped = mmkd("cache", "build", "recipe.yaml", *flags, status=2)
    # Not one shard more than it takes to know.
    assert "16 of 96 rows had to be skipped" in stopped


@pytest.mark.slow
def test_a_ray_worker_that_dies_ends_the_build_with_a_reason() -> None:
    pytest.importorskip("ray")

    # Defined here, so that it travels to the worker by its content.
    class Deadly:
        arguments = CacheArguments(cache_workers=1)

        def shard(self, split: str, number: int, advance: Any) -> Any:
            os.kill(os.getpid(), signal.SIGKILL)

    plan: Any = Deadly()
    with pytest.raises(ValueError, match=r"Ray workers died 2 times over one shard: .* lower cache_workers"):
        list(shards_on_ray(plan, [("train", 0)]))


def test_settings_that_cannot_be(mmkd: Run) -> None:
    server = ["--teacher_server", "http://127.0.0.1:9"]
    for flags, words in (
        (["--teacher_top_k", "0"], "nothing would be kept"),
        (["--teacher_top_k", "500"], "are more than the 300 tokens"),
        (["--shard", "3/2"], "shard is '3/2'"),
        (["--cache_shard_rows", "0"], "cache_shard_rows is 0"),
        (["--teacher_timeout", "0"], "teacher_timeout is 0"),
        (server, "does not answer"),
        ([*server, "--teacher_server_signal", "top_k", "--cache_tail_draws", "4"], "not the tail to draw from"),
    ):
        done = mmkd("cache", "build", "recipe.yaml", *flags, status=2)
        assert words in done, done


def test_a_second_writer_is_refused(mmkd: Run, workplace: Path) -> None:
    mmkd("cache", "build", "recipe.yaml")
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; f = open('cache/.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
         "print('locked', flush=True); sys.stdin.read()"],
        cwd=workplace,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "locked\n"
    assert "Another process is writing" in mmkd("cache", "build", "recipe.yaml", status=2)
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    mmkd("cache", "build", "recipe.yaml")
