"""B10: what `mmkd plan` predicts of training steps, beside what they take here.

FLOPs and memory are counted without data; the time follows from the FLOPs, the speed of a product of matrices on this
machine, and one utilisation for all variants, that of plain SFT: what is judged is how the variants differ.
"""

from dataclasses import replace
from typing import Any

import torch
from _measure import MEGABYTE, arguments, dtype_of, report, verdict
from _training import QUICK_STUDENT, QUICK_TEACHER, SMOLLM2_135M, SMOLLM2_360M, Training, llama, measure_steps

from mmkd.losses.projection import logits_bytes
from mmkd.preflight import estimate
from mmkd.preflight.hardware import this_device

VARIANTS = {"mmkd sft": "", "mmkd online": "forward_kl", "mmkd cached": ""}
BATCHES = ((2, 512), (4, 256), (6, 512))
CHUNK = 512


def planned(case: Training) -> estimate.Work:
    """The plan of one step without optimizer."""
    shape = estimate.Shape(case.batch, case.length, case.length - 1, 0.0, 0.0, 1.0)
    sizes = (QUICK_STUDENT, QUICK_TEACHER) if case.quick else (SMOLLM2_135M, SMOLLM2_360M)
    with torch.device("meta"):
        models = [llama(size, 0, case.dtype) for size in sizes]
    student = estimate.facts_of(models[0], 0.0, shape, False, train=True)
    teacher = estimate.facts_of(models[1], 0.0, shape, False, train=False) if "online" in case.trainer else None
    chunk, at_once = min(CHUNK, case.batch * case.length), 1 if teacher is None else 2
    logits = logits_bytes(case.vocab, chunk, at_once, False, case.device)
    return estimate.Work(shape, student, teacher, logits, 2.0 * case.vocab * student.width, 0.0, False)


def main() -> None:
    args = arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    speed = this_device(dtype_of(args)).flops
    rows: list[dict[str, Any]] = []
    for batch, length in [(2, 64)] if args.quick else BATCHES:
        base = Training("", "", batch, length, quick=args.quick, device=args.device, dtype=dtype_of(args))
        cases = [replace(base, trainer=trainer, loss=loss) for trainer, loss in VARIANTS.items()]
        runs = measure_steps(cases, args)
        works = {case.name: planned(case) for case in cases}
        first = cases[0].name
        utilisation = works[first].flops / speed / runs[first].seconds
        for name, run in runs.items():
            memory = sum(estimate.memory_of(works[name], "ddp", 1).values()) / MEGABYTE
            seconds = works[name].flops / speed / utilisation
            row = {"step": name, "batch": f"{batch} x {length}", "TFLOPs": works[name].flops / 1e12, "s": run.seconds}
            row |= {"planned s": seconds, "utilisation": utilisation, "peak MB": run.megabytes, "planned MB": memory}
            rows.append(row)
    verdicts = []
    if not args.quick:
        times = [abs(row["planned s"] / row["s"] - 1) for row in rows]
        verdicts.append(verdict("largest error of a time against SFT's", max(times), 0.15))
        if args.memory:
            sizes = [abs(row["planned MB"] / row["peak MB"] - 1) for row in rows]
            verdicts.append(verdict("largest error of a memory", max(sizes), 0.15))
    report("b10_plan", args.device, {f"{speed / 1e12:.3f} TFLOPS": rows}, verdicts, vars(args))


if __name__ == "__main__":
    main()
