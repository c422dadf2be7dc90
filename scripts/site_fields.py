"""Extension of griffe for mkdocs.yml: a field of a config is documented by the `help` of its metadata."""

import ast
from typing import Any

from griffe import Attribute, Docstring, Extension


class FieldHelp(Extension):
    """Gives `name: type = field(default=..., metadata={"help": ...})` its help as docstring, and shows the default."""

    def on_attribute_instance(self, *, node: Any, attr: Attribute, **kwargs: Any) -> None:
        """Called by griffe for each attribute that it has read."""
        value = getattr(node, "value", None)
        if "ClassVar" in str(attr.annotation):
            # For those who write a method, not for those who set its fields.
            attr.public = False
        if not (isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "field"):
            return
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if isinstance(init := given.get("init"), ast.Constant) and init.value is False:
            attr.public = False
            return
        metadata = given.get("metadata")
        if isinstance(metadata, ast.Dict):
            for key, entry in zip(metadata.keys, metadata.values, strict=True):
                if (
                    isinstance(key, ast.Constant)
                    and key.value == "help"
                    and isinstance(entry, ast.Constant)
                    and isinstance(entry.value, str)
                ):
                    attr.docstring = Docstring(entry.value, lineno=attr.lineno, endlineno=attr.endlineno, parent=attr)
        attr.value = ast.unparse(given["default"]) if "default" in given else None
