"""B3: one training step with an online teacher, beside TRL's GKD trainer on the same models and the same batch.

Student SmolLM2-135M, teacher in the shape of SmolLM2-360M with random weights. Both trainers are built by their own
constructors and driven through `get_batch_samples` and `training_step`, as `train()` does; GKD is off-policy (lmbda 0)
and gets a tokenised batch, so that its chat collator, which reads messages, is left out. `models only` is the step
without heads and loss, which both sides pay: its share decides how far the ratio of whole steps can fall.
"""

from dataclasses import replace
from typing import Any

import torch
from _measure import Run, ratio, report, verdict
from _training import base_case, measure_steps, step_arguments, title_of

TIME_LIMITS = {"forward_kl": 0.75, "jsd": 0.6}
MEMORY_LIMIT = 0.7
MODELS = "models only"


def main() -> None:
    args = step_arguments(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    base = base_case(args)
    cases = [
        replace(base, trainer=trainer, loss=loss) for loss in TIME_LIMITS for trainer in ("mmkd online", "TRL GKD")
    ]
    runs = measure_steps([replace(base, trainer=MODELS), *cases], args)

    def against_gkd(loss: str) -> tuple[float, float | None]:
        own, peer = runs[f"mmkd online {loss}"], runs[f"TRL GKD {loss}"]
        return own.seconds / peer.seconds, ratio(own.megabytes, peer.megabytes)

    def row(name: str, run: Run) -> dict[str, Any]:
        time, memory = against_gkd(name.split()[-1]) if name.startswith("mmkd") else (None, None)
        loss_only = run.seconds - runs[MODELS].seconds
        cells = {"": name, "s/step": run.seconds, "heads and loss, s": loss_only, "peak MB": run.megabytes}
        loss = None if name == MODELS else run.value
        return cells | {"loss": loss, "time over GKD": time, "memory over GKD": memory}

    verdicts = []
    for loss, limit in TIME_LIMITS.items():
        time, memory = against_gkd(loss)
        verdicts.append(verdict(f"{loss}: time over GKD", time, limit))
        verdicts.append(verdict(f"{loss}: memory over GKD", memory, MEMORY_LIMIT))
    tables = {title_of(base): [row(name, run) for name, run in runs.items()]}
    report("b3_online_step", args.device, tables, [] if args.quick else verdicts, vars(args))


if __name__ == "__main__":
    main()
