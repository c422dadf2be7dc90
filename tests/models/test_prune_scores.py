"""Importance scores: equal to plain numpy, blind to padding, and what they choose."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from mmkd.models.assemble import prune, pruned
from mmkd.models.prune_axes import FFN, HIDDEN, QUERIES, Axes, text_part
from mmkd.models.prune_calibration import (
    activation_scores,
    block_influence,
    gradient_scores,
    losses_without,
    mean_loss,
)
from mmkd.models.prune_search import SizeSearch, milliseconds_per_token
from mmkd.models.prune_sizes import PruneSizes
from scripts.golden import prune_scores as plain
from tests.models.test_prune_families import EXPERTS, model_of

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "PRUNE_scores.npz")
KINDS = [HIDDEN, FFN, QUERIES]


def golden_model() -> Any:
    config = LlamaConfig(
        vocab_size=plain.VOCAB,
        hidden_size=plain.HIDDEN,
        intermediate_size=plain.FFN,
        num_hidden_layers=plain.LAYERS,
        num_attention_heads=plain.HEADS,
        num_key_value_heads=plain.GROUPS,
        head_dim=plain.WIDTH,
        rms_norm_eps=plain.EPSILON,
        tie_word_embeddings=True,
    )
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    weights = {name[7:]: torch.tensor(GOLDEN[name]) for name in GOLDEN if name.startswith("weight ")}
    model.load_state_dict(weights, strict=False)
    return model


def padded() -> dict[str, Tensor]:
    """The golden rows as one batch, with padding behind the shorter ones."""
    rows = [torch.tensor(GOLDEN[f"row {number}"]) for number in range(3)]
    batch = {"input_ids": torch.full((3, 9), 3), "attention_mask": torch.zeros(3, 9, dtype=torch.long)}
    batch["labels"] = torch.full((3, 9), -100)
    for number, row in enumerate(rows):
        batch["input_ids"][number, : len(row)] = batch["labels"][number, : len(row)] = row
        batch["attention_mask"][number, : len(row)] = 1
    return batch


def same(ours: Tensor, name: str, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.double(), torch.tensor(GOLDEN[name]), rtol=tolerance, atol=1e-7)


def test_scores_of_activations_are_those_of_plain_numpy() -> None:
    model, batch = golden_model(), padded()
    assert mean_loss(model, [batch]) == pytest.approx(float(GOLDEN["loss"]), rel=1e-6)
    scores = activation_scores(model, Axes.of(model, KINDS), [batch])
    for layer in range(plain.LAYERS):
        same(scores.units[FFN, layer], f"ffn {layer}")
        same(scores.units[QUERIES, layer], f"queries {layer}")
    same(scores.units[HIDDEN, None], "hidden")
    same(block_influence(model, text_part(model), [batch]), "influence")


def test_scores_of_gradients_are_those_of_plain_numpy() -> None:
    model = golden_model()
    model.model.norm.weight.requires_grad_(False)
    scores = gradient_scores(model, Axes.of(model, KINDS), [padded()])
    for layer in range(plain.LAYERS):
        same(scores.units[FFN, layer], f"gradient ffn {layer}")
        same(scores.units[QUERIES, layer], f"gradient queries {layer}")
    same(scores.units[HIDDEN, None], "gradient hidden")
    # What was frozen stays so.
    trained = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert not trained.pop("model.norm.weight")
    assert all(trained.values())


def test_the_golden_numbers_are_what_the_script_computes() -> None:
    made = {name[7:]: GOLDEN[name] for name in GOLDEN if name.startswith("weight ")}
    rows = [GOLDEN[f"row {number}"] for number in range(3)]
    for name, values in plain.activation_scores(made, rows).items():
        np.testing.assert_allclose(values, GOLDEN[name], rtol=1e-12)


def test_a_layers_loss_is_that_of_the_model_without_it() -> None:
    model, batch = golden_model(), padded()
    losses = losses_without(model, text_part(model), [batch])
    whole = mean_loss(model, [batch])
    for layer in range(2):
        other = mean_loss(prune(model, layers=[1 - layer]), [batch])
        assert float(losses[layer]) == pytest.approx(other - whole, abs=1e-6)


def test_what_matters_most_is_kept() -> None:
    model, batch = golden_model(), padded()
    scores = activation_scores(model, Axes.of(model, KINDS), [batch])
    _, cut = pruned(model, PruneSizes(hidden_size=4, intermediate_size=2, num_key_value_heads=1), scores)
    for (kind, layer), kept in cut.units.items():
        if kind == "groups":
            ranked = scores.groups((QUERIES, layer), plain.GROUPS)
        elif kind == QUERIES:
            continue
        else:
            ranked = scores.units[kind, layer]
        dropped = [unit for unit in range(len(ranked)) if unit not in kept.tolist()]
        assert ranked[kept].min() >= ranked[dropped].max()


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_scored_by_what_they_add(family: str) -> None:
    model = model_of(family)
    batch = {"input_ids": torch.randint(3, 57, (2, 8), generator=torch.Generator().manual_seed(2))}
    scores = activation_scores(model, Axes.of(model, ["experts"]), [batch])
    silent = int(scores.units["experts", 0].argmax())
    experts = model.model.layers[0].mlp.experts
    with torch.no_grad():
        experts.down_proj[silent].zero_()
        if family == "gpt_oss":
            experts.down_proj_bias[silent].zero_()
    after = activation_scores(model, Axes.of(model, ["experts"]), [batch])
    assert after.units["experts", 0][silent] == 0
    kept = prune(model, num_experts=4, scores=after).model.layers[0].mlp.experts.down_proj
    assert not any(bool((expert == 0).all()) for expert in kept)


def test_parameters_are_counted_without_making_the_model() -> None:
    model = golden_model()
    search = SizeSearch(model, PruneSizes(), None)
    for candidate in search.candidates(400)[:3]:
        student: Any = pruned(model, candidate.sizes)[0]
        assert student.num_parameters() == candidate.parameters <= 400
    assert search.parameters(PruneSizes()) == model.num_parameters()


def test_a_search_keeps_sizes_that_are_set_and_prefers_what_matters() -> None:
    model, batch = golden_model(), padded()
    scores = activation_scores(model, Axes.of(model, KINDS), [batch])
    found = SizeSearch(model, PruneSizes(hidden_size=8), scores).candidates(600)
    assert {candidate.sizes.hidden_size for candidate in found} == {8}
    assert found == sorted(found, key=lambda each: (-each.kept, -each.parameters))
    with pytest.raises(ValueError, match="the least that is searched has"):
        SizeSearch(model, PruneSizes(), None).candidates(10)


def test_a_search_by_time_takes_the_largest_that_is_fast_enough() -> None:
    model = golden_model()
    search = SizeSearch(model, PruneSizes(), None)

    def measure(sizes: PruneSizes) -> float:
        return float(search.parameters(sizes))

    found = search.fast_enough(500.0, measure)
    assert all(candidate.parameters <= 500 for candidate in found)
    assert max(candidate.parameters for candidate in found) > 400
    with pytest.raises(ValueError, match="the smallest candidates take longer"):
        search.fast_enough(1.0, measure)
    assert milliseconds_per_token(model) > 0
