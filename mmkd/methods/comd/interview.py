"""What the roles of a run are asked in a round: answers, what is held out, an assessment, new instructions."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from mmkd.generation.generator import Sampling

from .assess import AnswerPair, Assessment, match, question_of
from .augment import Filter, augment, in_ratio
from .comd_prompts import Prompts
from .comd_trainer import CoMDConfig
from .instructions import ImageStore, Instruction, child_of_round
from .reply_record import Engine, Record, Reply
from .roles import Roles
from .round_progress import progress
from .select import Score
from .similar import SimilarImages


@dataclass(frozen=True)
class InstructionImages:
    """The pictures that instructions of a run may be about."""

    store: ImageStore
    similar: SimilarImages


class Interview:
    """Asks the roles of a run by its settings; the record answers what was asked before."""

    def __init__(self, training: CoMDConfig, roles: Roles, record: Record, prompts: Prompts, console: Console):
        self.training, self.roles, self.record, self.prompts, self.console = training, roles, record, prompts, console
        self.sampling = Sampling(training.answer_max_new_tokens, training.answer_temperature, seed=training.seed)

    @property
    def spent_out(self) -> bool:
        """Whether the teacher's budget is spent."""
        limit = self.training.max_teacher_tokens
        return limit is not None and self.roles.teacher_tokens(self.record) >= limit

    @property
    def assesses(self) -> bool:
        """Whether the answers of a round are assessed: by a judge that is the teacher, only within its budget."""
        training = self.training
        teacher_judges = training.assessor == "judge" and self.roles.assessor is self.roles.teacher
        return training.assessor != "none" and not (teacher_judges and self.spent_out)

    def answers(self, instructions: Sequence[Instruction], phase: str) -> list[Reply]:
        """The teacher's replies to instructions, in their order, as far as the budget goes."""
        questions = [question_of(instruction) for instruction in instructions]
        replies: list[Reply] = []
        step = len(questions) if self.training.max_teacher_tokens is None else self.training.generation_batch_size
        with progress(self.console, f"{phase}: teacher", len(questions)) as advance:
            for start in range(0, len(questions), max(1, step)):
                if self.spent_out:
                    break
                part = questions[start : start + step]
                replies += self.record.ask(self.roles.teacher, part, self.sampling, phase, advance)
        return replies

    def held_out_scores(
        self, number: int, student: Engine, instructions: Sequence[Instruction]
    ) -> dict[str, Any] | None:
        """How well student and teacher answer what is held out; None where nothing is."""
        if not instructions:
            return None
        scores: dict[str, Any] = {"metric": self.training.held_out_metric, "instructions": len(instructions)}
        for role, engine in (("student", student), ("teacher", self.roles.teacher)):
            scores[role] = self.held_out_score(number, role, engine, instructions)
        return scores

    def held_out_score(self, number: int, role: str, engine: Engine, instructions: Sequence[Instruction]) -> float:
        """The mean match of an engine's answers with the data's own."""
        phase, questions = f"round-{number}/evaluate", [question_of(instruction) for instruction in instructions]
        with progress(self.console, f"{phase}: {role}", len(questions)) as advance:
            replies = self.record.ask(engine, questions, self.sampling, phase, advance, spends=False)
        matches = [
            match(self.training.held_out_metric, reply.text, instruction.reference or "")
            for instruction, reply in zip(instructions, replies, strict=True)
        ]
        return round(sum(matches) / len(matches), 6)

    def assess(
        self, number: int, student: Engine, pool: Sequence[tuple[Instruction, str]]
    ) -> tuple[list[AnswerPair], Assessment]:
        """The student's answers beside the teacher's to instructions of the pool, and how they compare."""
        training = self.training
        chosen = sorted(pool, key=lambda pair: pair[0].key)
        if training.assess_instructions is not None:
            # By the key alone, so that the next round looks at the same ones again.
            chosen = chosen[: training.assess_instructions]
        phase = f"round-{number}/student"
        with progress(self.console, phase, len(chosen)) as advance:
            questions = [question_of(instruction) for instruction, _ in chosen]
            replies = self.record.ask(student, questions, self.sampling, phase, advance)
        pairs = [
            AnswerPair(instruction, answer, reply.text)
            for (instruction, answer), reply in zip(chosen, replies, strict=True)
        ]
        assessor = self.roles.make_assessor(self.record, self.prompts, student)
        asked = 2 * len(pairs) if training.assessor in ("judge", "likelihood") else len(pairs)
        with progress(self.console, f"round-{number}/assess: {training.assessor}", asked) as advance:
            return pairs, assessor.assess(pairs, f"round-{number}/assess", advance)

    def new_instructions(
        self,
        number: int,
        cap: int,
        pool: Mapping[str, Instruction],
        hard: Sequence[Score],
        easy: Sequence[Score],
        fit: Filter,
        pictures: InstructionImages,
    ) -> tuple[list[Instruction], dict[str, Any]]:
        """At most `cap` instructions made of the pool's, in the ratio of hard to easy ones, and how many there were.

        `pool` has its instructions by their keys, which scores name.
        """
        training, phase = self.training, f"round-{number}/augment"
        everything = list(pool.values())
        parents: dict[str, Sequence[Instruction]] = {"any": everything}
        counts = {"any": cap}
        if training.assessor != "none":
            kinds = {"hard": hard, "easy": easy}
            parents = {kind: [pool[score.key] for score in scores] for kind, scores in kinds.items()}
            counts = _shares(training.hard_ratio, cap, [kind for kind in parents if parents[kind]])
        augmentor = self.roles.make_augmentor(self.record, self.prompts, everything, pictures.store, pictures.similar)
        with progress(self.console, phase, sum(counts.values())) as advance:
            made = augment(augmentor, parents, counts, fit, training.seed, phase, advance)
        new = [child_of_round(child, number + 1) for child in in_ratio(made, training.hard_ratio, cap)]
        facts: dict[str, Any] = {kind: {"wanted": counts[kind], "fit": len(made[kind])} for kind in counts}
        facts |= {"joined": dict(Counter(child.kind for child in new)), "rejected": dict(fit.reasons)}
        return new, facts


def _shares(hard_ratio: float, cap: int, kinds: Sequence[str]) -> dict[str, int]:
    """How many instructions are wanted of each kind that there are parents of."""
    shares = {"hard": hard_ratio, "easy": 1 - hard_ratio}
    kinds = [kind for kind in kinds if shares[kind]]
    hard = round(hard_ratio * cap)
    counts = {"hard": hard, "easy": cap - hard}
    # The share of a last one may round to the kind that there is none of.
    return {kind: counts[kind] for kind in kinds if counts[kind]} or {kinds[0]: 1}
