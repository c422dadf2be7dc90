"""Which files of tests pytest-xdist's workers take first, and which stay together."""

from collections import Counter

import pytest
from xdist.scheduler import LoadFileScheduling

LONGEST = (
    "tests/trainers/test_base.py",
    "tests/test_cli.py",
    "tests/capture/test_build.py",
    "tests/test_hub.py",
    "tests/test_launch.py",
    "tests/teachers/test_cached.py",
    "tests/eval/test_compare_kinds.py",
    "tests/comd/test_rounds.py",
    "tests/docs/test_notebooks.py",
    "tests/ui/test_ui.py",
    "tests/docs/test_site.py",
    # The vLLM that they start is installed while the tests above run.
    "tests/teachers/test_real_capture.py",
    "tests/teachers/test_real_vllm.py",
    "tests/teachers/test_real_vlms.py",
    # It compares times, which is best where nothing but the other workers runs.
    "tests/test_benchmarks.py",
)
"""Files that take longer than the number of their tests tells."""

TOGETHER = "tests/teachers/test_real_"
"""How the names of files begin that one worker runs: it starts each vLLM once for all of them."""


class FilesTogether(LoadFileScheduling):
    """One file stays with one worker, whose fixtures (models, servers) are made once."""

    def _split_scope(self, nodeid: str) -> str:
        return TOGETHER if nodeid.startswith(TOGETHER) else super()._split_scope(nodeid)


def put_long_files_first(items: list[pytest.Item]) -> None:
    """Sorts tests by their files, so that no long file is begun when the other workers have nothing left to do."""
    tests = Counter(_file_of(item) for item in items)
    ranks = {name: rank for rank, name in enumerate(LONGEST)}

    def place(item: pytest.Item) -> tuple[int, int, str]:
        name = _file_of(item)
        return ranks.get(name, len(ranks)), -tests[name], name

    items.sort(key=place)


def _file_of(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]
