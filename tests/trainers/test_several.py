"""Several teachers: mixed by weights they add up, routed by a column each teaches its rows, in whatever batches."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM

from mmkd.cache.store import Cache
from mmkd.commands.main import main
from mmkd.eval.baselines import make_baseline
from mmkd.methods.kd import KDConfig, KDTrainer
from mmkd.methods.sft import SFTBaselineTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.preflight.count import Passes
from mmkd.preflight.doctor import examine
from mmkd.preflight.estimate import ModelCosts, logits_of, together
from mmkd.publish.lineage import teachers_of
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run_teacher import without_unreadable
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.several import SeveralTeachers
from scripts.make_tiny_models import make_model, make_tokenizer, save, sentences
from tests.helpers import Build, losses_of, near, steps
from tests.teachers.caches import write_recipe
from tests.teachers.fake_vllm import fake_vllm

VOCAB = 300


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second teacher with the vocabulary of the first."""
    tokenizer = make_tokenizer()
    model = make_model(layers=1, width=64, seed=9, rows=len(tokenizer))
    return save(model, tokenizer, tmp_path_factory.mktemp("other") / "teacher")


def first(trainer: Any, name: str = "loss") -> float:
    if not trainer.state.log_history:
        trainer.train()
    return losses_of(trainer, name)[0]


@pytest.mark.parametrize("cls", [KDTrainer, TAIDTrainer])
def test_the_same_teacher_twice_is_that_teacher(build: Build, completions: Dataset, tiny: Any, cls: Any) -> None:
    twice = SeveralTeachers({"a": str(tiny["teacher"]), "b": str(tiny["teacher"])}, {"a": 1, "b": 3})
    assert steps(build(cls, completions, {"teacher": twice}, max_steps=4)) == near(
        steps(build(cls, completions, max_steps=4))
    )


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (KDTrainer, {"temperature": 2.0, "ce_weight": 0.3}),
        (KDTrainer, {"divergence": "reverse_kl"}),
        (TAIDTrainer, {}),
        (SFTBaselineTrainer, {}),
    ],
)
def test_mixed_losses_are_weighted_means(
    build: Build, completions: Dataset, tiny: Any, other: Path, cls: Any, settings: dict[str, Any]
) -> None:
    settings = {"max_steps": 1, **settings}
    names = {"a": str(tiny["teacher"]), "b": str(other)}
    mixed = build(cls, completions, {"teacher": SeveralTeachers(names, {"a": 1.0, "b": 3.0})}, **settings)
    alone = {name: build(cls, completions, {"teacher": folder}, **settings) for name, folder in names.items()}
    assert first(mixed) == pytest.approx(0.25 * first(alone["a"]) + 0.75 * first(alone["b"]), rel=1e-4)
    for report in ("kl", "top1_agreement", "teacher_entropy"):
        expected = 0.25 * first(alone["a"], report) + 0.75 * first(alone["b"], report)
        assert first(mixed, report) == pytest.approx(expected, rel=1e-4)
    for name, one in alone.items():
        assert first(mixed, f"kl_{name}") == pytest.approx(first(one, "kl"), rel=1e-4)


def test_forward_kl_to_a_mix_pulls_to_the_mixture(build: Build, completions: Dataset, tiny: Any, other: Path) -> None:
    """Its gradient is that of the KL to the mean of the teachers' distributions, computed here in full."""
    names = {"a": str(tiny["teacher"]), "b": str(other)}
    trainer = build(KDTrainer, completions, {"teacher": SeveralTeachers(names)}, max_grad_norm=1e9)
    batch: Any = trainer.data_collator([dict(trainer.train_dataset[row]) for row in range(4)])
    trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch).backward()
    ours = {name: one.grad.clone() for name, one in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    labels = batch["labels"][:, 1:]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(path)(**inputs).logits for path in names.values()]
    mean = torch.stack([one.softmax(-1)[:, :-1] for one in logits]).mean(0)
    student = trainer.model(**inputs).logits[:, :-1].log_softmax(-1)
    kept = labels != -100
    (-(mean * student).sum(-1)[kept].mean()).backward()
    for name, one in trainer.model.named_parameters():
        torch.testing.assert_close(ours[name], one.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("cls", "packing"), [(KDTrainer, False), (TAIDTrainer, False), (KDTrainer, True)])
def test_routed_rows_learn_from_their_teacher_alone(
    build: Build, routed: Dataset, tiny: Any, other: Path, cls: Any, packing: bool
) -> None:
    """The evaluation's KL is that of each teacher on its rows, and together by tokens."""
    names = {"a": str(tiny["teacher"]), "b": str(other)}
    trainer = build(cls, routed, {"teacher": SeveralTeachers(names, column="domain")}, packing=packing)
    trainer.teacher.prepare(trainer.accelerator)
    whole = trainer.evaluate(routed)
    total = tokens = 0.0
    for name, folder in names.items():
        rows = routed.filter(lambda row, name=name: row["domain"] == name)
        alone = build(cls, rows, {"teacher": folder})
        kl = alone.evaluate(alone.train_dataset)["eval_kl"]
        assert whole[f"eval_kl_{name}"] == pytest.approx(kl, rel=1e-4)
        supervised = sum(label != -100 for row in alone.train_dataset["labels"] for label in row[1:])
        total, tokens = total + kl * supervised, tokens + supervised
    assert whole["eval_kl"] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize("column", [None, "domain"])
@pytest.mark.parametrize("cls", [KDTrainer, TAIDTrainer])
def test_batches_change_nothing(
    build: Build, routed: Dataset, tiny: Any, other: Path, cls: Any, column: str | None
) -> None:
    def train(**settings: Any) -> list[float]:
        teachers = SeveralTeachers({"a": str(tiny["teacher"]), "b": str(other)}, column=column)
        return steps(build(cls, routed, {"teacher": teachers}, max_steps=3, ce_weight=0.2, **settings))

    expected = near(train())
    assert train(per_device_train_batch_size=1, gradient_accumulation_steps=4) == expected
    assert train(per_device_train_batch_size=2, gradient_accumulation_steps=2, chunk_size=3) == expected
    assert train(padding_free=True, max_length=None) == expected
    assert train(padding_free=True, max_length=None, pad_to_multiple_of=64) == expected


@pytest.mark.parametrize("sizes", [(4, 1), (2, 2)])
def test_terms_of_routed_teachers_are_balanced(
    build: Build, routed: Dataset, tiny: Any, other: Path, sizes: tuple[int, int]
) -> None:
    """Batches in which one teacher has no row say nothing about its factors."""
    teachers = SeveralTeachers({"a": str(tiny["teacher"]), "b": str(other)}, column="domain")
    rows, parts = sizes
    batches = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
    trainer = build(KDTrainer, routed, {"teacher": teachers}, max_steps=6, ce_weight=0.5, combine="gradmag", **batches)
    trainer.train()
    for name in ("balance/ce", "balance/divergence"):
        # Of two terms of weight 0.5, one is made shorter and one longer; at most all weight goes to one.
        assert all(0 < factor < 1 for factor in losses_of(trainer, name))
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


@pytest.mark.parametrize("strategy", ["no", "epoch"])
def test_diagnostics_are_computed_where_they_are_logged(build: Build, completions: Dataset, strategy: str) -> None:
    trainer = build(KDTrainer, completions, logging_strategy=strategy, logging_first_step=False, max_steps=2)
    trainer.model.train()
    assert trainer._reports_now() == (strategy != "no")


@pytest.mark.parametrize("served", [False, True])
def test_the_least_vocabulary_counts(build: Build, completions: Dataset, tiny: Any, other: Path, served: bool) -> None:
    """Given teachers may know fewer tokens than their heads have rows; the answers hold none of the others."""
    known = VOCAB - 20
    # Single letters, each a token of the alphabet that all vocabularies begin with.
    completions = completions.map(lambda row: {"completion": "x y z"})
    with fake_vllm(vocab_size=VOCAB, cap=VOCAB) as fake:
        model = AutoModelForCausalLM.from_pretrained(other)
        teacher = ServerTeacher(fake.url, k=8, vocab_size=known) if served else LocalTeacher(model, known)
        several = SeveralTeachers({"a": str(tiny["teacher"]), "b": teacher})
        trainer = build(KDTrainer, completions, {"teacher": several}, max_steps=1)
        assert trainer.vocab_size == known
        assert {one.vocab_size for one in trainer.teacher.teachers.values()} == {known}
        if served:
            trainer.teacher.teachers["b"].client.close()


def test_the_estimate_counts_logits_of_all_that_teach_a_token() -> None:
    passes = Passes(6.0, 0.0, 0.0, 0.0, 1)
    teacher = ModelCosts(10.0, 0.0, 0.0, 4.0, 8, 300, passes)
    mixed, routed = (together([teacher, teacher], column) for column in (None, "domain"))
    assert mixed is not None
    assert routed is not None
    assert (mixed.chunks, mixed.weights, mixed.passes.forward) == (2, 20, 12)
    # Each row is read by one teacher, whose weights are all there.
    assert (routed.chunks, routed.weights, routed.passes.forward) == (1, 20, 6)
    args = KDConfig("unused", report_to="none")
    one, both = (logits_of(args, 300, number, "cpu") for number in (routed.chunks, mixed.chunks))
    assert both == one + args.chunk_size * 300 * 2


@pytest.mark.parametrize("job", ["kd several ddp", "kd routed ddp", "kd several fsdp2", "kd routed fsdp2"])
def test_two_ranks_see_what_one_sees(
    build: Build, routed: Dataset, ranks: Any, tiny: Any, untied: Any, job: str
) -> None:
    teachers = {"a": str(tiny["teacher"]), "b": str(untied["teacher"])}
    column = "domain" if "routed" in job else None
    alone = build(
        KDTrainer, routed, {"teacher": SeveralTeachers(teachers, column=column)}, max_steps=4, learning_rate=1e-2
    )
    expected = near(steps(alone))
    for rank in ranks[job]:
        assert [loss for loss, _ in rank["steps"]] + [norm for _, norm in rank["steps"]] == expected


@pytest.mark.parametrize("column", [None, "domain"])
def test_caches_are_their_live_teachers(
    build: Build, routed: Dataset, tiny: Any, other: Path, tmp_path: Path, column: str | None, capsys: Any
) -> None:
    """One local teacher, one on disk that knows all outcomes, built by the recipe that names both."""
    teachers = {
        "a": {"teacher": str(tiny["teacher"])},
        "b": {"teacher": str(other), "teacher_cache": str(tmp_path / "b"), "teacher_top_k": VOCAB},
    }
    keys = {"teachers": teachers, "teacher_column": column, "max_length": None, "teacher": None, "teacher_cache": None}
    recipe = write_recipe(tmp_path, tiny, {"train": routed}, **keys)
    assert main(["cache", "build", str(recipe)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "b")
    cache = Cache(tmp_path / "b")
    rows = len(routed) if column is None else routed["domain"].count("b")
    assert cache.manifest.total_rows == {"train": rows}
    on_disk = SeveralTeachers({"a": str(tiny["teacher"]), "b": CachedTeacher(cache)}, column=column)
    live = SeveralTeachers({"a": str(tiny["teacher"]), "b": str(other)}, column=column)
    ours, theirs = (
        build(KDTrainer, routed, {"teacher": one}, max_steps=3, max_length=None) for one in (on_disk, live)
    )
    ours.train()
    theirs.train()
    assert losses_of(ours) == pytest.approx(losses_of(theirs), rel=2e-3)
    for settings in (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"padding_free": True},
    ):
        again = build(KDTrainer, routed, {"teacher": on_disk}, max_steps=3, max_length=None, **settings)
        again.train()
        assert losses_of(again) == pytest.approx(losses_of(ours), rel=1e-4)
    found = examine(recipe_of(str(recipe)).parse())
    assert not [one for one in found if one.severity == "problem"]
    if column is not None:
        assert any("It knows the 10 sequences" in one.message for one in found)
    # The recipe reads the cache it has built.
    assert main(["train", str(recipe), "--max_steps", "2"]) == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("kl_a" in line and "kl_b" in line for line in logged)


def test_a_served_teacher_beside_a_local_one(build: Build, routed: Dataset, tiny: Any) -> None:
    """Routed: the server hears of its own rows only."""
    with fake_vllm(vocab_size=VOCAB, cap=VOCAB) as fake:
        served = ServerTeacher(fake.url, k=8)
        several = SeveralTeachers({"a": str(tiny["teacher"]), "b": served}, column="domain")
        trainer = build(KDTrainer, routed, {"teacher": several}, max_steps=6, per_device_train_batch_size=4)
        fake.requests.clear()
        trainer.train()
        assert len(fake.requests) == routed["domain"].count("b")
        assert losses_of(trainer, "kl_b")
        served.client.close()


def test_rollouts_are_judged_by_several(build: Build, routed: Dataset, tiny: Any, other: Path) -> None:
    teachers = SeveralTeachers({"a": str(tiny["teacher"]), "b": str(other)}, column="domain")
    settings = {"on_policy_fraction": 0.5, "rollout_max_tokens": 6, "rollout_patience": 0}
    trainer = build(KDTrainer, routed, {"teacher": teachers}, max_steps=3, **settings)
    trainer.train()
    assert losses_of(trainer, "rollout_length")
    assert all(map(lambda loss: 0 < loss < float("inf"), losses_of(trainer)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teachers": {"a": "x"}}, "1 teachers"),
        ({"weights": {"a": 1.0}}, "give each of them a number"),
        ({"weights": {"a": 1.0, "b": 0.0}}, "above 0"),
        ({"weights": {"a": 1.0, "b": 1.0}, "column": "domain"}, "nothing to weigh"),
    ],
)
def test_teachers_that_cannot_be_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SeveralTeachers(**{"teachers": {"a": "x", "b": "y"}, **arguments})


def test_runs_that_cannot_be_are_refused(build: Build, routed: Dataset, completions: Dataset, tiny: Any) -> None:
    def refused(cls: Any, data: Dataset, message: str, column: str | None = "domain", **settings: Any) -> None:
        teachers = SeveralTeachers({"a": str(tiny["teacher"]), "b": str(tiny["teacher"])}, column=column)
        given = {name: settings.pop(name) for name in ("eval_dataset",) if name in settings}
        with pytest.raises(ValueError, match=message):
            build(cls, data, {"teacher": teachers, **given}, **settings)

    class OneTeacherTrainer(KDTrainer):
        takes_several = False

    refused(OneTeacherTrainer, completions, "one teacher", column=None)
    refused(
        KDTrainer, routed, "packing_strategy: wrapped does not keep apart", packing=True, packing_strategy="wrapped"
    )
    refused(KDTrainer, completions, "no column 'domain'")
    strange = routed.map(lambda row: {"domain": "c" if row["domain"] == "b" else "a"})
    refused(KDTrainer, strange, "teachers that there are not: 'c'. The teachers are 'a', 'b'")
    refused(KDTrainer, routed, "held data names teachers that there are not", eval_dataset={"held": strange})
    numbers = Dataset.from_list([{**row, "domain": number % 2} for number, row in enumerate(routed.to_list())])
    refused(KDTrainer, numbers, "teachers that there are not: 0, 1")
    alone = routed.filter(lambda row: row["domain"] == "a")
    refused(KDTrainer, alone, "No row of the train data names 'b' in its domain")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"teachers": {"a": {"teacher": "x"}, "b": {"teacher_cach": "y"}}}, "did you mean 'teacher_cache'"),
        ({"teachers": {"a": {"teacher": "x"}, "b": {}}}, "teachers.b names nobody"),
        ({"teachers": ["x", "y"]}, "give a mapping"),
        ({"teachers": {"a": {"teacher": "x"}, "b": {"teacher": None}}}, "teachers.b names nobody"),
        ({"teachers": {"a": {"teacher": "x"}}}, "teachers holds 1; name two or more"),
        ({"teachers": {1: {"teacher": "x"}, 2: {"teacher": "y"}}}, "the name 1, .* quotes"),
        ({"teachers": {"a": {"teacher": "x", "weight": "much"}, "b": {"teacher": "y"}}}, "weight is 'much'"),
        ({"teachers": {"a": {"teacher": "x", "weight": 0}, "b": {"teacher": "y"}}}, "weight is 0"),
        ({"teachers": {"a": {"teacher": "x", "weight": float("inf")}, "b": {"teacher": "y"}}}, "weight is inf"),
        ({"teachers": {"a": {"teacher": "x"}, "b": {"teacher": "y"}}, "method": "comd"}, "one teacher"),
        ({"teachers": {"a": {"teacher": "x"}, "b": {"teacher": "y"}}, "teacher": "z"}, "say who teaches"),
        (
            {"teachers": {"a": {"teacher": "x", "weight": 2}, "b": {"teacher": "y"}}, "teacher_column": "domain"},
            "a weight says nothing",
        ),
        ({"teacher": "x", "teacher_column": "domain"}, "no `teachers`"),
        (
            {
                "teachers": {
                    "a": {"teacher": "x", "teacher_load_in_4bit": True, "teacher_load_in_8bit": True},
                    "b": {"teacher": "y"},
                }
            },
            "exclude",
        ),
    ],
)
def test_recipes_that_cannot_be_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"method": "kd", "student": "s", "data": "python_docs", **keys}))
    with pytest.raises(ValueError, match=message):
        recipe_of(str(recipe)).parse().by_teacher()


def test_teachers_as_a_flag(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"method": "kd", "student": "s", "data": "python_docs"}))
    teachers = {"a": {"teacher": "x"}, "b": {"teacher": "y"}}
    run = recipe_of(str(recipe), ["--teachers", json.dumps(teachers)]).parse()
    assert run.arguments.teachers == run.keys["teachers"] == teachers
    assert set(teachers_of([{"keys": run.keys}])) == {"x", "y"}
    with pytest.raises(ValueError, match=r"--teachers is no JSON .*write --teachers"):
        recipe_of(str(recipe), ["--teachers", "{a: x}"]).parse()


@pytest.mark.parametrize(("names", "left"), [("******", "abcef"), ("xxyxxy", "abcd"), ("xyxyxy", "abcef")])
def test_rows_that_no_cache_could_read_are_left_out_once(names: str, left: str) -> None:
    """A cache counts among its own rows: all, or those of its teacher."""
    rows = DatasetDict({"train": Dataset.from_dict({"text": list("abcdef"), "domain": list(names)})})
    entry, caches = SimpleNamespace(key=None), []
    for name in dict.fromkeys(names):
        run = SimpleNamespace(own_rows=None if name == "*" else ("domain", name))
        number = {"*": 3, "x": 3, "y": 1}[name]
        skipped = {"train": {number: entry}} if names.count(name) > number else {}
        manifest = SimpleNamespace(skipped=skipped, total_rows={"train": 6 if name == "*" else names.count(name)})
        caches.append((run, SimpleNamespace(folder="c", manifest=manifest)))
    found: Any = without_unreadable(rows, [caches[0], *caches])
    assert "".join(found["train"]["text"]) == left


def test_the_baseline_of_several_teachers_hears_of_no_cache(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"method": "kd", "student": "s", "data": "python_docs", "teacher_column": "domain"}
    cached = {"teacher_cache": "c", "teacher_tail": "unbiased"}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(keys | {"teachers": {"a": {"teacher": "x", **cached}, "b": {"teacher": "y"}}}))
    made = make_baseline(recipe_of(recipe), tmp_path / "sft-baseline.yaml", tmp_path)
    assert yaml.safe_load(Path(made.place).read_text()) == made.keys
    assert made.keys["teachers"] == {"a": {"teacher": "x"}, "b": {"teacher": "y"}}
    # Who is not named cannot measure the baseline.
    flag = json.dumps({"a": cached, "b": {"teacher": "y"}})
    made = make_baseline(
        recipe_of(recipe, ["--teachers", flag, "--max_steps", "3"]), tmp_path / "sft-baseline.yaml", tmp_path
    )
    assert made.keys["max_steps"] == 3
    assert not {"teachers", "teacher_column"} & made.keys.keys()


def test_a_recipe_by_domains(tiny: Any, other: Path, tmp_path: Path, capsys: Any) -> None:
    """A mixture whose parts are domains, trained, looked at and resumed through the CLI."""
    for name, seed in (("math", 5), ("code", 6)):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({"text": one}) for one in sentences(16, seed=seed))
        )
        source = {
            "source": "json",
            "data_files": {"train": f"{name}.jsonl"},
            "columns": {"text": "text"},
            "eval_rows": 4,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(source))
    parts = [{"data": f"./{name}.yaml", "weight": 1, "domain": name} for name in ("math", "code")]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump({"mixture": parts}))
    recipe = write_recipe(tmp_path / "run", tiny, {"train": Dataset.from_dict({"text": ["unused"]})})
    keys = yaml.safe_load(recipe.read_text())
    teachers = {"math": {"teacher": str(tiny["teacher"])}, "code": {"teacher": str(other), "teacher_dtype": "float32"}}
    for name in ("teacher", "teacher_cache"):
        del keys[name]
    keys |= {
        "teachers": teachers,
        "teacher_column": "domain",
        "data": str(tmp_path / "both.yaml"),
        "save_strategy": "steps",
    }
    recipe.write_text(yaml.safe_dump({**keys, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}))
    findings = examine(recipe_of(str(recipe)).parse())
    assert not [one for one in findings if one.severity == "problem"]
    assert {one.name for one in findings} >= {"vocabulary (code, math)", "special tokens (code, math)", "memory"}
    (named,) = [one for one in findings if one.name == "routes"]
    assert named.message == "Of 24 rows, by domain: 12 for code, 12 for math."
    for flag, value, problem in (
        ("--teacher_column", "topic", "no column 'topic'"),
        ("--teachers", json.dumps({"math": teachers["math"], "codes": teachers["code"]}), "are not: 'code'"),
    ):
        found = examine(recipe_of(str(recipe), [flag, value]).parse())
        assert any(one.severity == "problem" and problem in one.message for one in found if one.name == "routes")
    assert main(["train", str(recipe), "--dry_run"]) == 0
    assert main(["plan", str(recipe), "--memory", "24"]) == 0
    shown = capsys.readouterr().out
    assert "│ teacher math " in shown
    assert "│ teacher code " in shown
    assert "math: A teacher_cache takes" in shown
    assert main(["train", str(recipe), "--max_steps", "2"]) == 0
    assert main(["train", str(recipe), "--resume_from_checkpoint", "true"]) == 0
    logged = [json.loads(line) for line in (Path(keys["output_dir"]) / "log.jsonl").read_text().splitlines()]
    assert any("eval_kl_math" in line and "eval_kl_code" in line for line in logged)
    record = {"keys": recipe_of(str(recipe)).parse().keys}
    assert set(teachers_of([record])) == {str(tiny["teacher"]), str(other)}
