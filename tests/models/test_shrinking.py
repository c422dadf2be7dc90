"""Learnt masks: they begin open, reach their target, and the model that is cut computes what the masked one did."""

from typing import Any

import pytest
import torch
from transformers import BertConfig, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel, ViTConfig
from transformers import VisionTextDualEncoderConfig as PairConfig
from transformers import VisionTextDualEncoderModel as PairModel

from mmkd.errors import UserError
from mmkd.models.inherit import tower_sizes
from mmkd.models.shrinking import Shrinking
from mmkd.models.shrinking_cut import cut_model

TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
VISION, TEXT = {**TOWER, "image_size": 8, "patch_size": 4}, {**TOWER, "vocab_size": 20, "max_position_embeddings": 6}
HALF = {"vision": 0.5, "text": 0.4}
BATCH = {"input_ids": torch.tensor([[1, 2, 5, 19], [3, 4, 6, 19]])}


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    text: dict[str, Any] = {**TEXT, "eos_token_id": 19, "initializer_range": 0.3}
    vision: dict[str, Any] = {**VISION, "initializer_range": 0.3}
    if family == "clip":
        text |= {"bos_token_id": 1}
        return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=12)).eval()
    return SiglipModel(SiglipConfig(vision_config=vision, text_config={**text, "projection_size": 16})).eval()


def embeddings(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    outputs = model(**BATCH, pixel_values=pixels)
    return outputs.image_embeds, outputs.text_embeds


def closed(shrinking: Shrinking) -> None:
    """Makes the masks want a part of everything gone."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tower in HALF:
            for kind, logits in shrinking.masks_of(tower).logits.items():
                logits.copy_(6 * torch.rand(logits.shape, generator=generator) - (6 if kind == "layers" else 4))


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_cut_model_computes_what_the_masked_one_did(family: str) -> None:
    model = model_of(family)
    whole = embeddings(model)
    shrinking = Shrinking(model, HALF)
    closed(shrinking)
    shrinking.freeze()
    with torch.no_grad():
        masked = embeddings(model.train())
        small = cut_model(model, shrinking)
        cut = embeddings(small)
    sizes = tower_sizes(small.config)
    assert all(sizes[tower].layers < 3 for tower in HALF)
    assert all(sizes[tower].width < 16 for tower in HALF)
    assert type(small) is type(model)
    kept = (
        shrinking.current("vision", training=False).hidden.nonzero().flatten() if family == "siglip" else slice(None)
    )
    for ours, theirs in zip(cut, masked, strict=True):
        torch.testing.assert_close(ours, theirs[:, kept], rtol=1e-4, atol=1e-5)
    shrinking.remove()
    for ours, theirs in zip(embeddings(model.eval()), whole, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_masks_begin_open_and_change_nearly_nothing() -> None:
    model = model_of("clip")
    whole = embeddings(model)
    shrinking = Shrinking(model, {"vision": 1.0, "text": 1.0})
    for tower in HALF:
        assert shrinking.masks_of(tower).expected_share().item() == pytest.approx(1, abs=1e-3)
    for mask in vars(shrinking.current("text", training=True)).values():
        assert (mask == 1).all()
    for ours, theirs in zip(embeddings(model), whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_a_loss_reaches_the_masks_and_the_penalty_brings_them_to_the_target() -> None:
    model = model_of("clip").train()
    shrinking = Shrinking(model, HALF)
    logits = [parameter for name, parameter in shrinking.named_parameters() if "logits" in name]
    multipliers = [parameter for name, parameter in shrinking.named_parameters() if "multipliers" in name]
    down = torch.optim.AdamW(logits, lr=0.2, weight_decay=0, betas=(0.8, 0.99), eps=1e-15)
    up = torch.optim.AdamW(multipliers, lr=0.05, weight_decay=0, maximize=True)
    torch.cat(embeddings(model)).square()[:, 0].sum().backward()
    assert all(parameter.grad is not None for parameter in logits)
    for step in range(120):
        shrinking.penalty(step / 80).backward()
        for optimizer in (down, up):
            optimizer.step()
            optimizer.zero_grad()
    for tower, target in HALF.items():
        masks = shrinking.masks_of(tower)
        assert masks.expected_share().item() == pytest.approx(target, abs=0.1)
        kept = masks.kept_size()
        # Heads of four channels come in coarse steps, and the FFN takes up the difference as far as it can.
        assert kept.weights / masks.size.weights == pytest.approx(target, abs=0.12)
    shrinking.freeze()
    assert shrinking.penalty(1.0).item() == 0
    assert not any(parameter.requires_grad for parameter in logits)


def test_noise_depends_on_seed_and_step_alone() -> None:
    model = model_of("clip").train()
    shrinking = Shrinking(model, HALF)
    closed(shrinking)
    shrinking.sample(1, 5)
    first, again = embeddings(model)[0], embeddings(model)[0]
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    shrinking.sample(1, 6)
    assert not torch.equal(embeddings(model)[0], first)
    shrinking.sample(1, 5)
    torch.testing.assert_close(embeddings(model)[0], first, rtol=0, atol=0)


def test_towers_with_other_modules_are_for_manual_inheritance() -> None:
    vision: dict[str, Any] = VISION
    text: dict[str, Any] = TEXT
    both = PairConfig.from_vision_text_configs(ViTConfig(**vision), BertConfig(**text))
    with pytest.raises(UserError, match="inherit: manual"):
        Shrinking(PairModel(both), HALF)
