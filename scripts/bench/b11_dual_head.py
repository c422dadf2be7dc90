"""B11: one optimizer step of a dual-head student, beside the same student with one head and both losses.

Both are DHOTrainers on the same rows, kept in memory, with the teacher's logits at hand. Steps of the two take turns,
and the medians are compared, so that a machine that slows down slows both.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _measure import arguments, report, verdict
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pictures
from transformers import ResNetConfig, ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mmkd.methods.dho.dho_trainer import DHOConfig, DHOTrainer
from mmkd.models.dual_head import DualHeadForImageClassification

LIMIT = 1.05
BACKBONES: dict[str, tuple[Any, int]] = {
    "resnet-18, 64 px": (ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512]), 64),
    "vit 6x192, 64 px": (
        ViTConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=3,
            image_size=64,
            patch_size=8,
        ),
        64,
    ),
}


def main() -> None:
    parser = arguments(__doc__, dtypes=["float32"])
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=16, help="labelled rows of a batch, and as many unlabelled ones")
    options = parser.parse_args()
    if options.device != "cpu":
        parser.error("this benchmark measures on a CPU only")
    if options.quick:
        options.steps, options.classes, options.rows = 2, 20, 4
    torch.set_num_threads(options.threads)
    rows = []
    for name, (config, size) in BACKBONES.items():
        seconds = measure(config, size, options)
        rows.append({"backbone": name, **seconds, "ratio": seconds["dho"] / seconds["single_head"]})
    targets = [verdict(f"two heads over one, {row['backbone']}", row["ratio"], LIMIT) for row in rows]
    report("b11_dual_head", "cpu", {"CPU s/step": rows}, [] if options.quick else targets, vars(options))


def measure(config: Any, size: int, options: argparse.Namespace) -> dict[str, float]:
    """Median CPU seconds per step of both objectives."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {one: stepper(config, size, one, options, Path(folder)) for one in ("single_head", "dho")}
        times: dict[str, list[float]] = {one: [] for one in steps}
        for number in range(options.steps + 2):
            for one, step in steps.items():
                start = time.process_time()
                step()
                if number >= 2:
                    times[one].append(time.process_time() - start)
    return {one: statistics.median(values) for one, values in times.items()}


def stepper(config: Any, size: int, objective: str, options: argparse.Namespace, folder: Path) -> Any:
    """A function that takes one optimizer step as the Trainer does."""
    torch.manual_seed(0)
    count = 2 * options.rows
    images = [Pictures.new("RGB", (size, size), (number, 0, 0)) for number in range(count)]
    features = Features({"image": Image(), "label": Value("int64")})
    labels = [row if row < options.rows else -100 for row in range(count)]
    names = [f"class {number}" for number in range(options.rows)]
    model = DualHeadForImageClassification.from_backbone(
        config, names + [f"class {number}" for number in range(options.rows, options.classes)]
    )
    settings: dict[str, Any] = {"alpha": 0.5, "beta": 0.5} if objective == "dho" else {}
    args = DHOConfig(
        str(folder / objective),
        objective=objective,
        per_device_train_batch_size=options.rows,
        unlabeled_batch_size=options.rows,
        logging_steps=10**6,
        keep_rows=True,
        use_cpu=True,
        report_to="none",
        **settings,
    )
    # Every class needs a labelled row; those of the classes that the batch lacks are copies of its first image.
    extra = options.classes - options.rows
    rows = Dataset.from_dict(
        {"image": [*images, *images[:1] * extra], "label": [*labels, *range(options.rows, options.classes)]},
        features=features,
    )
    trainer = DHOTrainer(
        model=model,
        teacher=torch.randn(len(rows), options.classes),
        args=args,
        train_dataset=rows,
        processing_class=ViTImageProcessorPil(size={"height": size, "width": size}),
    )
    optimizer: Any = trainer.create_optimizer()
    trainer.model.train()
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(count)])

    def step() -> None:
        trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
