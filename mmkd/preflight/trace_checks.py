"""Checks of `mmkd doctor` on answers that are to be generated: who writes them, and how they are verified."""

from typing import Any

from mmkd.capture.answer_verdicts import check_gold_column, gold_of
from mmkd.capture.answering import api_client, judge_client
from mmkd.capture.generate_plan import check_answerer
from mmkd.data.arrow import read_rows
from mmkd.data.load_data import load_data
from mmkd.data.teacher_view import answer_of
from mmkd.generation.thoughts import thought_of
from mmkd.generation.verifiers import Verifier, verifier_named
from mmkd.recipe.recipe import Run
from mmkd.teachers.chat_api import ChatClient

from .facts import Finding

_ROWS = 20
_SHOWN = 60


def answerer(run: Run) -> list[Finding]:
    """Whether somebody is named who answers, and whether a chat API can be asked."""
    check_answerer(run)
    if run.arguments.teacher_api is None:
        return []
    with api_client(run) as client:
        return [_offered(client, "teacher_api")]


def judge(run: Run) -> list[Finding]:
    """Whether the judge can be asked."""
    with judge_client(run) as client:
        return [_offered(client, "cache_judge_server")]


def _offered(client: ChatClient, key: str) -> Finding:
    offered = client.offered()
    if offered is None:
        return Finding("ok", key, f"It answers, and does not list its models; {client.model!r} is asked.")
    if client.model not in offered:
        names = ", ".join(map(repr, sorted(offered)[:5]))
        return Finding("problem", key, f"It does not offer {client.model!r}; among its models are {names}.")
    return Finding("ok", key, f"It answers and offers {client.model!r}.")


def verifier(run: Run) -> list[Finding]:
    """Whether the verifier can read the right answers of the data, and finds the data's own answers right."""
    keys = run.cache
    assert keys.cache_verifier is not None
    rule = verifier_named(keys.cache_verifier, keys.cache_json_schema, keys.cache_gold_column)
    most = min(_ROWS, run.arguments.max_train_rows or _ROWS)
    data = load_data(run.arguments.data, max_train_rows=most, max_eval_rows=1, also=keys.read_columns)["train"]
    check_gold_column(data.column_names, keys.cache_gold_column)
    rows = list(read_rows(data, [name for name in data.column_names if name != "images"]))
    golds = [gold_of(row, keys.cache_gold_column) if rule.reads_gold else None for row in rows]
    findings = _readable(rule, golds, keys.cache_keep) if rule.reads_gold else []
    return findings or _own_answers(rule, rows, golds)


def _readable(rule: Verifier, golds: list[Any], keep: str) -> list[Finding]:
    """What is wrong with the right answers themselves."""
    unread = [number for number, gold in enumerate(golds) if gold is None or rule.gold(gold) is None]
    if not unread:
        return []
    first = golds[unread[0]]
    example = "has none" if first is None else f"says {str(first)[-_SHOWN:]!r}"
    severity = "problem" if keep == "correct" and len(unread) == len(golds) else "warning"
    advice = "Name the column with the right answers (cache_gold_column), or another cache_verifier."
    if keep != "correct":
        advice += " cache_keep chooses without them."
    return [
        Finding(
            severity,
            "verifier",
            f"The verifier {rule.name} reads no right answer in {len(unread)} of {len(golds)} rows; row {unread[0]} "
            f"{example}.",
            advice,
        )
    ]


def _own_answers(rule: Verifier, rows: list[dict[str, Any]], golds: list[Any]) -> list[Finding]:
    """Whether the answers that the rows have themselves are found right."""
    answers = [thought_of(answer_of(row)).answer for row in rows]
    ruled = ((n, rule.rule(answer, rows[n], golds[n]).right) for n, answer in enumerate(answers) if answer)
    rulings = {number: right for number, right in ruled if right is not None}
    if not rulings:
        return [Finding("ok", "verifier", f"{rule.name} reads the right answers of {len(rows)} rows.")]
    wrong = [number for number, right in rulings.items() if not right]
    if not wrong:
        return [Finding("ok", "verifier", f"{rule.name} finds the data's own answers right in {len(rulings)} rows.")]
    return [
        Finding(
            "problem" if len(wrong) == len(rulings) else "warning",
            "verifier",
            f"The verifier {rule.name} rejects the data's own answers in {len(wrong)} of {len(rulings)} rows; that of "
            f"row {wrong[0]} ends with {answers[wrong[0]][-_SHOWN:]!r}.",
            "It would reject a teacher's right answers of that form, too. Choose another cache_verifier, or correct "
            "the data.",
        )
    ]
