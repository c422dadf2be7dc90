"""Rows of easy-VQA as lm-eval asks for them."""

from typing import Any

from PIL import Image


def images(row: dict[str, Any]) -> list[Image.Image]:
    """The pictures of a row, opened."""
    return [Image.open(path).convert("RGB") for path in row["images"]]


def question(row: dict[str, Any]) -> str:
    """What is asked, after one placeholder per picture."""
    parts = row["messages"][0]["content"]
    return "".join("<image>" if part["type"] == "image" else part["text"] for part in parts)


def answer(row: dict[str, Any]) -> str:
    """The answer in the data."""
    return row["messages"][-1]["content"][0]["text"]
