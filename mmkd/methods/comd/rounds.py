"""The loop of CoMD: the teacher answers, the student learns, both are assessed, the failures make new instructions."""

import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import release_memory
from rich.console import Console

from mmkd.capture.build import build
from mmkd.capture.build_plan import check_place, make_plan
from mmkd.errors import UserError
from mmkd.models.adapters import merge_adapter
from mmkd.models.load import load_model, load_processing_class
from mmkd.recipe import run_record as run_record
from mmkd.recipe.main_process import from_main_process
from mmkd.recipe.recipe import Recipe, Run
from mmkd.recipe.run import last_checkpoint, load_rows_of
from mmkd.recipe.run_models import check_student
from mmkd.training.method import Train
from mmkd.training.progress import phase

from . import round_recipes as recipes
from .assess import ASSESSORS, AnswerPair
from .augment import Filter
from .comd_checks import check_rounds
from .comd_prompts import Prompts
from .comd_trainer import CoMDConfig
from .instructions import ImageStore, Instruction, apart_from, read_instructions, row_of
from .interview import InstructionImages, Interview
from .mutual import teach_teacher
from .reply_record import Record, Reply
from .roles import Roles
from .round_files import copy_model, read_json, write_json, write_lines
from .round_identity import check_identity
from .round_report import answer_row, new_row, phases_of, write_rounds, write_scores
from .select import Score, difficulty, split
from .similar import SimilarImages


def train_rounds(run: Run, train: Train) -> int:
    """Runs all rounds that are not finished; the exit status of a training that fails or is interrupted, else 0.

    The last student is left in output_dir, each round in a folder of its own. Raises UserError for what cannot be.
    """
    check_student(run)
    loop = Loop(run, train)
    training = run.training
    from_main_process(training, loop.start)
    for number in range(loop.training.rounds + 1):
        recipe = from_main_process(training, lambda number=number: loop.before(number))
        if recipe is None:
            break
        status = loop.learn(number, recipe)
        if status:
            return status
        if not from_main_process(training, lambda number=number: loop.after(number)):
            break
    from_main_process(training, loop.finish)
    return 0


class Loop:
    """The state of a run; all but `learn` happens on the main process alone.

    What was asked is in the record, so that a run which starts again walks through the same rounds, asks for nothing
    it was told before, and skips the trainings that are finished.
    """

    def __init__(self, run: Run, train: Train):
        training = run.training
        assert isinstance(training, CoMDConfig)
        self.run, self.training, self.train = run, training, train
        self.folder = Path(training.output_dir or "runs")
        self.console = Console(stderr=True)
        default = ASSESSORS.get(training.assessor, 0.0)
        self.threshold = default if training.hard_threshold is None else training.hard_threshold
        self.pool: dict[str, tuple[Instruction, str]] = {}
        self.scores: list[Score] = []
        self.reports: list[dict[str, Any]] = []
        self.ended = "all rounds are done"
        self.student: Path | None = None
        self.best = 0.0
        self.made = 0
        check_rounds(run)

    # Phases, in their order

    def start(self) -> None:
        """Reads data, prompts and record."""
        self.roles = Roles(self.run)
        self.prompts = Prompts.read(self.training.prompts)
        check_identity(self.folder, self.run, self.prompts)
        run_record.begin(self.run, self.folder)
        self.prompts.write(self.folder / "prompts")
        self.record = Record(self.folder / "record.jsonl")
        self.interview = Interview(self.training, self.roles, self.record, self.prompts, self.console)
        store = ImageStore(self.folder / "images")
        data = load_rows_of(self.run)
        held_out = read_instructions(data["eval"], store) if "eval" in data else []
        # Without an answer of the data's there is nothing to compare with, and still nothing to train on.
        self.held_out = [instruction for instruction in held_out if instruction.reference is not None]
        self.kept_out, seeds = held_out, read_instructions(data["train"], store)
        self.new = apart_from(seeds, held_out)
        if len(self.new) < len(seeds):
            self.say(f"{len(seeds) - len(self.new)} instructions are held out too, and are not trained on.")
        paths = [path for instruction in self.new for path in instruction.images]
        self.pictures = InstructionImages(store, SimilarImages(paths, self._first_student))
        if self.training.eval_strategy != "no" and self.held_out:
            rows = [row_of(instruction, instruction.reference or "") for instruction in self.held_out]
            write_lines(self.folder / "held_out.jsonl", rows)

    def before(self, number: int) -> Recipe | None:
        """The teacher answers what is new; the round's recipe, None when the loop ends here."""
        folder, phase = self._round(number), f"round-{number}/answer"
        self.lost: Counter[str] = Counter()
        replies = self.interview.answers(self.new, phase)
        joined = [
            (instruction, reply.text)
            for instruction, reply in zip(self.new, replies, strict=False)
            if self._is_answer(reply, self.lost)
        ]
        self.lost["over the budget"] += len(self.new) - len(replies)
        write_lines(folder / "answers.jsonl", [answer_row(*pair) for pair in zip(self.new, replies, strict=False)])
        if number and not joined and self.training.augmentor != "none":
            self.ended = f"round {number} has no new answers: {_counts(self.lost)}"
            shutil.rmtree(folder)
            return None
        self.pool |= {instruction.key: (instruction, answer) for instruction, answer in joined}
        rows = joined if self.training.train_on == "new" else list(self.pool.values())
        self._check_size(number, len(rows))
        write_lines(folder / "pool.jsonl", [row_of(*pair) for pair in rows])
        evaluated = self.training.eval_strategy != "no" and self.held_out
        held_out = self.folder / "held_out.jsonl" if evaluated else None
        recipes.write_data(folder, any(instruction.images for instruction, _ in rows), held_out)
        keys = recipes.student_keys(self.run) if self.student is None else {"student": str(self.student)}
        self.size, self.added = len(rows), len(joined)
        self.roles.close()
        return recipes.write_round(self.run, folder, keys, number, self.roles.taught)

    def learn(self, number: int, recipe: Recipe) -> int:
        """Trains the student of a round, on all ranks; the exit status."""
        folder = self._round(number)
        done, output = folder / "train.json", folder / recipes.STUDENT
        if done.is_file():
            return 0
        start = time.perf_counter()
        lora = self.run.student.use_peft
        trained = folder / recipes.ADAPTER if lora else output
        if self.training.round_cache:
            from_main_process(self.training, lambda: _build_cache(recipe))
        print(f"Round {number} of {self.training.rounds}: {trained}", file=sys.stderr)
        resumes = last_checkpoint(trained) is not None
        with phase(f"round {number} of {self.training.rounds}"):
            status = self.train(recipe.with_(resume_from_checkpoint=True) if resumes else recipe)
        # The trainer is in circles of references, and would stay beside the models that answer now.
        release_memory()
        PartialState().wait_for_everyone()
        if status:
            return status
        if PartialState().is_main_process:
            if lora:
                merge_adapter(trained, output, self.training.trust_remote_code)
            write_json(done, {"seconds": round(time.perf_counter() - start, 3)})
        PartialState().wait_for_everyone()
        return 0

    def after(self, number: int) -> bool:
        """Held-out scores, assessment and augmentation; whether there is another round."""
        folder, training = self._round(number), self.training
        previous, self.student = self.student, folder / recipes.STUDENT
        engine = self.roles.checkpoint(self.student)
        held_out = self.interview.held_out_scores(number, engine, self.held_out)
        report: dict[str, Any] = {"round": number, "trained_on": self.size, "pool": len(self.pool), "new": self.added}
        report |= {"unanswered": dict(+self.lost), "held_out": held_out}
        go_on = number < training.rounds
        if self.interview.spent_out:
            go_on, self.ended = False, f"max_teacher_tokens {training.max_teacher_tokens} are spent"
        hard: list[Score] = []
        easy: list[Score] = []
        if self.interview.assesses:
            pairs, assessment = self.interview.assess(number, engine, list(self.pool.values()))
            instructions = {pair.instruction.key: pair.instruction for pair in pairs}
            types = difficulty(self.scores, assessment.scores, instructions, self.threshold, training.type_words)
            hard, easy = split(assessment.scores, self.threshold, training.min_teacher_score)
            self.scores = assessment.scores
            report |= {"difficulty": types, "assessed": len(assessment.scores), "hard": len(hard), "easy": len(easy)}
            report |= {"dropped": assessment.dropped, "asked_again": assessment.asked_again}
            report |= {"first_preferred": assessment.first_preferred}
            write_scores(folder, pairs, assessment, self.threshold, training.type_words)
            if training.mutual:
                report["mutual"] = self._mutual(number, pairs, previous, held_out)
            if go_on and not hard:
                go_on, self.ended = False, f"no instruction is hard any more after round {number}"
            if go_on and not easy and not training.hard_ratio:
                go_on, self.ended = False, f"no instruction is easy after round {number}, and hard_ratio is 0"
        engine.close()
        self.new = []
        if go_on and training.augmentor != "none":
            report["augmented"] = self._augment(number, hard, easy)
            if not self.new:
                go_on, self.ended = False, f"max_new_instructions {training.max_new_instructions} are made"
        write_lines(folder / "new.jsonl", [new_row(instruction) for instruction in self.new])
        self.roles.close()
        report["phases"] = phases_of(self.record, number, read_json(folder / "train.json")["seconds"])
        report["teacher_tokens"] = self.roles.teacher_tokens(self.record)
        write_json(folder / "report.json", report)
        self.reports.append(report)
        self._summary(report)
        return go_on

    def finish(self) -> None:
        """Leaves the last student in output_dir and says why the loop ended."""
        assert self.student is not None
        copy_model(self.student, self.folder)
        write_rounds(self.folder, self.reports, self.ended)
        run_record.finish(self.folder)
        self.say(f"The loop ended: {self.ended}. The student is in {self.folder}.")

    # Parts of phases

    def _augment(self, number: int, hard: Sequence[Score], easy: Sequence[Score]) -> dict[str, Any]:
        """Fills `new` with instructions made of the pool's. Raises UserError when nothing of it is fit to join."""
        training = self.training
        cap = min(training.new_instructions, (training.max_new_instructions or sys.maxsize) - self.made)
        if cap < 1:
            return {"wanted": 0}
        pool = {key: instruction for key, (instruction, _) in self.pool.items()}
        self.new, facts = self.interview.new_instructions(
            number, cap, pool, hard, easy, Filter.of(training, list(pool.values()), self.kept_out), self.pictures
        )
        self.made += len(self.new)
        if not self.new:
            raise UserError(
                f"The augmentor gave nothing that is fit to join the pool ({_counts(Counter(facts['rejected']))}). If "
                "it repeats itself raise augment_temperature or max_rouge, or use a stronger augmentor_model; the "
                f"rounds so far are in {self.folder}."
            )
        return facts

    def _mutual(
        self, number: int, pairs: Sequence[AnswerPair], previous: Path | None, held_out: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Rolls the student back where it got worse, and lets it teach the teacher where it is better."""
        if held_out is None:
            raise UserError(
                "mutual guards held-out scores, but the data holds no answers out. Give it eval rows.",
                because="meaning",
            )
        tolerance = self.training.mutual_tolerance
        report: dict[str, Any] = {}
        if previous is not None and held_out["student"] < self.best - tolerance:
            report["student_rolled_back_from"], self.student = held_out["student"], previous
        else:
            self.best = held_out["student"]
        better = {score.key for score in self.scores if -score.gap >= self.threshold}
        rows = [row_of(pair.instruction, pair.student) for pair in pairs if pair.instruction.key in better]
        report["lessons"] = len(rows)
        if len(rows) < self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps:
            return report
        self.roles.close()
        teacher = str(self.roles.taught or self.run.arguments.teacher)
        taught = teach_teacher(self.run, rows, teacher, self._round(number), self.train)
        before, after = (
            held_out["teacher"],
            self.interview.held_out_score(number, "taught teacher", self.roles.checkpoint(taught), self.held_out),
        )
        report |= {"teacher_before": before, "teacher_after": after, "teacher_rolled_back": after < before - tolerance}
        if not report["teacher_rolled_back"]:
            self.roles.replace_teacher(taught)
        return report

    # Small things

    def say(self, text: str) -> None:
        """Prints a line to the terminal."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _summary(self, report: dict[str, Any]) -> None:
        held_out = report["held_out"]
        hard = f", {report['hard']} of {report['assessed']} hard" if "hard" in report else ""
        score = f", held out: student {held_out['student']:.4f}, teacher {held_out['teacher']:.4f}" if held_out else ""
        shares = ", ".join(f"{name} {phase['share']:.0%}" for name, phase in report["phases"].items())
        self.say(f"Round {report['round']}: pool {report['pool']:,}{hard}{score}; time: {shares}")

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number}"

    def _is_answer(self, reply: Reply, lost: Counter[str]) -> bool:
        if reply.finish_reason == "stop" and reply.text:
            return True
        lost["cut off" if reply.finish_reason == "length" else "empty" if not reply.text else "refused"] += 1
        return False

    def _check_size(self, number: int, rows: int) -> None:
        training = self.training
        batch = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
        if rows < batch:
            raise UserError(
                f"Round {number} has {rows} instructions to train on ({_counts(self.lost)}), fewer than a batch of "
                f"{batch}. Give more data or budget, lower per_device_train_batch_size or "
                "gradient_accumulation_steps, or set train_on: pool."
            )

    def _first_student(self) -> tuple[Any, Any]:
        """The student of round 0: pictures look alike to it in the same way in all rounds."""
        folder = str(self._round(0) / recipes.STUDENT)
        return load_model(folder, device=self.training.device), load_processing_class(folder)


def _build_cache(recipe: Recipe) -> str:
    run = recipe.parse()
    check_place(run)
    return str(build(make_plan(run), Console(stderr=True)))


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common() if count) or "none was lost"
