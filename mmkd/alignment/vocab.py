"""Whether two tokenizers are one, and how many tokens they share."""

from collections.abc import Mapping


def shared_vocabulary(student: Mapping[str, int], teacher: Mapping[str, int]) -> int:
    """The number of leading token ids that mean the same to student and teacher.

    One vocabulary may have more tokens at its end (a padding token, say): what comes after the last shared id has no
    counterpart and is left out of every comparison. Raises ValueError where the tokenizers really differ.
    """
    differing = [token for token, index in student.items() if token in teacher and teacher[token] != index]
    shared = {index for token, index in student.items() if token in teacher}
    end = max(shared, default=-1) + 1
    missing = [token for token, index in student.items() if index < end and token not in teacher]
    missing += [token for token, index in teacher.items() if index < end and token not in student]
    if differing or missing or not shared:
        examples = ", ".join(repr(token) for token in (differing + missing)[:3])
        raise ValueError(
            f"Student ({len(student)} tokens) and teacher ({len(teacher)} tokens) have different vocabularies: "
            f"{len(differing)} tokens have another id and {len(missing)} exist on one side only ({examples}, ...). A "
            "token-by-token divergence would compare unrelated tokens. Use a teacher of the same family, or method "
            "alm, which distils across tokenizers."
        )
    return end
