"""`mmkd eval` end to end on tiny models: numbers are lm-eval's own, kept, resumed, refused and averaged."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mmkd.commands.main import main
from mmkd.eval.evaluation import evaluate
from mmkd.eval.harness import Harness, Settings
from mmkd.eval.model import ensemble_of, find_model
from mmkd.eval.suites import SuiteTask
from mmkd.models.quantised_students import StudentQuantisation, record_in_config
from mmkd.results.places import RECORD, results_folder
from mmkd.shipped import recipe_root
from scripts.make_tiny_models import make_model, make_tokenizer, save, sentences
from tests.helpers import LORA
from tests.vlms import make_llava, picture

CHOICES = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 2.0}}
"""
TEXT = """
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}}]
metadata: {{version: 1.0}}
"""
ANSWERS = """
task: tiny_answers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "cat"
generation_kwargs: {{max_gen_toks: 3, do_sample: false, until: ["zzz"]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks with their data."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": f"{a} {b}", "choices": [" cat", " dog", " tree"], "answer": number % 3}
        for number, (a, b) in enumerate(zip(sentences(12), sentences(12, seed=5), strict=True))
    ]
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, text in {"choice": CHOICES, "text": TEXT, "answers": ANSWERS}.items():
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "rows.jsonl"))
    return folder


@pytest.fixture
def student(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny student as the folder of a run, which may be written to."""
    (copy_of(tiny["student"], tmp_path / "student") / RECORD).write_text("{}")
    return tmp_path / "student"


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    return target


def own_call(tasks: list[str], folder: Path, **arguments: Any) -> dict[str, Any]:
    """The numbers of lm-eval's own call, as its documentation writes it."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    simple_evaluate: Any = lm_eval.simple_evaluate
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = simple_evaluate(tasks=tasks, task_manager=manager, **arguments)
    return found["results"]


def test_numbers_are_those_of_lm_evals_own_call(student, folder, capsys):
    tasks = ["tiny_choice", "tiny_text", "tiny_answers"]
    assert main(["eval", str(student), "--tasks", *tasks, "--include_path", str(folder), "--batch_size", "4"]) == 0
    kept = json.loads((student / "eval/results.json").read_text())
    ours = {entry["task"]: entry["results"][entry["task"]] for entry in kept["tasks"].values()}
    for task in tasks:
        theirs = own_call(
            [task],
            folder,
            model="hf",
            model_args={"pretrained": str(student), "dtype": "auto"},
            batch_size=4,
            device="cpu",
            apply_chat_template=True,
        )[task]
        assert ours[task] == json.loads(json.dumps(theirs))
    assert "bits_per_byte" in capsys.readouterr().out
    score = next(entry for entry in kept["tasks"].values() if entry["task"] == "tiny_choice")["scores"][0]
    assert score["items"] == 12
    assert score["value"] == ours["tiny_choice"]["acc,none"]


def test_a_finished_task_is_not_run_again_and_an_interrupted_evaluation_goes_on(student, folder, monkeypatch, capsys):
    run, ran = Harness.run, []

    def counted(self, suite_task, task, manager):
        ran.append(task.name)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return run(self, suite_task, task, manager)

    monkeypatch.setattr(Harness, "run", counted)
    command = ["eval", str(student), "--tasks", "tiny_choice", "tiny_text", "--include_path", str(folder)]
    assert main(command) == 130
    said = capsys.readouterr().err
    assert "the same command goes on" in said
    assert f"{student}, tiny_choice: task 1 of 2\n" in said
    assert f"{student}, tiny_text: task 2 of 2, about " in said
    assert main(command) == 0
    said = capsys.readouterr().err
    assert f"{student}: 1 of 2 tasks are finished already and kept in {student / 'eval'}." in said
    assert main(command) == 0
    assert "task 1 of" not in capsys.readouterr().err
    assert ran == ["tiny_choice", "tiny_text", "tiny_text"]
    # Other settings and other data are other results.
    assert main([*command, "--limit", "3"]) == 0
    assert ran[3:] == ["tiny_choice", "tiny_text"]


def test_results_of_other_weights_are_refused(student, folder, capsys):
    command = ["eval", str(student), "--tasks", "tiny_choice", "--include_path", str(folder), "--limit", "2"]
    assert main(command) == 0
    save(make_model(seed=9, rows=len(make_tokenizer())), make_tokenizer(), student)
    assert main(command) == 2
    assert "is of another revision" in capsys.readouterr().err


def test_changed_data_is_another_task(student, folder, tmp_path):
    from mmkd.eval.tasks import Tasks

    copy = tmp_path / "copy"
    copy.mkdir()
    data = copy / "rows.jsonl"
    data.write_text((folder / "rows.jsonl").read_text())
    (copy / "choice.yaml").write_text(CHOICES.format(data=data))
    before = Tasks(["tiny_choice"], [copy])["tiny_choice"]
    data.write_text("".join(data.read_text().splitlines(True)[:5]))
    after = Tasks(["tiny_choice"], [copy])["tiny_choice"]
    assert before.version == after.version == 2.0
    assert before.fingerprint != after.fingerprint
    data.unlink()
    with pytest.raises(ValueError, match="does not exist; check dataset_kwargs"):
        Tasks(["tiny_choice"], [copy])["tiny_choice"]


def test_an_ensemble_answers_with_the_average_of_log_probs(tiny, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["eval", str(tiny["teacher"]), str(tiny["student"]), "--ensemble", "--tasks", "tiny_text", "tiny_choice"]
    assert main([*command, "--include_path", str(folder), "--dtype", "float32"]) == 0
    kept = json.loads((tmp_path / "runs/eval/teacher+student/results.json").read_text())
    found = {entry["task"]: entry for entry in kept["tasks"].values()}
    # By hand: the prefix token and the text through both models.
    tokenizer = make_tokenizer()
    models = [find_loaded(tiny[name]) for name in ("teacher", "student")]
    total, size = 0.0, 0
    for row in map(json.loads, (folder / "rows.jsonl").read_text().splitlines()):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(row["question"])["input_ids"]]])
        with torch.no_grad():
            mean = torch.stack([model(ids).logits.double().log_softmax(-1) for model in models]).mean(0)
        log_probs = mean.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
        total += log_probs.sum().item()
        size += len(row["question"].encode())
    expected = -total / size / torch.tensor(2.0).log().item()
    assert found["tiny_text"]["scores"][0]["value"] == pytest.approx(expected, rel=1e-5)


def test_members_of_an_ensemble_compute_as_they_were_trained(tiny, tmp_path):
    rounded, adapted = tmp_path / "rounded", tmp_path / "adapted"
    model = find_loaded(tiny["student"])
    record_in_config(model, StudentQuantisation.of("int8"))
    model.save_pretrained(rounded)
    make_tokenizer().save_pretrained(rounded)
    adapter: Any = get_peft_model(find_loaded(tiny["student"]), LoraConfig(**LORA, init_lora_weights=False))
    adapter.peft_config["default"].base_model_name_or_path = str(tiny["student"])
    adapter.save_pretrained(adapted)
    make_tokenizer().save_pretrained(adapted)
    ids = torch.arange(5, 15)[None]
    members = [find_model(str(folder)) for folder in (tiny["teacher"], rounded, adapted)]
    log_probs = [member.load("float32")(ids).logits.log_softmax(-1) for member in members]
    both = ensemble_of(members).load("float32")(ids).logits
    torch.testing.assert_close(both, torch.stack(log_probs).mean(0).log_softmax(-1))
    assert not torch.equal(log_probs[1], find_loaded(tiny["student"])(ids).logits.log_softmax(-1))


def find_loaded(folder: Path) -> Any:
    from mmkd.models.load import load_model

    return load_model(str(folder), dtype="float32").eval()


def test_without_a_chat_template_prompts_are_plain_and_asking_for_one_is_refused(student, folder, capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    (student / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(student)
    command = ["eval", str(student), "--tasks", "tiny_choice", "--include_path", str(folder), "--limit", "2"]
    assert main(command) == 0
    assert "has no chat template: it is asked in plain text" in capsys.readouterr().err
    (entry,) = json.loads((student / "eval/results.json").read_text())["tasks"].values()
    assert entry["settings"]["apply_chat_template"] is False
    assert main([*command, "--chat_template", "on"]) == 2
    assert "has no chat template" in capsys.readouterr().err


def test_a_run_that_was_cut_off_or_trained_in_stages_stands_for_its_model(student, tmp_path):
    run = tmp_path / "run"
    stage = run / "2-SFT"
    run.mkdir()
    copy_of(student, stage)
    (run / "1-PT").mkdir()
    assert find_model(str(run)).path == str(stage)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no model: .* but nothing"):
        find_model(str(tmp_path / "empty"))


def test_an_adapter_is_evaluated_on_its_model(tiny, folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(find_loaded(tiny["student"]), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 1)
    model.peft_config["default"].base_model_name_or_path = str(tiny["student"])
    model.save_pretrained(str(tmp_path / "adapter"))
    adapted = find_model(str(tmp_path / "adapter"))
    assert (adapted.path, adapted.adapter) == (str(tiny["student"]), str(tmp_path / "adapter"))
    settings = Settings(batch_size=4)
    (entry,) = evaluate(adapted, [SuiteTask("tiny_text")], settings, include=[folder])
    (plain,) = evaluate(find_model(str(tiny["student"])), [SuiteTask("tiny_text")], settings, tmp_path / "x", [folder])
    assert entry["scores"][0]["value"] != plain["scores"][0]["value"]
    assert (results_folder(tmp_path / "adapter") / "results.json").is_file()


def test_questions_with_images_go_to_vision_language_models_only(student, tmp_path, capsys):
    rows = []
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
        content = [{"type": "image", "text": None}, {"type": "text", "text": sentences(4)[number]}]
        said = [{"type": "text", "text": "cat"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": said}]
        rows.append({"messages": messages, "images": [str(tmp_path / f"{number}.png")]})
    tasks = tmp_path / "tasks"
    shutil.copytree(recipe_root("eval") / "tasks/easy_vqa", tasks)
    (tasks / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    path = tasks / "easy_vqa.yaml"
    path.write_text(path.read_text().replace(".cache/mmkd/easy_vqa/test.jsonl", str(tasks / "rows.jsonl")))
    folder = make_llava(tmp_path / "llava")
    command = ["--tasks", "easy_vqa", "--include_path", str(tasks)]
    assert main(["eval", str(folder), *command]) == 0
    kept = results_folder(folder)
    (entry,) = json.loads((kept / "results.json").read_text())["tasks"].values()
    theirs = own_call(
        ["easy_vqa"],
        tasks,
        model="hf-multimodal",
        model_args={"pretrained": str(folder), "dtype": "auto"},
        batch_size=8,
        device="cpu",
        apply_chat_template=entry["settings"]["apply_chat_template"],
    )
    assert entry["results"] == json.loads(json.dumps(theirs))
    assert entry["settings"]["model"] == "hf-multimodal"
    answers = (kept / entry["samples"]).read_text().splitlines()
    assert json.loads(answers[2])["images"] == [str(tmp_path / "2.png")]
    assert main(["eval", str(student), *command]) == 2
    assert "is no vision-language model" in capsys.readouterr().err


def test_a_vision_language_model_takes_text_tasks_too(folder, tmp_path):
    vlm = make_llava(tmp_path / "llava")
    (entry,) = evaluate(find_model(str(vlm)), [SuiteTask("tiny_text")], Settings(limit=3), include=[folder])
    assert entry["settings"]["model"] == "hf"
    assert entry["scores"][0]["items"] == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "tiny_chioce"], "The nearest: tiny_choice"),
        (["--suite", "ofline"], "The nearest: offline"),
        ([], "Say what to evaluate"),
        (["--tasks", "tiny_text", "--model_type", "vllm"], "needs vLLM"),
        (["--tasks", "tiny_text", "--model_type", "local-completions"], "base_url"),
        (["--tasks", "tiny_text", "--model_type", "gpt"], "choose one of auto"),
        (["--tasks", "tiny_text", "--model_args", "a"], "write key=value"),
        (["--tasks", "tiny_text", "--limit", "0"], "limit is 0"),
        (["--suite", "vlm"], "pip install 'mmkd"),
        (["--tasks", "tiny_text", "--ensemble"], "name two or more"),
        (["--tasks", "easy_vqa"], "easy_vqa"),
    ],
)
def test_bad_input(tiny, folder, tmp_path, capsys, flags, message):
    command = ["eval", str(tiny["student"]), "--include_path", str(folder), "--output", str(tmp_path / "out"), *flags]
    assert main(command) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tasks_of_lmms_eval_are_handed_to_it(tmp_path, monkeypatch, capsys):
    asked = {}

    def simple_evaluate(**arguments):
        asked.update(arguments)
        result = {"alias": "gqa", "exact_match,none": 0.5, "exact_match_stderr,none": 0.1}
        sample = {"doc_id": 0, "target": "a", "filtered_resps": ["b"], "exact_match": 0.0}
        return {"results": {"gqa": result}, "samples": {"gqa": [sample]}, "versions": {"gqa": 1}}

    evaluator: Any = ModuleType("lmms_eval.evaluator")
    evaluator.simple_evaluate = simple_evaluate
    monkeypatch.setitem(sys.modules, "lmms_eval", ModuleType("lmms_eval"))
    monkeypatch.setitem(sys.modules, "lmms_eval.evaluator", evaluator)
    monkeypatch.setattr("mmkd.eval.evaluation.check_lmms", lambda: None)
    monkeypatch.setattr("mmkd.eval.lmms.version", lambda package: "0.7.3")
    folder = make_llava(tmp_path / "llava")
    suite = tmp_path / "suite.yaml"
    suite.write_text("tasks: [{task: gqa, harness: lmms-eval, metric: exact_match}]")
    command = ["eval", str(folder), "--suite", str(suite), "--dtype", "float32", "--model_args", "max_length=64"]
    assert main(command) == 0
    assert (asked["model"], asked["tasks"]) == ("llava_hf", ["gqa"])
    assert asked["model_args"] == f"pretrained={folder},dtype=float32,max_length=64"
    assert "0.5000 ± 0.1000" in capsys.readouterr().out
    asked.clear()
    assert main(command) == 0
    assert not asked


def test_data_that_cannot_be_downloaded_is_said(student, tmp_path, capsys, monkeypatch):
    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    (tmp_path / "far.yaml").write_text(TEXT.replace("json", "nobody/nothing").format(data="x").replace("tiny", "far"))
    path = tmp_path / "far.yaml"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "dataset_kwargs" not in line))
    assert main(["eval", str(student), "--tasks", "far_text", "--include_path", str(tmp_path)]) == 2
    assert "The data of task far_text cannot be loaded: Couldn't reach" in capsys.readouterr().err


def test_an_answer_longer_than_the_context_is_said(student, tmp_path, capsys):
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "a", "choices": [" cat" * 9, " dog"], "answer": 0}))
    (tmp_path / "long.yaml").write_text(CHOICES.format(data=tmp_path / "long.jsonl").replace("tiny", "long"))
    flags = ["--tasks", "long_choice", "--include_path", str(tmp_path), "--model_args", "max_length=8"]
    assert main(["eval", str(student), *flags]) == 2
    assert "Task long_choice has an answer that is longer than the model's context" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_left_alone(tiny, folder, tmp_path, capsys):
    """Its results are in runs/eval; those that were written beside it before are read, and nothing is asked again."""
    teacher = copy_of(tiny["teacher"], tmp_path / "models/teacher")
    before = sorted(teacher.rglob("*"))
    command = ["eval", "models/teacher", "--tasks", "tiny_choice", "--include_path", str(folder)]
    assert main(command) == 0
    assert sorted(teacher.rglob("*")) == before
    told = Path(capsys.readouterr().out.split()[-1])
    assert told.parent.parent == Path("runs/eval")
    assert told.parent.name.startswith("teacher-")
    assert results_folder(teacher) == told.parent
    (first,) = json.loads(told.read_text())["tasks"].values()
    shutil.move(told.parent, teacher / "eval")
    # Of earlier versions, and kept: another task goes to the new place, with what is known.
    assert main([*command[:-2], "tiny_text", *command[-2:]]) == 0
    again = json.loads(told.read_text())["tasks"].values()
    assert [entry["task"] for entry in again] == ["tiny_choice", "tiny_text"]
    assert next(iter(again))["date"] == first["date"]
    assert Path(next(iter(again))["samples"]).is_file()
    assert len(json.loads((teacher / "eval/results.json").read_text())["tasks"]) == 1


@pytest.mark.parametrize("place", ["run", "run/checkpoint-3", "run/2-SFT", "run/round-1/student"])
def test_results_lie_in_the_folder_of_a_run(tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / "run" / RECORD).write_text("{}")
    assert results_folder(tmp_path / place) == tmp_path / place / "eval"


def test_a_path_that_leads_nowhere(student, tmp_path, capsys):
    (tmp_path / "runs/kd-quick").mkdir(parents=True)
    for name, words in (
        ("runs/kd-quikc", "Did you mean the folder runs/kd-quick?"),
        ("./runs/kd-quikc", "There is no folder ./runs/kd-quikc, and it cannot be a Hub id (user/name). Did you mean"),
        ("runs/2024/gone/", "There is no folder runs/2024/gone/"),
        ("zzz", "neither a local folder nor reachable as a Hub id"),
        ("student/config.json", "is a file, and a model is a folder. Name the folder: student."),
    ):
        assert main(["eval", name, "--measures", "cost"]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmkd: ")]
        assert words in line
