"""Whether a student can be trained as student_quantization says, looked up in a model without weights."""

from mmkd.models.quantised_students import share_of
from mmkd.recipe.recipe import Run
from mmkd.recipe.run_models import check_student

from .empty_models import empty_student
from .facts import Finding, Side


def quantised_student(run: Run, student: Side) -> list[Finding]:
    """What is quantised, if anything. Raises UserError for a student that cannot be."""
    quantisation = run.training.quantisation
    if quantisation is None:
        return []
    check_student(run)
    model = empty_student(run, student)
    text = f"The student is trained as {quantisation.described()}: {share_of(model, quantisation)}."
    findings = [Finding("ok", "quantisation", text)]
    if run.student.use_peft and run.student.lora_dropout:
        text = "lora_dropout is not applied: the adapter is merged into the weight before that is rounded."
        findings.append(Finding("warning", "quantisation", text, "Set lora_dropout: 0."))
    return findings
