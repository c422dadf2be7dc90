"""trans_encoder: losses, cycles that go on where they were cut off, and what their result is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertModel

from mmkd.commands import main as cli
from mmkd.data.sentence_pairs import load_pairs
from mmkd.data.text_pairs import PAIR_COLUMNS
from mmkd.errors import UserError
from mmkd.methods.trans_encoder import half_cycles
from mmkd.methods.trans_encoder.encoder_loading import cosines, load_bi_encoder, load_cross_encoder, probabilities
from mmkd.methods.trans_encoder.half_cycles import RECORD
from mmkd.methods.trans_encoder.trans_encoder_trainer import TransEncoderConfig, TransEncoderTrainer, pair_losses
from mmkd.recipe.flags import recipe_of
from tests.alignment.tiny_tokenizers import TEXTS, wordpiece

pytest.importorskip("sentence_transformers")

PAIRS = [(first, second) for first in TEXTS[:4] for second in TEXTS[1:4]]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with random weights, which sentence-transformers pools by the mean."""
    torch.manual_seed(0)
    tokenizer, folder = wordpiece(200), tmp_path_factory.mktemp("bert")
    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=16, max_position_embeddings=64, **shape)
    BertModel(config).save_pretrained(folder)
    tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token = "[UNK]", "[CLS]", "[SEP]"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(bert: Path, tmp_path: Path) -> Path:
    rows = [{"sentence1": first, "sentence2": second, "score": len(first) % 5} for first, second in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {
        "method": "trans_encoder",
        "student": str(bert),
        "data": str(tmp_path / "pairs.jsonl"),
        "output_dir": str(tmp_path / "run"),
        "cycles": 2,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "cross_batch_size": 8,
        "report_to": "none",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(keys))
    return path


def test_the_two_losses_are_those_of_the_paper() -> None:
    logits, labels = torch.tensor([[0.3], [-2.0]]), torch.tensor([0.9, 0.2])
    expected = -(labels * logits[:, 0].sigmoid().log() + (1 - labels) * (1 - logits[:, 0].sigmoid()).log())
    torch.testing.assert_close(pair_losses({"scores": logits}, labels, cross=True), expected)
    states = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    cosine = torch.stack([torch.nn.functional.cosine_similarity(states[i], states[i + 2], dim=0) for i in range(2)])
    losses = pair_losses({"sentence_embedding": states}, labels, cross=False)
    torch.testing.assert_close(losses, (cosine - labels).square())


@pytest.mark.parametrize("load", [load_bi_encoder, load_cross_encoder])
def test_accumulation_changes_nothing(load: Any, bert: Path, tmp_path: Path) -> None:
    scores = torch.rand(len(PAIRS), generator=torch.Generator().manual_seed(0)).tolist()
    columns = dict(zip(("sentence1", "sentence2"), map(list, zip(*PAIRS, strict=True)), strict=True))
    rows, runs = Dataset.from_dict({**columns, "score": scores}), []
    for batch, parts in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        given: dict[str, Any] = {"max_length": 32} if load is load_cross_encoder else {}
        encoder = load(str(bert), "student", device="cpu", **given)
        for module in encoder.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts, "num_train_epochs": 2}
        settings: dict[str, Any] = {**sizes, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
        trainer = TransEncoderTrainer(encoder, TransEncoderConfig(str(tmp_path), **settings), rows)
        trainer.train()
        runs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    # The last step of an epoch has half as many pairs.
    assert len(runs[0]) == 4
    assert runs[1] == [pytest.approx(step, rel=1e-4) for step in runs[0]]


def test_cycles_end_in_a_model_of_sentence_transformers_and_are_resumed(recipe: Path, monkeypatch: Any) -> None:
    trained: list[half_cycles.Half] = []
    train = half_cycles.Cycles._train

    def stopping(self: Any, half: half_cycles.Half, labels: Any) -> None:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(half)
        assert (labels >= 0).all()
        assert (labels <= 1).all()
        train(self, half, labels)

    monkeypatch.setattr(half_cycles.Cycles, "_train", stopping)
    assert cli.main(["train", str(recipe)]) == 130
    run = recipe.parent / "run"
    assert not (run / "modules.json").exists()
    kept = (run / "cycle_2" / "cross_encoder" / "model.safetensors").read_bytes()
    monkeypatch.setattr(half_cycles.Cycles, "_train", train)
    assert cli.main(["train", str(recipe)]) == 0
    assert (run / "cycle_2" / "cross_encoder" / "model.safetensors").read_bytes() == kept
    record = json.loads((run / RECORD).read_text())
    assert [(entry["cycle"], entry["kind"]) for entry in record["halves"]] == [
        (cycle, kind) for cycle in (1, 2) for kind in ("cross_encoder", "bi_encoder")
    ]
    # Without scored pairs the last cycle is the result, with the length of texts that the student came with.
    assert record["chosen"]["cycle"] == 2
    student = load_bi_encoder(str(run), "student", device="cpu")
    assert (
        student.max_seq_length
        == load_bi_encoder(str(recipe_of(str(recipe), []).keys["student"]), "s", device="cpu").max_seq_length
    )
    assert (run / "model.safetensors").read_bytes() == (run / "cycle_2/bi_encoder/model.safetensors").read_bytes()
    assert cli.main(["push", str(run), "--repo", "me/encoder", "--dry_run"]) == 0
    published = load_bi_encoder(str(run / "push"), "student", device="cpu")
    assert (run / "push" / "1_Pooling" / "config.json").is_file()
    np.testing.assert_array_equal(published.encode(["a"]), student.encode(["a"]))
    with pytest.raises(UserError, match="holds cycles of another run: learning_rate differ"):
        half_cycles.train_cycles(recipe_of(str(recipe), ["--learning_rate", "1e-3"]).parse(), lambda _: 0)


def test_scored_pairs_choose_the_cycle(recipe: Path, capsys: Any) -> None:
    data = recipe.parent / "pairs.jsonl"
    assert cli.main(["train", str(recipe), "--dev_data", str(data), "--max_steps", "1"]) == 0
    record = json.loads((recipe.parent / "run" / RECORD).read_text())
    measured = {entry["cycle"]: entry["spearman"] for entry in record["halves"] if entry["kind"] == "bi_encoder"}
    assert record["chosen"]["cycle"] == max(measured, key=lambda cycle: measured[cycle])
    assert "before training" in capsys.readouterr().out


def test_two_students_learn_from_the_mean_of_what_both_say(recipe: Path, bert: Path) -> None:
    flags = ["--mutual_student", str(bert), "--cycles", "1", "--max_steps", "1"]
    cycles = half_cycles.Cycles(recipe_of(str(recipe), flags).parse(), half_cycles.Console(quiet=True))
    said = [np.full(len(PAIRS), value, np.float32) for value in (0.2, -0.5)]
    cycles._bi_encoder = lambda name, folder=None: name  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(half_cycles, "cosines", lambda name, *_: said[name == "second"])
        # A cosine below 0 counts as 0.
        np.testing.assert_allclose(cycles._labels(1, "cross_encoder"), 0.1, rtol=1e-6)
    assert cli.main(["train", str(recipe), *flags]) == 0
    folders = {path.name for path in (recipe.parent / "run" / "cycle_1").iterdir() if not path.name.endswith("_log")}
    assert folders == {f"{kind}_encoder_{name}" for kind in ("bi", "cross") for name in ("first", "second")}


def test_weights_of_the_encoder_before_are_taken_where_asked(recipe: Path) -> None:
    flags = ["--begin_with", "previous", "--cycles", "1", "--cross_learning_rate", "1e-2", "--learning_rate", "1e-9"]
    assert cli.main(["train", str(recipe), *flags]) == 0
    folder = recipe.parent / "run" / "cycle_1"
    cross = load_cross_encoder(str(folder / "cross_encoder"), "c", device="cpu", max_length=32)[0].model.state_dict()
    bi = load_bi_encoder(str(folder / "bi_encoder"), "b", device="cpu")[0].model.state_dict()
    name = "embeddings.word_embeddings.weight"
    torch.testing.assert_close(bi[name], cross[f"bert.{name}"], atol=1e-6, rtol=0)


def test_what_encoders_say_of_pairs(bert: Path, recipe: Path) -> None:
    pairs = load_pairs(str(recipe.parent / "pairs.jsonl"), max_rows=3)
    encoder = load_bi_encoder(str(bert), "student", device="cpu")
    said = [encoder.encode([first, second]) for first, second in zip(pairs.first, pairs.second, strict=True)]
    expected = [float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) for a, b in said]
    np.testing.assert_allclose(cosines(encoder, pairs, 2), expected, atol=1e-5)
    cross = load_cross_encoder(str(bert), "cross-encoder", device="cpu", max_length=32)
    assert ((probabilities(cross, pairs, 2) > 0) & (probabilities(cross, pairs, 2) < 1)).all()


def test_dry_run_plan_and_doctor(recipe: Path, capsys: Any) -> None:
    assert cli.main(["train", str(recipe), "--dry_run"]) == 0
    assert cli.main(["plan", str(recipe), "--gpu", "L4"]) == 0
    assert cli.main(["doctor", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "12 without labels" in said
    assert "4 in 2 cycles" in said
    assert "12 pairs of sentences" in said


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--teacher", "x"], "does not read teacher"),
        (["--mutual_cross_encoder", "x"], "there is none. Set mutual_student"),
        (["--use_peft", "true"], "trains whole encoders"),
        (["--cycles", "0"], "cycles"),
        (["--student", "nowhere/at/all"], "cannot be loaded"),
    ],
)
def test_what_cannot_be_is_refused(flags: list[str], reason: str, recipe: Path, capsys: Any) -> None:
    assert cli.main(["train", str(recipe), *flags]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": "one"}], "has the columns text, and none of the pairs"),
        ([{"sentence1": "", "sentence2": "b", "score": 1}], "has no pair of sentences"),
        ([{"sentence1": "a", "sentence2": "b"}], "no score of its pairs"),
        ([{"sentence1": "a", "sentence2": "b", "score": 1}], "All scores"),
        ([{"sentence1": "a", "sentence2": "b", "score": "x"}], "no number"),
    ],
)
def test_bad_pairs_are_refused(rows: list[dict[str, Any]], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=reason):
        load_pairs(str(path), scored=True)


def test_pairs_of_clip_kd_are_pairs_here_too(tmp_path: Path) -> None:
    for first, second in PAIR_COLUMNS:
        path = tmp_path / f"{first}_{second}.jsonl"
        path.write_text(json.dumps({first: "a", second: "b"}) + "\n")
        pairs = load_pairs(str(path))
        assert (pairs.first, pairs.second) == (["a"], ["b"])


def test_several_processes_are_refused(ranks: Any) -> None:
    for rank in ranks["trans_encoder ddp"]:
        assert "trans_encoder trains in one process, and there are 2. Remove accelerate_config" in rank["refused"]


def test_scores_outside_of_0_and_1_are_refused(bert: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "score": [-0.1]})
    encoder = load_bi_encoder(str(bert), "student", device="cpu")
    with pytest.raises(UserError, match="clamp them"):
        TransEncoderTrainer(encoder, TransEncoderConfig(output_dir=str(tmp_path), report_to="none"), rows)
