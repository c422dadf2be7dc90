"""The check of `mmkd doctor` on methods that read with two tokenizers: how much of the text both agree on."""

import numpy as np

from mmkd.capture.sequences import TokenSequence
from mmkd.preparation.pairs import Agreement, BatchAligner, read

from .facts import Finding, Rendered

# Below this share of the student's supervised tokens, a template or a normaliser is likely to be in the way.
_USUAL = 0.9


def alignment(ours: Rendered, theirs: Rendered) -> list[Finding]:
    """The share of the student's supervised tokens that lie in chunks of text which end tokens on both sides."""
    pairs = [
        (student_sequence, teacher_sequence)
        for student_sequence, teacher_sequence in zip(ours.sequences, theirs.sequences, strict=True)
        if isinstance(student_sequence, TokenSequence) and isinstance(teacher_sequence, TokenSequence)
    ]
    if not pairs:
        return [Finding("problem", "alignment", "No row can be read by both student and teacher.")]
    student, teacher = (
        read([(sequence.ids, np.where(sequence.supervised, sequence.ids, -100)) for sequence in side])
        for side in zip(*pairs, strict=True)
    )
    align = BatchAligner.of(ours.prepared.processing_class, theirs.prepared.processing_class)
    counts = align.chunks(student, teacher).counts
    agreement = Agreement.of(counts)
    if not agreement.chunks:
        advice = "Nothing would be learnt: look at both chat templates and at what they supervise."
        return [Finding("problem", "alignment", str(agreement), advice)]
    if agreement.share < _USUAL:
        advice = "What does not align is not learnt from the teacher. Compare the chat templates and normalisers."
        return [Finding("warning", "alignment", str(agreement), advice)]
    return [Finding("ok", "alignment", str(agreement))]
