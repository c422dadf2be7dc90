"""Writes the JSON Schemas of recipes and data recipes to mmkd/_schemas, from the fields that mmkd reads them by.

Editors find them by the first line of a YAML file. Run it after a change of a key: `tests/recipe/test_json_schema.py`
compares. Methods of other packages are not in them: `mmkd recipes schema` prints a schema with those installed.
"""

import json
from typing import Any

from mmkd.data.data_schema import class_data_recipe_schema, data_recipe_schema
from mmkd.files import write_file
from mmkd.recipe.recipe_schema import recipe_schema
from mmkd.schema_lines import SCHEMAS
from mmkd.training.method import METHODS


def schemas() -> dict[str, str]:
    """Name of a file -> its content."""
    made: dict[str, dict[str, Any]] = {
        "recipe": recipe_schema([name for name in METHODS if METHODS[name].config.__module__.startswith("mmkd.")]),
        "data_recipe": data_recipe_schema(),
        "class_data_recipe": class_data_recipe_schema(),
    }
    return {f"{kind}.schema.json": json.dumps(schema, indent=1) + "\n" for kind, schema in made.items()}


def main() -> None:
    """Writes all of them."""
    for name, text in schemas().items():
        write_file(SCHEMAS / name, text)
        print(SCHEMAS / name)


if __name__ == "__main__":
    main()
