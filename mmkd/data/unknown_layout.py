"""What a user is told about rows whose layout is not known."""

from collections.abc import Mapping
from typing import Any

_KNOWN = (
    "text; messages; conversations (ShareGPT, LLaVA); prompt and completion; prompt and chosen; instruction, input "
    "and output (Alpaca); a question and an answer; body (OpenAI batch); input and preferred_output (OpenAI "
    "preferences)"
)


def unknown_layout(sample: Mapping[str, Any], subject: str) -> str:
    """The message about rows like `sample`, which has a value of some row for each column."""
    hint = ""
    if isinstance(sample.get("response"), Mapping) and "custom_id" in sample:
        hint = " These are an OpenAI batch's answers without its questions: join both files by custom_id."
    if isinstance(sample.get("chosen"), str):
        hint = (
            " `chosen` is a text here, and without a column `prompt` nothing says where its answer begins. Split it "
            "into the columns prompt and completion, or learn from all of it by naming the column text (in a data "
            "recipe: `columns: {text: chosen}`)."
        )
    if _is_classes(sample):
        hint = " Pictures with a class are for method dho, which trains a classifier."
    columns = suggested_columns(sample)
    example = f", such as `columns: {columns}`; put the right names in" if columns else ""
    return (
        f"{subject}: no layout is known with the columns {', '.join(sample) or '(none)'}.{hint} The known ones are "
        f"{_KNOWN}. Rename the columns, or map them with `columns:` in a data recipe{example}."
    )


def suggested_columns(sample: Mapping[str, Any]) -> str:
    """What `columns:` of a data recipe could be, in YAML; empty if no column holds text."""
    texts = [name for name, value in sample.items() if isinstance(value, str)]
    chat = next((name for name, value in sample.items() if _is_list_of_objects(value)), None)
    picture = next((name for name in ("image", "images", "img", "picture", "photo") if name in sample), None)
    images = f", images: {picture}" if picture is not None else ""
    texts = [name for name in texts if name != picture]
    if chat is not None:
        role, content = [str(key) for key in sample[chat][0]][:2]
        return f"{{messages: {{column: {chat}, role_key: {role}, content_key: {content}}}{images}}}"
    if len(texts) >= 2 and images:
        return f"{{messages: {{user: '{{{texts[0]}}}', assistant: '{{{texts[1]}}}'}}{images}}}"
    if _is_classes(sample):
        return ""
    if len(texts) >= 2:
        return f"{{prompt: {texts[0]}, completion: {texts[1]}}}"
    return f"{{text: {texts[0]}}}" if texts else ""


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and len(value[0]) > 1


def _is_classes(sample: Mapping[str, Any]) -> bool:
    return "label" in sample and any(name in sample for name in ("image", "img"))
