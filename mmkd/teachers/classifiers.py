"""Teachers of classes: whatever can say one logit per class of an image or a text."""

import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, one_hot
from torch.optim.lr_scheduler import CosineAnnealingLR
from transformers import AutoModel, AutoProcessor

from mmkd.errors import UserError
from mmkd.losses.dual_head_losses import tip_adapter_logits
from mmkd.models.class_prompts import prompt_mean

OPEN_CLIP = "open_clip:"
"""What the name of a teacher of open_clip begins with, as in `open_clip:ViT-B-32/laion2b_s34b_b79k`."""


class ClassTeacher(ABC):
    """Answers rows (PIL images, or texts) with one logit per class."""

    kind: ClassVar[str]
    class_names: tuple[str, ...]

    @abstractmethod
    def logits(self, rows: Sequence[Any]) -> Float[Tensor, "row class"]:
        """Class logits in fp32 on the CPU."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What besides its weights decides the teacher's answers, as plain values."""


class Embedder(ABC):
    """Images and texts in one space."""

    name: str
    scale: float

    @abstractmethod
    def image_features(self, images: Sequence[Any]) -> Float[Tensor, "row width"]:
        """Features of images as the model gives them, in fp32."""

    @abstractmethod
    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "row width"]:
        """Features of texts as the model gives them, in fp32."""


class TransformersEmbedder(Embedder):
    """A CLIP- or SigLIP-like model of transformers."""

    def __init__(self, model: Any, processor: Any):
        if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
            raise UserError(
                f"{type(model).__name__} does not embed images and texts in one space. Take a CLIP- or SigLIP-like "
                "teacher, or another teacher_kind.",
                because="meaning",
            )
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.name = model.name_or_path
        self.scale = float(model.logit_scale.exp())

    @classmethod
    def load(cls, name: str, **kwargs: Any) -> "TransformersEmbedder":
        """That of a Hub id or a folder."""
        hub = {key: kwargs[key] for key in ("revision", "trust_remote_code") if key in kwargs}
        model = AutoModel.from_pretrained(name, use_safetensors=True, **kwargs)
        return cls(model, AutoProcessor.from_pretrained(name, **hub))

    @torch.no_grad()
    def image_features(self, images: Sequence[Any]) -> Float[Tensor, "row width"]:
        """Features of images as the model gives them, in fp32."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.model.device, self.model.dtype)
        return self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output.float()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "row width"]:
        """Features of texts as the model gives them, in fp32."""
        # SigLIP was trained on texts of one length and reads its answer off the last position.
        padding = "max_length" if "siglip" in self.model.config.model_type else True
        inputs = self.processor(text=list(texts), padding=padding, truncation=True, return_tensors="pt")
        inputs = {key: value.to(self.model.device) for key, value in inputs.items()}
        return self.model.get_text_features(**inputs, return_dict=True).pooler_output.float()


class OpenClipEmbedder(Embedder):
    """A model of open_clip, by `open_clip:architecture/pretrained`, or `open_clip:hf-hub:owner/name`."""

    def __init__(self, name: str, device: str | torch.device = "cpu"):
        import open_clip  # pyright: ignore[reportMissingImports]

        architecture = name.removeprefix(OPEN_CLIP)
        pretrained = None
        if not architecture.startswith("hf-hub:"):
            architecture, _, pretrained = architecture.partition("/")
        model, _, self.transform = open_clip.create_model_and_transforms(architecture, pretrained=pretrained or None)
        self.model, self.tokenizer = (
            model.eval().requires_grad_(False).to(device),
            open_clip.get_tokenizer(architecture),
        )
        self.name, self.device, self.scale = name, device, float(model.logit_scale.exp())

    @torch.no_grad()
    def image_features(self, images: Sequence[Any]) -> Float[Tensor, "row width"]:
        """Features of images as the model gives them, in fp32."""
        return self.model.encode_image(
            torch.stack([self.transform(image) for image in images]).to(self.device)
        ).float()

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Float[Tensor, "row width"]:
        """Features of texts as the model gives them, in fp32."""
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.device)).float()


class ZeroShotTeacher(ClassTeacher):
    """cos(image, class) times the model's own scale, a class being the mean of its prompts' unit features.

    `text_weights` are those means, of unit length unless `normalize_mean` is off (as the authors do for DFN's ViT-H);
    `text_embeddings` are the means of the features as they are, which DHO's students of a VLM start from.
    """

    kind = "zero_shot"

    def __init__(
        self, embedder: Embedder, class_names: Sequence[str], prompts: Sequence[str], normalize_mean: bool = True
    ):
        self.embedder, self.class_names, self.prompts = embedder, tuple(class_names), tuple(prompts)
        self.normalize_mean = normalize_mean
        features = torch.stack(
            [embedder.text_features([prompt.format(name) for prompt in prompts]).cpu() for name in class_names]
        )
        self.text_embeddings: Float[Tensor, "class width"] = features.mean(1)
        self.text_weights: Float[Tensor, "class width"] = prompt_mean(features, normalize_mean)

    def features(self, rows: Sequence[Any]) -> Float[Tensor, "row width"]:
        """Unit features of images."""
        return normalize(self.embedder.image_features(rows), dim=-1).cpu()

    def logits(self, rows: Sequence[Any]) -> Float[Tensor, "row class"]:
        """Class logits in fp32."""
        return self.embedder.scale * self.features(rows) @ self.text_weights.T

    @property
    def settings(self) -> dict[str, Any]:
        """The prompts."""
        return {"prompts": list(self.prompts), "normalize_mean": self.normalize_mean}


class TipAdapterTeacher(ClassTeacher):
    """Tip-Adapter-F (2207.09519): zero-shot logits plus a cache of a few labelled images, with fine-tuned keys."""

    kind = "tip_adapter"

    def __init__(
        self,
        zero_shot: ZeroShotTeacher,
        keys: Float[Tensor, "example width"],
        labels: Int[Tensor, "example"],
        alpha: float = 1.0,
        beta: float = 5.5,
    ):
        self.zero_shot, self.class_names, self.alpha, self.beta = zero_shot, zero_shot.class_names, alpha, beta
        self.keys, self.labels = keys, labels
        self.values = one_hot(labels, len(self.class_names)).float()

    @classmethod
    def fit(
        cls,
        zero_shot: ZeroShotTeacher,
        images: Sequence[Any],
        labels: Sequence[int],
        *,
        alpha: float = 1.0,
        beta: float = 5.5,
        epochs: int = 20,
        learning_rate: float = 1e-3,
        batch_size: int = 256,
        seed: int = 0,
    ) -> "TipAdapterTeacher":
        """The teacher whose keys start as the images' features and are trained with AdamW on their labels."""
        parts = [zero_shot.features(images[row : row + batch_size]) for row in range(0, len(images), batch_size)]
        features, targets = torch.cat(parts), torch.as_tensor(labels)
        keys = features.clone().requires_grad_()
        teacher = cls(zero_shot, keys, targets, alpha, beta)
        optimizer = torch.optim.AdamW([keys], lr=learning_rate, eps=1e-4)
        steps = epochs * -(-len(features) // batch_size)
        schedule = CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(features), generator=generator).split(batch_size):
                loss = cross_entropy(teacher.logits_of(features[rows]), targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        teacher.keys = keys.detach()
        return teacher

    def logits_of(self, features: Float[Tensor, "row width"]) -> Float[Tensor, "row class"]:
        """Class logits of unit features."""
        weights, scale = self.zero_shot.text_weights, self.zero_shot.embedder.scale
        return tip_adapter_logits(features, weights, self.keys, self.values, self.alpha, self.beta, scale)

    @torch.no_grad()
    def logits(self, rows: Sequence[Any]) -> Float[Tensor, "row class"]:
        """Class logits in fp32."""
        return self.logits_of(self.zero_shot.features(rows))

    @property
    def settings(self) -> dict[str, Any]:
        """The prompts, alpha and beta, and the cache in brief."""
        cache = {"keys_sum": round(self.keys.double().sum().item(), 6), "labels": self.labels.tolist()}
        return {**self.zero_shot.settings, "tip_alpha": self.alpha, "tip_beta": self.beta, **cache}


class ClassifierTeacher(ClassTeacher):
    """A classifier of transformers whose labels are the classes, in the same order."""

    kind = "classifier"

    def __init__(self, model: Any, processor: Any, class_names: Sequence[str]):
        check_classes(model.config.num_labels, class_names, "The teacher")
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.class_names = tuple(class_names)

    @torch.no_grad()
    def logits(self, rows: Sequence[Any]) -> Float[Tensor, "row class"]:
        """Class logits in fp32."""
        return self.answers(rows).cpu()

    def answers(self, rows: Sequence[Any]) -> Float[Tensor, "row class"]:
        """Class logits in fp32 where the model is; gradients pass."""
        if isinstance(rows[0], str):
            inputs = self.processor(list(rows), padding=True, truncation=True, return_tensors="pt")
        else:
            inputs = self.processor(images=list(rows), return_tensors="pt").to(self.model.dtype)
        return self.model(**inputs.to(self.model.device)).logits.float()

    @property
    def settings(self) -> dict[str, Any]:
        """Nothing: its weights say all."""
        return {}


class QuestionTeacher(ClassTeacher):
    """An LLM or a VLM that is asked the class: the logits of its answer's first token, one per class.

    With up to 26 classes the question lists them as A, B, ... and the answers are those letters; with more, they are
    the class names. Raises UserError where two answers begin with the same token.
    """

    kind = "question"

    def __init__(self, model: Any, processor: Any, class_names: Sequence[str], question: str | None = None):
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.class_names = tuple(class_names)
        letters = len(class_names) <= len(string.ascii_uppercase)
        answers = list(string.ascii_uppercase[: len(class_names)]) if letters else list(class_names)
        options = zip(answers, class_names, strict=True)
        listed = ", ".join(f"{answer}. {name}" if letters else name for answer, name in options)
        what = question or "Which of these is it?"
        self.question = f"{what} {listed}. Answer with the {'letter' if letters else 'name'} alone."
        tokenizer = getattr(processor, "tokenizer", processor)
        self.tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in answers]
        taken: dict[int, str] = {}
        for token, answer in zip(self.tokens, answers, strict=True):
            if token in taken:
                raise UserError(
                    f"The answers {taken[token]!r} and {answer!r} begin with the same token of the teacher's "
                    "tokenizer, so its first token cannot tell the classes apart. Rename one under class_names."
                )
            taken[token] = answer
        tokenizer.padding_side = "left"

    @torch.no_grad()
    def logits(self, rows: Sequence[Any]) -> Float[Tensor, "row class"]:
        """Logits of the answers as the first token, in fp32."""
        inputs = self._inputs(rows).to(self.model.device)
        return self.model(**inputs).logits[:, -1, self.tokens].float().cpu()

    def _inputs(self, rows: Sequence[Any]) -> Any:
        if isinstance(rows[0], str):
            conversations = [[{"role": "user", "content": f"{row}\n\n{self.question}"}] for row in rows]
            texts = [self._prompt(messages) for messages in conversations]
            return self.processor(texts, padding=True, return_tensors="pt", add_special_tokens=False)
        content = [{"type": "image"}, {"type": "text", "text": self.question}]
        prompt = self._prompt([{"role": "user", "content": content}])
        images = [[row] for row in rows]
        return self.processor(text=[prompt] * len(images), images=images, padding=True, return_tensors="pt")

    def _prompt(self, messages: list[dict[str, Any]]) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    @property
    def settings(self) -> dict[str, Any]:
        """The question."""
        return {"question": self.question}


def check_classes(classes: int, class_names: Sequence[str], who: str) -> None:
    """Raises UserError when somebody knows another number of classes than there are names."""
    if classes != len(class_names):
        raise UserError(
            f"{who} answers with {classes} classes, the data has {len(class_names)} ({', '.join(class_names[:3])}, "
            "...). Take a teacher of the same classes in the same order, or one that is told their names (zero_shot, "
            "question).",
            because="meaning",
        )
