"""DHO students (2505.07675): a backbone whose features feed a supervised head and a distillation head."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.utils.generic import ModelOutput

from mmkd.errors import UserError
from mmkd.losses.dual_head_losses import check_interpolation, interpolate
from mmkd.seams.transformers_seam import has_class_for

from .class_heads import CosineHead as CosineHead
from .class_heads import EmbedHead, ResidualAdapter, TextHead
from .features import (
    POOLINGS,
    backbone_class,
    new_backbone,
    pooled,
    pooler_arguments,
    usual_pooling,
    vision_tower,
    width_of,
)

if TYPE_CHECKING:
    # Its parts import peft, and this module may be imported while peft is.
    from .training_heads import TrainingHeads


class DualHeadConfig(PreTrainedConfig):
    """The config of backbone, pooling and heads, with the weights alpha and beta of the prediction."""

    model_type = "mmkd_dual_head"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="vit")
    }

    # A dict while a config is read from disk; after construction always a config.
    backbone_config: Any = None
    pooling: str | None = None
    kd_head: str = "linear"
    cosine_temperature: float = 0.01
    alpha: float = 0.5
    beta: float = 0.5
    embed_width: int | None = None
    """Width of the embeddings that are compared with texts of a vision-language model; None for a student without."""

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        self.pooling = self.pooling or usual_pooling(self.backbone_config, self.text)
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling is {self.pooling!r}; choose one of {', '.join(POOLINGS)}.")
        if self.kd_head not in ("linear", "cosine", "adapter"):
            raise UserError(f"kd_head is {self.kd_head!r}; choose linear, or cosine or adapter for students of a VLM.")
        if self.cosine_temperature <= 0:
            raise UserError(f"cosine_temperature is {self.cosine_temperature}; it divides cosines: make it positive.")
        check_interpolation(self.alpha, self.beta)

    @property
    def text(self) -> bool:
        """Whether the backbone reads tokens rather than pixels."""
        return False


class DualHeadTextConfig(DualHeadConfig):
    """The config of a dual-head model over a language model."""

    model_type = "mmkd_dual_head_text"
    sub_configs_defaults: ClassVar[dict[str, SubConfigSpec]] = {
        "backbone_config": SubConfigSpec(config_class=AutoConfig, model_type="bert")
    }

    @property
    def text(self) -> bool:
        """Whether the backbone reads tokens rather than pixels."""
        return True


@dataclass
class DualHeadOutput(ModelOutput):
    """The predictions of both heads. `logits` is the log of the interpolated one, so that softmax gives it back."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    ce_logits: Tensor | None = None
    kd_logits: Tensor | None = None
    features: Tensor | None = None
    embeds: Tensor | None = None
    extra: dict[str, Tensor] | None = None
    """What heads say that the student has in training only (`mmkd.models.training_heads`)."""


class _DualHeadModel(PreTrainedModel):
    """The common base of image and text models."""

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    # Otherwise the Trainer passes num_items_in_batch, which backbones do not accept.
    accepts_loss_kwargs = False
    config: DualHeadConfig

    def __init__(self, config: DualHeadConfig, backbone: PreTrainedModel | None = None):
        super().__init__(config)
        if backbone is None:
            backbone = new_backbone(config.backbone_config, config.pooling)
        self.backbone = backbone
        width, classes = width_of(backbone), len(config.id2label or {})
        tau = config.cosine_temperature
        self.adapter = ResidualAdapter(backbone) if config.kd_head == "adapter" else None
        if self.adapter is not None:
            width = self.adapter.width
        self.feature_width = width
        self.ce_head: Any = nn.Linear(width, classes) if self.adapter is None else CosineHead(width, classes, tau)
        if self.adapter is not None:
            self.kd_head: nn.Module = TextHead(backbone, self.adapter, classes, tau)
        elif config.kd_head == "cosine":
            self.kd_head = CosineHead(width, classes, tau)
        else:
            self.kd_head = nn.Linear(width, classes)
        self.embed_head = None if config.embed_width is None else EmbedHead(width, config.embed_width)
        self.training_heads: TrainingHeads | None = None
        self.post_init()

    @classmethod
    def from_backbone(
        cls, backbone: str | PreTrainedModel | PreTrainedConfig, class_names: list[str], **settings: Any
    ) -> Any:
        """A student with new heads over a backbone: a Hub id or folder, a model, or a config (random weights).

        `settings` are fields of the config; for a name, `dtype`, `revision`, `trust_remote_code` and
        `attn_implementation` are passed to from_pretrained. Of a CLIP- or SigLIP-like model the vision tower is used.
        """
        if len(class_names) < 2:
            raise UserError(f"A classifier needs two classes or more, not {len(class_names)}: pass their names.")
        keys = ("dtype", "revision", "trust_remote_code", "attn_implementation")
        loading = {key: settings.pop(key) for key in keys if key in settings}
        pooling = settings.pop("pooling", None)
        if isinstance(backbone, str):
            hub = {key: loading[key] for key in keys[1:3] if key in loading}
            tower = vision_tower(AutoConfig.from_pretrained(backbone, **hub))
            pooling = pooling or usual_pooling(tower, cls is DualHeadForSequenceClassification)
            model = backbone_class(tower).from_pretrained(
                backbone, config=tower, use_safetensors=True, **pooler_arguments(tower, pooling), **loading
            )
        elif isinstance(backbone, PreTrainedConfig):
            tower, model = vision_tower(backbone), None
        else:
            tower, model = backbone.config, backbone
        config_class: Any = cls.config_class
        config = config_class(
            backbone_config=tower,
            pooling=pooling,
            id2label=dict(enumerate(class_names)),
            label2id={name: number for number, name in enumerate(class_names)},
            **settings,
        )
        made = cls(config, model)
        if made.adapter is not None:
            made.adapter.take(made.backbone)
        return made

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """Saves the weights under their current names.

        By default transformers renames the weights of some backbones (ViT) to those of older versions, and its Trainer
        then does not find them when it resumes from the checkpoint.
        """
        return super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    def init_heads(self, text_embeddings: Float[Tensor, "class width"]) -> None:
        """Initialises both heads with the teacher's text embeddings (language-aware initialisation) and zero biases.

        Raises UserError if the student's features do not have the teacher's width.
        """
        for head in (self.ce_head, self.kd_head):
            weight = head.get_parameter("weight")
            if weight.shape != text_embeddings.shape:
                raise UserError(
                    f"The teacher's text embeddings are {tuple(text_embeddings.shape)} (classes, width), the "
                    f"student's heads {tuple(weight.shape)}. Take a student whose features have "
                    "the teacher's width (the vision tower of a CLIP-like model), or set head_init: random.",
                    because="meaning",
                )
            with torch.no_grad():
                weight.copy_(text_embeddings)
                bias = dict(head.named_parameters()).get("bias")
                if bias is not None:
                    bias.zero_()

    def answer(self, features: Float[Tensor, "row width"], labels: Int[Tensor, "row"] | None = None) -> DualHeadOutput:
        """The predictions of both heads from the features, and the loss where there are labels."""
        ce_logits, kd_logits = self.ce_head(features), self.kd_head(features)
        logits = interpolate(ce_logits, kd_logits, self.config.alpha, self.config.beta)
        loss = None if labels is None else nll_loss(logits, labels)
        embeds = None if self.embed_head is None else self.embed_head(features)
        return DualHeadOutput(loss, logits, ce_logits, kd_logits, features, embeds)

    def predict(self, labels: Int[Tensor, "row"] | None, **inputs: Any) -> DualHeadOutput:
        """The answer to inputs of the backbone; in training, also what the heads of the training say."""
        heads = self.training_heads if self.training else None
        if heads is None:
            return self.answer(self.features(**inputs), labels)
        with heads.listening(self.backbone) as captured:
            output = self.answer(self.features(**inputs), labels)
            output.extra = heads(output, captured, inputs.get("attention_mask"))
        return output

    def single_head(self, head: str = "ce") -> tuple[Float[Tensor, "class width"], Float[Tensor, "class"]]:
        """Weight and bias of one linear head in place of both.

        ce: the supervised head; exactly this model at alpha 1. kd: the distillation head over beta; exactly this model
        at alpha 0. merged: alpha ce + (1 - alpha) kd / beta, the normalised *geometric* mean of the two predictions;
        this model takes the arithmetic one, so the two agree at alpha 0 and 1 and only nearly in between. Raises
        UserError for a cosine head, which no linear layer can replace, and for an unknown name.
        """
        if head not in ("ce", "kd", "merged"):
            raise UserError(f"{head!r} is none of the single heads; choose ce, kd or merged.")
        alpha = {"ce": 1.0, "kd": 0.0, "merged": self.config.alpha}[head]
        if self.adapter is not None:
            raise UserError(
                "An adapter stands between the backbone and the heads, which no classifier of transformers has. "
                "Export the whole model with export_program.",
                because="upstream",
            )
        if alpha < 1 and not isinstance(self.kd_head, nn.Linear):
            raise UserError(
                "A cosine head divides by the features' length, which no linear layer does. Export head 'ce', or the "
                "whole model with export_program.",
                because="meaning",
            )
        weight, bias = alpha * self.ce_head.weight.detach(), alpha * self.ce_head.bias.detach()
        if alpha < 1:
            share = (1 - alpha) / self.config.beta
            weight = weight + share * self.kd_head.get_parameter("weight").detach()
            bias = bias + share * self.kd_head.get_parameter("bias").detach()
        return weight, bias

    def plain_model(self, head: str = "ce") -> PreTrainedModel:
        """A model of transformers' own classes with one head (see `single_head`), which loads without mmkd.

        Raises UserError if transformers' classifier of this backbone pools its features differently.
        """
        auto_class: Any = AutoModelForSequenceClassification if self.config.text else AutoModelForImageClassification
        config: Any = type(self.config.backbone_config).from_dict(self.config.backbone_config.to_dict())
        config.id2label, config.label2id = self.config.id2label, self.config.label2id
        weight, bias = self.single_head(head)
        unfit = UserError(
            f"transformers has no classifier over {config.model_type} that computes what this model does with "
            f"pooling {self.config.pooling!r}. Export the whole model with export_program, which needs torch alone.",
            because="upstream",
        )
        if not has_class_for(auto_class, type(config)):
            raise unfit
        if self.config.text and getattr(config, "pad_token_id", None) is None:
            raise UserError(
                "A text classifier of transformers finds the last token by the padding token, and the backbone's "
                "config names none. Set model.config.backbone_config.pad_token_id first."
            )
        plain = auto_class.from_config(config).to(weight.dtype).to(weight.device).eval()
        classifier = [module for module in plain.modules() if isinstance(module, nn.Linear)][-1]
        ours, theirs = self.backbone.state_dict(), plain.base_model.state_dict()
        if classifier.weight.shape != weight.shape or {k: v.shape for k, v in ours.items()} != {
            k: v.shape for k, v in theirs.items()
        }:
            raise unfit
        plain.base_model.load_state_dict(ours)
        with torch.no_grad():
            classifier.weight.copy_(weight)
            if classifier.bias is not None:
                classifier.bias.copy_(bias)
            probe = _probe(self)
            features = self.eval().features(**probe)
            same = torch.allclose(plain(**probe).logits, features @ weight.T + bias, rtol=1e-3, atol=1e-4)
        if not same:
            raise unfit
        return plain

    def export_program(self, path: str | Path, image_size: int | None = None) -> None:
        """Writes the model as a program that `torch.export.load` runs without mmkd or transformers.

        It computes exactly the interpolated class probabilities, for any number of rows, and of square images of
        `image_size` pixels (default: that of the backbone's config), or texts of any length.
        """
        probe = _probe(self, image_size)
        batch = torch.export.Dim("batch", min=1)
        module = _Probabilities(self.eval(), list(probe))
        # The range of the number of tokens is the backbone's own limit, which the export infers.
        automatic = torch.export.Dim.AUTO
        dimensions = {0: automatic, 1: automatic} if self.config.text else {0: batch}
        shapes = {"values": tuple(dimensions for _ in probe)}
        torch.export.save(torch.export.export(module, tuple(probe.values()), dynamic_shapes=shapes), str(path))

    def features(self, **inputs: Any) -> Float[Tensor, "row width"]:
        """One feature vector per row, shared by the heads."""
        features = pooled(self.backbone(**inputs), self.config.pooling, inputs.get("attention_mask"))
        return features if self.adapter is None else self.adapter(features)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CosineHead):
            nn.init.normal_(module.weight)
        if isinstance(module, EmbedHead):
            module.reset_parameters()


class DualHeadForImageClassification(_DualHeadModel):
    """A vision backbone of transformers or timm with a supervised and a distillation head."""

    config_class = DualHeadConfig
    main_input_name = "pixel_values"

    def forward(
        self,
        pixel_values: Float[Tensor, "row channel height width"],
        labels: Int[Tensor, "row"] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DualHeadOutput:
        return self.predict(labels, pixel_values=pixel_values, **kwargs)


class DualHeadForSequenceClassification(_DualHeadModel):
    """A language model with a supervised and a distillation head."""

    config_class = DualHeadTextConfig
    main_input_name = "input_ids"

    def forward(
        self,
        input_ids: Int[Tensor, "row token"],
        attention_mask: Int[Tensor, "row token"] | None = None,
        labels: Int[Tensor, "row"] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> DualHeadOutput:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return self.predict(labels, input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class _Probabilities(nn.Module):
    """The interpolated class probabilities, for inputs as positional arguments."""

    def __init__(self, model: _DualHeadModel, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, values, strict=True))).logits.exp()


def _probe(model: _DualHeadModel, image_size: int | None = None, rows: int = 3) -> dict[str, Tensor]:
    """Random inputs of the right shape and type."""
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config.backbone_config
    if model.config.text:
        # Any token will do, but the lowest ids are often special: padding, which a mask of ones contradicts.
        ids = torch.randint(5, config.vocab_size, (rows, 8), generator=generator)
        return {"input_ids": ids.to(model.device), "attention_mask": torch.ones_like(ids).to(model.device)}
    size = image_size or getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    shape = (rows, getattr(config, "num_channels", None) or 3, height, width)
    return {"pixel_values": torch.randn(shape, generator=generator).to(model.device, model.dtype)}


AutoConfig.register(DualHeadConfig.model_type, DualHeadConfig)
AutoConfig.register(DualHeadTextConfig.model_type, DualHeadTextConfig)
AutoModelForImageClassification.register(DualHeadConfig, DualHeadForImageClassification)
AutoModelForSequenceClassification.register(DualHeadTextConfig, DualHeadForSequenceClassification)
