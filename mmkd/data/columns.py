"""The mapping from a source's columns to TRL's: by name, by template, or as a list of messages."""

import string
from collections.abc import Mapping
from dataclasses import dataclass, field

from mmkd.errors import UserError, nearest

ROLES = ("system", "developer", "user", "assistant", "tool")


def is_template(mapping: str) -> bool:
    """Whether a column's mapping is a `{column}` template rather than the name of a column."""
    return "{" in mapping


def template_columns(template: str) -> list[str]:
    """The source columns that a template reads. Raises UserError for one that str.format cannot fill by name."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}; write {{{{ and }}}} for braces that are text.") from error
    for name in names:
        if not name or name.isdigit() or "." in name or "[" in name:
            raise UserError(
                f"template {template!r}: {{{name}}} is no plain column name; use {{column}}, one pair of braces each."
            )
    return names


@dataclass(frozen=True)
class MessagesColumn:
    """A column that holds a list of messages, with the keys of role and content."""

    column: str = field(metadata={"help": "The source column: a list of objects, one for each message.", "yaml": str})
    role_key: str = field(
        default="role", metadata={"help": "The key of the speaker; 'from' in ShareGPT.", "yaml": str}
    )
    content_key: str = field(
        default="content", metadata={"help": "The key of the text; 'value' in ShareGPT.", "yaml": str}
    )
    role_map: Mapping[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "{role in the source: role of the chat template}, such as {human: user, gpt: assistant}.",
            "yaml": dict,
        },
    )

    image_token: str | None = field(
        default=None,
        metadata={
            "help": "The mark for an image within the text, such as '<image>' in LLaVA's data. It becomes an image "
            "of the message, between the texts around it.",
            "yaml": str,
        },
    )
    user_key: str | None = field(
        default=None,
        metadata={
            "help": "For lists of pairs, such as The Cauldron's. The key of the question; images are placed before "
            "the first one.",
            "yaml": str,
        },
    )
    assistant_key: str | None = field(
        default=None, metadata={"help": "For lists of pairs. The key of the answer.", "yaml": str}
    )

    def __post_init__(self) -> None:
        """Raises UserError for a role that chat templates do not know, and for only one key of a pair."""
        if (self.user_key is None) != (self.assistant_key is None):
            raise UserError("user_key and assistant_key name the two sides of a pair: give both or neither.")
        for role in self.role_map.values():
            if role not in ROLES:
                raise UserError(
                    f"role_map: {role!r} is no role; did you mean {nearest(role, ROLES)!r}? "
                    f"The roles are {', '.join(ROLES)}."
                )


@dataclass(frozen=True)
class TurnColumns:
    """A question and an answer as templates over the source's columns; images are placed before the question.

    Besides `{column}`, `{choices:letters}` writes a list as lettered lines and `{answer:letter}` a number as a letter.
    """

    user: str = field(metadata={"help": "Template of the question, such as '{question}'.", "yaml": str})
    assistant: str = field(metadata={"help": "Template of the answer, such as '{answer}'.", "yaml": str})

    def __post_init__(self) -> None:
        """Raises UserError for a template that reads no column."""
        for key in ("user", "assistant"):
            if not is_template(getattr(self, key)):
                raise UserError(f"{key} is {getattr(self, key)!r}, which reads no column; write '{{column}}'.")
