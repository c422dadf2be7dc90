"""Dual-head students: any backbone, saved and loaded through the auto classes, exported to run without mmkd."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    ConvNextConfig,
    Dinov2Config,
    LlamaConfig,
    ResNetConfig,
    SiglipVisionConfig,
    ViTConfig,
    pipeline,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mmkd.models.dual_head import (
    CosineHead,
    DualHeadConfig,
    DualHeadForImageClassification,
    DualHeadForSequenceClassification,
)
from tests.helpers import VISION, environment

NAMES = ["cat", "dog", "bird"]
WORDS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 50,
}
BACKBONES: dict[str, Any] = {
    "vit": ViTConfig(**VISION),
    "resnet": ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic"),
    "convnext": ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, image_size=32),
    "clip": CLIPVisionConfig(**VISION, projection_dim=12),
    "siglip": SiglipVisionConfig(**VISION),
    "dinov2": Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, mlp_ratio=1
    ),
}
TEXTS: dict[str, Any] = {"bert": BertConfig(**WORDS), "llama": LlamaConfig(**WORDS, pad_token_id=0)}


def student(name: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    cls: Any = DualHeadForSequenceClassification if name in TEXTS else DualHeadForImageClassification
    return cls.from_backbone({**BACKBONES, **TEXTS}[name], NAMES, **settings).eval()


def inputs(name: str, rows: int = 2) -> dict[str, torch.Tensor]:
    if name in TEXTS:
        return {"input_ids": torch.randint(5, 50, (rows, 6), generator=torch.Generator().manual_seed(0))}
    size = 32 if name in ("resnet", "convnext") else 8
    return {"pixel_values": torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("name", [*BACKBONES, *TEXTS])
def test_a_saved_student_comes_back_through_the_auto_classes(name: str, tmp_path: Path) -> None:
    model = student(name, alpha=0.3, beta=2.0)
    model.save_pretrained(tmp_path)
    auto_class: Any = AutoModelForSequenceClassification if name in TEXTS else AutoModelForImageClassification
    again = auto_class.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert (again.config.alpha, again.config.beta, again.config.id2label) == (0.3, 2.0, dict(enumerate(NAMES)))
    ours, theirs = model(**inputs(name)), again(**inputs(name))
    for key in ("logits", "ce_logits", "kd_logits", "features"):
        assert torch.equal(ours[key], theirs[key])
    mixture = 0.3 * ours.ce_logits.softmax(-1) + 0.7 * (ours.kd_logits / 2).softmax(-1)
    torch.testing.assert_close(ours.logits.exp(), mixture)


def test_a_backbone_of_timm(tmp_path: Path) -> None:
    timm: Any = pytest.importorskip("timm", reason="needs mmkd[timm], whose torchvision CPU builds of torch lack")
    network = timm.create_model("resnet10t").eval()
    timm.models.save_for_hf(network, tmp_path / "timm", safe_serialization=True)
    model = DualHeadForImageClassification.from_backbone(str(tmp_path / "timm"), NAMES).eval()
    pixels = torch.randn(2, 3, 64, 64)
    expected = network.forward_head(network.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(model(pixels).features, expected)
    model.save_pretrained(tmp_path / "student")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "student")
    assert torch.equal(again(pixels).logits, model(pixels).logits)


def test_every_parameter_of_a_backbone_gets_a_gradient() -> None:
    for name in [*BACKBONES, *TEXTS]:
        model = student(name).train()
        outputs = model(**inputs(name))
        (outputs.ce_logits.sum() + outputs.kd_logits.square().sum()).backward()
        idle = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert idle == [] or all("mask_token" in key or "embed" in key or "head.k_proj" in key for key in idle), name


@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler"])
def test_pooling(pooling: str) -> None:
    model = student("siglip", pooling=pooling)
    outputs = model.backbone(**inputs("siglip"))
    hidden = outputs.last_hidden_state
    expected = {"cls": hidden[:, 0], "mean": hidden.mean(1), "pooler": outputs.pooler_output}[pooling]
    assert torch.equal(model.features(**inputs("siglip")), expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_does_not_change_a_texts_features(pooling: str, side: str) -> None:
    model = student("bert" if pooling == "mean" else "llama", pooling=pooling)
    ids = inputs("llama", 1)["input_ids"]
    mask, pad = torch.ones_like(ids), torch.zeros(1, 2, dtype=torch.long)
    parts = (lambda a, b: [b, a]) if side == "left" else (lambda a, b: [a, b])
    # A decoder's positions follow its mask only where they are given; BERT counts from the left.
    positions = {"position_ids": torch.arange(6)[None]}
    long = {"position_ids": torch.cat(parts(positions["position_ids"], pad), 1)}
    alone = model.features(input_ids=ids, attention_mask=mask, **positions)
    padded = model.features(
        input_ids=torch.cat(parts(ids, pad), 1), attention_mask=torch.cat(parts(mask, pad), 1), **long
    )
    torch.testing.assert_close(alone, padded)


def test_a_clip_student_starts_from_text_embeddings(tmp_path: Path) -> None:
    tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=12))
    tower.save_pretrained(tmp_path)
    model = DualHeadForImageClassification.from_backbone(str(tmp_path), NAMES, kd_head="cosine").eval()
    embeddings = torch.randn(3, 12)
    model.init_heads(embeddings)
    outputs = model(**inputs("clip"))
    features = tower.eval()(**inputs("clip")).image_embeds
    torch.testing.assert_close(outputs.features, features)
    torch.testing.assert_close(outputs.ce_logits, features @ embeddings.T)
    cosine = torch.nn.functional.cosine_similarity(features[:, None], embeddings[None], dim=-1)
    torch.testing.assert_close(outputs.kd_logits, cosine / 0.01, rtol=1e-4, atol=1e-4)


def test_embeddings_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"text embeddings are \(3, 5\).*heads \(3, 16\)"):
        student("vit").init_heads(torch.randn(3, 5))


@pytest.mark.parametrize("name", ["vit", "resnet", "convnext", "bert"])
@pytest.mark.parametrize(("head", "alpha"), [("ce", 1.0), ("kd", 0.0), ("merged", 1.0), ("merged", 0.0)])
def test_a_plain_model_is_the_student_at_the_ends(name: str, head: str, alpha: float, tmp_path: Path) -> None:
    model = student(name, alpha=alpha, beta=2.0)
    model.plain_model(head).save_pretrained(tmp_path)
    auto_class: Any = AutoModelForSequenceClassification if name in TEXTS else AutoModelForImageClassification
    plain = auto_class.from_pretrained(tmp_path).eval()
    assert type(plain).__module__.startswith("transformers.")
    assert plain.config.id2label == dict(enumerate(NAMES))
    probabilities = model(**inputs(name)).logits.exp()
    torch.testing.assert_close(plain(**inputs(name)).logits.softmax(-1), probabilities, rtol=1e-4, atol=1e-5)


def test_a_merged_head_is_the_geometric_mean() -> None:
    model = student("vit", alpha=0.4, beta=2.0)
    outputs, plain = model(**inputs("vit")), model.plain_model("merged")(**inputs("vit"))
    mean = 0.4 * outputs.ce_logits.log_softmax(-1) + 0.6 * (outputs.kd_logits / 2).log_softmax(-1)
    torch.testing.assert_close(plain.logits.softmax(-1), mean.softmax(-1))


@pytest.mark.parametrize("name", ["clip", "dinov2", "siglip"])
def test_a_backbone_that_transformers_pools_otherwise_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="Export the whole model with export_program"):
        student(name).plain_model()


def test_a_cosine_head_is_no_linear_layer() -> None:
    with pytest.raises(ValueError, match="cosine head"):
        student("vit", kd_head="cosine").plain_model("merged")
    with pytest.raises(ValueError, match="none of the single heads"):
        student("vit").plain_model("both")


@pytest.mark.parametrize("name", ["vit", "clip", "bert"])
def test_an_exported_program_is_exact_and_needs_torch_alone(name: str, tmp_path: Path) -> None:
    model = student(name, alpha=0.3, kd_head="cosine")
    model.export_program(tmp_path / "student.pt2")
    given = {**inputs(name, 5)}
    if name in TEXTS:
        given["attention_mask"] = torch.ones_like(given["input_ids"])
    torch.save((list(given.values()), model(**given).logits.exp().detach()), tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "inputs, expected = torch.load('expected.pt')\n"
        "program = torch.export.load('student.pt2').module()\n"
        "torch.testing.assert_close(program(*inputs), expected)\n"
        "assert not {'mmkd', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment())


@pytest.mark.parametrize("first", ["mmkd", "transformers"])
def test_a_pipeline_works_where_mmkd_was_imported(first: str, tmp_path: Path) -> None:
    student("vit").save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "model")
    Image.fromarray(np.zeros((10, 12, 3), np.uint8)).save(tmp_path / "image.png")
    imports = "import mmkd\nassert 'torch' not in sys.modules\n" if first == "mmkd" else ""
    imports += "from transformers import pipeline\n" + ("" if first == "mmkd" else "import mmkd\n")
    code = (
        f"import sys\n{imports}"
        "answer = pipeline('image-classification', 'model', device='cpu')('image.png')\n"
        "assert {one['label'] for one in answer} == {'cat', 'dog', 'bird'}\n"
        "assert abs(sum(one['score'] for one in answer) - 1) < 1e-5\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment())


def test_any_module_may_be_imported_first() -> None:
    """transformers' auto classes bring the dual heads, which need what asked for the auto classes."""
    subprocess.run([sys.executable, "-c", "import mmkd.models.assemble"], check=True, env=environment())


def test_a_plain_model_works_in_a_pipeline(tmp_path: Path) -> None:
    student("vit").plain_model().save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(tmp_path)
    image = Image.fromarray(np.zeros((10, 12, 3), np.uint8))
    answer: Any = pipeline("image-classification", str(tmp_path), device="cpu")(image)
    assert {one["label"] for one in answer} == set(NAMES)


def test_labels_give_the_loss_of_the_prediction() -> None:
    outputs = student("vit")(**inputs("vit"), labels=torch.tensor([0, 2]))
    expected = -outputs.logits[[0, 1], [0, 2]].mean()
    torch.testing.assert_close(outputs.loss, expected)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"kd_head": "mlp"}, "kd_head is 'mlp'"),
        ({"alpha": 2.0}, "alpha is 2.0"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"cosine_temperature": 0.0}, "cosine_temperature is 0.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings: dict[str, Any], says: str) -> None:
    config: Any = DualHeadConfig
    with pytest.raises(ValueError, match=says):
        config(backbone_config=ViTConfig(**VISION), **settings)


def test_one_class_is_none() -> None:
    with pytest.raises(ValueError, match="two classes or more"):
        DualHeadForImageClassification.from_backbone(ViTConfig(**VISION), ["cat"])


def test_the_cosine_head_does_not_see_lengths() -> None:
    head, features = CosineHead(4, 3, 0.01), torch.randn(2, 4)
    torch.testing.assert_close(head(features), head(7 * features), rtol=1e-4, atol=1e-4)
