"""`mmkd push` by the real client to a Hub on loopback: what is published, what is refused, and that it loads."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mmkd.commands.main import main
from mmkd.eval.model import find_model
from mmkd.eval.results import Results
from mmkd.models.load import load_model
from mmkd.publish.lineage import trainings_of
from mmkd.publish.runs import read_log
from scripts.make_tiny_models import sentences
from tests.classes import pixels, vit
from tests.helpers import environment
from tests.hub_server import LoopbackHub, loopback_hub
from tests.vlms import make_llava

# Runs what it reads: a command line of mmkd with a token, or an expression. Imports cost more than all that it does.
DRIVER = """
import contextlib, io, json, os, sys
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline
from huggingface_hub import ModelCard
from mmkd.commands.main import main
for line in sys.stdin:
    asked = json.loads(line)
    os.environ["HF_TOKEN"] = asked["token"]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        value = main(asked["run"]) if "run" in asked else eval(asked["eval"])
    answer = json.dumps({"value": value, "out": out.getvalue(), "err": err.getvalue()})
    print(answer, file=sys.__stdout__, flush=True)
"""

Client = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def workplace(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished KD run in `run`, whose teacher's card says what licence it is under."""
    folder = tmp_path_factory.mktemp("publishing")
    rows = [json.dumps({"text": text}) for text in sentences(24)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    data = {"name": "words", "license": "cc-by-nc-4.0", "source": "json", "columns": {"text": "text"}}
    data |= {"data_files": {"train": "rows.jsonl"}, "splits": {"train": "train"}, "eval_rows": 4, "shuffle_seed": 0}
    (folder / "words.yaml").write_text(yaml.safe_dump(data))
    recipe = {"method": "kd", "student": "student", "teacher": "teacher", "data": "words.yaml", "output_dir": "run"}
    recipe |= {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "logging_steps": 1, "max_length": 64}
    recipe |= {"save_strategy": "no", "report_to": "none"}
    (folder / "kd.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    for name in ("student", "teacher"):
        shutil.copytree(tiny[name], folder / name)
    (folder / "student" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (folder / "teacher" / "README.md").write_text("---\nlicense: gemma\n---\n")
    before = Path.cwd()
    os.chdir(folder)
    assert main(["train", "kd.yaml", "--learning_rate", "1e-2", "--save_strategy", "no"]) == 0
    os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def here(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    # What runs in this process asks no Hub.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with loopback_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(hub: LoopbackHub, workplace: Path) -> Iterator[Client]:
    """`client("push", ...)` runs a command of mmkd in a process of this Hub, `client(eval=...)` an expression."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER],
        cwd=workplace,
        env={**environment(), **hub.environment(workplace / "home")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def call(*words: str, token: str = "x", **asked: Any) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"token": token, **({"run": words} if words else {}), **asked}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield call
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=30)


@pytest.fixture
def run(workplace: Path, tmp_path: Path) -> Path:
    """A copy of the run to break."""
    return shutil.copytree(workplace / "run", tmp_path / "run")


def add_results(folder: Path, items: int = 8) -> None:
    """What `mmkd eval` would have kept of a task of eight items."""
    model = find_model(str(folder))
    entry = {
        "task": "tiny_choice",
        "metric": None,
        "results": {"tiny_choice": {"acc,none": 0.75, "acc_stderr,none": 0.1, "alias": "tiny_choice"}},
        "groups": {},
        "higher_is_better": {"tiny_choice": {"acc": True}},
        "n_samples": {"tiny_choice": {"effective": items, "original": 8}},
    }
    Results(model.results_folder, model.name, model.weights).add_task("key", entry, [])


def dry_run(folder: Path, *flags: str) -> tuple[Any, Path]:
    """The card, and the folder it lies in."""
    output = folder / "push"
    assert main(["push", str(folder), "--repo", "user/student", "--dry_run", *flags]) == 0
    return ModelCard.load(output / "README.md"), output


def test_a_dry_run_writes_all_that_would_be_pushed(run, capsys):
    add_results(run)
    card, folder = dry_run(run, "--base_model", "org/base", "--teacher", "org/teacher", "--license", "apache-2.0")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "README.md"}
    assert files >= {"training/recipe.yaml", "training/words.yaml", "training/log.jsonl", "eval/scores.json"}
    assert not {name for name in files if name.endswith((".bin", ".pt")) or "trainer_state" in name}
    # `mmkd eval` keeps its own there, with samples, once the folder is evaluated itself.
    assert not {name for name in files if name.startswith("eval/results.json") or "samples" in name}
    assert card.data.base_model == "org/base"
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "apache-2.0",
        "transformers",
        "text-generation",
    )
    assert card.data.model_name == "student"
    found = {(one.dataset_type, one.metric_type): one.metric_value for one in card.data.eval_results or []}
    assert found["tiny_choice", "acc"] == 0.75
    evaluated = json.loads((run / "eval_results.json").read_text())
    assert found["words", "kl"] == evaluated["eval_kl"]
    recipe = yaml.safe_load((folder / "training/recipe.yaml").read_text())
    assert (recipe["student"], recipe["teacher"], recipe["data"]) == ("org/base", "org/teacher", "training/words.yaml")
    # The flag of the command line, as a number.
    assert recipe["learning_rate"] == 0.01
    assert recipe["save_strategy"] == "no"
    text = card.text
    for words in ("distilled from `org/teacher` with `kd`", "| tiny_choice | acc ↑ | 8 | 0.7500 ± 0.1000 |"):
        assert words in text
    assert "tested" not in text
    assert str(run) not in (folder / "README.md").read_text()
    told = capsys.readouterr().err
    assert "The teacher org/teacher (gemma) requires models distilled from it to stay under its own terms" in told
    assert "The data words (cc-by-nc-4.0) is for non-commercial or research use" in told
    assert "(cc-by-nc-4.0) is for non-commercial" in text


def test_a_part_of_a_benchmark_is_no_result_of_it(run):
    add_results(run, items=4)
    card, _ = dry_run(run)
    assert "| tiny_choice | acc ↑ | 4 of 8 | 0.7500 ± 0.1000 |" in card.text
    assert {one.dataset_type for one in card.data.eval_results or []} == {"words"}


def test_folders_without_a_hub_id_go_by_their_names_and_not_into_the_metadata(run):
    card, _ = dry_run(run)
    assert card.data.base_model is None
    assert "`student`" in card.text
    assert card.data.license == "apache-2.0"


def test_pushed_private_in_one_commit_and_loaded_again(hub, client, workplace):
    done = client("push", "run", "--repo", "user/student", "--base_model", "org/base", "--teacher", "org/teacher")
    assert done["value"] == 0, done["err"]
    assert done["out"].strip() == f"{hub.url}/user/student"
    repo = hub.repos["model", "user/student"]
    assert repo.private
    assert len(repo.commits) == 2
    assert repo.files["model.safetensors"] == (workplace / "run/model.safetensors").read_bytes()
    loaded = client(eval="AutoModelForCausalLM.from_pretrained('user/student').lm_head.weight.double().sum().item()")
    ours = find_model("run").load("float32").lm_head.weight.double().sum().item()
    assert loaded["value"] == pytest.approx(ours, rel=1e-12)
    template = client(eval="AutoTokenizer.from_pretrained('user/student').chat_template")
    assert template["value"] == (workplace / "run/chat_template.jinja").read_text()
    metadata = client(eval="ModelCard.load('user/student').data.to_dict()['model-index'][0]['name']")
    assert metadata["value"] == "student"


def test_an_interrupted_push_shows_nothing_and_goes_on(hub, client):
    hub.failing = "/commit/"
    done = client("push", "run", "--repo", "user/again")
    assert done["value"] == 2
    assert "The Hub failed on user/again" in done["err"]
    assert hub.repos["model", "user/again"].files == {}
    hub.failing, before = None, len(hub.requests)
    assert client("push", "run", "--repo", "user/again")["value"] == 0
    assert not [request for request in hub.requests[before:] if request.startswith("PUT")]
    assert "model.safetensors" in hub.repos["model", "user/again"].files


def test_weights_that_did_not_arrive_are_sent_again(hub, client, run):
    """Others than before, or the Hub would know them."""
    weights = load_file(run / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, run / "model.safetensors", {"format": "pt"})
    hub.failing, hub.failing_with = "PUT /lfs/", 400
    done = client("push", str(run), "--repo", "user/cut")
    hub.failing, hub.failing_with, before = None, 500, len(hub.requests)
    assert done["value"] == 2
    assert "The Hub failed on user/cut: Error while uploading 'model.safetensors'" in done["err"]
    assert hub.repos["model", "user/cut"].files == {}
    assert client("push", str(run), "--repo", "user/cut")["value"] == 0
    assert sum(request.startswith("PUT") for request in hub.requests[before:]) == 1
    assert hub.repos["model", "user/cut"].files["model.safetensors"] == (run / "model.safetensors").read_bytes()


def test_pushing_again_deletes_what_is_no_more(hub, client):
    assert client("push", "run", "--repo", "user/twice")["value"] == 0
    repo = hub.repos["model", "user/twice"]
    repo.commit({"model-00002-of-00002.safetensors": b"old"})
    assert client("push", "run", "--repo", "user/twice")["value"] == 0
    assert "model-00002-of-00002.safetensors" not in repo.files
    assert "training/recipe.yaml" in repo.files


def test_exported_files_with_their_own_numbers(hub, client, run, capsys):
    pytest.importorskip("compressed_tensors")
    ask = ["export", str(run), "--rows", "3", "--vllm", "none", "--format", "compressed-tensors:int8"]
    assert main([*ask, "compressed-tensors:fp8"]) == 0
    push = ["push", str(run), "--repo", "user/formats", "--exported"]
    assert client(*push, "compressed-tensors-int8", "compressed-tensors-fp8")["value"] == 0
    files = hub.repos["model", "user/formats"].files
    for name in ("int8", "fp8"):
        folder = run / "exported" / f"compressed-tensors-{name}"
        record = json.loads((folder / "exported.json").read_text())
        for file in record["files"]:
            assert files[f"exported/{folder.name}/{file}"] == (folder / file).read_bytes()
        described = json.loads(files[f"exported/{folder.name}/exported.json"])
        assert described["files"] == record["files"]
        assert described["checks"]["transformers"]["kl"] == record["checks"]["transformers"]["kl"]
        assert str(run.parent) not in files[f"exported/{folder.name}/exported.json"].decode()
        card = files["README.md"].decode()
        assert f"| {record['checks']['transformers']['kl']:.4g} |" in card
        assert f"| `{record['files']['model.safetensors']['sha256']}` |" in card
    assert "held-out rows of `words.yaml`" in card
    loaded = client(
        eval="AutoModelForCausalLM.from_pretrained('user/formats', subfolder='exported/compressed-tensors-int8')"
        ".config.quantization_config.quant_method.value"
    )
    assert loaded["value"] == "compressed-tensors"
    # Another check is other numbers, and what is no longer named goes.
    before = len(hub.requests)
    assert main([*ask, "--rows", "2"]) == 0
    assert client(*push, "compressed-tensors-int8")["value"] == 0
    repo = hub.repos["model", "user/formats"]
    assert not [name for name in repo.files if name.startswith("exported/compressed-tensors-fp8")]
    assert not [request for request in hub.requests[before:] if request.startswith("PUT")]
    again = json.loads((run / "exported/compressed-tensors-int8/exported.json").read_text())
    assert again["checks"]["transformers"]["rows"] == 2
    assert f"| {again['checks']['transformers']['kl']:.4g} |" in repo.files["README.md"].decode()


def test_student_and_cache_in_a_collection(hub, client):
    hub.create("dataset", "user/cache", {"manifest.json": b"{}"})
    command = ("push", "run", "--repo", "user/collected", "--collection", "My Students", "--cache", "user/cache")
    for _ in range(2):
        done = client(*command)
        assert done["value"] == 0, done["err"]
    (collection,) = hub.collections.values()
    assert collection["private"]
    assert [(one["type"], one["id"]) for one in collection["items"]] == [
        ("model", "user/collected"),
        ("dataset", "user/cache"),
    ]


def test_no_rights_and_no_token_leave_nothing_behind(hub, client):
    before = dict(hub.repos)
    for repo, token, words in (
        ("user/mine", "", "There is no token of the Hub here"),
        ("user/mine", "wrong", "The Hub refuses user/mine to you"),
        ("other/theirs", "x", "The Hub refuses other/theirs to you"),
    ):
        done = client("push", "run", "--repo", repo, token=token)
        assert done["value"] == 2
        assert words in done["err"]
    assert hub.repos == before


def test_a_repository_that_is_something_else_is_left_alone(hub, client):
    hub.create("model", "user/else", {"pytorch_model.bin": b"weights"}, private=True)
    hub.create("model", "user/open", {}, private=False)
    for repo, words in (("user/else", "holds something else"), ("user/open", "exists and is public")):
        done = client("push", "run", "--repo", repo)
        assert done["value"] == 2
        assert words in done["err"]
    assert list(hub.repos["model", "user/else"].files) == ["pytorch_model.bin"]
    assert client("push", "run", "--repo", "user/open", "--public")["value"] == 0


def test_the_licence_of_a_base_on_the_hub_is_looked_up(hub, client, workplace):
    hub.create("model", "org/licensed", {"README.md": b"---\nlicense: mit\n---\n"})
    (workplace / "student/README.md").rename(workplace / "student/CARD.md")
    done = client("push", "run", "--repo", "user/licensed", "--base_model", "org/licensed")
    (workplace / "student/CARD.md").rename(workplace / "student/README.md")
    assert done["value"] == 0, done["err"]
    assert b"license: mit" in hub.repos["model", "user/licensed"].files["README.md"]


def test_a_vision_language_student_loads_with_plain_transformers(hub, client, workplace, tmp_path):
    make_llava(tmp_path / "vlm")
    recipe = {"method": "sft", "student": "org/vlm", "data": "words.yaml"}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    done = client("push", str(tmp_path / "vlm"), "--repo", "user/vlm", "--recipe", str(tmp_path / "sft.yaml"))
    assert done["value"] == 0, done["err"]
    card = hub.repos["model", "user/vlm"].files["README.md"].decode()
    assert "pipeline_tag: image-text-to-text" in card
    load = "[type(kind.from_pretrained('user/vlm')).__name__ for kind in (AutoModelForImageTextToText, AutoProcessor)]"
    assert client(eval=load)["value"] == ["LlavaForConditionalGeneration", "LlavaProcessor"]


def compared(run: Path, weights: str) -> Path:
    """A comparison of two seeds, the second of which is this run."""
    row = {"name": "kd", "role": "student", "recipe": "kd.yaml", "folders": ["elsewhere", str(run)], "tokens": [9, 9]}
    row |= {"parameters": 1, "tasks": {}, "retention": {}, "flips": {}, "cost": None, "cache": None}
    row |= {"weights": ["", weights], "gain_over_sft": {"kl": {"gain": 0.5, "low": 0.25, "high": 0.75}}}
    kl = {"mean": 1.5, "std": 0.7, "values": [1.0, 2.0], "title": "KL to teacher (nats)", "higher_is_better": False}
    machine = {"device": "cpu", "processor": "a CPU", "threads": 1, "versions": {"torch": "2"}}
    found = {"schema": 1, "seeds": [0, 1], "machine": machine, "rows": [{**row, "metrics": {"kl": kl}}]}
    path = run.parent / "comparison.json"
    path.write_text(json.dumps(found))
    return path


def test_the_comparison_on_the_card(run, capsys):
    compared(run, find_model(str(run)).weights)
    card, folder = dry_run(run)
    assert "+0.500 [+0.250, +0.750]" in card.text
    assert "1.500 ± 0.700" in card.text
    assert "has 2 seeds" in card.text
    # The model's own number, and not the mean of the seeds.
    assert [one.metric_value for one in card.data.eval_results] == [2.0]
    assert str(run) not in (folder / "eval/comparison.json").read_text()
    compared(run, "another")
    assert "The comparison is of another revision" in refused(capsys, str(run), "--repo", "user/x")
    shutil.move(run.parent / "comparison.json", run.parent.parent / "theirs.json")
    given = ["--comparison", str(run.parent.parent / "theirs.json")]
    assert "another revision" in refused(capsys, str(run), "--repo", "user/x", *given)
    other = shutil.copytree(run, run.parent / "other")
    assert "says nothing about this student" in refused(capsys, str(other), "--repo", "user/x", *given)


def test_the_lineage_of_stages(workplace, run, tmp_path, capsys):
    """The last of two stages is plain SFT on other data, and still the student of the first one's teacher."""
    root = tmp_path / "staged"
    first = shutil.move(run, root / "1-KD")
    last = shutil.copytree(first, root / "2-SFT")
    record = json.loads((last / "run.json").read_text())
    keys = {**record["keys"], "method": "sft", "student": str(first), "data": "questions"}
    data = {"name": "questions", "license": "cc-by-sa-4.0", "homepage": None, "source": "org/questions"}
    (last / "run.json").write_text(json.dumps({**record, "keys": keys, "data": data}))
    card, folder = dry_run(root, "--base_model", "org/base", "--teacher", "org/teacher")
    assert card.data.base_model == "org/base"
    assert card.data.tags == ["mmkd", "distillation", "kd", "sft"]
    assert card.data.datasets == ["org/questions"]
    assert "distilled from `org/teacher` with `kd` and `sft`" in card.text
    # Of the last stage's data.
    assert {one.dataset_type for one in card.data.eval_results} == {"org/questions"}
    assert "On held-out rows of `questions`" in card.text
    for row in (
        "| teacher | org/teacher | gemma |",
        "| data | words | cc-by-nc-4.0 |",
        "| data | questions | cc-by-sa-",
    ):
        assert row in card.text
    assert "`training/recipe-1.yaml`" in card.text
    assert yaml.safe_load((folder / "training/recipe-1.yaml").read_text())["student"] == "org/base"
    assert "share-alike" in capsys.readouterr().err
    seen = next(one["supervised_tokens"] for one in reversed(read_log(last)) if "supervised_tokens" in one)
    assert f"It saw {2 * seen:,} supervised tokens, {seen:,} of them in the last training." in card.text
    shutil.rmtree(folder)
    # Moved, and looked at from elsewhere: its stages are still those beside each other.
    moved = Path(shutil.move(root, tmp_path / "moved"))
    assert f"It saw {2 * seen:,} supervised tokens" in dry_run(moved)[0].text
    shutil.move(moved, root)
    (root / "2-SFT/model.safetensors").unlink()
    (root / "2-SFT/config.json").unlink()
    assert "is not finished" in refused(capsys, str(root), "--repo", "user/x")


def test_a_classifier(tmp_path):
    vit().save_pretrained(tmp_path / "run")
    pixels().save_pretrained(tmp_path / "run")
    recipe = {"method": "dho", "student": "org/vit", "teacher": "org/clip", "data": "classification/fashion_mnist"}
    (tmp_path / "dho.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "run/interpolation.json").write_text("{}")
    card, folder = dry_run(tmp_path / "run", "--recipe", str(tmp_path / "dho.yaml"), "--license", "mit")
    assert card.data.pipeline_tag == "image-classification"
    assert "import mmkd" in card.text
    assert "| data | fashion_mnist | MIT |" in card.text
    assert {"preprocessor_config.json", "interpolation.json"} <= {path.name for path in folder.iterdir()}


def test_an_adapter_of_a_folder_here_is_merged(workplace, tmp_path):
    folder = tmp_path / "lora"
    model = get_peft_model(load_model(str(workplace / "student")), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(folder)
    card, published = dry_run(folder, "--recipe", str(workplace / "kd.yaml"))
    assert card.data.library_name == "transformers"
    found, expected = (load_model(str(path)) for path in (published, workplace / "student"))
    weights = expected.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.state_dict().items())
    assert not (published / "adapter_config.json").exists()
    shutil.rmtree(published)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    card, _ = dry_run(folder, "--recipe", str(workplace / "kd.yaml"))
    assert (card.data.library_name, card.data.base_model, card.data.base_model_relation) == (
        "peft",
        "org/base",
        "adapter",
    )


def refused(capsys: Any, *words: str) -> str:
    assert main(["push", *words, "--dry_run"]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["student", "a/b/c", "user/a b", "user/-x", "user/name.git", "user/a--b"])
def test_names_that_cannot_be(capsys, name):
    assert repr(name) in refused(capsys, "run", f"--repo={name}")


def test_no_folder_no_weights_no_record(run, capsys):
    assert "There is no folder" in refused(capsys, "nowhere", "--repo", "user/x")
    (run / "run.json").unlink()
    assert "does not say how it was trained" in refused(capsys, str(run), "--repo", "user/x")
    (run / "model.safetensors").unlink()
    assert "has no weights" in refused(capsys, str(run), "--repo", "user/x")


def test_an_unfinished_run_is_refused_and_its_checkpoint_is_not(workplace, run, capsys):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "finished": None}))
    assert "is not finished" in refused(capsys, str(run), "--repo", "user/x")
    checkpoint = run / "checkpoint-1"
    checkpoint.mkdir()
    for path in [path for path in run.iterdir() if path.is_file() and path.name != "run.json"]:
        shutil.move(path, checkpoint)
    assert re.search("not finished: its newest checkpoint is checkpoint-1", refused(capsys, str(run), "--repo", "u/x"))
    dry_run(checkpoint)


def test_results_of_another_revision_are_refused(run, capsys):
    add_results(run)
    weights = load_file(run / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, run / "model.safetensors", {"format": "pt"})
    assert "is of another revision" in refused(capsys, str(run), "--repo", "user/x")


def test_what_training_publishes_has_the_card_of_push(hub, client, workplace):
    """With every checkpoint one of it, at the end that of the finished student."""
    saving = ["--save_strategy", "steps", "--save_steps", "1", "--hub_strategy", "every_save"]
    publishing = ["--push_to_hub", "true", "--hub_model_id", "user/trained", "--output_dir", "published"]
    done = client("train", "kd.yaml", *saving, *publishing, "--hub_always_push", "true")
    assert done["value"] == 0, done["err"]
    assert "Mind: " in done["err"]
    repo = hub.repos["model", "user/trained"]
    cards = [commit["README.md"].content.decode() for commit in repo.commits.values() if "README.md" in commit]
    assert all("distilled from `teacher` with `kd` of mmkd" in card for card in cards)
    assert not any("None" in card for card in cards)
    assert "On held-out rows" not in cards[0]
    output = workplace / "published"
    assert main(["push", str(output), "--repo", "user/trained", "--dry_run"]) == 0
    pushed = {path.relative_to(output / "push").as_posix() for path in (output / "push").rglob("*") if path.is_file()}
    assert pushed <= {*repo.files}
    assert repo.files["README.md"] == (output / "push/README.md").read_bytes()
    assert b"On held-out rows of `words`" in repo.files["README.md"]


def test_the_tokens_of_a_checkpoint_that_a_run_began_with(run, tmp_path):
    """And of all rounds of a loop, which count each for itself."""
    entry = {"loss": 1.0, "step": 1}
    (run / "checkpoint-1").mkdir()
    state = {"max_steps": 2, "log_history": [{**entry, "supervised_tokens": 7}, {"eval_loss": 1.0, "step": 1}]}
    (run / "checkpoint-1/trainer_state.json").write_text(json.dumps(state))
    record = json.loads((run / "run.json").read_text())
    keys = {**record["keys"], "student": str(run / "checkpoint-1"), "method": "comd"}
    for number in range(2):
        inner = tmp_path / f"loop/round-{number}/student"
        inner.mkdir(parents=True)
        (inner / "log.jsonl").write_text(json.dumps({**entry, "supervised_tokens": 10}) + "\n")
    first, last = trainings_of({**record, "keys": keys}, tmp_path / "loop")
    assert (first.folder, first.tokens, last.tokens) == (run / "checkpoint-1", 7, 20)
    assert first.record["keys"]["student"] == "student"
