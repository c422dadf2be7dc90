"""The pages of keys: each key can be linked to, under its group, and none is missing."""

import re

from mmkd.data.data_recipe import DataRecipe
from mmkd.recipe.key_groups import OWN_KEYS, UPSTREAM_KEYS
from mmkd.recipe.key_reference import keys_of_all
from scripts.site_keys import data_key_page, key_page


def test_every_key_of_a_group_has_an_anchor() -> None:
    page = key_page()
    anchors = re.findall(r"^\{: #(\S+) \}$", page, re.MULTILINE)
    assert len(anchors) == len({*anchors})
    listed = {name for names in [*OWN_KEYS.values(), *UPSTREAM_KEYS.values()] for name in names.split()}
    unused = {key.name for key in keys_of_all() if key.unused}
    assert listed - unused <= {*anchors}
    assert {"kd-temperature", "dho-temperature", "taid-t_start", "comd-rounds"} <= {*anchors}
    assert all(f"| `{name}` |" in page for name in unused - {*anchors})


def test_keys_stand_under_their_group() -> None:
    page = key_page()
    places = [
        page.index(f"\n## {title}\n") for title in ("Every method", "Method kd", "Teacher", "Cache", "Publishing")
    ]
    assert places == sorted(places)
    assert places[2] < page.index("{: #teacher_top_k }") < places[3] < page.index("{: #cache_signal }") < places[4]


def test_a_key_of_some_methods_says_of_which() -> None:
    entry = key_page().split("{: #on_policy_fraction }")[1].split("{: #")[0]
    assert "*Methods: kd, taid, alm, llava_kd.*" in entry


def test_every_key_of_a_data_recipe_is_described() -> None:
    page = data_key_page()
    names = [name for name, field in DataRecipe.__dataclass_fields__.items() if "yaml" in field.metadata]
    assert all(f"{{: #{name} }}" in page for name in names)
    assert "| `role_map` |" in page
    assert "| `min_chars` |" in page
    assert "{: #class-validation_per_class }" in page
