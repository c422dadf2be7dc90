"""Secrets where they would be written down: in recipes, which run.json, cards and caches repeat."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mmkd.errors import UserError

_USER_INFO = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/?#\s@]+@", re.IGNORECASE)
_SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def without_user_info(text: str) -> str:
    """The text with name and password taken out of its URLs."""
    return _USER_INFO.sub(r"\1***@", text)


def refuse_user_info(url: str, where: str) -> None:
    """Raises UserError for a URL with a name or password in it."""
    if _USER_INFO.search(url):
        raise UserError(
            f"{where} is {without_user_info(url)}, a URL with a name or password in it, which would stand in records, "
            "logs and cards. Take it out; a key of a server belongs into the environment (VLLM_API_KEY, "
            "OPENAI_API_KEY, HF_TOKEN)."
        )


def refuse_secrets(keys: Mapping[Any, Any]) -> None:
    """Raises UserError for a secret in a recipe, without repeating it."""
    for key, value in keys.items():
        if key == "hub_token" and value is not None:
            raise UserError(
                "hub_token is a secret, and a recipe is copied into records and cards. Remove it, and use `hf auth "
                "login` or the variable HF_TOKEN of the shell."
            )
        if key == "env" and isinstance(value, Mapping):
            _refuse_variables(value)
        if isinstance(key, str) and key.endswith("_key_env") and isinstance(value, str):
            _check_variable(key, value)
        for text in _texts(value):
            refuse_user_info(text, str(key))
        for own in _mappings(value):
            refuse_secrets(own)


def _refuse_variables(variables: Mapping[Any, Any]) -> None:
    for name, value in variables.items():
        if value not in (None, "") and _SECRET_NAME.search(str(name)):
            raise UserError(
                f"env.{name} is a secret, and a recipe is copied into records and cards. Remove it, and set the "
                "variable in the shell that starts the run."
            )


def _check_variable(key: str, value: str) -> None:
    if not _VARIABLE.fullmatch(value):
        raise UserError(
            f"{key} is not the name of a variable (its value is not shown, since it may be the key itself). Set a "
            "variable of the environment to the key, and write its name here, such as OPENAI_API_KEY."
        )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple):
        for own in value:
            yield from _texts(own)


def _mappings(value: Any) -> Iterator[Mapping[Any, Any]]:
    if isinstance(value, Mapping):
        yield value
    elif isinstance(value, list | tuple):
        for own in value:
            yield from _mappings(own)
