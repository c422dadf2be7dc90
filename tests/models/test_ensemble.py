"""Ensemble: the geometric mean of its members, wherever a causal LM can stand."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mmkd.models.ensemble import Ensemble, load_ensemble
from scripts.make_tiny_models import make_model, make_tokenizer, save
from tests.alignment.tiny_tokenizers import CHATTERS

IDS = torch.randint(300, (2, 7), generator=torch.Generator().manual_seed(0))


def test_log_probs_are_the_renormalised_mean_of_the_members() -> None:
    models = [make_model(seed=1), make_model(layers=3, width=48, rows=320, seed=2)]
    with torch.no_grad():
        members = [model(input_ids=IDS).logits[..., :300].double().log_softmax(-1) for model in models]
    product = (members[0].exp() * members[1].exp()).sqrt()
    found = Ensemble(models)(IDS).logits
    torch.testing.assert_close(found.double(), (product / product.sum(-1, keepdim=True)).log(), rtol=1e-5, atol=1e-5)


def test_an_ensemble_of_one_model_is_that_model() -> None:
    model: Any = make_model().eval()
    both: Any = Ensemble([model, model])
    with torch.no_grad():
        torch.testing.assert_close(both(IDS).logits, model(input_ids=IDS).logits.log_softmax(-1))
    settings = {"max_new_tokens": 6, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    assert torch.equal(both.generate(IDS, **settings), model.generate(IDS, **settings))
    assert not both.training
    assert both.device == model.device
    assert both.config.vocab_size == 300


def test_padding_on_the_left_changes_nothing() -> None:
    both: Any = Ensemble([make_model(seed=1), make_model(seed=2)])
    padded, mask = torch.nn.functional.pad(IDS, (3, 0)), torch.nn.functional.pad(torch.ones_like(IDS), (3, 0))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = both(padded, mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, both(IDS).logits, rtol=1e-4, atol=1e-4)
    generated = [
        both.generate(ids, attention_mask=m, max_new_tokens=4, do_sample=False, pad_token_id=0)[:, -4:]
        for ids, m in ((padded, mask), (IDS, torch.ones_like(IDS)))
    ]
    assert torch.equal(*generated)


def test_members_are_loaded_by_name_and_must_share_their_tokens(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    names = [str(save(make_model(rows=rows), tokenizer, tmp_path / str(rows))) for rows in (len(tokenizer), 320)]
    both = load_ensemble(names)
    assert both.config.vocab_size == len(tokenizer)
    assert len(both.members) == 2
    other = str(save(make_model(rows=512), CHATTERS["llama"](), tmp_path / "other"))
    with pytest.raises(ValueError, match=r"different vocabularies.*mmkd transfer-tokenizer"):
        load_ensemble([names[0], other])


def test_it_is_what_an_evaluation_harness_expects_and_cannot_be_saved(tmp_path: Path) -> None:
    both: Any = Ensemble([make_model(seed=1), make_model(seed=2)])
    both.eval()
    both.tie_weights()
    before = both(IDS).logits
    assert both.config.model_type == "llama"
    assert both.config.max_position_embeddings == 256
    assert torch.equal(both(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits, before)
    with pytest.raises(ValueError, match="save its members"):
        both.save_pretrained(tmp_path)


def test_too_few_members_and_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="two models or more"):
        Ensemble([make_model()])
    with pytest.raises(ValueError, match="vocab_size is 301"):
        Ensemble([make_model(), make_model()], 301)
