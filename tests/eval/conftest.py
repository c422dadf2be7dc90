"""What tests of evaluation share."""

import pytest


@pytest.fixture(autouse=True)
def no_environment_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip and the system about themselves after every task, a second each time."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)
