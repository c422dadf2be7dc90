"""Verified traces from the outside: answers of a chat API, verdicts on them, what is kept, and pairs for DPO."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from huggingface_hub import DatasetCard

from mmkd.cache.cache_card import cache_card
from mmkd.cache.kept_answers import published
from mmkd.cache.manifest import Manifest
from mmkd.cache.store import LOG
from mmkd.capture.answer_verdicts import Rulings
from mmkd.commands.main import main
from mmkd.data.load_data import load_data
from mmkd.errors import UserError
from mmkd.generation.generator import Generator, Prompt, RowError, Sampling
from mmkd.generation.local_generation import LocalGenerator, prompt_inputs, together
from mmkd.generation.served_generation import ServerGenerator
from mmkd.generation.thoughts import FORCED_END, BudgetedAnswer, BudgetedGenerator
from mmkd.models.load import load_model, load_processing_class
from mmkd.publish.lineage import kept_answers
from mmkd.recipe.arguments import RunArguments
from mmkd.recipe.run_record import data_facts
from mmkd.teachers import endpoints
from mmkd.teachers.chat_api import Chat, ChatClient, ChatReply
from mmkd.teachers.vllm_client import VLLMClient
from tests.comd.chat_server import ChatServer, chat_server, said
from tests.loopback import QuietHandler, answering, listening
from tests.teachers.fake_vllm import fake_vllm
from tests.trainers.served_student import ServedStudent

Run = Callable[..., str]
SECRET = "sk-secret-of-a-user"


def arithmetic(body: dict[str, Any]) -> str:
    """Adds two numbers, and is wrong for every third seed; a judge likes what is right."""
    text, seed = said(body), body.get("seed", 0)
    if text.startswith("An assistant"):
        return "10\nIt is right." if "= 7" in text or "#### 7" in text else "I would say 3 of 10."
    if text.startswith("Your reply did not"):
        return "3"
    first, second = (int(word) for word in text.split("+"))
    wrong = seed % 3 == 0
    return f"<think>{first} and {second}</think>The answer is {first + second + wrong}."


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with sums and a recipe that has a chat API answer them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    rows = [{"prompt": f"{n}+{n + 1}", "completion": f"So it is\n#### {2 * n + 1}"} for n in range(12)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"name": "sums", "license": "CC0-1.0", "source": "json", "data_files": {"train": "sums.jsonl"}}
    columns = {"prompt": "prompt", "completion": "completion"}
    (tmp_path / "sums.yaml").write_text(yaml.safe_dump({**data, "columns": columns, "shuffle_seed": None}))
    recipe = {
        "method": "sft",
        "student": "unused",
        "data": "sums.yaml",
        "output_dir": "run",
        "teacher_cache": "answers",
        "teacher_api_model": "teacher",
        "job": "generate",
        "cache_samples": 4,
        "cache_shard_rows": 4,
        "cache_keep": "correct",
        "cache_verifier": "number",
        "cache_pairs": 2,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server(reply=arithmetic) as fake:
        yield fake


@pytest.fixture
def build(sums: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]) -> Run:
    """Builds with the server; gives what was printed, in one line, and checks the exit status against `status`."""

    def run(*flags: str, status: int = 0) -> str:
        capsys.readouterr()
        try:
            code = main(["cache", "build", "recipe.yaml", "--teacher_api", server.url, *flags])
        except SystemExit as error:
            code = error.code
        printed = capsys.readouterr()
        assert code == status, printed.err
        return " ".join((printed.out + printed.err).split())

    return run


def rows_of(recipe: str) -> list[dict[str, Any]]:
    """The rows that a data recipe of one split names, as they lie in its file."""
    keys = yaml.safe_load(Path(recipe).read_text())
    path = Path(recipe).parent / keys["data_files"]["train"]
    return [dict(row) for row in datasets.Dataset.from_parquet(str(path))]  # pyright: ignore[reportCallIssue]


def files_of(folder: Path) -> dict[str, bytes]:
    """All that decides the answers and what was chosen of them, by name."""
    ignored = (LOG, ".lock")
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in ignored)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def is_right(row: dict[str, Any], completion: str) -> bool:
    first, second = (int(word) for word in row["prompt"].split("+"))
    return completion.endswith(f" {first + second}.")


def data_files(recipe: str) -> list[str]:
    return list(yaml.safe_load(Path(recipe).read_text())["data_files"].values())


def test_right_answers_are_kept_and_the_others_counted(
    build: Run, server: ChatServer, sums: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = build()
    assert len(server.requests) == 48
    kept = rows_of("answers/data.yaml")
    assert kept
    assert all(is_right(row, row["completion"]) and row["right"] for row in kept)
    everything: Any = datasets.load_from_disk("answers")["train"]
    right = sum(is_right(row, row["completion"]) for row in everything)
    assert len(kept) == right < 48
    assert f"train: {right} of 48 answers are kept" in printed
    assert f"Rejected: {48 - right} wrong. Right: {right / 48:.1%} of 48." in printed
    # What trains is what was kept, thoughts and all.
    rows = load_data("answers/data.yaml")["train"]
    assert sorted(rows["completion"]) == sorted(row["completion"] for row in kept)
    summary = json.loads(Path("answers/traces.json").read_text())
    assert main(["cache", "info", "answers"]) == 0
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"train: {right} of 48 answers are kept" in told
    assert "keep correct, thoughts keep, verifier number" in told
    assert "tokens of the API" in told
    card = cache_card(sums / "answers", Manifest.read(sums / "answers"), "user/answers", ["prompt"])
    assert f"train: {right} of 48 answers are kept" in card
    assert "source: user/answers" in card
    configs: Any = DatasetCard(card).data.to_dict()["configs"]
    assert [config["config_name"] for config in configs] == ["default", "kept", "pairs"]
    facts = data_facts("sft", "answers/data.yaml")
    assert f"train: {right} of 48 answers are kept" in facts["answers"]
    assert kept_answers([{"data": facts}]) == [facts["answers"]]
    assert set(published(sums / "answers")) >= {"traces.json", "pairs.yaml", *data_files("answers/data.yaml")}
    assert summary["splits"]["train"]["reasons"] == {"wrong": 48 - right}
    assert f"{right} of 48 answers are kept" in yaml.safe_load(Path("answers/data.yaml").read_text())["description"]


def test_another_choice_asks_nobody_again(build: Run, server: ChatServer, sums: Path) -> None:
    build()
    asked, shards = len(server.requests), Manifest.read(sums / "answers").shards
    by_gold = {(row["prompt"], row["sample"]) for row in rows_of("answers/data.yaml")}
    build("--cache_keep", "majority", "--cache_thoughts", "strip")
    by_vote = rows_of("answers/data.yaml")
    assert {(row["prompt"], row["sample"]) for row in by_vote} != by_gold
    assert all(row["votes"] > 2 for row in by_vote)
    assert all(row["completion"].startswith("The answer is") for row in by_vote)
    assert len(list((sums / "answers" / "kept").iterdir())) == 1
    printed = build("--cache_keep", "all", "--cache_pairs", "0")
    assert "Right:" in printed
    assert len(rows_of("answers/data.yaml")) == 48
    assert not (sums / "answers" / "pairs.yaml").exists()
    assert len(server.requests) == asked
    assert Manifest.read(sums / "answers").shards == shards
    assert len(list((sums / "answers" / "verdicts").iterdir())) == 1


def test_a_judge_is_asked_once_about_each_answer(build: Run, server: ChatServer, sums: Path) -> None:
    judge = ["--cache_keep", "judge", "--cache_judge_server", server.url, "--cache_judge_model", "teacher"]
    build(*judge, "--cache_gold_column", "completion")
    judged = [body for body in server.requests if said(body).startswith("An assistant")]
    assert len(judged) == 48
    assert all("The right answer, which the assistant did not see" in said(body) for body in judged)
    assert all("<think>" not in said(body) for body in judged)
    kept = rows_of("answers/data.yaml")
    assert {row["prompt"] for row in kept} == {"3+4"}
    assert {row["rating"] for row in kept} == {10}
    asked = len(server.requests)
    # The others were asked again, and rated then.
    assert asked == 48 + 48 + 44
    build(*judge, "--cache_gold_column", "completion", "--cache_judge_min", "3")
    assert len(rows_of("answers/data.yaml")) == 48
    assert len(server.requests) == asked


def test_pairs_train_with_dpo(build: Run, sums: Path, tiny: dict[str, Path]) -> None:
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    build("--cache_thoughts", "strip")
    pairs = rows_of("answers/pairs.yaml")
    assert pairs
    for row in pairs:
        assert is_right(row, row["chosen"])
        assert not is_right(row, row["rejected"])
        assert row["reason"] == "wrong"
    path = yaml.safe_load(Path("answers/pairs.yaml").read_text())["data_files"]["train"]
    data: Any = datasets.load_dataset("parquet", data_files=f"answers/{path}", split="train")
    settings = DPOConfig("dpo", max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False)
    trainer = DPOTrainer(str(tiny["student"]), args=settings, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] > 0
    # mmkd itself trains on the chosen answers.
    assert sorted(load_data("answers/pairs.yaml")["train"]["completion"]) == sorted(row["chosen"] for row in pairs)


def test_keys_are_sent_and_written_nowhere(sums: Path, capsys: Any, caplog: pytest.LogCaptureFixture) -> None:
    fake, seen = ChatServer(reply=arithmetic), list[str]()

    def respond(path: str, headers: Any, body: dict[str, Any]) -> Any:
        seen.append(headers["Authorization"])
        if len(seen) in (2, 5):
            return 503, {"error": {"message": f"busy, {SECRET}"}}
        return fake.respond(path, headers, body)

    with answering(respond) as url:
        assert main(["cache", "build", "recipe.yaml", "--teacher_api", url, "--max_train_rows", "4"]) == 0
    assert set(seen) == {f"Bearer {SECRET}"}
    assert "busy, ***" in caplog.text
    printed = capsys.readouterr()
    assert SECRET not in printed.out + printed.err + caplog.text
    assert not [path for path in sums.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_a_build_that_was_cut_off_goes_on_to_the_same_files(
    build: Run, server: ChatServer, sums: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "BACK_OFF", 0)
    build("--teacher_cache", "whole")
    server.requests.clear()
    server.fail_after = 20
    assert "The chat server does not answer" in build(status=2)
    assert len(Manifest.read(sums / "answers").shards["train"]) == 1
    assert not (sums / "answers" / "kept").exists()
    server.fail_after = None
    # Of the shards that were not finished, all is asked again.
    assert "1 of 3 shards are there and intact" in build()
    given = Rulings.of
    calls = iter([True, False])
    monkeypatch.setattr(Rulings, "of", lambda *own: given(*own) if next(calls) else [][0])
    other = ["--cache_verifier", "choice"]
    with pytest.raises(IndexError):
        build(*other)
    monkeypatch.setattr(Rulings, "of", given)
    build(*other)
    build(*other, "--teacher_cache", "whole")
    assert files_of(sums / "answers") == files_of(sums / "whole")


def test_the_right_answer_may_stand_in_any_column(build: Run, server: ChatServer, sums: Path) -> None:
    build()
    asked, manifest = len(server.requests), (sums / "answers" / "manifest.json").read_bytes()
    rows = [{"prompt": f"{n}+{n + 1}", "completion": "", "sum": 2 * n + 2, "offset": 1} for n in range(12)]
    rows = [{**row, "completion": f"So it is\n#### {2 * n + 1}"} for n, row in enumerate(rows)]
    (sums / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (sums / "mine.py").write_text('def off(answer, row):\n    return f\' {row["sum"] - row["offset"]}.\' in answer\n')
    # Neither column belongs to the layout of a file that is named directly.
    direct = ["--data", "sums.jsonl", "--cache_verifier", "python:mine.py:off", "--teacher_cache", "direct"]
    build(*direct, "--cache_verifier_columns", "sum", "offset", "--cache_samples", "2", "--cache_shard_rows", "20")
    assert json.loads((sums / "direct" / "traces.json").read_text())["splits"]["train"]["answers"] == 24
    asked = len(server.requests)
    build("--cache_gold_column", "sum")
    kept = rows_of("answers/data.yaml")
    assert kept
    assert not any(is_right(row, row["completion"]) for row in kept)
    assert {row["gold"] for row in kept} <= {str(2 * n + 2) for n in range(12)}
    build("--cache_verifier", "python:mine.py:off", "--cache_verifier_columns", "sum", "offset")
    kept = rows_of("answers/data.yaml")
    assert kept
    assert all(is_right(row, row["completion"]) for row in kept)
    # Right answers that were corrected are compared again.
    for row in rows:
        row["sum"] += 1
    (sums / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    build("--cache_verifier", "python:mine.py:off", "--cache_verifier_columns", "sum", "offset")
    assert not any(is_right(row, row["completion"]) for row in rows_of("answers/data.yaml"))
    assert len(server.requests) == asked
    assert (sums / "answers" / "manifest.json").read_bytes() == manifest


def test_a_teacher_reads_a_prompt_of_its_own(build: Run, server: ChatServer, sums: Path) -> None:
    server.reply = lambda body: "#### 7"
    view = {"system": "You add.", "template": "{prompt} ({answer})"}
    refused = build("--teacher_view", json.dumps(view), "--teacher_cache", "refused", status=2)
    assert "teacher_view.system is a message of a conversation" in refused
    build("--teacher_view", json.dumps({"template": "{prompt}\n{answer}"}))
    assert all("####" in said(body) for body in server.requests)
    assert {row["prompt"] for row in rows_of("answers/data.yaml")} == {"3+4"}
    del server.requests[:]
    without = ["--privileged_dropout", "1", "--teacher_cache", "dropped"]
    build("--teacher_view", json.dumps({"template": "{prompt}\n{answer}"}), *without)
    assert not any("####" in said(body) for body in server.requests)
    assert "teacher_view" in build(status=2)


def test_thoughts_within_a_budget(tiny: dict[str, Path]) -> None:
    """Answers within it are those without one; a thought that is longer is ended there."""
    model = load_model(str(tiny["teacher"]))
    tokenizer: Any = load_processing_class(str(tiny["teacher"]), "teacher")

    def inputs(prompts: list[Prompt]) -> Any:
        return prompt_inputs(tokenizer, prompts)

    inner = LocalGenerator(model, tokenizer, inputs, together)
    budgeted = BudgetedGenerator(inner, tokenizer, lambda own: own.ids, lambda own, ids: Prompt(ids), 6)
    prompts = [Prompt(tokenizer(text)["input_ids"]) for text in ("a cat sees", "the dog", "two birds and a cat")]
    sampling = Sampling(20, temperature=0)
    plain = inner.generate(prompts, sampling)
    assert any(len(own[0].ids) > 6 for own in plain if not isinstance(own, RowError))
    for ours, theirs in zip(budgeted.generate(prompts, sampling), plain, strict=True):
        assert not isinstance(ours, RowError)
        assert not isinstance(theirs, RowError)
        assert (ours[0].text, ours[0].ids, ours[0].finish_reason) == (
            theirs[0].text,
            theirs[0].ids,
            theirs[0].finish_reason,
        )
    thinking = [Prompt(tokenizer("a cat<think>")["input_ids"])]
    (own,) = budgeted.generate(thinking, Sampling(30, temperature=0.9, seed=3), samples=3)
    assert not isinstance(own, RowError)
    cut = [answer for answer in own if isinstance(answer, BudgetedAnswer)]
    assert cut
    for answer in cut:
        assert answer.thoughts_cut
        forced = tokenizer(FORCED_END, add_special_tokens=False)["input_ids"]
        assert answer.ids[6 : 6 + len(forced)] == forced
        assert answer.text.count("</think>") == 1
        assert len(answer.ids) <= 30
    with fake_vllm(ServedStudent, tokenizer=tokenizer) as fake:
        fake.weights = model
        with VLLMClient(fake.url) as client:
            served: Generator[Prompt] = ServerGenerator(client, lambda prompt: prompt)
            same = BudgetedGenerator(served, tokenizer, lambda own: own.ids, lambda own, ids: Prompt(ids), 6)
            for asked in (prompts, thinking):
                here, there = (own.generate(asked, sampling) for own in (budgeted, same))
                assert [own[0].ids for own in here if own] == [own[0].ids for own in there if own]  # pyright: ignore


def test_a_damaged_verdict_is_given_again(build: Run, server: ChatServer, sums: Path) -> None:
    build()
    before, asked = files_of(sums / "answers"), len(server.requests)
    (shard,) = (sums / "answers" / "verdicts").glob("*/train/00001.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "verifier: train shard 1, 2 of 3." in build()
    assert files_of(sums / "answers") == before
    assert len(server.requests) == asked


def test_a_server_that_wants_time_gets_it(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "BACK_OFF", 0)
    waits: list[float] = []
    monkeypatch.setattr(endpoints.Endpoints, "_tell", lambda self, state: waits.append(state.upcoming_sleep))
    answers = [(429, "0.25"), (429, None), (200, None)]

    class Handler(QuietHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, wait = answers.pop(0)
            choice = {"message": {"content": "4", "reasoning_content": "2 and 2"}, "finish_reason": "stop"}
            content = json.dumps({"choices": [choice], "usage": {"prompt_tokens": 5, "completion_tokens": 9}}).encode()
            self.send_response(status)
            if wait is not None:
                self.send_header("Retry-After", wait)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with listening(Handler) as url, ChatClient([url], "teacher") as client:
        (reply,) = client.replies([Chat([{"role": "user", "content": "2+2"}])], {"max_tokens": 5})
    assert isinstance(reply, ChatReply)
    assert (reply.text, reply.thoughts) == ("4", "2 and 2")
    assert waits == [0.25, 0]
    assert (client.prompt_tokens, client.completion_tokens) == (5, 9)


def test_settings_that_a_server_does_not_take_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    bodies: list[dict[str, Any]] = []

    def respond(path: str, headers: Any, body: dict[str, Any]) -> Any:
        bodies.append(body)
        if "max_tokens" in body:
            message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
            return 400, {"error": {"message": message, "param": "max_tokens"}}
        if "seed" in body:
            return 400, {"error": {"message": "Unknown parameter", "param": "seed"}}
        return 200, {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}]}

    with answering(respond) as url, ChatClient([url], "teacher", concurrency=1) as client:
        chats = [Chat([{"role": "user", "content": "?"}], seed=3)] * 2
        replies = list(client.replies(chats, {"max_tokens": 5, "temperature": 1.0, "top_p": 0.9}))
    assert all(isinstance(reply, ChatReply) for reply in replies)
    assert "takes no seed" in caplog.text
    last = {name: value for name, value in bodies[-1].items() if name != "messages"}
    assert last == {"model": "teacher", "max_completion_tokens": 5, "top_p": 0.9}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--cache_verifier", "nobody"], "choose one of number, math, choice, json"),
        (["--cache_verifier", "python:nothing:here"], "there is no module 'nothing'"),
        (["--cache_gold_column", "gold"], "the run reads the column 'gold', which the source does not have"),
        (["--cache_keep", "judge"], "needs cache_judge_server"),
        (["--cache_keep", "all"], "cache_pairs needs kept and rejected answers"),
        (["--cache_samples", "1"], "cache_pairs needs kept and rejected answers"),
        (["--cache_max_think_tokens", "8"], "a chat API does not take"),
        (["--job", "score"], "teacher_api writes text only"),
        (["--teacher", "somebody"], "teacher_api says who answers"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(
    build: Run, server: ChatServer, flags: list[str], words: str
) -> None:
    assert words in build(*flags, status=2)
    assert not server.requests


def test_a_remote_api_needs_a_key(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="set MY_KEY in the environment"):
        ChatClient(["https://example.com/v1"], "teacher", key_names=("MY_KEY",))
    with pytest.raises(UserError, match="holds a name, a password or a key") as refused:
        ChatClient([f"https://example.com/v1?key={SECRET}"], "teacher")
    assert SECRET not in str(refused.value)
    with pytest.raises(UserError, match="writes text and no probabilities"):
        RunArguments("kd", "sums.yaml", student="somebody", teacher_api=["https://example.com/v1"])


def test_doctor_looks_at_verifier_judge_and_api(sums: Path, server: ChatServer, capsys: Any) -> None:
    def findings(*flags: str) -> str:
        capsys.readouterr()
        main(["doctor", "recipe.yaml", "--teacher_api", server.url, *flags])
        return " ".join(capsys.readouterr().out.split())

    judged = ["--cache_judge_server", server.url, "--cache_judge_model", "other"]
    sound = findings(*judged)
    assert "number finds the data's own answers right in 12 rows." in sound
    assert "It answers and offers 'teacher'." in sound
    assert "It does not offer 'other'; among its models are 'teacher'." in sound
    unread = findings("--cache_verifier", "choice")
    assert "The verifier choice reads no right answer in 12 of 12 rows; row 0 says" in unread
    (sums / "mine.py").write_text("def first(answer, row):\n    return row['prompt'] != '3+4'\n")
    rejected = findings("--cache_verifier", "python:mine.py:first")
    assert "rejects the data's own answers in 1 of 12 rows; that of row 3 ends with" in rejected
    assert not [body for body in server.requests if "messages" in body]
