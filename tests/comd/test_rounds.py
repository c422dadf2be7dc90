"""The loop, end to end."""

from mmkd.cli import main
from tests.comd.chat_server import chat_server
from tests.comd.conftest import Recipe


def test_try(recipe: Recipe, tmp_path) -> None:
    with chat_server() as server:
        path = recipe(teacher_server=[server.url])
        assert main(["train", str(path), "--dry_run"]) == 0
        assert main(["train", str(path)]) == 0
    import subprocess
    print(subprocess.run(f"cd {tmp_path}/run; find . -type f | sort; cat round-1/report.json; cat round-1/scores.jsonl; cat round-1/new.jsonl; cat round-1/recipe.yaml; head -3 record.jsonl", shell=True, capture_output=True, text=True).stdout)
    assert 0
