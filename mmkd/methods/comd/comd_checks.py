"""Settings of CoMD that contradict each other, refused before its first question."""

from mmkd.errors import UserError
from mmkd.recipe.recipe import Run

from .comd_trainer import CoMDConfig


def check_rounds(run: Run) -> None:
    """Raises UserError for settings that contradict each other."""
    training = run.training
    assert isinstance(training, CoMDConfig)
    if training.push_to_hub:
        raise UserError(
            "push_to_hub would push every round of comd. Leave it out, and upload the last student.",
            because="not built",
        )
    if training.mutual and (training.world_size > 1 or run.arguments.teacher_server is not None):
        raise UserError(
            "mutual trains the teacher in this process: give it as a folder or Hub id without teacher_server, and "
            "run a single process.",
            because="not built",
        )
    if training.assessor == "likelihood" and run.arguments.teacher_server is not None:
        raise UserError(
            "assessor: likelihood needs the teacher's log-probs, which a chat server does not give. Give the "
            "teacher as a folder or Hub id without teacher_server, or choose another assessor.",
            because="not built",
        )
