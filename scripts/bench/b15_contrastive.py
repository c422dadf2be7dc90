"""B15: the contrastive loss over the pairs of all ranks, beside open_clip's ClipLoss of the same features.

Each rank has the features of its own pairs, gathers those of the others with their gradient, and computes CLIP's loss
forward and backward: mmkd, open_clip with `local_loss` (each rank its own rows) and without (each rank all of them).
open_clip is read from a folder of its own, since the CPU build of torch does not go with torchvision:

    pip install --no-deps --target SITE open_clip_torch timm torchvision ftfy wcwidth
    python scripts/bench/b15_contrastive.py --open_clip SITE
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _measure import MEGABYTE, add_peer, arguments, ratio, report, verdict

from mmkd.losses.contrastive_losses import Targets, clip
from mmkd.methods.clip_kd.pair_terms import PairFeatures, PairView

SCALE = 50.0
LIMIT = 1.1


def ours(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
    """mmkd's loss of this rank's rows, times the number of ranks, over which DDP averages."""
    view = PairView.of(PairFeatures(images, texts), everywhere=True)
    losses = clip(view.cosines, SCALE, Targets.of(view.cosines))
    return losses.sum() / len(view.all_texts) * dist.get_world_size()


def peer(local: bool, ranks: int) -> Callable[..., torch.Tensor]:
    """open_clip's loss, of this rank's rows or of all."""
    from open_clip.loss import ClipLoss  # pyright: ignore[reportMissingImports]

    loss = ClipLoss(local, gather_with_grad=True, rank=dist.get_rank(), world_size=ranks)
    unit = torch.nn.functional.normalize
    return lambda images, texts: loss(unit(images, dim=-1), unit(texts, dim=-1), SCALE)


def on_rank(rank: int, options: argparse.Namespace, folder: str, only: str | None = None) -> None:
    """Measures every variant on one rank, turn by turn, or one only; writes what the first rank saw."""
    torch.set_num_threads(options.threads)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=options.ranks)
    variants: dict[str, Callable[..., torch.Tensor]] = {"mmkd": ours}
    if options.open_clip:
        sys.path.append(options.open_clip)
        # torchvision's build for CUDA declares these itself.
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        variants |= {"open_clip, local_loss": peer(True, options.ranks), "open_clip": peer(False, options.ranks)}
    variants = {name: loss for name, loss in variants.items() if only in (None, name)}
    generator = torch.Generator().manual_seed(rank)
    features = [torch.randn(options.pairs, options.width, generator=generator).requires_grad_() for _ in range(2)]
    seen: dict[str, dict[str, Any]] = {name: {"seconds": []} for name in variants}
    for turn in range(options.repeats + 1):
        for name in list(variants) if turn % 2 else reversed(list(variants)):
            gc.collect()
            dist.barrier()
            Path("/proc/self/clear_refs").write_text("5")
            before, start = _status("VmRSS"), time.process_time()
            # The first turn loads what libraries load once; a large one would leave memory for the others.
            given = [each[:16] for each in features] if only and not turn else features
            loss = variants[name](*given)
            loss.backward()
            seconds = time.process_time() - start
            megabytes = (_status("VmHWM") - before) / MEGABYTE
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            gradient = features[0].grad
            assert gradient is not None
            if turn:
                seen[name]["seconds"].append(seconds)
                said = {"loss": float(mean / options.ranks), "gradient": float(gradient.norm())}
                seen[name] |= {"MB": max(megabytes, seen[name].get("MB", 0.0)), **said}
            for each in features:
                each.grad = None
    if rank == 0:
        Path(folder, "seen.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def run(options: argparse.Namespace, folder: str, only: str | None = None) -> dict[str, dict[str, Any]]:
    """What the first of new ranks saw of every variant, or of one only."""
    Path(folder, "store").unlink(missing_ok=True)
    mp.spawn(on_rank, (options, folder, only), nprocs=options.ranks)  # pyright: ignore[reportPrivateImportUsage]
    return json.loads(Path(folder, "seen.json").read_text())


def main() -> None:
    parser = arguments(__doc__, dtypes=["float32"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=1024, help="of each rank")
    parser.add_argument("--width", type=int, default=512)
    add_peer(parser, "open_clip", "open_clip, or a folder in which it is installed")
    options = parser.parse_args()
    if options.device != "cpu":
        parser.error("this benchmark measures on a CPU only")
    if options.quick:
        options.pairs, options.width, options.repeats = 16, 8, 1
    with tempfile.TemporaryDirectory() as folder:
        seen = run(options, folder)
        for name in seen if options.memory else ():
            # In processes of its own: memory that one variant has freed would serve the next.
            seen[name]["MB"] = run(options, folder, name)[name]["MB"]
    rows = [
        {"loss over pairs": name, "CPU s": min(own.pop("seconds")), "peak MB": own.pop("MB"), **own}
        for name, own in seen.items()
    ]
    named = {row["loss over pairs"]: row for row in rows}
    fast = named.get("open_clip, local_loss")
    targets = [
        verdict(f"{what} over open_clip's local_loss", ratio(named["mmkd"][what], fast[what]) if fast else None, LIMIT)
        for what in ("CPU s", "peak MB")
        if not options.quick
    ]
    report("b15_contrastive", "cpu", {"one rank's step": rows}, targets, vars(options))
    if not options.open_clip:
        print(
            "open_clip was not measured: name a folder in which it is installed (--open_clip SITE).", file=sys.stderr
        )


if __name__ == "__main__":
    main()
