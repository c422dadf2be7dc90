"""What is said about licences that do not go together."""

import pytest

from mmkd.publish.licences import LicensedSource, conflicts, terms_of

OPEN = LicensedSource("org/open", "apache-2.0")


@pytest.mark.parametrize(
    ("name", "license", "family"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", None, "llama2"),
        ("meta-llama/Meta-Llama-3-8B", None, "llama3"),
        ("meta-llama/Llama-3.1-8B", None, "llama3"),
        ("google/gemma-3-270m", None, "gemma"),
        ("org/anything", "gemma", "gemma"),
        # What is stated is believed, whatever the name.
        ("org/gemma-like", "apache-2.0", None),
        ("org/unknown", None, None),
    ],
)
def test_families_by_licence_or_by_name(name, license, family):
    terms = terms_of(LicensedSource(name, license))
    assert (terms.family if terms else None) == family


def test_nothing_is_said_where_all_is_open():
    assert conflicts("apache-2.0", "user/x", [OPEN], [OPEN], [LicensedSource("words", "cc0-1.0")]) == []
    assert conflicts("mit", "user/x", [], [], [LicensedSource("a", "odc-by"), LicensedSource("b", "MIT")]) == []


@pytest.mark.parametrize(
    ("declared", "repo", "base", "teacher", "data", "words"),
    [
        (
            "apache-2.0",
            "u/x",
            OPEN,
            LicensedSource("t", "llama3"),
            None,
            ["forbids training models of other families", "stay under its own"],
        ),
        ("llama3", "u/x", LicensedSource("b", "llama3"), LicensedSource("t", "llama3"), None, []),
        (
            "llama3.1",
            "u/x",
            LicensedSource("b", "llama3.1"),
            LicensedSource("t", "llama3.1"),
            None,
            ["begins with 'Llama'"],
        ),
        ("llama3.1", "u/Llama-x", OPEN, LicensedSource("t", "llama3.1"), None, []),
        ("gemma", "u/x", OPEN, LicensedSource("t", "gemma"), None, []),
        ("apache-2.0", "u/x", OPEN, LicensedSource("t", "gemma"), None, ["stay under its own terms"]),
        (
            "apache-2.0",
            "u/x",
            OPEN,
            LicensedSource("t", "cc-by-nc-4.0"),
            None,
            ["t (cc-by-nc-4.0) is for non-commercial"],
        ),
        ("apache-2.0", "u/x", OPEN, LicensedSource("t", None), None, ["The teacher t states no licence"]),
        ("mit", "u/x", LicensedSource("b", "gemma"), None, None, ["passes its terms on"]),
        ("mit", "u/x", OPEN, None, LicensedSource("d", "cc-by-sa-4.0"), ["d (cc-by-sa-4.0) is share-alike"]),
        ("cc-by-sa-4.0", "u/x", OPEN, None, LicensedSource("d", "cc-by-sa-4.0"), []),
        ("mit", "u/x", OPEN, None, LicensedSource("d", "cc-by-nc-sa-4.0"), ["non-commercial", "share-alike"]),
        ("mit", "u/x", OPEN, None, LicensedSource("d", "research use, see homepage"), ["non-commercial or research"]),
        ("mit", "u/x", OPEN, None, LicensedSource("d", "not stated (its sources differ)"), ["says 'not stated"]),
        (
            "mit",
            "u/x",
            OPEN,
            None,
            LicensedSource("d", "cc-by-4.0 (under OpenAI's terms of use too)"),
            ['says "cc-by-4.0'],
        ),
        ("mit", "u/x", OPEN, None, LicensedSource("d", "odc-by (its sets keep their own)"), ["says 'odc-by"]),
        ("mit", "u/x", OPEN, None, LicensedSource("d", "cc-by-nd-4.0"), ["allows no derivatives"]),
        (None, "u/x", OPEN, None, None, ["The student's own licence is not stated"]),
    ],
)
def test_conflicts(declared, repo, base, teacher, data, words):
    found = conflicts(declared, repo, [base], [teacher] if teacher else [], [data] if data else [])
    assert len(found) == len(words)
    for sentence, part in zip(found, words, strict=True):
        assert part in sentence
