"""B9: one optimizer step of LLaVA-KD, beside plain SFT of the same vision-language model on the same rows.

Random weights; every variant takes its turn, and the fastest of its steps counts. Memory is the peak of a process that
takes a step alone, over what it holds after the step before: models, AdamW's state, the batch. "logits in full" is the
authors' way: both models' logits at all positions, softmax and products on them.
"""

import ctypes
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from _measure import MEGABYTE, Step, alone, arguments, interleaved, ratio, report
from datasets import Dataset, Features, Image, List, Value, disable_progress_bars
from PIL import Image as Pictures
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    CLIPImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from mmkd.losses.divergences import forward_kl
from mmkd.losses.token_matching import assigned
from mmkd.losses.visual_alignment import logit_distances
from mmkd.methods.llava_kd import LLaVAKDConfig, LLaVAKDTrainer
from mmkd.methods.sft import SFTBaselineConfig, SFTBaselineTrainer
from mmkd.models.heads import LMHead
from mmkd.models.llava import CHAT_TEMPLATE, IMAGE_TOKEN
from mmkd.teachers.batch import Batch

VARIANTS: dict[str, dict[str, Any]] = {
    "sft": {},
    "llava_kd, answers only": {"beta": 0.0, "gamma": 0.0},
    "llava_kd, no relation": {"gamma": 0.0},
    "llava_kd, relation_on hidden": {"relation_on": "hidden"},
    "llava_kd": {},
    "llava_kd, features: tower": {"features": "tower"},
    "llava_kd, features: projector": {"features": "projector"},
    "llava_kd, features: every_nth": {"features": "every_nth"},
    "llava_kd, features: relation": {"features": {"student": "last_hidden", "tokens": "visual", "kind": "relation"}},
    "llava_kd, divergence dbild": {"divergence": "dbild", "temperature": 3.0},
    "llava_kd, vsd and vlad": {"vsd_weight": 1.0, "vlad_weight": 1.0},
    "llava_kd, switch": {"switch": {"weight": 1.0}},
    "llava_kd, finer teacher, pool": {"visual_tokens": "pool"},
    "llava_kd, finer teacher, hungarian euclidean": {"visual_tokens": "hungarian", "matching_cost": "euclidean"},
    "llava_kd, finer teacher, hungarian manhattan": {"visual_tokens": "hungarian"},
    "logits in full": {},
}


@dataclass(frozen=True)
class Case:
    """A variant on a batch of one-image rows."""

    variant: str
    batch: int
    patches: int
    vocab: int
    width: int
    layers: int
    device: str = "cpu"


def main() -> None:
    parser = arguments(__doc__, dtypes=["float32"])
    parser.add_argument("--batch", type=int, default=4, help="rows of one image")
    parser.add_argument("--patches", type=int, default=18, help="visual tokens along one edge of an image")
    parser.add_argument("--vocab", type=int, default=32000)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = (2, 4, 500, 64, 1) if args.quick else (args.batch, args.patches, args.vocab, 256, 6)
    cases = {name: Case(name, *sizes, args.device) for name in VARIANTS}
    repeats: dict[str, int] = {name: args.repeats for name in cases}
    runs = interleaved({name: build(case)[1] for name, case in cases.items()}, repeats, args.device)
    memory = {name: alone(build, case, args.device).megabytes if args.memory else None for name, case in cases.items()}
    rows = [
        {
            "step": name,
            "s": run.seconds,
            "x sft": ratio(run.seconds, runs["sft"].seconds),
            "peak MB": memory[name],
            "loss": run.value,
        }
        for name, run in runs.items()
    ]
    visual, logits = sizes[0] * sizes[1] ** 2, sizes[0] * sizes[1] ** 2 * sizes[2] * 4 / MEGABYTE
    title = f"{visual} visual tokens, vocabulary {sizes[2]}: their fp32 logits would be {logits:.0f} MB a model"
    matched = [matching(tokens, sizes[2], args.repeats) for tokens in ((36,) if args.quick else (144, 324, 576))]
    tables = {title: rows, f"Matching one image of as many tokens on both sides, vocabulary {sizes[2]}": matched}
    report("b9", args.device, tables, settings={"sizes": sizes})


def matching(tokens: int, vocab: int, repeats: int) -> dict[str, Any]:
    """CPU milliseconds of the distances between logits and of the assignment, the fastest of some."""
    torch.manual_seed(0)
    states = torch.randn(tokens, 256), torch.randn(tokens, 512)
    heads = [LMHead(torch.randn(vocab, side.shape[1])) for side in states]
    row: dict[str, Any] = {"tokens": tokens}
    for cost in ("manhattan", "euclidean"):
        seconds: list[float] = []
        for _ in range(max(1, repeats // 2)):
            start = time.process_time()
            costs = logit_distances(states[0], heads[0], states[1], heads[1], cost)
            seconds.append(time.process_time() - start)
        row[f"{cost} ms"] = 1000 * min(seconds)
        start = time.process_time()
        assigned(costs)
        row[f"assignment ({cost}) ms"] = 1000 * (time.process_time() - start)
    return row


def build(case: Case) -> tuple[Step, Step]:
    """A first step, after which AdamW has its state and what was freed is given back, and the same step."""
    disable_progress_bars()
    step = stepper(case)

    def first() -> float:
        loss = step()
        # Else pages that malloc kept would count as held before, and not as needed by the step.
        ctypes.CDLL(None).malloc_trim(0)
        return loss

    return first, step


def stepper(case: Case) -> Step:
    """A function that takes one step as the Trainer does and returns its loss."""
    processor = make_processor(case)
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(),
        "assistant_only_loss": True,
        "max_length": None,
        "bf16": False,
        "use_cpu": case.device == "cpu",
        "activation_checkpointing": False,
        "per_device_train_batch_size": case.batch,
        "logging_steps": 10**6,
        "report_to": "none",
        "disable_tqdm": True,
    }
    common = {"train_dataset": make_rows(case), "processing_class": processor}
    student = make_model(case, len(processor.tokenizer), case.width)
    # A third more patches along an edge.
    seen = replace(case, patches=case.patches * 4 // 3) if "finer" in case.variant else case
    if case.variant == "sft":
        trainer: Any = SFTBaselineTrainer(student, None, SFTBaselineConfig(**settings), **common)
    else:
        config = LLaVAKDConfig(**settings, **VARIANTS[case.variant])
        teacher = make_model(seen, len(processor.tokenizer), 2 * case.width)
        trainer = LLaVAKDTrainer(student, teacher, config, teacher_processing_class=make_processor(seen), **common)
    optimizer = torch.optim.AdamW(trainer.model.parameters())
    trainer.model.train()
    batch = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in trainer.train_dataset]))

    def step() -> float:
        trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        if case.variant == "logits in full":
            loss = loss_in_full(trainer, batch)
        else:
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def loss_in_full(trainer: Any, batch: Batch) -> torch.Tensor:
    """The same loss from logits in full."""
    inputs = batch.student.inputs
    student, labels = trainer.model(**inputs).logits, batch["labels"][:, 1:]
    with torch.no_grad():
        teacher = trainer.teacher.model(**inputs).logits
    answer, visual = labels != -100, batch.student.visual
    log_probs, target = student.log_softmax(-1), teacher.log_softmax(-1)
    kl = forward_kl(log_probs, target)
    reg = -log_probs[:, :-1][answer].gather(-1, labels[answer][:, None]).mean()
    images = [logits[visual].unflatten(0, (len(labels), -1)) for logits in (student, teacher)]
    ours, theirs = ((one @ one.mT).flatten(1) for one in images)
    relation = 1 - torch.cosine_similarity(ours, theirs).mean()
    return reg + kl[:, :-1][answer].mean() + kl[visual].mean() + 0.5 * relation


def make_model(case: Case, rows: int, width: int) -> LlavaForConditionalGeneration:
    """A random LLaVA model whose tower is small beside its language model."""
    torch.manual_seed(width)
    side = 8 * case.patches
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": side,
            "patch_size": 8,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": rows,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": case.layers,
            "num_attention_heads": 4,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        },
        image_token_index=2,
        vision_feature_layer=-1,
        image_seq_length=case.patches**2,
    )
    return LlavaForConditionalGeneration(config)


def make_processor(case: Case) -> LlavaProcessor:
    """Words without meaning, as many as the vocabulary has; the head is trimmed to them."""
    words = {"<pad>": 0, "<eos>": 1, IMAGE_TOKEN: 2, "USER": 3, ":": 4, "ASSISTANT": 5}
    words |= {f"w{number}": number for number in range(len(words), case.vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    fast.chat_template = CHAT_TEMPLATE
    side = {"height": 8 * case.patches, "width": 8 * case.patches}
    return LlavaProcessor(
        CLIPImageProcessorPil(size=side, do_center_crop=False, crop_size=side),
        fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def make_rows(case: Case) -> Dataset:
    """A picture, a question of 24 words and an answer of 32 each."""
    part = {"type": Value("string"), "text": Value("string")}
    features = Features({"messages": List({"role": Value("string"), "content": List(part)}), "images": List(Image())})
    side, rows = 8 * case.patches, []
    for number in range(case.batch):
        question, answer = (" ".join(f"w{10 + number + i}" for i in range(count)) for count in (24, 32))
        asked = [{"type": "image", "text": None}, {"type": "text", "text": question}]
        said = [{"type": "text", "text": answer}]
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        rows.append({"messages": messages, "images": [Pictures.new("RGB", (side, side), (40 * number, 9, 99))]})
    return Dataset.from_list(rows, features=features)


if __name__ == "__main__":
    main()
