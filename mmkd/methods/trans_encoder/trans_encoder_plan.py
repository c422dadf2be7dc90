"""Doctor, plan and dry run of trans_encoder, and the trainer of its first half-cycle."""

import math
from typing import Any

from accelerate import init_empty_weights
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModel

from mmkd.data.sentence_pairs import load_pairs
from mmkd.errors import UserError, first_line
from mmkd.preflight.book import Book
from mmkd.preflight.costs import device_memory
from mmkd.preflight.facts import Finding
from mmkd.preflight.hardware import GIB, USABLE, Device
from mmkd.preflight.stage_checks import StageRun
from mmkd.preflight.whole_model import training_pass, training_state
from mmkd.recipe.recipe import Run
from mmkd.recipe.run import check_surroundings
from mmkd.units import readable_size, with_noun

from .half_cycles import Cycles, Half
from .trans_encoder_config import TransEncoderConfig
from .trans_encoder_run import check_arguments, members_of, pairs_of, settings_of
from .trans_encoder_trainer import TransEncoderTrainer


def build_first_half(run: Run) -> TransEncoderTrainer:
    """The trainer of the first half-cycle: a cross-encoder that learns what the student says."""
    return Cycles(run, Console(quiet=True)).trainer_of(Half(1, "cross_encoder", next(iter(members_of(run)))))


def check_run(run: Run) -> None:
    """Raises UserError for settings, pairs and students that training would refuse."""
    check_arguments(run)
    pairs_of(run)
    if (dev := settings_of(run).dev_data) is not None:
        load_pairs(dev, scored=True)
    for names in members_of(run).values():
        for name in names:
            _empty(name, settings_of(run))


def examine_encoders(run: Run, sharded: bool) -> list[Finding]:
    """What all checks of a recipe of sentence encoders found; a check that cannot be made is a problem."""
    book = Book()
    book.attempt("settings", check_surroundings, run)
    book.attempt("settings", check_arguments, run)
    if sharded:
        text = "accelerate_config spreads weights over devices, and trans_encoder trains in one process."
        book.findings.append(Finding("problem", "settings", text, "Remove accelerate_config."))
    book.check("data", _data, run)
    if run.arguments.student is not None:
        for student, cross in members_of(run).values():
            book.check("student", _student, run, student, cross)
    return book.findings


def _data(run: Run) -> list[Finding]:
    pairs, dev = pairs_of(run), settings_of(run).dev_data
    equal = sum(first == second for first, second in zip(pairs.first, pairs.second, strict=True))
    findings = [Finding("ok", "data", f"{with_noun(len(pairs), 'pair')} of sentences.")]
    if equal > len(pairs) / 2:
        text = f"{equal:,} of {len(pairs):,} pairs are a sentence and itself, of which there is nothing to learn."
        findings.append(Finding("warning", "data", text, "Pair different sentences."))
    if dev is None:
        findings.append(Finding("ok", "data", "The last cycle is the result. dev_data would choose the best."))
    else:
        findings.append(Finding("ok", "data", f"{len(load_pairs(dev, scored=True)):,} scored pairs choose the cycle."))
    return findings


def _student(run: Run, student: str, cross: str) -> list[Finding]:
    args = settings_of(run)
    findings: list[Finding] = []
    device, room = device_memory()
    for role, name in (("bi-encoder", student), ("cross-encoder", cross)):
        model = _empty(name, args)
        total = sum(training_state(model, args).values())
        count = sum(parameter.numel() for parameter in model.parameters())
        text = f"The {role} {name} is a {model.config.model_type} of {count / 1e6:.2f} M parameters. Weights, "
        text += f"gradients and optimizer take {readable_size(total)} of the {readable_size(room)} of {device}."
        findings.append(Finding("ok" if total < 0.8 * room else "warning", "student", text))
    return findings


def _empty(name: str, args: TransEncoderConfig) -> Any:
    """An encoder without weights. Raises UserError where there is none."""
    trust = args.trust_remote_code
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust)
        with init_empty_weights(include_buffers=False):
            return AutoModel.from_config(config, trust_remote_code=trust)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name!r} is no encoder that transformers knows: {first_line(error)}") from error


def steps_of(args: TransEncoderConfig, pairs: int) -> dict[str, int]:
    """Optimizer steps of one training of each kind."""
    shown = pairs * (2 if args.symmetric else 1)
    kinds = {
        "cross_encoder": (shown, args.cross_batch_size, args.cross_epochs),
        "bi_encoder": (pairs, args.per_device_train_batch_size, args.num_train_epochs),
    }
    steps: dict[str, int] = {}
    for kind, (rows, size, epochs) in kinds.items():
        batches = math.ceil(math.ceil(rows / size) / args.gradient_accumulation_steps)
        steps[kind] = args.max_steps if args.max_steps > 0 else math.ceil(batches * epochs)
    return steps


def dry_run_encoders(run: Run, console: Console) -> None:
    """Prints what a run would do: students, pairs, cycles and steps. A batch of the first half-cycle is tried."""
    cycles = Cycles(run, console)
    pairs = len(cycles.pairs)
    args, members = cycles.args, members_of(run)
    half = Half(1, "cross_encoder", next(iter(members)))
    trainer: Any = cycles.trainer_of(half, limit=args.cross_batch_size)
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    batch = {key: value.to(args.device) for key, value in batch.items()}
    # Which counts its pairs.
    trainer.get_batch_samples(iter([batch]), 1, args.device)
    loss = trainer.compute_loss(trainer.model, batch)
    table = Table(title="mmkd trans_encoder: dry run", show_header=False)
    for name, (student, cross) in members.items():
        table.add_row(f"student {name}".strip(), f"{student}; cross-encoders begin with {cross}")
    table.add_row("pairs", f"{pairs:,} without labels")
    table.add_row("result", "the last cycle" if args.dev_data is None else f"the best cycle on {args.dev_data}")
    for kind, steps in steps_of(args, pairs).items():
        table.add_row(f"steps of each {kind.replace('_', '-')}", f"{steps:,}")
    table.add_row("trainings", f"{args.cycles * 2 * len(members)} in {with_noun(args.cycles, 'cycle')}")
    table.add_row("loss of a first batch", f"{loss.item():.4f}")
    console.print(table)


def plan_encoders(stage: StageRun, device: Device, devices: int, price: float | None, console: Console) -> int:
    """Prints the plan of a run; returns 0 when it fits one device, 1 when it does not."""
    run: Any = stage.run
    args, members = settings_of(run), members_of(run)
    check_arguments(run)
    pairs = len(pairs_of(run))
    steps, hours, most = steps_of(args, pairs), 0.0, 0.0
    for student, cross in members.values():
        shapes = {
            "cross_encoder": (cross, (args.cross_batch_size, args.cross_max_length)),
            "bi_encoder": (student, (2 * args.per_device_train_batch_size, args.max_length)),
        }
        for kind, (name, shape) in shapes.items():
            model = _empty(name, args)
            state = sum(training_state(model, args).values())
            flops, saved = training_pass(model, {"input_ids": shape}, bool(args.bf16))
            seconds = flops * args.gradient_accumulation_steps / (device.flops * device.utilisation)
            hours += args.cycles * steps[kind] * seconds / 3600
            most = max(most, state + saved)
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_row("GiB on the device at most", f"{most / GIB:,.2f}")
    table.add_row("fits", "yes" if most <= USABLE * device.memory else "no")
    table.add_row("steps of the run", f"{args.cycles * len(members) * sum(steps.values()):,}")
    table.add_row("device-hours of the run", f"{hours:,.3g}")
    if price is not None:
        table.add_row("cost", f"{price * hours:,.2f}")
    title = f"mmkd plan {stage.title}: 1 x {device.name} ({device.memory / GIB:.0f} GiB)."
    console.print(title if devices == 1 else f"{title} trans_encoder trains on one device.", highlight=False)
    console.print(table)
    return 0 if most <= USABLE * device.memory else 1
