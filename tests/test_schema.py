"""What the fields of configs may hold: types, choices and ranges, declared by the fields, checked by one validator."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from transformers.trainer_utils import SaveStrategy
from trl.scripts.utils import TrlParser

from mmkd import KDConfig
from mmkd.errors import UserError
from mmkd.schema import Field, PositiveInt, Range, Share, check_fields
from mmkd.training.method import METHODS


@dataclass
class Settings:
    share: Share = 0.5
    rows: PositiveInt | None = None
    shares: list[Share] = field(default_factory=list)
    kind: str = field(default="mean", metadata={"choices": ["mean", "sum"]})
    names: dict[str, Any] | str | None = None
    fast: bool = False


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"share": 1.5}, "share is 1.5; give a number from 0 to 1."),
        ({"share": math.nan}, "share is nan; give a number from 0 to 1."),
        ({"share": [1]}, "share is [1], which is no number (float)."),
        ({"share": True}, "share is True, which is no number (float)."),
        ({"share": None}, "share is null, and it needs a value."),
        ({"rows": 0}, "rows is 0; give 1 or more, or null."),
        ({"rows": 2.5}, "rows is 2.5, which is no whole number (int)."),
        ({"rows": 10**30}, "which no computer counts to."),
        ({"shares": [0.5, -1]}, "shares[1] is -1; give a number from 0 to 1."),
        ({"shares": 0.5}, "shares is 0.5, which is no list."),
        ({"kind": "men"}, "kind is 'men'; choose one of mean, sum. Did you mean 'mean'?"),
        ({"kind": {}}, "kind is {}; choose one of mean, sum."),
        ({"names": [1]}, "names is [1]; give a mapping or text."),
        ({"names": {1: 2}}, "names has the name 1, which YAML reads as no text: put it into quotes."),
        ({"fast": 2}, "fast is 2, which is neither true nor false."),
    ],
)
def test_what_a_field_cannot_hold_is_said_from_the_field(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as raised:
        check_fields(Settings(**wrong))
    assert says in str(raised.value)


def test_what_a_field_can_hold_passes() -> None:
    check_fields(Settings())
    check_fields(Settings(share=1, rows=3, shares=[0, 1], kind="sum", names={"a": [1]}, fast=True))
    check_fields(Settings(names="text"))


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "says"),
    [
        (Range(min=0), 0, -1, "0 or more"),
        (Range(above=0), 1, 0, "a number above 0"),
        (Range(min=0, max=1), 1, 1.1, "a number from 0 to 1"),
        (Range(above=0, max=1), 1, 0, "a number above 0 and up to 1"),
        (Range(above=0, below=1), 0.5, 1, "a number above 0 and below 1"),
        (Range(min=0, below=1), 0, 1, "a number from 0 and below 1"),
        (Range(), 1, math.inf, "a finite number"),
        (Range(min=0, finite=False), math.inf, math.nan, "0 or more"),
    ],
)
def test_a_range_says_what_lies_in_it(bounds: Range, inside: float, outside: float, says: str) -> None:
    assert inside in bounds
    assert outside not in bounds
    assert str(bounds) == says


@pytest.mark.parametrize(
    ("hint", "written", "value"),
    [
        (int, "5", 5),
        (float, "1e-3", 1e-3),
        (float | None, None, None),
        (bool, "yes", True),
        (bool, 0, False),
        (list[str] | None, "connector", ["connector"]),
        (list[int], ["1", 2], [1, 2]),
        (SaveStrategy | str, "no", "no"),
        (dict[str, Any] | str | None, {"a": 1}, {"a": 1}),
        (str | list[str] | None, ["a"], ["a"]),
        (Literal["a", "b"], "b", "b"),
        (PositiveInt | str | None, "7", 7),
    ],
)
def test_yaml_is_read_as_the_annotation_says(hint: Any, written: Any, value: Any) -> None:
    assert Field.of("key", hint).read(written) == value


def test_a_config_in_python_is_checked_as_a_recipe_is() -> None:
    with pytest.raises(UserError, match=r"temperature is -1; give a number above 0\."):
        KDConfig(output_dir="run", temperature=-1)
    with pytest.raises(UserError, match=r"divergence is 'kl'; choose one of forward_kl"):
        KDConfig(output_dir="run", divergence="kl")


@pytest.mark.parametrize("method", METHODS)
def test_parsers_of_trl_read_our_configs(method: str) -> None:
    """Ranges stand where argparse does not see them, so that scripts of others can use the configs."""
    config = METHODS[method].config
    parser: Any = TrlParser
    (parsed,) = parser(config).parse_args_into_dataclasses(args=["--output_dir", "run"])
    assert isinstance(parsed, config)
