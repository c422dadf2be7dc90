"""Requirements of the licences of models and data on a student, and conflicts with its own licence."""

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LicensedSource:
    """A model or data set that a student is made of: its published name, and its licence on the Hub or in a recipe."""

    name: str
    license: str | None


@dataclass(frozen=True)
class Terms:
    """The requirements of a licence. Read the licence yourself: this is a reminder and no legal advice."""

    pattern: str
    non_commercial: bool = False
    share_alike: bool = False
    no_derivatives: bool = False
    family: str | None = None
    """The family under whose licence models must stay that were trained on the outputs."""
    no_training: bool = False
    """Outputs may not be used to train models outside of the family."""
    name_prefix: str | None = None
    """The required first part of the name of a model that was trained on the outputs."""


KNOWN = (
    Terms(r"llama-?2", family="llama2", no_training=True),
    Terms(r"(meta-)?llama-?3[.-][123]", family="llama3", name_prefix="Llama"),
    Terms(r"(meta-)?llama-?3", family="llama3", no_training=True),
    Terms(r"llama-?4", family="llama4", name_prefix="Llama"),
    Terms(r"gemma", family="gemma"),
    Terms(r"(qwen|mrl|mistral-ai-research|nvidia-non-commercial|stabilityai-nc)[\w-]*(research|non-?commercial|nc)\b.*",
          non_commercial=True),
    Terms(r"cc-by-nc-sa.*", non_commercial=True, share_alike=True),
    Terms(r"cc-by-nc-nd.*", non_commercial=True, no_derivatives=True),
    Terms(r"cc-by-nc.*", non_commercial=True),
    Terms(r"cc-by-nd.*", no_derivatives=True),
    Terms(r"(cc-by-sa|gfdl|odbl|cdla-sharing).*", share_alike=True),
    Terms(r"(a|l)?gpl-.*", share_alike=True),
    Terms(r".*(non-?commercial|research use|research only).*", non_commercial=True),
)  # fmt: skip

# Texts that do not name a single licence, or that mention further terms.
_UNKNOWN = re.compile(
    r"other|unknown|not stated|see the homepage|.*keep (their own|the licences)|.*each subset keeps|.*terms of use"
)
_FAMILY_NAMES = re.compile(r"(?i)(?:^|/)(?:meta-)?(llama-?[234](?:[.-][123](?!\d))?|gemma)")


def terms_of(source: LicensedSource) -> Terms | None:
    """The terms of a known licence; for a model without a licence, those of the family in its name."""
    license = source.license
    if license is None and (match := _FAMILY_NAMES.search(source.name)):
        license = match[1]
    text = (license or "").lower()
    return next((terms for terms in KNOWN if re.match(terms.pattern, text)), None)


def conflicts(
    declared: str | None,
    repo_id: str,
    base: Sequence[LicensedSource],
    teachers: Sequence[LicensedSource],
    data: Sequence[LicensedSource],
) -> list[str]:
    """Sentences about conflicts with publishing the student as `repo_id` under the declared licence."""
    own = terms_of(LicensedSource("", declared)) if declared else None
    sentences = []
    for teacher in teachers:
        sentences += _of_outputs(teacher, own, declared, repo_id, base)
    for role, source in [*(("base model", source) for source in base), *(("data", source) for source in data)]:
        sentences += _of_part(role, source, own, declared)
    if declared is None or _UNKNOWN.match(declared.lower()):
        sentences.append("The student's own licence is not stated: pass --license.")
    return list(dict.fromkeys(sentences))


def _of_outputs(
    teacher: LicensedSource, own: Terms | None, declared: str | None, repo_id: str, base: Sequence[LicensedSource]
) -> list[str]:
    terms = terms_of(teacher)
    if terms is None:
        return [] if teacher.license else [_not_known("teacher", teacher)]
    subject = f"The teacher {teacher.name} ({teacher.license or terms.family})"
    sentences = []
    families = [base_terms.family for base_terms in map(terms_of, base) if base_terms is not None]
    if terms.no_training and not (families and all(family == terms.family for family in families)):
        sentences.append(
            f"{subject} forbids training models of other families on its outputs, and the student is of another one."
        )
    if terms.family is not None and (own is None or own.family != terms.family):
        sentences.append(
            f"{subject} requires models distilled from it to stay under its own terms, and the student is declared "
            f"{declared or 'without a licence'}."
        )
    if terms.name_prefix and not repo_id.rpartition("/")[2].startswith(terms.name_prefix):
        sentences.append(
            f"{subject} requires a model trained on its outputs to have a name that begins with {terms.name_prefix!r} "
            f"and to say 'Built with {terms.name_prefix}'; {repo_id} does not."
        )
    if terms.non_commercial and not (own and own.non_commercial):
        sentences.append(
            f"{subject} is for non-commercial use, and the student is declared {declared or 'without a licence'}."
        )
    return sentences


def _of_part(role: str, source: LicensedSource, own: Terms | None, declared: str | None) -> list[str]:
    terms = terms_of(source)
    if terms is None:
        is_stated = source.license and not _UNKNOWN.match(source.license.lower())
        return [] if is_stated else [_not_known(role, source)]
    subject = f"The {role} {source.name} ({source.license or terms.family})"
    stated = f"and the student is declared {declared or 'without a licence'}."
    sentences = []
    if terms.non_commercial and not (own and own.non_commercial):
        sentences.append(f"{subject} is for non-commercial or research use, {stated}")
    if terms.share_alike and not (own and own.share_alike and own.pattern == terms.pattern):
        sentences.append(f"{subject} is share-alike, {stated}")
    if terms.no_derivatives:
        sentences.append(f"{subject} allows no derivatives.")
    if terms.family and role == "base model" and (own is None or own.family != terms.family):
        sentences.append(f"{subject} passes its terms on, {stated}")
    return sentences


def _not_known(role: str, source: LicensedSource) -> str:
    stated = f"says {source.license!r}" if source.license else "states no licence"
    return f"The {role} {source.name} {stated}: find out what it allows before you publish."
