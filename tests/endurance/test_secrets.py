"""Keys of servers and of the Hub: they stand in the environment, and in nothing that mmkd writes or says."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

from mmkd.commands.main import main
from mmkd.commands.train import train
from mmkd.data.credentials import without_user_info
from mmkd.data.data_recipe import DataRecipe
from mmkd.errors import UserError
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.recipe import Recipe
from mmkd.teachers.chat_api import ChatClient
from mmkd.teachers.endpoints import Endpoints
from tests.loopback import answering
from tests.teachers.caches import write_recipe

SECRET = "sk-3f9a-secret-of-a-user"
URL = f"https://me:{SECRET}@example.org"
KEYS: list[dict[str, Any]] = [
    {"hub_token": SECRET},
    {"env": {"HF_TOKEN": SECRET}},
    {"env": {"WANDB_API_KEY": SECRET}},
    {"env": {"AWS_SECRET_ACCESS_KEY": SECRET}},
    {"env": {"db_password": SECRET}},
    {"teacher_server": URL},
    {"teacher_server": ["http://a", URL]},
    {"teacher_api": URL},
    {"teacher_api_key_env": SECRET},
    {"cache_judge_server": URL},
    {"data": f"{URL}/rows.jsonl"},
    {"teachers": {"a": {"teacher_server": URL}, "b": {"teacher": "x"}}},
    {"teachers": json.dumps({"a": {"teacher_server": URL}})},
    {"stages": {"SFT": {"method": "sft", "hub_token": SECRET}}},
    {"stages": {"SFT": {"method": "sft", "env": {"HF_TOKEN": SECRET}}}},
    {"report_to": URL},
]


@pytest.mark.parametrize("keys", KEYS)
def test_a_secret_in_a_recipe_is_refused_and_not_repeated(keys: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"method": "kd", "data": "rows.jsonl", "student": "a", "teacher": "b", **keys}))
    with pytest.raises(UserError, match=r"secret|password|variable") as caught:
        Recipe.read(path)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("flag", [f"--hub_token={SECRET}", f"--teacher_server={URL}", f"--data={URL}/rows.jsonl"])
def test_a_secret_in_a_flag_is_refused_and_not_repeated(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"method": "kd", "data": "rows.jsonl", "student": "a", "teacher": "b"}))
    with pytest.raises(UserError, match=r"secret|password") as caught:
        recipe_of(str(path), [flag])
    assert SECRET not in str(caught.value)
    for command in ("train", "doctor", "plan"):
        assert main([command, str(path), flag]) == 2
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    assert "secret" in said.err or "password" in said.err


def test_what_is_no_secret_may_stand_there(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    keys = {"method": "kd", "data": "user@host/rows", "student": "me/a@main", "teacher": "b", "hub_token": None}
    keys |= {"env": {"HF_HOME": "/x", "TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "a", "HF_TOKEN": ""}}
    keys |= {"teacher_api_key_env": "MY_KEY", "teacher_server": "http://host:8000/v1?a=b@c"}
    path.write_text(yaml.safe_dump(keys))
    assert Recipe.read(path).keys["teacher_api_key_env"] == "MY_KEY"


def test_data_recipes_and_servers_refuse_them_too(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump({"source": "json", "data_files": {"train": f"{URL}/a.jsonl"}}))
    for call in (
        lambda: DataRecipe.load(str(path)),
        lambda: Endpoints([URL], None, 1, 1.0, 0),
        lambda: ChatClient([URL], "m"),
    ):
        with pytest.raises(UserError, match="password") as caught:
            call()
        assert SECRET not in str(caught.value)
    assert without_user_info(f"a {URL}/x b") == "a https://***@example.org/x b"


def test_a_key_that_a_server_repeats_is_not_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a refusal, and in a failure that is tried again."""
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    for status in (401, 500):

        def respond(path: str, headers: Any, body: Any, status: int = status) -> tuple[int, Any]:
            return status, {"error": {"message": f"Incorrect API key provided: {SECRET}"}}

        with answering(respond) as url, caplog.at_level(logging.DEBUG, logger="mmkd"):
            with pytest.raises(Exception, match=r"API key") as caught:
                ChatClient([url], model="m", retries=1).offered()
            assert SECRET not in str(caught.value)
    assert SECRET not in caplog.text


def test_a_run_writes_no_secret_of_the_environment(
    tiny: dict[str, Path], texts: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, capfd: Any
) -> None:
    """With its record, its log, its checkpoints, its trackers and its card."""
    names = ("HF_TOKEN", "OPENAI_API_KEY", "VLLM_API_KEY", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")
    for name in names:
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackers"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "trackers"))
    recipe = write_recipe(tmp_path, tiny, {"train": texts}, teacher_cache=None, save_strategy="steps", save_steps=2)
    assert train(recipe_of(str(recipe))) == 0
    assert (tmp_path / "run" / "run.json").is_file()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    holding = [path.name for path in files if SECRET.encode() in path.read_bytes()]
    assert not holding
    said = capfd.readouterr()
    assert SECRET not in caplog.text + said.out + said.err
