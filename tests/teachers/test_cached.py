"""Training from a cache is training with the live teacher, however batches are made; what does not fit is refused."""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, IterableDataset, load_dataset
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mmkd.cache.codec import Codec
from mmkd.cache.store import Cache, damaged_shards
from mmkd.capture.build import build as build_plan
from mmkd.capture.scoring import score_tokens
from mmkd.capture.sequences import TokenSequence, UnusableRow
from mmkd.methods.kd import DIVERGENCES, KDConfig, KDTrainer
from mmkd.methods.sft import SFTBaselineTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.preparation.collation import Collator
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.run import build_trainer
from mmkd.teachers.batch import ONLY, View
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.signals import SparseSignal, TopKSignal
from mmkd.training.logit_difference import DIFFERENCES
from scripts.make_tiny_models import make_model, make_tokenizer, save, sentences
from tests.forked import run_ranks
from tests.helpers import Build, losses_of
from tests.pretended_cuda import pretended_cuda
from tests.teachers.cached_ranks import VARIANTS, results
from tests.teachers.caches import build_cache, plan_of, write_recipe
from tests.teachers.vlm import make_image, make_vlm

# Tokens of the tiny models: an exact top-k of that many is the whole distribution.
VOCAB = 300


def completion_rows(count: int, seed: int) -> Dataset:
    completions = [f" {text}" for text in sentences(count, seed=seed + 1)]
    return Dataset.from_dict({"prompt": sentences(count, seed=seed), "completion": completions})


# Those of the `completions` fixture, and an eval split that no batch size divides.
TRAIN, EVAL = completion_rows(24, seed=3), completion_rows(9, seed=11)


@pytest.fixture(scope="module")
def recipe(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose cache keeps the whole distribution."""
    recipe = write_recipe(tmp_path_factory.mktemp("whole"), tiny, {"train": TRAIN, "eval": EVAL}, teacher_top_k=VOCAB)
    build_cache(recipe)
    return recipe


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    return recipe.parent / "cache"


@pytest.fixture(scope="module")
def sparse_recipe(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose cache keeps 8 outcomes and 8 draws."""
    data = {"train": TRAIN, "eval": EVAL}
    recipe = write_recipe(tmp_path_factory.mktemp("sparse"), tiny, data, teacher_top_k=8, cache_tail_draws=8)
    build_cache(recipe)
    return recipe


@pytest.fixture(scope="module")
def sparse(sparse_recipe: Path) -> Path:
    return sparse_recipe.parent / "cache"


class Encoded(LocalTeacher):
    """The live teacher as a cache would repeat it: encoded and decoded, but never looked up."""

    signal_type: type = TopKSignal
    can_temper = False

    def __init__(self, folder: Path, cache: Path):
        super().__init__(AutoModelForCausalLM.from_pretrained(folder), VOCAB)
        codec = Cache(cache).codec
        assert isinstance(codec, Codec)
        self.codec = codec

    @torch.no_grad()
    def ask(self, inputs: Any, supervised: Any) -> Any:
        scores = score_tokens(super().ask(inputs, supervised), self.codec.k, 0, np.zeros(int(supervised.sum())))
        scores = self.codec.decode(self.codec.encode(scores), len(scores))
        return TopKSignal(*map(torch.from_numpy, (scores.ids, scores.log_probs, scores.tail_log_probs)))


def view_of(targets: Mapping[str, torch.Tensor]) -> View:
    """A view of which nothing is known but what a teacher on disk said."""
    return View({}, torch.zeros(1, 1, dtype=torch.long), targets={ONLY: targets})


def steps(trainer: Any) -> list[tuple[float, float]]:
    trainer.train()
    return list(zip(losses_of(trainer), losses_of(trainer, "grad_norm"), strict=True))


# The same losses


@pytest.mark.parametrize("method", [*DIVERGENCES, "taid", "sft"])
def test_losses_are_those_of_the_live_teacher(build: Build, tiny: dict[str, Path], whole: Path, method: str) -> None:
    """Within the encoding's error of the teacher itself, and to rounding of what the cache repeats; in eval too."""
    cls: Any = {"taid": TAIDTrainer, "sft": SFTBaselineTrainer}.get(method, KDTrainer)
    settings = {"divergence": method} if cls is KDTrainer else {}
    ran, evaluated = [], []
    teachers = [CachedTeacher(whole), str(tiny["teacher"])]
    if method in ("jsd", "taid", *DIFFERENCES):
        teachers.append(Encoded(tiny["teacher"], whole))
    for teacher in teachers:
        trainer = build(cls, TRAIN, trainer={"teacher": teacher, "eval_dataset": EVAL}, max_steps=2, **settings)
        ran.append(steps(trainer))
        evaluated.append(trainer.evaluate())
    cached, live, *encoded = ran
    # The largest differences between logits are those to unlikely tokens, which the encoding rounds most.
    tolerance = 5e-2 if method in DIFFERENCES else 2e-2
    assert [loss for loss, _ in cached] == pytest.approx([loss for loss, _ in live], rel=tolerance)
    for other in encoded:
        assert cached == [pytest.approx(pair, rel=1e-3) for pair in other]
    for name in ("eval_loss", "eval_kl", "eval_ce", "eval_top1_agreement", "eval_teacher_entropy"):
        for result, share in zip(evaluated[1:], (tolerance, 1e-3), strict=False):
            assert evaluated[0][name] == pytest.approx(result[name], rel=share)


def test_a_student_that_is_the_teacher_has_no_loss(
    build: Build, tiny: dict[str, Path], whole: Path, sparse: Path
) -> None:
    for cache, tails in ((whole, ["bucket", "renormalise"]), (sparse, ["bucket"])):
        for tail in tails:
            arguments = {"model": str(tiny["teacher"]), "teacher": CachedTeacher(cache, tail)}
            trainer = build(KDTrainer, TRAIN, trainer=arguments, max_steps=1)
            trainer.train()
            # Nothing but the encoding's error.
            assert 0 <= losses_of(trainer)[0] < 3e-4
            assert losses_of(trainer, "top1_agreement")[0] == 1


WAYS: dict[str, dict[str, Any]] = {
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "workers that stay and fetch ahead": {
        "dataloader_num_workers": 2,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3,
        "max_steps": 8,
    },
    "in order": {"train_sampling_strategy": "sequential"},
    "packed": {"packing": True, "max_length": 64},
    "with cross-entropy, in small chunks": {"ce_weight": 0.4, "chunk_size": 3},
}


@pytest.mark.parametrize("way", WAYS)
def test_however_batches_are_made(build: Build, tiny: dict[str, Path], whole: Path, way: str) -> None:
    teachers = (CachedTeacher(whole), Encoded(tiny["teacher"], whole))
    settings = {"max_steps": 2, **WAYS[way]}
    cached, encoded = (steps(build(KDTrainer, TRAIN, trainer={"teacher": one}, **settings)) for one in teachers)
    assert len(cached) == WAYS[way].get("max_steps", 2)
    assert cached == [pytest.approx(pair, rel=1e-3) for pair in encoded]


PREPARATIONS: dict[str, dict[str, Any]] = {
    "padding free": {"padding_free": True, "max_length": None},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    "bfd_split": {"packing": True, "packing_strategy": "bfd_split", "max_length": 16},
}


@pytest.mark.parametrize("name", PREPARATIONS)
def test_however_rows_are_prepared(build: Build, tiny: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Built and read with the same keys of a recipe."""
    settings = PREPARATIONS[name]
    data = {"train": TRAIN, "eval": EVAL}
    recipe = write_recipe(tmp_path / "recipe", tiny, data, teacher_top_k=VOCAB, **settings)
    cache = build_cache(recipe)
    trainer: Any = build_trainer(recipe_of(str(recipe)).parse())
    assert isinstance(trainer.teacher, CachedTeacher)
    arguments = {"teacher": Encoded(tiny["teacher"], cache), "eval_dataset": EVAL}
    encoded: Any = build(KDTrainer, TRAIN, trainer=arguments, **settings)
    cached, expected = results(trainer), results(encoded)
    assert cached["steps"] == [pytest.approx(pair, rel=1e-3) for pair in expected["steps"]]
    assert cached["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-3)


def test_streamed_rows_are_looked_up_as_they_come(build: Build, tiny: dict[str, Path], whole: Path) -> None:
    stream = TRAIN.to_iterable_dataset(num_shards=4)
    assert isinstance(stream, IterableDataset)
    for settings in ({}, {"dataloader_num_workers": 2}):
        losses = []
        for teacher in (CachedTeacher(whole), Encoded(tiny["teacher"], whole)):
            trainer = build(KDTrainer, stream, trainer={"teacher": teacher, "eval_dataset": EVAL}, **settings)
            losses.append([*steps(trainer), (trainer.evaluate()["eval_kl"], 0.0)])
        assert losses[0] == [pytest.approx(pair, rel=1e-3) for pair in losses[1]]


@pytest.mark.parametrize("tail", ["bucket", "unbiased", "renormalise"])
def test_answers_come_to_the_gpu(build: Build, sparse: Path, tail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"teacher": CachedTeacher(sparse, tail), "eval_dataset": EVAL}
    with pretended_cuda(monkeypatch):
        trainer = build(KDTrainer, TRAIN, trainer=arguments, max_steps=2)
        trainer.train()
        trainer.evaluate()


def test_an_unknown_row_in_a_stream_is_named_when_it_comes(build: Build, whole: Path) -> None:
    rows = [*TRAIN.to_list()[:6], {"prompt": "one dog", "completion": " sat"}, *TRAIN.to_list()[6:]]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = build(KDTrainer, stream, trainer={"teacher": CachedTeacher(whole)}, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match=r"does not know a sequence of this batch \(first tokens \[\d+, "):
        trainer.train()


@pytest.mark.parametrize("tail", ["unbiased", "renormalise"])
def test_other_tails_teach_too(build: Build, sparse: Path, tail: str) -> None:
    settings = {"temperature": 2.0} if tail == "renormalise" else {}
    trainer = build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(sparse, tail)}, max_steps=30, **settings)
    trainer.train()
    kl = losses_of(trainer, "kl")
    assert all(np.isfinite(losses_of(trainer)))
    assert kl[-1] < 0.85 * kl[0]


def test_one_cache_says_the_same_whichever_tail_is_chosen(sparse: Path) -> None:
    """The exact outcomes are there in every signal, and all masses are 1."""
    cache = Cache(sparse)
    rows = [cache.scores(row) for row in range(4)]
    supervised = torch.ones(sum(map(len, rows)), dtype=torch.bool)
    teachers = [CachedTeacher(cache, tail) for tail in ("bucket", "unbiased", "renormalise")]
    signals: list[Any] = [one.ask(view_of(one.tensors(rows)), supervised) for one in teachers]
    bucket, unbiased, renormalised = signals
    assert torch.equal(bucket.ids, renormalised.ids)
    assert torch.equal(bucket.ids, unbiased.ids[:, :8])
    assert torch.equal(bucket.log_probs, unbiased.log_probs[:, :8])
    one = torch.ones(len(supervised))
    torch.testing.assert_close(unbiased.log_probs.exp().sum(-1), one)
    torch.testing.assert_close(renormalised.log_probs.exp().sum(-1), one)
    torch.testing.assert_close(bucket.log_probs.exp().sum(-1) + bucket.tail_log_probs.exp(), one)


def test_a_tail_brings_the_gradient_nearer_to_the_live_one(
    build: Build, tiny: dict[str, Path], whole: Path, sparse: Path
) -> None:
    """The gradient of all rows at once; the whole distribution has the encoding's error left."""

    def gradient(teacher: Any) -> torch.Tensor:
        trainer = build(KDTrainer, TRAIN, trainer={"teacher": teacher}, per_device_train_batch_size=24)
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.model.train()
        trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        trainer.compute_loss(trainer.model, batch).backward()
        return torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()])

    live = gradient(str(tiny["teacher"]))
    errors = {
        tail: ((gradient(CachedTeacher(sparse, tail)) - live).norm() / live.norm()).item()
        for tail in ("bucket", "unbiased", "renormalise")
    }
    assert ((gradient(CachedTeacher(whole)) - live).norm() / live.norm()).item() < 0.02
    assert max(errors["unbiased"], errors["bucket"]) < errors["renormalise"]


def test_resume_gives_the_losses_of_an_uninterrupted_run(build: Build, whole: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"taid_alpha": 0.5, "taid_beta": 0.5, "max_steps": 6}

    def trainer(**more: Any) -> Any:
        return build(TAIDTrainer, TRAIN, trainer={"teacher": CachedTeacher(whole)}, **settings, **more)

    uninterrupted = trainer()
    uninterrupted.train()
    cut = str(tmp_path / "cut")
    trainer(save_strategy="steps", save_steps=3, output_dir=cut).train()
    resumed = trainer(output_dir=cut, dataloader_num_workers=1)
    resumed.train(resume_from_checkpoint=f"{cut}/checkpoint-3")
    for name in ("loss", "kl", "taid_t", "grad_norm"):
        assert losses_of(resumed, name)[-3:] == losses_of(uninterrupted, name)[-3:], name


@pytest.fixture(scope="module")
def ranks(
    sparse_recipe: Path, tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each of two gloo ranks saw in every variant."""
    output = tmp_path_factory.mktemp("ranks")
    arguments = [str(sparse_recipe), str(tiny["student"]), str(output)]
    run_ranks(2, ["-m", "tests.teachers.cached_ranks", *arguments])
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_do_not_depend_on_ranks(sparse_recipe: Path, ranks: list[dict[str, Any]], name: str) -> None:
    """Two ranks of two rows are one rank of four; the last batch of an evaluation is uneven."""
    sizes = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "5", "--max_steps", "2"]
    expected = results(build_trainer(recipe_of(str(sparse_recipe), [*VARIANTS[name], *sizes]).parse()))
    found = ranks[0][name]
    assert found == ranks[1][name]
    if name != "packed":
        # Packed rows are one batch each on every rank, so that the steps are others.
        assert found["steps"] == [pytest.approx(pair, rel=1e-3) for pair in expected["steps"]]
        assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-3)
    assert all(np.isfinite(found["steps"]).ravel())


def test_one_rank_reads_the_teachers_weights_and_all_refuse_another(ranks: list[dict[str, Any]]) -> None:
    assert [rank["hashed"] for rank in ranks] == [len(VARIANTS), 0]
    assert ranks[0]["refusals"] == ranks[1]["refusals"]
    another, none = ranks[0]["refusals"]
    assert "is of the teacher" in another
    assert "has no safetensors files" in none


def test_streams_on_several_ranks(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["streamed"] == ranks[1]["streamed"]
    assert len(ranks[0]["streamed"]) == 2
    assert all(np.isfinite(ranks[0]["streamed"]))


def test_packed_rows_that_ranks_repeat_do_not_count_twice(sparse_recipe: Path, ranks: list[dict[str, Any]]) -> None:
    """An evaluation of untrained students, whose packed rows do not fill the ranks' last batch."""
    alone: Any = build_trainer(recipe_of(str(sparse_recipe), VARIANTS["packed"]).parse())
    assert len(alone.eval_dataset) % 6
    evaluated = alone.evaluate()
    expected = {name: evaluated[name] for name in ("eval_loss", "eval_kl", "eval_ce")}
    assert ranks[0]["packed"]["evaluated"] == pytest.approx(expected, rel=1e-5)


# Batches


def test_the_collator_travels_to_other_processes(build: Build, sparse: Path) -> None:
    trainer = build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(sparse, "unbiased")})
    collator = trainer.data_collator
    assert isinstance(collator, Collator)
    examples = [dict(trainer.train_dataset[row]) for row in range(3)]
    here, there = collator(examples), pickle.loads(pickle.dumps(collator))(examples)
    targets = here.student.targets[ONLY]
    for name, tensor in targets.items():
        assert torch.equal(tensor, there.student.targets[ONLY][name])
    assert len(targets["ids"]) == (here["labels"][:, 1:] != -100).sum()


def test_a_batch_without_supervised_tokens_is_a_zero(build: Build, sparse: Path) -> None:
    for tail in ("bucket", "unbiased", "renormalise"):
        trainer = build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(sparse, tail)})
        collator: Any = trainer.data_collator
        batch = collator([{"input_ids": [5, 6, 7], "labels": [5, -100, -100]}])
        trainer.model.train()
        trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        assert loss.item() == 0


class Shy:
    """An engine that has no answer for some sequences."""

    def __init__(self, engine: Any, without: Callable[[TokenSequence], bool]):
        self.engine, self.without = engine, without

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def score(self, sequences: list[TokenSequence], advance: Any) -> list[Any]:
        scores = self.engine.score(sequences, advance)
        return [
            UnusableRow("too shy") if self.without(one) else score
            for one, score in zip(sequences, scores, strict=True)
        ]


def test_sequences_that_were_skipped_teach_nothing(tiny: dict[str, Path], tmp_path: Path) -> None:
    """One row a batch, so that batches without a token to learn from occur."""
    recipe = write_recipe(
        tmp_path, tiny, {"train": TRAIN, "eval": EVAL}, on_error="skip", num_train_epochs=1, max_steps=-1
    )
    plan: Any = plan_of(recipe)
    skipped = [plan.prepared.splits["train"][row] for row in (0, 5, 23)]
    keys = {one.key for one in skipped}
    plan.scorer = Shy(plan.scorer, lambda one: one.key in keys)
    cache = Cache(build_plan(plan, Console(quiet=True)))
    assert cache.skipped_keys == keys
    assert {row: entry.reason for row, entry in cache.manifest.skipped["train"].items()} == dict.fromkeys(
        (0, 5, 23), "too shy"
    )
    trainer: Any = build_trainer(recipe_of(str(recipe), ["--per_device_train_batch_size", "1"]).parse())
    trainer.train()
    tokens = plan.prepared.splits["train"].supervised_tokens - sum(int(one.supervised.sum()) for one in skipped)
    assert losses_of(trainer, "supervised_tokens")[-1] == tokens
    losses = losses_of(trainer)
    assert len(losses) == 24
    assert sum(loss == 0 for loss in losses) == 3
    # A run that skips nothing cannot be built from the same answers.
    plan = plan_of(recipe, "--on_error", "fail", "--teacher_cache", str(tmp_path / "strict"))
    plan.scorer = Shy(plan.scorer, lambda one: one.key in keys)
    with pytest.raises(ValueError, match=r"Row 0 of the train data cannot be used: too shy .*on_error: skip"):
        build_plan(plan, Console(quiet=True))


# Refusals


def test_a_cache_for_other_preparation_is_refused_and_the_field_named(
    build: Build, whole: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    for settings, named in (
        ({"max_length": 32}, "max_length: 32 here, 64 there"),
        ({"max_length": None}, "max_length: None here, 64 there"),
        ({"truncation_mode": "keep_end"}, "truncation_mode: 'keep_end' here, 'keep_start' there"),
        ({"completion_only_loss": False}, "completion_only_loss: False here, None there"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing: 'wrapped' here, None there"),
        ({"chat_template_path": str(write_template(tmp_path))}, "chat_template: "),
    ):
        with pytest.raises(ValueError, match=f"built for other sequences than this run trains on: .*{named}"):
            build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(whole)}, **settings)
    other = save(make_model(rows=280), make_tokenizer(280), tmp_path / "other")
    with pytest.raises(ValueError, match=r"speaks of 300 tokens, the student has 280|tokenizer: '"):
        build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(whole), "model": str(other)})
    renamed: Any = make_tokenizer()
    renamed.add_tokens(["one dog"])
    with pytest.raises(ValueError, match="tokenizer: '"):
        build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(whole), "processing_class": renamed})
    ending: Any = make_tokenizer()
    ending.eos_token = "<|pad|>"
    with pytest.raises(ValueError, match=r"eos_token: '<\|pad\|>' here, '<\|end\|>' there"):
        build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(whole), "processing_class": ending})


def write_template(folder: Path) -> Path:
    path = folder / "template.jinja"
    path.write_text("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    return path


def test_a_student_with_a_smaller_vocabulary_is_refused(
    build: Build, whole: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    smaller = save(make_model(rows=290), tokenizer, tmp_path / "smaller")
    with pytest.raises(ValueError, match=r"speaks of 300 tokens, the student has 290. Build it again"):
        build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(whole), "model": str(smaller)})


def test_a_student_with_a_padded_vocabulary_is_trimmed(
    build: Build, whole: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    larger = save(make_model(rows=320, seed=2), tokenizer, tmp_path / "larger")
    trainer = build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(whole), "model": str(larger)})
    assert trainer.vocab_size == 300
    trainer.train()
    assert all(np.isfinite(losses_of(trainer)))


def test_other_data_is_refused_before_training(build: Build, whole: Path) -> None:
    changed = TRAIN.map(
        lambda row, place: {"completion": row["completion"] + " dog" * (place in (3, 7))}, with_indices=True
    )
    with pytest.raises(ValueError, match=r"does not know 2 sequences of the train data, the first of them number 3"):
        build(KDTrainer, changed, trainer={"teacher": CachedTeacher(whole)})
    parts = {"first": EVAL, "second": changed.select([3])}
    with pytest.raises(ValueError, match=r"does not know 1 sequences of the second data"):
        build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(whole), "eval_dataset": parts})
    trainer = build(KDTrainer, TRAIN.select(range(8)), trainer={"teacher": CachedTeacher(whole), "eval_dataset": EVAL})
    assert trainer.evaluate()["eval_kl"] > 0
    with pytest.raises(ValueError, match="does not know a sequence of this batch"):
        trainer.evaluate(eval_dataset=changed.select([3]))


def test_tails_that_the_cache_does_not_have_are_refused(whole: Path, tiny: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no draws from the tail, which teacher_tail: unbiased needs"):
        CachedTeacher(whole, "unbiased")
    with pytest.raises(ValueError, match=r"teacher_tail is 'buckets'; choose one of bucket, unbiased, renormalise"):
        CachedTeacher(whole, "buckets")
    data = {"train": TRAIN.select(range(4))}
    draws_only = build_cache(write_recipe(tmp_path / "draws", tiny, data, teacher_top_k=0, cache_tail_draws=5))
    for tail in ("bucket", "renormalise"):
        with pytest.raises(ValueError, match=r"has draws only \(top-k of 0\): set teacher_tail: unbiased"):
            CachedTeacher(draws_only, tail)
    assert CachedTeacher(draws_only, "unbiased").signal_type is SparseSignal
    log_probs = build_cache(write_recipe(tmp_path / "log_probs", tiny, data, cache_signal="log_probs"))
    with pytest.raises(ValueError, match=r"answers with LabelSignal, method kd needs DenseSignal or TopKSignal"):
        KDTrainer.check_teacher(CachedTeacher(log_probs), KDConfig(str(tmp_path), bf16=False))
    with pytest.raises(ValueError, match=r"no teacher cache: it has no manifest.json"):
        CachedTeacher(tmp_path / "nowhere")


def test_draws_alone_train(tiny: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny, {"train": TRAIN}, teacher_top_k=0, cache_tail_draws=50, max_steps=20)
    build_cache(recipe)
    trainer: Any = build_trainer(recipe_of(str(recipe), ["--teacher_tail", "unbiased"]).parse())
    trainer.train()
    assert losses_of(trainer, "ce")[-1] != losses_of(trainer, "ce")[0]
    assert losses_of(trainer)[-1] < losses_of(trainer)[0]


@pytest.mark.parametrize("tail", ["unbiased", "renormalise"])
@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "forward_kl"])
def test_divergences_that_need_the_tail_are_refused_without_it(
    build: Build, sparse: Path, tail: str, divergence: str
) -> None:
    with pytest.raises(ValueError, match=f"{divergence} compares with the whole distribution.*teacher_tail: bucket"):
        build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(sparse, tail)}, divergence=divergence)


def test_taid_needs_the_tail(build: Build, sparse: Path) -> None:
    for tail in ("unbiased", "renormalise"):
        with pytest.raises(ValueError, match=r"answers with SparseSignal, method taid needs"):
            build(TAIDTrainer, TRAIN, trainer={"teacher": CachedTeacher(sparse, tail)})


def test_only_a_renormalised_cache_can_be_tempered(build: Build, sparse: Path) -> None:
    for tail in ("bucket", "unbiased"):
        with pytest.raises(ValueError, match=r"temperature is 2.0, but this teacher is known at temperature 1 only"):
            build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(sparse, tail)}, temperature=2.0)
    build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(sparse, "renormalise")}, temperature=2.0)
    # Differences between listed tokens need no tail.
    trainer = build(
        KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(sparse)}, temperature=3.0, divergence="dbild", max_steps=1
    )
    trainer.train()
    assert losses_of(trainer)[0] > 0


def test_a_recipe_that_names_another_teacher_or_data_is_refused(
    recipe: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(
        ValueError, match=r"is of the teacher '.*teacher' \(weights [0-9a-f]{64}\), the recipe names '.*student'"
    ):
        build_trainer(recipe_of(str(recipe), ["--teacher", str(tiny["student"])]).parse())
    other = yaml.safe_load((recipe.parent / "words.yaml").read_text()) | {"shuffle_seed": 5}
    other["data_files"] = {split: str(recipe.parent / name) for split, name in other["data_files"].items()}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    with pytest.raises(ValueError, match=r"was built on the data 'words' with the fingerprint"):
        build_trainer(recipe_of(str(recipe), ["--data", str(tmp_path / "other.yaml")]).parse())
    with pytest.raises(ValueError, match=r"max_length: 32 here, 64 there"):
        build_trainer(recipe_of(str(recipe), ["--max_length", "32"]).parse())


def test_the_same_teacher_under_another_name_is_welcome(recipe: Path, tiny: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.symlink_to(tiny["teacher"])
    other = recipe_of(str(recipe), ["--teacher", str(copy), "--output_dir", str(tmp_path / "run")])
    assert build_trainer(other.parse())


def test_a_damaged_row_stops_training_and_names_its_shard(build: Build, tiny: dict[str, Path], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny, {"train": TRAIN}, cache_shard_rows=24)
    cache = build_cache(recipe)
    path = cache / "train" / "00000.arrow"
    content = bytearray(path.read_bytes())
    rows: Any = load_dataset("arrow", data_files=str(path), split="train", keep_in_memory=True)
    blob = rows[5]["blob"]
    content[content.index(blob) + len(blob) // 2] ^= 4
    path.write_bytes(content)
    trainer = build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(cache)}, per_device_train_batch_size=24)
    with pytest.raises(ValueError, match=r"Row 5 of .*train/00000.arrow is damaged"):
        trainer.train()
    assert list(damaged_shards(cache, Cache(cache).manifest)) == [("train", 0)]
    build_cache(recipe)
    repaired = build(KDTrainer, TRAIN, trainer={"teacher": CachedTeacher(cache)})
    repaired.train()


# Images


def image_recipe(folder: Path, broken: bool = False, **keys: Any) -> Path:
    """A recipe with images whose student is its teacher."""
    vlm = make_vlm(folder / "vlm")
    rows = []
    for row, (question, answer) in enumerate(zip(sentences(6), sentences(6, seed=5), strict=True)):
        image = folder / f"{row}.png"
        make_image(row, width=64 if row % 2 else 32).save(image)
        if broken and row == 2:
            image.write_bytes(image.read_bytes()[:60])
        user = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": question}]}
        assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        rows.append({"messages": [user, assistant], "images": [str(image)]})
    models = {"teacher": vlm, "student": vlm}
    recipe = write_recipe(
        folder,
        models,
        {"train": Dataset.from_list(rows)},
        max_length=None,
        cache_shard_rows=4,
        per_device_train_batch_size=2,
        dtype="float32",
        **keys,
    )
    return recipe


def test_a_vision_student_that_is_the_teacher_has_no_loss(tmp_path: Path) -> None:
    """Images through recipe, cache, collator and both models, in batches of rows with different image sizes."""
    recipe = image_recipe(tmp_path, max_steps=3, learning_rate=0.0, teacher_top_k=64)
    cache = Cache(build_cache(recipe))
    assert len(cache) == 6
    for flags in ([], ["--dataloader_num_workers", "2"]):
        trainer: Any = build_trainer(recipe_of(str(recipe), flags).parse())
        trainer.train()
        assert all(0 <= loss < 3e-4 for loss in losses_of(trainer))
        assert losses_of(trainer, "top1_agreement") == [1, 1, 1]


def test_an_image_that_cannot_be_decoded_is_left_out_where_that_was_asked_for(tmp_path: Path) -> None:
    recipe = image_recipe(tmp_path, broken=True, num_train_epochs=1, max_steps=-1)
    with pytest.raises(ValueError, match=r"Row \d of the train data cannot be used: .*on_error: skip"):
        build_cache(recipe)
    skipping = ["--on_error", "skip", "--max_skipped", "0.2", "--teacher_cache", str(tmp_path / "skipping")]
    cache = Cache(build_cache(recipe, *skipping))
    assert len(cache) == 5
    ((_, entry),) = cache.manifest.skipped["train"].items()
    assert entry.key is None
    trainer: Any = build_trainer(recipe_of(str(recipe), ["--teacher_cache", str(tmp_path / "skipping")]).parse())
    trainer.train()
    assert len(losses_of(trainer)) == 3
