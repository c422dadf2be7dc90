"""`mmkd teachers rank` and the acceptance of drafts: by enumeration, by hand, and end to end."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmkd.commands.main import main
from mmkd.eval.acceptance import acceptance, measured_tokens_per_pass, tokens_per_pass
from mmkd.eval.teacher_fit import Pair
from mmkd.eval.teacher_ranking import ordered
from mmkd.losses.divergences import tvd
from mmkd.models.load import load_model, load_processing_class
from scripts.make_tiny_models import make_model, make_tokenizer, save, sentences
from tests.teachers.fake_vllm import ServedModel, ServedStates, fake_vllm

OUTCOMES, DRAFT = 3, 3


def kept_in_speculative_decoding(draft: torch.Tensor, target: torch.Tensor) -> float:
    """The mean number of kept tokens by the algorithm itself, over all drafts; models are [last token, next token]."""
    total = 0.0
    for tokens in itertools.product(range(OUTCOMES), repeat=DRAFT):
        drafted, all_kept, last = 1.0, 1.0, 0
        for token in tokens:
            drafted *= draft[last, token].item()
            last = token
        last = 0
        for token in tokens:
            all_kept *= min(1.0, (target[last, token] / draft[last, token]).item())
            total += drafted * all_kept
            last = token
    return total


def test_tokens_per_pass_are_those_of_the_algorithm():
    draft, target = torch.rand(2, OUTCOMES, OUTCOMES, generator=torch.Generator().manual_seed(0)).softmax(-1).unbind()
    # Sharper, so that the two differ.
    target = target**4 / (target**4).sum(-1, keepdim=True)
    measured = 0.0
    for tokens in itertools.product(range(OUTCOMES), repeat=DRAFT):
        pairs = list(zip((0, *tokens), tokens, strict=False))
        written = torch.stack([target[pair] for pair in pairs]).prod().item()
        ratios = torch.stack([(draft[pair] / target[pair]).clamp(max=1) for pair in pairs])
        measured += written * measured_tokens_per_pass([ratios], DRAFT)
    assert measured == pytest.approx(1 + kept_in_speculative_decoding(draft, target), rel=1e-6)


def test_acceptance_is_one_minus_tvd_and_independent_tokens_follow_the_formula():
    draft, target = torch.randn(2, 5, 7, dtype=torch.float64).log_softmax(-1)
    assert torch.allclose(acceptance(draft, target), 1 - tvd(draft, target))
    rate = 0.7
    assert tokens_per_pass(rate, 4) == pytest.approx((1 - rate**5) / (1 - rate))
    assert measured_tokens_per_pass([torch.ones(3), torch.ones(9)], 4) == 5
    assert torch.isnan(torch.tensor(measured_tokens_per_pass([torch.ones(3)], 4)))


def entry(gain: float, distance: float, **more: Any) -> dict[str, Any]:
    pattern = {"tokens": 10.0, "thinks": 0.0, "template_thinks": 0.0}
    own = {"student_bits_per_byte": 1.0, "teacher_bits_per_byte": 1.0 + distance}
    own |= {"teacher_mass_on_student_top_k": 0.95, "student_mass_on_student_top_k": 0.97}
    data = {"student_bits_per_byte": 2.0, "teacher_bits_per_byte": 2.0 - gain}
    patterns = {"student_pattern": pattern, "teacher_pattern": pattern | more}
    return {"on_data": data, "on_own_answers": own, "tokenizers": {"same": True}, **patterns}


def test_what_a_teacher_knows_counts_as_far_as_the_student_can_follow():
    near, far, ignorant = entry(0.4, 0.1), entry(0.5, 2.0), entry(-0.1, 0.0)
    assert [result["gain"] for result in ordered([ignorant, far, near])] == pytest.approx([0.4, 0.5, -0.1])
    assert "nothing to learn" in ordered([ignorant])[0]["reasons"][0]
    thinking = ordered([entry(0.4, 0.1, thinks=0.9, tokens=90.0)])[0]["reasons"]
    assert "it thinks before it answers, and the student does not" in thinking
    assert "answers in 90 tokens, the student in 10" in thinking


@pytest.fixture
def candidates(tmp_path: Path) -> dict[str, str]:
    """Rows of text, a student, and teachers with its tokenizer and with another one."""
    tokenizer, other = make_tokenizer(), make_tokenizer(280)
    folders = {
        "student": save(make_model(seed=0), tokenizer, tmp_path / "student"),
        "family": save(make_model(seed=1), tokenizer, tmp_path / "family"),
        "stranger": save(make_model(rows=280, seed=2), other, tmp_path / "stranger"),
    }
    rows = [{"prompt": text[:12], "completion": text[12:]} for text in sentences(5, seed=1, low=8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {name: str(folder) for name, folder in folders.items()}


def ranked(candidates: dict[str, str], *teachers: str, measures: str = "fit") -> dict[str, Any]:
    names = [candidates[name] for name in ("student", *teachers)]
    sizes = ["--rows", "3", "--answers", "2", "--max_new_tokens", "8", "--output", "ranks.json"]
    assert main(["teachers", "rank", *names, "--data", "rows.jsonl", *sizes, "--measures", *measures.split()]) == 0
    entries = json.loads(Path("ranks.json").read_text())["teachers"]
    return {Path(entry["name"]).name: entry for entry in entries}


def test_teachers_are_ranked_and_not_measured_twice(candidates, monkeypatch, capsys):
    found = ranked(candidates, "student", "stranger")
    itself, stranger = found["student"], found["stranger"]
    assert itself["on_data"]["agreement"] == 1
    assert itself["gain"] == itself["distance"] == 0
    assert itself["on_own_answers"]["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert stranger["on_data"]["teacher_bits_per_byte"] > 0
    assert not stranger["tokenizers"]["same"]
    assert any("use method alm" in reason for reason in stranger["reasons"])
    assert "agree own" in capsys.readouterr().out
    monkeypatch.setattr(Pair, "compared", lambda *arguments: pytest.fail("it is kept"))
    assert ranked(candidates, "student", "stranger") == found


def test_a_draft_is_measured_on_what_its_target_writes(candidates, capsys):
    drafts = ranked(candidates, "student", "family", measures="acceptance")
    assert drafts["student"]["acceptance"]["acceptance"] == pytest.approx(1, abs=1e-5)
    assert drafts["student"]["acceptance"]["tokens_per_pass_greedy"] == 5
    assert 0 < drafts["family"]["acceptance"]["acceptance"] < 1
    command = ["teachers", "rank", candidates["student"], candidates["stranger"], "--data", "rows.jsonl"]
    assert main([*command, "--measures", "acceptance", "--rows", "2"]) == 2
    assert "different tokenizers" in capsys.readouterr().err


def test_a_served_teacher_is_the_same_teacher(candidates):
    family = candidates["family"]
    local = ranked(candidates, "family")["family"]
    settings = {"root": family, "tokenizer": load_processing_class(family), "max_model_len": 256}
    with fake_vllm(ServedStates, served=load_model(family).eval(), **settings) as fake:
        served = ranked({**candidates, "served": f"server:{fake.url}"}, "served")
    (entry,) = served.values()
    for name in ("on_data", "on_own_answers"):
        assert entry[name] == pytest.approx(local[name], abs=1e-4)
    assert entry["gain"] == pytest.approx(local["gain"], abs=1e-4)


def test_a_server_that_generates_is_refused(candidates, capsys):
    family = candidates["family"]
    with fake_vllm(ServedModel, root=family, tokenizer=load_processing_class(family)) as fake:
        command = ["teachers", "rank", candidates["student"], f"server:{fake.url}", "--data", "rows.jsonl"]
        assert main(command) == 2
    assert "--signal hidden" in capsys.readouterr().err
