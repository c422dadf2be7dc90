"""mmkd doctor: recipes that are sound, and what is said about those that are not."""

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
)
from transformers.models.idefics3 import Idefics3Processor

from mmkd.cache.manifest import Manifest
from mmkd.capture.build import build
from mmkd.capture.build_plan import make_plan
from mmkd.capture.sequences import TokenSequence
from mmkd.preflight import costs
from mmkd.preflight.doctor import doctor, examine
from mmkd.preflight.facts import Finding, Rendered
from mmkd.preflight.row_checks import lengths
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run_record import RECORD, RunRecord
from scripts.make_tiny_models import CHAT_TEMPLATE, make_model, make_tokenizer, save, sentences
from tests.teachers.fake_vllm import ServedStates, fake_vllm
from tests.teachers.fake_vlm import ServedVLM
from tests.teachers.vlm import make_image, make_vlm

ROWS = 24


def chats(count: int = ROWS, words: str = "") -> list[dict[str, Any]]:
    pairs = zip(sentences(count, seed=1), sentences(count, seed=2), strict=True)
    return [
        {"messages": [{"role": "user", "content": a + words}, {"role": "assistant", "content": b}]} for a, b in pairs
    ]


class Place:
    """A folder with a data recipe of chats and recipes of KD runs on it."""

    def __init__(self, folder: Path, tiny: dict[str, Path]):
        self.folder, self.models = folder, tiny
        self.data(chats())

    def data(self, rows: list[dict[str, Any]], name: str = "chats", **columns: str) -> str:
        (self.folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        recipe: dict[str, Any] = {"name": name, "license": "CC0-1.0", "source": "json", "eval_rows": 4}
        recipe |= {
            "data_files": {"train": f"{name}.jsonl"},
            "columns": {"messages": {"column": "messages"}, **columns},
        }
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        return str(self.folder / f"{name}.yaml")

    def model(self, name: str, tokenizer: Any = None, **sizes: Any) -> str:
        """A model with the tiny tokenizer, or another one."""
        tokenizer = tokenizer or make_tokenizer()
        sizes = {"rows": len(tokenizer), **sizes}
        return str(save(make_model(**sizes), tokenizer, self.folder / name))

    def recipe(self, **keys: Any) -> str:
        common = {
            "method": "kd",
            "student": str(self.models["student"]),
            "teacher": str(self.models["teacher"]),
            "data": str(self.folder / "chats.yaml"),
            "output_dir": str(self.folder / "run"),
            "max_length": 64,
            "assistant_only_loss": True,
            "bf16": False,
            "report_to": "none",
        }
        keys = {key: value for key, value in {**common, **keys}.items() if value is not None}
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(keys))
        return str(path)

    def examine(self, **keys: Any) -> list[Finding]:
        return examine(recipe_of(self.recipe(**keys)).parse())


@pytest.fixture
def place(tmp_path: Path, tiny: dict[str, Path]) -> Place:
    return Place(tmp_path, tiny)


def of(findings: list[Finding], name: str, severity: str) -> str:
    """What the findings of one name and severity say."""
    return "\n".join(f"{one.message} {one.advice}" for one in findings if (one.name, one.severity) == (name, severity))


def problems(findings: list[Finding]) -> list[str]:
    return [one.name for one in findings if one.severity == "problem"]


def printed(recipe: str, *flags: str) -> tuple[int, str]:
    sink = io.StringIO()
    return doctor(recipe_of(recipe, flags), Console(file=sink, width=200)), sink.getvalue()


# The command


def test_a_sound_recipe_has_status_0_and_every_check_speaks(place: Place) -> None:
    status, text = printed(place.recipe())
    assert status == 0
    assert "Sound: 0 problems, 0 warnings." in text
    for name in ("vocabulary", "chat template", "special tokens", "end of answer", "supervision", "length", "memory"):
        assert name in text
    assert not (place.folder / "run").exists()


def test_flags_win_over_the_recipe_and_one_problem_is_status_1(place: Place) -> None:
    status, text = printed(place.recipe(), "--teacher", "nowhere/at/all", "--max_length", "12")
    assert status == 1
    assert "Not sound: " in text
    assert "there is no such folder" in text
    # The others go on.
    assert "max_length 12 cuts" in text


def test_a_recipe_with_an_unknown_key_is_refused_as_in_training(place: Place) -> None:
    with pytest.raises(ValueError, match="Did you mean 'temperature'"):
        printed(place.recipe(temprature=2))


def test_keys_of_accelerate_belong_to_the_launcher(place: Place) -> None:
    assert printed(place.recipe(accelerate_config="ddp", num_processes=2))[0] == 0
    assert printed(place.recipe(), "--accelerate_config", "ddp", "--num_processes", "2")[0] == 0
    with pytest.raises(ValueError, match="num_processes"):
        printed(place.recipe(), "--num_processes", "2")


def test_no_weights_are_read(place: Place) -> None:
    """A teacher of 70 billion parameters, of which there is nothing but a config."""
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=256,
        dtype="bfloat16",
        eos_token_id=1,
    )
    config.save_pretrained(place.folder / "large")
    make_tokenizer().save_pretrained(place.folder / "large")
    findings = place.examine(teacher=str(place.folder / "large"))
    assert problems(findings) == []
    whole = of(findings, "memory", "warning") + of(findings, "memory", "ok")
    assert "teacher weights 127.5 GiB" in whole
    quantised = place.examine(teacher=str(place.folder / "large"), teacher_load_in_4bit=True)
    assert "teacher weights 35." in of(quantised, "memory", "warning") + of(quantised, "memory", "ok")


def test_a_broken_check_is_a_problem_with_its_place(place: Place) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ 1 / 0 }}"
    findings = place.examine(student=place.model("student", tokenizer), assistant_only_loss=False)
    assert "ZeroDivisionError: division by zero" in of(findings, "data", "problem")
    assert of(findings, "special tokens", "ok")


# Vocabulary


def test_padding_rows_are_left_out(place: Place) -> None:
    findings = place.examine(teacher=place.model("padded", rows=320))
    assert problems(findings) == []
    assert "300 tokens" in of(findings, "vocabulary", "ok")
    assert "0 of the student's 300 and 20 of the teacher's 320" in of(findings, "vocabulary", "ok")


def test_another_tokenizer_names_method_alm(place: Place) -> None:
    findings = place.examine(teacher=place.model("other", make_tokenizer(290)))
    assert problems(findings) == ["vocabulary"]
    assert "method alm" in of(findings, "vocabulary", "problem")


def test_renamed_special_tokens_are_listed_with_their_use(place: Place) -> None:
    tokenizer = renamed(make_tokenizer(), "<|user|>", "<|human|>")
    findings = place.examine(teacher=place.model("renamed", tokenizer))
    text = of(findings, "vocabulary", "problem")
    assert "2 is '<|user|>' to the student, '<|human|>' to the teacher" in text
    assert "The sample uses 1 of them, 20 times" in text
    # The template differs in it too.
    assert "> '<|human|>' <" in of(findings, "chat template", "warning")


def test_tokens_that_the_teacher_does_not_know(place: Place) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|new|>"], special_tokens=True)
    student = place.model("student", tokenizer)
    assert "300 tokens" in of(place.examine(student=student), "vocabulary", "ok")
    place.data(chats(words="<|new|>"))
    findings = place.examine(student=student)
    assert "20 tokens that the teacher does not know, 0 of them supervised" in of(findings, "vocabulary", "problem")
    assert "'<|new|>' (300)" in of(findings, "vocabulary", "problem")


def renamed(tokenizer: Any, old: str, new: str) -> Any:
    content = tokenizer.backend_tokenizer.to_str().replace(json.dumps(old)[1:-1], new)
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(content)
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|{{ message['role'] }}|>", f"{new}")
    return tokenizer


# EOS


def test_a_student_that_would_not_stop_where_the_teacher_does(place: Place) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|system|>"
    student = place.model("student", tokenizer)
    config = json.loads((Path(student) / "config.json").read_text())
    (Path(student) / "config.json").write_text(json.dumps({**config, "eos_token_id": 4}))
    (Path(student) / "generation_config.json").unlink()
    (place.folder / "other.jinja").write_text(CHAT_TEMPLATE.replace("<|end|>", "<|system|>"))
    findings = place.examine(student=student, chat_template_path=str(place.folder / "other.jinja"))
    assert "may never stop: its EOS '<|system|>' is none of" in of(findings, "special tokens", "warning")
    # With a template that ends answers as the teacher does, training adds what ends them.
    findings = place.examine(student=student)
    assert {one.severity for one in findings} == {"ok"}
    assert "20 of 20 rows. Training lets the student's generation stop at <|end|> (1)" in of(
        findings, "end of answer", "ok"
    )
    assert "stops at <|end|> (1), " in of(findings, "special tokens", "ok")
    # A model that stops there by itself needs nothing.
    assert "Training lets" not in of(place.examine(student=student, eos_token="<|end|>"), "end of answer", "ok")


def test_a_token_that_ends_an_answer_unsupervised(place: Place) -> None:
    outside = CHAT_TEMPLATE.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")
    (place.folder / "outside.jinja").write_text(outside)
    findings = place.examine(chat_template_path=str(place.folder / "outside.jinja"))
    assert "<|end|> (1) follows the answer in 20 of 20 rows but is not supervised" in of(
        findings, "end of answer", "problem"
    )


def test_a_template_without_an_end_of_turn(place: Place) -> None:
    (place.folder / "open.jinja").write_text(CHAT_TEMPLATE.replace("<|end|>", ""))
    findings = place.examine(chat_template_path=str(place.folder / "open.jinja"))
    assert "20 of 20 rows end without EOS" in of(findings, "end of answer", "problem")


def test_a_template_without_marks_tells_the_assistant_all_the_same(place: Place) -> None:
    plain = CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (place.folder / "plain.jinja").write_text(plain)
    unmarked, marked = (
        of(place.examine(**settings), "supervision", "ok")
        for settings in ({"chat_template_path": str(place.folder / "plain.jinja")}, {})
    )
    assert unmarked == marked


def test_what_a_template_leaves_out_is_found(place: Place) -> None:
    assert "writes all that 20 rows say" in of(place.examine(), "rendering", "ok")
    deaf = CHAT_TEMPLATE.replace("{% else %}{{ message['content'] }}", "{% else %}?")
    (place.folder / "deaf.jinja").write_text(deaf)
    path = str(place.folder / "deaf.jinja")
    assert "row 0: the content of the user in message 0" in of(
        place.examine(chat_template_path=path), "rendering", "warning"
    )
    (place.folder / "dumb.jinja").write_text(
        CHAT_TEMPLATE.replace("{{ message['content'] }}<|end|>{% endgen", "<|end|>{% endgen")
    )
    findings = place.examine(chat_template_path=str(place.folder / "dumb.jinja"))
    assert "leaves out what the student is to learn" in of(findings, "data", "problem")


def test_white_space_after_eos_does_not_hide_it(place: Place) -> None:
    (place.folder / "lines.jinja").write_text(CHAT_TEMPLATE.replace("<|end|>", "<|end|>\n"))
    findings = place.examine(chat_template_path=str(place.folder / "lines.jinja"))
    assert "<|end|> (1) is supervised in 20 of 20 rows" in of(findings, "end of answer", "ok")


def test_padding_with_eos_keeps_eos_supervised(place: Place) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    findings = place.examine(student=place.model("student", tokenizer))
    assert "Padding is EOS" in of(findings, "special tokens", "ok")


def test_a_tokenizer_without_eos(place: Place) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    findings = place.examine(student=place.model("student", tokenizer))
    assert "no EOS token" in of(findings, "special tokens", "problem")


# Templates


def test_another_context_is_a_warning_that_shows_the_first_differing_token(place: Place) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|{{ message['role'] }}|>", "<|system|><|{{ message['role'] }}|>")
    findings = place.examine(teacher=place.model("other", tokenizer))
    assert problems(findings) == []
    text = of(findings, "chat template", "warning")
    assert "20 of 20 rows are other tokens to the teacher. Row 0 differs from token 0 on" in text
    assert "student: > '<|user|>' <" in text
    assert "teacher: > '<|system|>' < '<|user|>'" in text
    assert "Only the context differs" in text


def test_other_supervised_tokens_are_a_problem_and_the_teachers_template_the_way_out(place: Place) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>{% endgen", "<|system|>{% endgen")
    teacher = place.model("other", tokenizer)
    findings = place.examine(teacher=teacher)
    assert "Supervised tokens differ" in of(findings, "chat template", "problem")
    assert "Both sides render" in of(place.examine(teacher=teacher, chat_template_path=teacher), "chat template", "ok")


def test_a_teacher_without_a_template(place: Place) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    findings = place.examine(teacher=place.model("base", tokenizer))
    assert problems(findings) == []
    assert "has no chat template" in of(findings, "chat template", "warning")


def test_prompts_without_answers_are_sound_where_the_student_answers_them(place: Place) -> None:
    prompts = [{"prompt": row["messages"][:1]} for row in chats()]
    (place.folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    data = place.folder / "prompts.yaml"
    data.write_text(yaml.safe_dump({"source": "json", "data_files": {"train": "prompts.jsonl"}}))
    asked = {"data": str(data), "rollout_max_tokens": 8, "assistant_only_loss": False}
    assert problems(place.examine(on_policy_fraction=1, **asked)) == []
    assert "prompts without answers" in of(place.examine(**asked), "data", "problem")


def test_evaluation_without_rows_for_it(place: Place) -> None:
    data = place.folder / "all.yaml"
    data.write_text(yaml.safe_dump({"source": "json", "data_files": {"train": "chats.jsonl"}}))
    often = {"data": str(data), "eval_strategy": "steps", "eval_steps": 2}
    assert "has no rows for evaluation" in of(place.examine(**often), "evaluation", "problem")
    assert problems(place.examine(**{**often, "eval_strategy": "no"})) == []


# Lengths


def test_truncation_is_counted(place: Place) -> None:
    findings = place.examine(max_length=24)
    text = of(findings, "length", "warning")
    assert "max_length 24 cuts" in text
    assert "of the supervised ones" in text
    assert "nothing is cut off" in of(
        place.examine(max_length=24, packing=True, packing_strategy="wrapped"), "length", "ok"
    )


def test_prompts_that_fill_max_length_leave_nothing(place: Place) -> None:
    findings = place.examine(max_length=3)
    assert "20 rows keep nothing to learn" in of(findings, "length", "problem")


def test_more_tokens_than_a_model_has_positions_for(place: Place) -> None:
    assert "max_length is 300" in of(place.examine(max_length=300), "length", "warning")
    place.data(chats(words=" the" * 300))
    text = of(place.examine(max_length=None, dataset_num_proc=1), "length", "ok")
    assert "nothing is cut off" not in text
    findings = place.examine(max_length=1000)
    # Rotary positions can be computed for more.
    assert "The student is made for 256 tokens, the data has sequences of" in of(findings, "length", "warning")


@pytest.mark.parametrize(("silent", "severity"), [(0, "ok"), (1, "warning"), (3, "problem")])
def test_rows_without_a_supervised_token(place: Place, silent: int, severity: str) -> None:
    ids, nothing = np.arange(10, dtype=np.int32), np.zeros(10, dtype=bool)
    told = [TokenSequence(ids, nothing if row < silent else ~nothing) for row in range(3)]
    prepared: Any = None
    findings = lengths(Rendered(list(told), prepared, None), recipe_of(place.recipe()).parse(), [])
    assert findings[0].severity == severity
    assert f"3 rows, 30 tokens, {30 - 10 * silent} of them supervised" in findings[0].message


# Memory and disk


def test_memory_against_the_device(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "device_memory", lambda: ("a small device", 2**20))
    assert "1.0 MiB of a small device" in of(place.examine(), "memory", "warning")
    monkeypatch.setattr(costs.torch.cuda, "is_available", lambda: True)
    run = recipe_of(place.recipe()).parse()
    assert of(examine(run), "memory", "problem")
    assert "shards" in of(examine(run, sharded=True), "memory", "warning")


def test_students_that_are_made_or_adapted_are_counted_as_such(place: Place) -> None:
    whole = of(place.examine(), "memory", "ok")
    adapted = of(place.examine(use_peft=True, lora_r=2), "memory", "ok")
    assert size_of(adapted, "gradients") < 0.1 * size_of(whole, "gradients")
    quantised = of(place.examine(use_peft=True, lora_r=2, load_in_4bit=True), "memory", "ok")
    assert size_of(quantised, "student weights") < 0.8 * size_of(adapted, "student weights")
    pruned = of(place.examine(student=None, student_init="prune", student_layers=1), "memory", "ok")
    assert size_of(pruned, "student weights") < size_of(pruned, "teacher weights")
    findings = place.examine(student=None, student_init="prune", student_layers=7)
    assert "layers=7, but the teacher has 3" in of(findings, "student", "problem")


def size_of(text: str, part: str) -> float:
    value, unit = text.split(f"{part} ")[1].split()[:2]
    return float(value) * {"K": 1024, "M": 1024**2, "G": 1024**3}[unit[0]]


def test_the_disk_that_a_cache_takes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = str(place.folder / "not" / "there" / "cache")
    findings = place.examine(teacher_cache=cache)
    assert problems(findings) == []
    assert "24 rows, 130 bytes per token" in of(findings, "disk", "ok")
    assert "mmkd cache build" in of(findings, "cache", "warning")
    assert "teacher weights" not in of(findings, "memory", "ok")
    monkeypatch.setattr(costs.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert "100 bytes are free" in of(place.examine(teacher_cache=cache), "disk", "problem")


# Servers


def test_a_server_that_is_down(place: Place) -> None:
    findings = place.examine(teacher_server=["http://127.0.0.1:9"])
    assert problems(findings) == ["server"]
    assert "no connection to http://127.0.0.1:9" in of(findings, "server", "problem")
    assert of(findings, "memory", "ok")


def test_a_server_with_a_cap_below_k_and_one_that_serves_another_model(place: Place) -> None:
    teacher = str(place.models["teacher"])
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    with fake_vllm(root=teacher, vocab_size=300, cap=32, tokens=probe(tokenizer)) as fake:
        findings = place.examine(teacher_server=[fake.url])
        assert "--max-logprobs 64" in of(findings, "server", "problem")
        findings = place.examine(teacher_server=[fake.url], teacher_top_k=8)
        assert "room for 128 tokens, gives the top 8" in of(findings, "server", "ok")
        findings = place.examine(teacher_server=[fake.url], teacher_top_k=8, max_length=200)
        assert "--max-model-len 201" in of(findings, "server", "problem")
        findings = place.examine(teacher_server=[fake.url], teacher_top_k=8, temperature=2.0)
        assert "temperature is 2.0" in of(findings, "server", "problem")
        findings = place.examine(teacher_server=[fake.url], teacher=place.model("another"))
        assert "serves" in of(findings, "server", "problem")


def test_a_server_of_hidden_states(place: Place) -> None:
    teacher = str(place.models["teacher"])
    settings = {"root": teacher, "tokenizer": AutoTokenizer.from_pretrained(teacher)}
    with fake_vllm(ServedStates, served=AutoModelForCausalLM.from_pretrained(teacher), **settings) as fake:
        findings = place.examine(teacher_server=[fake.url], temperature=2.0)
        assert "sends hidden states of 48 numbers in float32 (192 bytes per token)" in of(findings, "server", "ok")
        findings = place.examine(teacher_server=[fake.url], teacher_server_signal="top_k")
        assert "--max-logprobs 64" in of(findings, "server", "problem")
        findings = place.examine(teacher_server=[fake.url], job="generate", teacher_cache="to_be_built")
        assert "without --signal hidden" in of(findings, "server", "problem")
    with fake_vllm(root=teacher, tokens=probe(settings["tokenizer"])) as fake:
        findings = place.examine(teacher_server=[fake.url], teacher_server_signal="hidden")
        assert f"vllm serve {teacher}" in of(findings, "server", "problem")
        assert "--runner pooling --convert embed --pooler-config.task token_embed" in of(findings, "server", "problem")


def probe(tokenizer: Any) -> list[int]:
    from mmkd.teachers.vllm_client import PROBE

    return tokenizer(PROBE + "".join(tokenizer.all_special_tokens), add_special_tokens=False)["input_ids"]


# Caches


@pytest.fixture
def built(place: Place) -> str:
    """A cache of the recipe."""
    cache = str(place.folder / "cache")
    build(
        make_plan(recipe_of(place.recipe(teacher_cache=cache, cache_shard_rows=8)).parse()),
        Console(file=io.StringIO()),
    )
    return cache


def test_a_finished_cache(place: Place, built: str) -> None:
    findings = place.examine(teacher_cache=built)
    assert {one.severity for one in findings} == {"ok"}
    text = of(findings, "cache", "ok")
    assert "is complete: 24 sequences" in text
    assert "It knows the 24 sequences of the sample" in text
    # It needs no teacher, and no server.
    assert problems(place.examine(teacher_cache=built, teacher=None)) == []
    assert problems(place.examine(teacher_cache=built, teacher_server=["http://127.0.0.1:9"])) == []


def test_a_cache_of_another_teacher_template_or_temperature(place: Place, built: str) -> None:
    findings = place.examine(teacher_cache=built, teacher=place.model("another", seed=5))
    assert "is of the teacher" in of(findings, "cache", "problem")
    findings = place.examine(teacher_cache=built, max_length=20, temperature=2.0)
    assert "max_length: 20 here, 64 there" in of(findings, "cache", "problem")
    assert "temperature is 2.0" in of(findings, "cache", "problem")
    place.data(chats(words=" one"))
    assert "does not know 24 of the 24 sequences" in of(place.examine(teacher_cache=built), "cache", "problem")


def test_a_cache_that_is_not_complete_or_edited(place: Place, built: str) -> None:
    manifest = Manifest.read(Path(built))
    del manifest.shards["train"][1]
    manifest.write(Path(built))
    assert "1 of 4 shards are missing" in of(place.examine(teacher_cache=built), "cache", "problem")
    path = Path(built) / "manifest.json"
    path.write_text(path.read_text().replace("kd", "dk").replace("top_k", "top_j"))
    assert "was edited" in of(place.examine(teacher_cache=built), "cache", "problem")


# Images


@pytest.fixture
def vision(place: Place) -> dict[str, Any]:
    """A recipe of a VLM as its own teacher, on rows with an image each."""
    rows = []
    for number in range(6):
        make_image(number, width=32 * (1 + number % 2)).save(place.folder / f"{number}.png")
        question = [{"type": "image", "text": None}, {"type": "text", "text": "one cat"}]
        answer = [{"type": "text", "text": "a dog"}]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append({"messages": messages, "image": str(place.folder / f"{number}.png")})
    data = place.data(rows, "pictures", images="image")
    model = str(make_vlm(place.folder / "vlm"))
    return {"student": model, "teacher": model, "data": data, "max_length": None, "assistant_only_loss": False}


def test_equal_processors_give_equal_image_tokens(place: Place, vision: dict[str, Any]) -> None:
    findings = place.examine(**vision)
    assert problems(findings) == []
    assert "image tokens each, the same on both sides" in of(findings, "images", "ok")


def test_a_server_is_asked_about_a_row_with_images(place: Place, vision: dict[str, Any]) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(vision["teacher"])
    processor: Any = AutoProcessor.from_pretrained(vision["teacher"])
    with fake_vllm(ServedVLM, served=model, processor=processor, root=vision["teacher"]) as fake:
        settings = {**vision, "teacher_server": [fake.url], "max_length": 255}
        findings = place.examine(**settings)
        assert of(findings, "server", "problem") == ""
        assert "The server makes the same tokens of a row with 1 image" in of(findings, "images", "ok")
        processor.image_processor.size = {"longest_edge": 32}
        findings = place.examine(**settings)
        assert "The server was asked about a row with 1 image" in of(findings, "images", "problem")


def test_another_processor_gives_other_image_tokens(place: Place, vision: dict[str, Any]) -> None:
    other = shutil.copytree(vision["teacher"], place.folder / "other")
    processor = Idefics3Processor.from_pretrained(other)
    processor.image_processor.size = {"longest_edge": 32}
    processor.save_pretrained(other)
    findings = place.examine(**{**vision, "teacher": str(other)})
    assert "with the student's processor" in of(findings, "images", "problem")


def test_other_pixels_for_a_local_teacher(place: Place, vision: dict[str, Any]) -> None:
    other = shutil.copytree(vision["teacher"], place.folder / "other")
    processor = Idefics3Processor.from_pretrained(other)
    processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    processor.save_pretrained(other)
    findings = place.examine(**{**vision, "teacher": str(other)})
    assert "image_mean is [0.1, 0.2, 0.3]" in of(findings, "images", "problem")


def test_images_that_cannot_be_decoded_are_named(place: Place, vision: dict[str, Any]) -> None:
    for number in (0, 3):
        (place.folder / f"{number}.png").write_bytes(b"no picture")
    text = of(place.examine(**vision), "images", "problem")
    assert "rows cannot be read" in text
    assert "UnidentifiedImageError" in text


def test_images_cut_off_by_max_length(place: Place, vision: dict[str, Any]) -> None:
    assert "cuts image tokens off" in of(place.examine(**{**vision, "max_length": 8}), "length", "problem")


def test_images_need_a_teacher_that_sees(place: Place, vision: dict[str, Any]) -> None:
    tokenizer = Idefics3Processor.from_pretrained(vision["teacher"]).tokenizer
    tokenizer.chat_template = CHAT_TEMPLATE
    findings = place.examine(**{**vision, "teacher": place.model("blind", tokenizer)})
    assert "reads text only" in of(findings, "images", "problem")


# The literature


def thinking(place: Place, name: str) -> str:
    """A model whose chat template writes thoughts."""
    tokenizer = make_tokenizer()
    template = str(tokenizer.chat_template)
    tokenizer.chat_template = template + "{% if add_generation_prompt and enable_thinking %}<think>{% endif %}"
    return place.model(name, tokenizer)


def test_papers_warn_of_models_that_think(place: Place, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    student = thinking(place, "thinking")
    on_policy = {"student": student, "on_policy_fraction": 1.0, "rollout_max_tokens": 8}
    assert "student's chat template has a <think> block and the teacher's has none" in of(
        place.examine(**on_policy), "literature", "warning"
    )
    assert not of(place.examine(**{**on_policy, "teacher": student}), "literature", "warning")
    assert not of(place.examine(student=student), "literature", "warning")
    for keys, whom in (
        ({"teacher": "self"}, "its teacher is the student itself"),
        ({"teacher_view": {"system": "Think."}}, "its teacher reads another prompt"),
    ):
        told = of(place.examine(student=student, **keys), "literature", "warning")
        assert whom in told
        assert "2607.05184" in told
    RunRecord(recipe_of(place.recipe(**on_policy)).parse()).on_train_begin(
        SimpleNamespace(output_dir=str(tmp_path / "run")), SimpleNamespace(is_world_process_zero=True), None
    )
    assert "2604.13016" in caplog.text
    assert "2604.13016" in json.loads((tmp_path / "run" / RECORD).read_text())["cautions"][0]


def test_papers_warn_of_long_rollouts_that_count_alike(place: Place) -> None:
    keys: dict[str, Any] = {"on_policy_fraction": 1.0, "rollout_max_tokens": 2000, "max_length": 4000}
    assert "2606.22600" in of(place.examine(**keys), "literature", "warning")
    keys |= {"rollout_token_weights": "importance"}
    assert not of(place.examine(**keys), "literature", "warning")
