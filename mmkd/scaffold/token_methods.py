"""What `mmkd init` knows of each method over tokens: the tokenizers and rows it is for, and the keys it needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mmkd.preflight.facts import Side
from mmkd.preparation.prompt_rows import prompts_only

from .draft import Draft


@dataclass(frozen=True)
class MethodFacts:
    """What the keys of a method depend on."""

    student: Side
    teacher: Side
    columns: Sequence[str]
    """Of the rows."""
    served: bool
    """Whether a server runs the teacher."""
    answered: bool
    """Whether the rows have answers of their own."""
    room: int
    """Tokens of max_length that the longest sampled row leaves for an answer."""


@dataclass(frozen=True)
class TokenMethod:
    """A method as `mmkd init` writes it."""

    name: str
    why: str
    """What is learnt by it, for the comment above its name."""
    set_keys: Callable[[Draft, MethodFacts], None]
    tokenizers: Literal["same", "different", "any"] = "same"
    """Of student and teacher: those that it needs, or is meant for."""
    images: bool = True
    """Whether it learns from pictures too."""
    reads_cache: bool = False
    """Whether a teacher that does not fit beside the student can be run before training."""
    answer_tokens: int = 0
    """Of an answer that the teacher writes during training, at most."""


ROLLOUT_TOKENS = 128
"""Of an answer that the student writes, at most."""

_ANSWER_TOKENS = 256


def set_rollouts(draft: Draft, facts: MethodFacts) -> None:
    """The keys of answers that the student writes itself, for every method over tokens."""
    columns = facts.columns
    prompts = prompts_only(columns)
    draft.set(
        "method",
        "on_policy_fraction",
        1.0 if prompts else 0.5,
        "The data has prompts only, so that the student answers all of them."
        if prompts
        else "Share of the prompts that the student answers itself; the others have the data's answers.",
    )
    room = int(draft.keys["max_length"]) // 2
    tokens = min(ROLLOUT_TOKENS, max(1, room, facts.room if prompts else 0))
    draft.set("method", "rollout_max_tokens", tokens, "A student goes wrong early: short ones will do.")
    if "text" in columns:
        draft.set("method", "rollout_prompt_tokens", max(1, min(64, room)), "Plain text: so much of it is continued.")


def _divergence(draft: Draft, facts: MethodFacts) -> None:
    draft.set(
        "method",
        "divergence",
        "forward_kl",
        "Covers all that the teacher would say; safest for small students. Try jsd or reverse_kl against rambling.",
    )
    draft.set("method", "temperature", 1.0)


def _visual(draft: Draft, facts: MethodFacts) -> None:
    towers = [side.config.vision_config.to_dict() for side in (facts.student, facts.teacher)]
    if any(towers[0].get(name) != towers[1].get(name) for name in ("image_size", "patch_size")):
        draft.set(
            "method",
            "visual_tokens",
            "pool",
            "The two cut pictures into different numbers of tokens: the finer one is averaged.",
        )


def _chunks(draft: Draft, facts: MethodFacts) -> None:
    draft.set("method", "ce_weight", 0.1, "A little of the data's own text keeps the student's spelling right.")


def _rounds(draft: Draft, facts: MethodFacts) -> None:
    images = "images" in facts.columns
    assessor = "likelihood"
    if images or facts.served:
        # Rouge compares with the data's own answers.
        assessor = "agreement" if images or not facts.answered else "rouge"
    draft.set("method", "rounds", 2, "After the first, which learns the teacher's answers to your own questions.")
    draft.set(
        "method",
        "assessor",
        assessor,
        "Finds what the student fails at. `judge` lets the teacher rate both answers, which needs one of 7B or more.",
    )
    draft.set(
        "method",
        "augmentor",
        "templates" if images else "model",
        "New questions are questions of yours about other pictures."
        if images
        else "The teacher writes new questions like those that the student fails at.",
    )
    draft.set("method", "new_instructions", 256, "New questions per round.")
    room = max(1, int(draft.keys["max_length"]) // 2, facts.room)
    draft.set("method", "answer_max_new_tokens", min(_ANSWER_TOKENS, room), "Longer answers are left out.")
    if facts.answered:
        draft.set("method", "held_out_metric", "rouge", "How held-out answers are compared with yours.")


TOKEN_METHODS = {
    method.name: method
    for method in (
        TokenMethod(
            "kd",
            "The student learns the teacher's distribution over every next token.",
            _divergence,
            reads_cache=True,
        ),
        TokenMethod(
            "llava_kd",
            "The student learns the teacher's distribution over the answer and at the visual tokens, and how these "
            "relate.",
            _visual,
        ),
        TokenMethod(
            "alm",
            "Student and teacher have different tokenizers: chunks of text that end a token on both are compared.",
            _chunks,
            tokenizers="different",
            images=False,
        ),
        TokenMethod(
            "comd",
            "In each round the student's failures decide what the teacher is asked next.",
            _rounds,
            tokenizers="any",
            answer_tokens=_ANSWER_TOKENS,
        ),
    )
}
