"""Whether the modules that `features` names exist, looked up in models without weights."""

from collections.abc import Mapping

from mmkd.models.captured_features import modules_of
from mmkd.recipe.recipe import Run
from mmkd.recipe.run_teacher import reads_teacher
from mmkd.training.feature_config import FeatureConfig
from mmkd.training.feature_terms import LAST_HIDDEN

from .empty_models import empty_student, empty_teacher
from .facts import Finding, Side


def named_modules(run: Run, student: Side, teachers: Mapping[str, Side]) -> list[Finding]:
    """The modules that are compared, if any. Raises UserError for one that student or teacher does not have."""
    terms = run.training.feature_terms if isinstance(run.training, FeatureConfig) else ()
    if not terms:
        return []
    alone = run.by_teacher()
    loaded = {name: side for name, side in teachers.items() if reads_teacher(alone[name].arguments)}
    models = {name: empty_teacher(alone[name], side)[0] for name, side in loaded.items()}
    ours, compared = empty_student(run, student), list[str]()
    for term in terms:
        modules = [LAST_HIDDEN] if term.student == LAST_HIDDEN else modules_of(ours, term.student)
        for name, model in models.items():
            called = term.of_teacher(name)
            if called not in (None, LAST_HIDDEN):
                modules_of(model, called)
        compared += modules
    return [Finding("ok", "features", f"Compared modules of the student: {', '.join(compared)}.")]
