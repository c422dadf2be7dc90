"""The loop, end to end: rounds, kill -9, replays, budgets, and what ends it."""

import json
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from mmkd.commands.main import main
from mmkd.methods.comd.round_report import read_rounds
from mmkd.models.load import load_model
from mmkd.publish.push_folder import PushOptions, prepare
from mmkd.publish.runs import parts_of
from mmkd.teachers import endpoints
from tests.comd.chat_server import ChatServer, chat_server, kind_of, said, scripted
from tests.comd.conftest import Recipe
from tests.forked import Forked
from tests.vlms import make_tower, picture


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def outcome(folder: Path) -> dict[str, Any]:
    """What a run leaves behind, without how long it took and where it lies."""
    found: dict[str, Any] = {
        str(path.relative_to(folder)): lines(path) for path in sorted(folder.glob("round-*/*.jsonl"))
    }
    for number, report in enumerate(read_rounds(folder)):
        found[f"report {number}"] = {key: value for key, value in report.items() if key != "phases"}
    found["weights"] = {name: tensor.tolist() for name, tensor in load_model(str(folder)).state_dict().items()}
    return found


def asked(server: ChatServer) -> Counter[str]:
    return Counter(json.dumps(body, sort_keys=True) for body in server.requests)


def repeated(server: ChatServer) -> dict[str, int]:
    """What was asked more than once, and how often."""
    return {body: times for body, times in asked(server).items() if times > 1}


def test_rounds_leave_what_they_were_made_of(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with chat_server() as server:
        assert main(["train", str(recipe(teacher_server=[server.url]))]) == 0
    run = tmp_path / "run"
    pools = [lines(run / f"round-{number}" / "pool.jsonl") for number in range(3)]
    assert [len(pool) for pool in pools] == [12, 16, 20]
    for number in (0, 1):
        folder = run / f"round-{number}"
        new = lines(folder / "new.jsonl")
        assert Counter(one["kind"] for one in new) == {"hard": 2, "easy": 2}
        before = {row["key"] for row in pools[number]}
        assert {one["parent"] for one in new} <= before
        scores = {row["key"]: row for row in lines(folder / "scores.jsonl")}
        for one in new:
            assert scores[one["parent"]]["hard"] == (one["kind"] == "hard")
        # What is new is answered and learnt in the next round.
        assert {row["key"] for row in pools[number + 1]} - before == {one["key"] for one in new}
        answers = {row["key"]: row["text"] for row in lines(run / f"round-{number + 1}" / "answers.jsonl")}
        assert answers.keys() == {one["key"] for one in new}
        by_key = {row["key"]: row["completion"][-1]["content"] for row in pools[number + 1]}
        assert all(by_key[key] == text for key, text in answers.items())
    assert not lines(run / "round-2" / "new.jsonl")
    for one in read_rounds(run):
        assert one["assessed"] == one["pool"]
        assert one["held_out"]["instructions"] == 4
        assert sum(phase["share"] for phase in one["phases"].values()) == pytest.approx(1, abs=0.01)
        assert one["phases"]["answer"]["tokens_per_second"] > 0
    types = read_rounds(run)[1]["difficulty"].values()
    assert sum(one["assessed"] for one in types) == 16
    assert sum(one["assessed_twice"] for one in types) == 12
    # Each round goes on from the last; the last is the result, an ordinary model.
    for number in (1, 2):
        keys = yaml.safe_load((run / f"round-{number}" / "recipe.yaml").read_text())
        assert (keys["method"], keys["student"]) == ("sft", str(run / f"round-{number - 1}" / "student"))
    student: Any = AutoModelForCausalLM.from_pretrained(run)
    last = load_model(str(run / "round-2" / "student"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(student.parameters(), last.parameters(), strict=True))
    assert (run / "prompts" / "judge.txt").is_file()
    assert json.loads((run / "rounds.json").read_text())["ended"] == "all rounds are done"
    # The record is that of the loop, and the log that of every round.
    record = json.loads((run / "run.json").read_text())
    assert record["method"] == "comd"
    assert record["finished"]
    assert not (run / "log.jsonl").exists()
    assert [part.name for part in parts_of(run)] == ["round-0", "round-1", "round-2"]
    # Nothing is asked twice, and each pair is judged in both orders.
    assert set(asked(server).values()) == {1}
    assert server.count("judge") == len(orders_of(run))
    assert "round-0/answer" in capsys.readouterr().err


def orders_of(run: Path) -> set[tuple[str, str, str]]:
    """Every instruction with two answers, in the orders in which a judge sees them."""
    rows = [row for path in run.glob("round-*/scores.jsonl") for row in lines(path)]
    pairs = {(row["key"], row["teacher_answer"], row["student_answer"]) for row in rows}
    return pairs | {(key, student, teacher) for key, teacher, student in pairs}


def test_kill_9_inside_a_round_asks_nothing_twice_and_a_record_is_replayed_without_a_server(
    recipe: Recipe, tmp_path: Path
) -> None:
    """Killed while the judge of round 0 is asked, and replayed from the record without a server: one outcome."""
    processes: list[Forked] = []

    def deadly(body: dict[str, Any]) -> str:
        if kind_of(body) == "judge" and not killed:
            killed.append(body)
            # So that what was said before is written down.
            time.sleep(0.3)
            processes[-1].send_signal(signal.SIGKILL)
        return scripted(body)

    killed: list[dict[str, Any]] = []
    with chat_server(reply=deadly) as server:
        settings = {"teacher_server": [server.url], "teacher_concurrency": 1, "rounds": 1, "seed": 0}
        path = recipe(**settings, save_strategy="steps", save_steps=1)
        processes.append(Forked(["-m", "mmkd.commands.main", "train", str(path)], tmp_path))
        assert processes[-1].wait(timeout=120) == -signal.SIGKILL
        trained = tmp_path / "run" / "round-0" / "student" / "model.safetensors"
        stamp, torn = trained.stat().st_mtime_ns, len(lines(tmp_path / "run" / "record.jsonl"))
        assert torn >= 12
        assert main(["train", str(path)]) == 0
        assert trained.stat().st_mtime_ns == stamp
        # The question under way when it was killed, and the one that waited behind it.
        assert sum(count - 1 for count in asked(server).values()) <= 2
        # The record alone, in another place, with nobody to ask: the rounds are replayed.
        (tmp_path / "again").mkdir()
        shutil.copyfile(tmp_path / "run" / "record.jsonl", tmp_path / "again" / "record.jsonl")
    assert main(["train", str(path), "--output_dir", str(tmp_path / "again"), "--save_strategy", "no"]) == 0
    assert outcome(tmp_path / "again") == outcome(tmp_path / "run")
    # A server that is gone is no matter to a finished run either.
    assert main(["train", str(path)]) == 0


def test_nothing_that_is_held_out_ever_enters_a_pool(recipe: Recipe, tmp_path: Path) -> None:
    """An augmentor that writes held-out instructions, and data that holds them twice."""
    path = recipe(rounds=1)
    held_out = [row["question"] for row in lines(tmp_path / "eval.jsonl")]
    for number, text in enumerate(held_out[:2]):
        with open(tmp_path / "train.jsonl", "a") as file:
            file.write(json.dumps({"question": f"  {text.upper()}" if number else text, "answer": "x"}) + "\n")

    def leak(body: dict[str, Any]) -> str:
        if kind_of(body) != "augment":
            return scripted(body)
        return held_out[body["seed"] % 4].upper() if body["seed"] % 2 else scripted(body)

    changed = {**yaml.safe_load(path.read_text()), "new_instructions": 8}
    with chat_server(reply=leak) as server:
        path.write_text(yaml.safe_dump({**changed, "teacher_server": [server.url]}))
        assert main(["train", str(path)]) == 0
    report = read_rounds(tmp_path / "run")[0]
    assert report["pool"] == 12
    assert report["augmented"]["rejected"]["held out"] >= 1
    for number in (0, 1):
        pool = lines(tmp_path / "run" / f"round-{number}" / "pool.jsonl")
        texts = {" ".join(row["prompt"][0]["content"].lower().split()) for row in pool}
        assert not texts & set(held_out)


def test_budgets(recipe: Recipe, tmp_path: Path) -> None:
    with chat_server() as server:
        # All are hard, or the rounds may end for want of hard ones.
        path = recipe(teacher_server=[server.url], max_new_instructions=2, rounds=3, hard_threshold=-9.0)
        assert main(["train", str(path)]) == 0
        reports = read_rounds(tmp_path / "run")
        # Half of those that a round may make: easy ones have no parents.
        assert [one["pool"] for one in reports] == [12, 13, 14]
        ended = json.loads((tmp_path / "run" / "rounds.json").read_text())["ended"]
        assert ended == "max_new_instructions 2 are made"
        # Two tokens an answer: eight of twelve fit, in batches of four; neither judge nor augmentor is asked.
        short = ["--output_dir", str(tmp_path / "short"), "--generation_batch_size", "4"]
        before = server.count("judge")
        assert main(["train", str(path), *short, "--max_teacher_tokens", "16"]) == 0
        assert server.count("judge") == before
    (report,) = read_rounds(tmp_path / "short")
    assert (report["pool"], report["unanswered"]) == (8, {"over the budget": 4})
    assert report["teacher_tokens"] == 16
    ended = json.loads((tmp_path / "short" / "rounds.json").read_text())["ended"]
    assert ended == "max_teacher_tokens 16 are spent"


def test_an_empty_hard_set_ends_the_loop(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with chat_server(reply=lambda body: "7 7" if kind_of(body) == "judge" else scripted(body)) as server:
        assert main(["train", str(recipe(teacher_server=[server.url]))]) == 0
    assert len(read_rounds(tmp_path / "run")) == 1
    assert "no instruction is hard any more after round 0" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_where_all_are_hard_a_last_instruction_is_made_of_them(recipe: Recipe, tmp_path: Path) -> None:
    settings = {"max_new_instructions": 1, "hard_threshold": -9.0, "rounds": 2}
    with chat_server() as server:
        assert main(["train", str(recipe(teacher_server=[server.url], **settings))]) == 0
        assert [one["pool"] for one in read_rounds(tmp_path / "run")] == [12, 13]
        easy = ["--hard_ratio", "0", "--output_dir", str(tmp_path / "easy")]
        assert main(["train", str(recipe(teacher_server=[server.url], **settings)), *easy]) == 0
    ended = json.loads((tmp_path / "easy" / "rounds.json").read_text())["ended"]
    assert ended == "no instruction is easy after round 0, and hard_ratio is 0"


@pytest.mark.parametrize(
    "reply, message",
    [
        (lambda body: "no idea", "The judge answers nonsense"),
        (lambda body: "9 2", "The judge goes by the order"),
        (
            lambda body: scripted(body) if kind_of(body) == "judge" else "say the same old thing",
            "fit to join the pool",
        ),
    ],
)
def test_roles_that_cannot_be_trusted(recipe: Recipe, reply: Any, message: str, capsys: Any) -> None:
    def answered(body: dict[str, Any]) -> str:
        return scripted(body) if kind_of(body) == "answer" else reply(body)

    with chat_server(reply=answered) as server:
        # The one that repeats itself says what is in the pool.
        asked_for = (
            said
            if "same old" in str(reply({"messages": [{"content": "Here is an instruction"}], "seed": 0}))
            else None
        )
        assert (
            main(["train", str(recipe(teacher_server=[server.url], rounds=1, min_words=6 if asked_for else 4))]) == 2
        )
    assert message in capsys.readouterr().err


def test_an_unreachable_judge(recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(endpoints, "BACK_OFF", 0)
    with chat_server() as teacher, chat_server(fail_after=3) as judge:
        path = recipe(teacher_server=[teacher.url], assessor_server=[judge.url], rounds=1, teacher_concurrency=1)
        assert main(["train", str(path)]) == 2
        assert "does not answer" in capsys.readouterr().err
        # It is there again: what it said and what the teacher said is not asked for again.
        judge.fail_after = None
        assert main(["train", str(path)]) == 0
        assert repeated(teacher) == repeated(judge) == {}
        assert teacher.count("judge") == judge.count("augment") == 0


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"per_device_train_batch_size": 13}, "fewer than a batch of 13"),
        ({"teacher_server": None}, "comd needs a teacher that answers"),
        ({"teacher_cache": "somewhere"}, "cannot be a teacher_cache"),
        ({"assessor": "likelihood"}, "a chat server does not give"),
        ({"mutual": True}, "mutual trains the teacher in this process"),
        ({"push_to_hub": True}, "would push every round"),
        ({"augmentor": "templates"}, "there are no pictures"),
        ({"assessor_server_model": "gpt"}, "without assessor_server"),
        ({"round_settings": {"temprature": 2}}, "round_settings has 'temprature'"),
        ({"answer_max_new_tokens": 8, "prompts": "nowhere"}, r"holds no \.txt file"),
    ],
)
def test_recipes_that_cannot_be(recipe: Recipe, changed: dict[str, Any], message: str, capsys: Any) -> None:
    with chat_server() as server:
        assert main(["train", str(recipe(**{"teacher_server": [server.url], "rounds": 1, **changed}))]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_plain_text_has_nothing_to_answer(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = recipe(teacher_server=["http://127.0.0.1:9"])
    data = yaml.safe_load((tmp_path / "data.yaml").read_text())
    (tmp_path / "data.yaml").write_text(yaml.safe_dump({**data, "columns": {"text": "question"}}))
    assert main(["train", str(path)]) == 2
    assert "the data holds plain text" in capsys.readouterr().err


def test_other_settings_or_prompts_need_another_folder(recipe: Recipe, tmp_path: Path, capsys: Any) -> None:
    with chat_server() as server:
        path = recipe(teacher_server=[server.url], rounds=0)
        assert main(["train", str(path)]) == 0
        assert main(["train", str(path), "--hard_ratio", "0.7"]) == 2
        assert "were made with other settings" in capsys.readouterr().err
        (tmp_path / "prompts").mkdir()
        (tmp_path / "prompts" / "augment_hard.txt").write_text("Another one like {instruction}")
        assert main(["train", str(path), "--prompts", str(tmp_path / "prompts")]) == 2
        assert "other prompts (augment_hard)" in capsys.readouterr().err
        # More rounds of the same are no other settings.
        assert main(["train", str(path), "--rounds", "1"]) == 0
    assert len(read_rounds(tmp_path / "run")) == 2


def test_a_dry_run_asks_nobody(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = recipe(teacher_server=["http://127.0.0.1:9"])
    assert main(["train", str(path), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert "12 of the data, 4 held out" in printed
    assert "up to 8" in printed
    assert not (tmp_path / "run").exists()


@pytest.fixture
def speaker(tmp_path: Path, recipe: Recipe, tiny: dict[str, Path]) -> Path:
    """A tiny teacher that has learnt to answer in one word and to stop."""
    rows = lines_of(recipe, tmp_path)
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({**row, "answer": "house"}) + "\n" for row in rows))
    data = yaml.safe_load((tmp_path / "data.yaml").read_text())
    data |= {"data_files": {"train": str(tmp_path / "short.jsonl")}, "splits": {"train": "train"}}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(data))
    flags = ["--method", "sft", "--student", str(tiny["teacher"]), "--data", str(tmp_path / "short.yaml")]
    flags += ["--output_dir", str(tmp_path / "speaker"), "--max_steps", "20"]
    keys = yaml.safe_load(recipe().read_text())
    plain = {
        key: value for key, value in keys.items() if key not in ("rounds", "new_instructions", "answer_max_new_tokens")
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(plain))
    assert main(["train", str(tmp_path / "sft.yaml"), *flags]) == 0
    return tmp_path / "speaker"


def lines_of(recipe: Recipe, tmp_path: Path) -> list[dict[str, Any]]:
    recipe()
    return lines(tmp_path / "train.jsonl")


def test_the_teacher_in_this_process_with_token_terms_from_a_cache(
    recipe: Recipe, speaker: Path, tmp_path: Path
) -> None:
    path = recipe(
        teacher=str(speaker),
        assessor="likelihood",
        hard_threshold=0.0,
        augmentor="none",
        rounds=1,
        round_method="kd",
        round_settings={"divergence": "jsd", "ce_weight": 0.5},
        round_cache=True,
        teacher_top_k=8,
        max_length=32,
    )
    assert main(["train", str(path)]) == 0
    for number in (0, 1):
        folder = tmp_path / "run" / f"round-{number}"
        assert (folder / "teacher_cache" / "manifest.json").is_file() or list((folder / "teacher_cache").iterdir())
        keys = yaml.safe_load((folder / "recipe.yaml").read_text())
        assert (keys["method"], keys["divergence"], keys["ce_weight"]) == ("kd", "jsd", 0.5)
    assert {row["text"] for row in lines(tmp_path / "run" / "round-0" / "answers.jsonl")} == {"house"}


@pytest.mark.parametrize("learning_rate", [1e-6, 1.0])
def test_the_teacher_learns_from_its_student_and_is_rolled_back_where_it_gets_worse(
    learning_rate: float, recipe: Recipe, speaker: Path, tmp_path: Path
) -> None:
    """A likelihood that calls every answer of the student better teaches the teacher; held-out scores decide."""
    keys = {
        "teacher": str(speaker),
        "assessor": "likelihood",
        "hard_threshold": -50.0,
        "augmentor": "none",
        "rounds": 1,
        "mutual": True,
        "mutual_steps": 3,
        "mutual_learning_rate": learning_rate,
        "lora_r": 4,
        "lora_target_modules": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    }
    path = recipe(**keys)
    held_out = lines(tmp_path / "eval.jsonl")
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({**row, "answer": "house"}) + "\n" for row in held_out))
    assert main(["train", str(path)]) == 0
    rounds = [one["mutual"] for one in read_rounds(tmp_path / "run")]
    assert [one["lessons"] for one in rounds] == [12, 12]
    # A teacher that got worse was put back: the next round starts from what it was.
    assert [one["teacher_before"] for one in rounds] == [1.0, 1.0]
    assert [one["teacher_after"] < 1 for one in rounds] == [learning_rate == 1] * 2
    assert [one["teacher_rolled_back"] for one in rounds] == [learning_rate == 1] * 2
    assert (tmp_path / "run" / "round-0" / "teacher" / "model.safetensors").is_file()


def test_a_student_with_lora_is_merged_between_rounds(recipe: Recipe, tmp_path: Path) -> None:
    with chat_server() as server:
        lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]}
        assert main(["train", str(recipe(teacher_server=[server.url], rounds=1, **lora))]) == 0
    run = tmp_path / "run"
    assert (run / "round-1" / "adapter" / "adapter_model.safetensors").is_file()
    first, second = (load_model(str(run / f"round-{number}" / "student")).state_dict() for number in (0, 1))
    changed = {name for name in first if not torch.equal(first[name], second[name])}
    assert changed
    assert all("q_proj" in name or "v_proj" in name for name in changed)


def test_stages_with_pictures(tmp_path: Path, recipe: Recipe, tiny: dict[str, Path], capsys: Any) -> None:
    """A connector is trained on captions, then rounds whose new questions are about similar pictures."""
    rows = []
    for number in range(12):
        picture(number).save(tmp_path / f"{number}.png")
        content = [
            {"type": "image", "text": None},
            {"type": "text", "text": f"{['what is', 'is there'][number % 2]} a cat {number}"},
        ]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]}
        rows.append(
            {"messages": [{"role": "user", "content": content}, answer], "images": [str(tmp_path / f"{number}.png")]}
        )
    path = recipe(
        student_init="llava", student=str(tiny["student"]), student_vision_tower=str(make_tower(tmp_path / "tower"))
    )
    for split, part in (("train", rows[:9]), ("eval", rows[9:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    data = yaml.safe_load((tmp_path / "data.yaml").read_text())
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump({**data, "columns": {"messages": "messages", "images": "images"}})
    )
    keys = yaml.safe_load(path.read_text()) | {"max_length": 128}
    own = {"rounds": 1, "assessor": "agreement", "augmentor": "templates", "new_image": "similar", "max_rouge": 0.9}
    with chat_server() as server:
        keys["stages"] = {
            "PT": {"method": "sft", "trainable": ["connector"]},
            "CoMD": {**own, "trainable": ["connector", "language_model"], "teacher_server": [server.url]},
        }
        for key in ("rounds", "new_instructions", "answer_max_new_tokens"):
            keys["stages"]["CoMD"].setdefault(key, keys.pop(key))
        path.write_text(yaml.safe_dump(keys, sort_keys=False))
        assert main(["train", str(path), "--dry_run"]) == 0
        assert "templates" in capsys.readouterr().out
        assert not server.requests
        assert main(["train", str(path)]) == 0
        assert all("image_url" in json.dumps(body) for body in server.requests)
    prepared = prepare(tmp_path / "run", PushOptions("org/student"))
    assert prepared.student.methods == ["sft", "comd"]
    assert {entry["part"] for entry in prepared.log} == {"round-0", "round-1"}
    assert "comd" in prepared.card.text
    run = tmp_path / "run" / "2-CoMD"
    LlavaForConditionalGeneration.from_pretrained(run)
    new = lines(run / "round-0" / "new.jsonl")
    seeds = {row["key"]: row for row in lines(run / "round-0" / "pool.jsonl")}
    assert new
    kept_out = {row["images"][0] for row in rows[9:]}
    for one in new:
        assert one["images"] != seeds[one["parent"]]["images"]
        assert not set(one["images"]) & kept_out
    # The PT stage's connector is where the rounds begin.
    assert yaml.safe_load((run / "round-0" / "recipe.yaml").read_text())["student"] == str(tmp_path / "run" / "1-PT")


def test_doctor_looks_at_roles_and_budget(
    recipe: Recipe, tiny: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    teacher = str(tiny["teacher"])
    assert main(["doctor", str(recipe(teacher=teacher, augmentor="random", assessor="likelihood"))]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "rounds 0 to 2, each trained with sft" in text
    assert "up to 12 instructions and 8 new ones, at most 160 tokens" in text
    for keys, reason in [
        ({"assessor_server_model": "judge", "assessor": "judge"}, "assessor_server_model is set without"),
        ({"mutual": True, "teacher_server": ["http://127.0.0.1:9"]}, "mutual trains the teacher in this process"),
        ({"per_device_train_batch_size": 16}, "12 instructions are fewer than a batch of 16"),
    ]:
        assert main(["doctor", str(recipe(teacher=teacher, **keys))]) == 1
        assert reason in " ".join(capsys.readouterr().out.split())
