"""`--help_keys`: every key in a group, mmkd's own first; filters; what is of no use is hidden and not lost."""

import dataclasses
import io
import re
from typing import Any

import pytest
from rich.console import Console

from mmkd.commands.main import main
from mmkd.errors import UserError
from mmkd.recipe.cache_arguments import CacheArguments
from mmkd.recipe.key_groups import GROUPS, HELP, OWN_KEYS, UNUSED, UPSTREAM_KEYS
from mmkd.recipe.key_help import print_keys
from mmkd.recipe.key_parser import parser_of
from mmkd.recipe.key_reference import keys_of, keys_of_all
from mmkd.training.method import METHODS

ALL_NAMES = {name for method in METHODS for name in parser_of(method).names}


def printed(method: str | None, *words: str, width: int = 80) -> str:
    page = io.StringIO()
    print_keys(Console(file=page, width=width, highlight=False), method, words)
    return page.getvalue()


@pytest.mark.parametrize("method", METHODS)
def test_every_key_has_a_group_and_a_description(method: str) -> None:
    keys = {key.name: key for key in keys_of(method)}
    assert {*keys} == {*parser_of(method).names, "stages", "schedule", "accelerate_config", "env"}
    assert all(key.group in GROUPS and len(key.help) > 10 for key in keys.values())
    # Own keys are in groups that say what they are for.
    assert not [key for key in keys.values() if key.is_own and key.group == "other"]


def test_tables_name_only_keys_that_there_are() -> None:
    tables = [*OWN_KEYS.values(), *UPSTREAM_KEYS.values()]
    listed = [name for names in tables for name in names.split()]
    assert len(listed) == len({*listed})
    assert {*listed, *UNUSED, *HELP} - ALL_NAMES == {"stages", "schedule", "accelerate_config", "env"}
    for method in METHODS.values():
        assert {*method.unused} <= {*parser_of(method.name).names}


def test_own_keys_come_first_and_a_group_stands_under_its_title() -> None:
    text = printed("kd")
    titles = re.findall(r"^[A-Z].*$", text.split("\n\n", 1)[1], re.MULTILINE)
    assert titles == ["Method kd", *list(GROUPS.values())[1:]]
    assert text.index("--divergence") < text.index("--on_policy_fraction") < text.index("\nTeacher\n")
    assert text.index("\nStudent\n") < text.index("--student_layers") < text.index("--lora_r")
    assert "--temperature  number above 0; default 1.0\n" in text
    assert "--rollout_truncated  keep | drop; default keep\n" in text
    assert "--method  sft | kd | taid | alm | llava_kd | comd | dho | tower_kd | clip_kd" in text


@pytest.mark.parametrize("width", [50, 80, 200])
def test_lines_fit_the_terminal(width: int) -> None:
    assert all(len(line) <= width and line == line.rstrip() for line in printed("alm", width=width).splitlines())


def test_keys_without_a_use_are_hidden_and_counted() -> None:
    text = printed("kd")
    hidden = [key for key in keys_of("kd") if key.unused]
    assert {key.name for key in hidden} >= {"fsdp", "do_predict", "loss_type", "local_rank", "label_names"}
    assert not [key.name for key in hidden if f"--{key.name} " in text]
    assert f"{len(hidden)} keys without a use here are hidden. --help_keys all shows them." in text
    everything = printed("kd", "all")
    assert all(f"--{key.name}  " in everything or key.name == "env" for key in keys_of("kd") if key.field)
    assert "are hidden" not in everything


@pytest.mark.parametrize(
    ("method", "hidden", "shown"),
    [
        ("sft", {"ce_weight", "on_policy_fraction", "rollout_server"}, {"teachers", "teacher_cache"}),
        ("alm", {"loss_type", "teacher_model_init_kwargs"}, {"teachers", "combine", "rollout_server"}),
        ("comd", {"teacher_cache", "ce_weight", "combine"}, {"teacher_server", "round_settings"}),
        ("dho", {"student_layers", "use_peft", "cache_signal", "teacher_top_k"}, {"teacher_cache", "ce_weight"}),
    ],
)
def test_what_a_method_does_not_read_is_hidden(method: str, hidden: set[str], shown: set[str]) -> None:
    unused = {key.name for key in keys_of(method) if key.unused}
    assert hidden <= unused
    assert not shown & unused


def test_a_hidden_key_is_really_refused_or_without_effect() -> None:
    """A key that a method hides as being about something else cannot be one that its own config declares."""
    for method, value in METHODS.items():
        own = {key.name for key in keys_of(method) if key.method == method}
        assert own & {*value.unused} <= {"ce_weight"}


def test_words_select_by_name_and_description() -> None:
    text = printed("kd", "lora")
    # One of them by its description.
    assert re.findall(r"^  --(\w+)", text, re.MULTILINE)[:3] == ["use_peft", "lora_r", "lora_alpha"]
    assert "--divergence" not in text
    assert re.findall(r"^  --(\w+)", printed("kd", "lora", "dropout"), re.MULTILINE) == ["lora_dropout"]
    # All choices, where the list of all keys counts them.
    assert "adamw_torch | adamw_torch_fused" in printed("kd", "optim")
    assert "one of " in printed("kd").split("--optim ")[1].split("\n")[0]
    # A hidden key is found, and says why it is hidden.
    assert "set accelerate_config to fsdp2" in " ".join(printed("kd", "--fsdp").split())


def test_no_match_names_the_nearest_keys_or_the_method_that_has_one() -> None:
    with pytest.raises(UserError, match=r"No key of method kd has 'tempratur' .* nearest names are temperature"):
        printed("kd", "tempratur")
    with pytest.raises(UserError, match=r"No key of method sft has 'taid_alpha' .* Method taid has such a key"):
        printed("sft", "taid_alpha")
    with pytest.raises(UserError, match=r"No key of any method has 'xyzzy' .* Try a shorter word"):
        printed(None, "xyzzy")


def test_without_a_recipe_all_methods_are_listed() -> None:
    text = printed(None)
    titles = [line for line in text.splitlines() if re.match(r"(Method|Teacher)", line)]
    assert titles == ["Method", *(f"Method {name}" for name in METHODS if name != "sft"), "Teacher"]
    # `alpha` means one thing to llava_kd and another to dho.
    assert len([key for key in keys_of_all() if key.name == "alpha"]) == 2
    assert text.count("--learning_rate ") == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["kd/quickstart", "--help_keys", "skew"], "Keys of method kd with 'skew'"),
        (["--help_keys", "kd/quickstart"], "Keys of method kd."),
        (["kd/quickstart", "--help-keys", "skew", "--method", "taid", "--dry_run"], "No key of method taid"),
        (["--help_keys", "taid", "t_start"], "Keys of method taid with 't_start'"),
        (["--help_keys", "t_start"], "Keys of all methods with 't_start'"),
    ],
)
def test_the_command_takes_a_recipe_a_method_or_neither(words: list[str], says: str, capsys: Any) -> None:
    status = main(["train", *words])
    said = capsys.readouterr()
    assert says in " ".join((said.out + said.err).split())
    assert status == (2 if "No key" in says else 0)


def test_a_recipe_is_still_required_to_train(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train"])
    assert "the following arguments are required: recipe" in capsys.readouterr().err


def test_help_of_a_cache_build_lists_the_keys_of_caches(capsys: Any) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["cache", "build", "--help"])
    text = capsys.readouterr().out
    assert "usage: mmkd cache build" in text
    assert all(f"--{field.name}  " in text for field in dataclasses.fields(CacheArguments))


def test_a_terminal_gets_colours() -> None:
    page = io.StringIO()
    print_keys(Console(file=page, width=80, force_terminal=True, color_system="standard"), "kd", ["skew"])
    assert "\x1b[1;36m--skew" in page.getvalue()
    assert "\x1b[" not in printed("kd", "skew")
