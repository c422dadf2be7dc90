"""B2: one training step with cached top-64 targets, beside plain supervised fine-tuning of the same student.

The teacher's answers lie on disk, in a cache that mmkd wrote, and the step reads them: it is collator, forward and
backward, so this is all that distillation costs over SFT once the cache exists. Three baselines: trl's SFTTrainer
(which computes entropy and accuracy in every step), transformers' Trainer (the model's own loss over full logits) and
SFT of mmkd, whose cross-entropy runs through the same kernel as the distillation. mmkd computes its diagnostics in the
steps that are logged, one in ten by default: such a step is measured, too.
"""

from dataclasses import replace

import torch
from _measure import ratio, report, verdict
from _training import base_case, collating, measure_steps, step_arguments, title_of


def main() -> None:
    parser = step_arguments(__doc__)
    parser.add_argument("--k", type=int, default=64, help="entries per token of the cached signal")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = replace(base_case(args), k=args.k)
    cached, baselines = f"mmkd cached top-{args.k}", ["TRL SFT", "transformers SFT", "mmkd sft"]
    first = replace(base, trainer="mmkd cached", loss=f"top-{args.k}")
    cases = [first, replace(first, logged=True), *(replace(base, trainer=trainer) for trainer in baselines)]
    runs = measure_steps(cases, args)
    rows = [
        {
            "": name,
            "s/step": run.seconds,
            "peak MB": run.megabytes,
            "loss": run.value,
            "cached over it: s": runs[cached].seconds / run.seconds,
            "cached over it: MB": ratio(runs[cached].megabytes, run.megabytes),
        }
        for name, run in runs.items()
    ]
    verdicts = [
        verdict(f"cached step over {name}", runs[cached].seconds / runs[name].seconds, 1.05) for name in baselines
    ]
    alone = [{"": case.name, "ms": 1e3 * collating(case)} for case in cases if not case.logged]
    tables = {title_of(base): rows, "Of it the collator, which reads and decodes the cache": alone}
    report("b2_cached_step", args.device, tables, [] if args.quick else verdicts, vars(args))


if __name__ == "__main__":
    main()
