"""The site is built without a network, every link of it leads somewhere, and every page can be reached."""

import logging
import os
import re
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import mmkd
from mmkd.training.method import METHODS
from scripts.site_pages import all_commands
from tests.docs.test_pages import CARDS, PAGES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site. Links and anchors are checked on the way: any warning fails."""
    folder = tmp_path_factory.mktemp("site")
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder))
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    # What griffe misses in docstrings breaks no page.
    assert [warning for warning in warnings if not warning.startswith("griffe: ")] == []
    return folder


def test_pages_load_nothing_from_other_servers(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=\"(https?:[^\"]*)|<link[^>]*rel=\"(?:stylesheet|preconnect)\"[^>]*href=\"(https?:[^\"]*)"
    )
    found = {match[0] for page in site.rglob("*.html") for match in loaded.finditer(page.read_text(encoding="utf-8"))}
    assert found == set()


def test_every_method_has_a_page(site: Path) -> None:
    for method in METHODS:
        assert (site / "methods" / method / "index.html").is_file(), method


def test_every_command_stands_in_the_reference(site: Path) -> None:
    text = (site / "reference" / "cli" / "index.html").read_text(encoding="utf-8")
    for words, _ in all_commands():
        assert f'id="mmkd-{"-".join(words)}"' in text


def test_every_public_name_stands_in_the_reference(site: Path) -> None:
    text = (site / "reference" / "api" / "index.html").read_text(encoding="utf-8")
    documented = set(re.findall(r'id="mmkd\.(\w+)"', text))
    assert set(dir(mmkd)) - documented == {"__version__"}


def test_instructions_to_the_tests_are_not_shown(site: Path) -> None:
    assert not [page for page in site.rglob("*.html") if "<!-- test:" in page.read_text(encoding="utf-8")]


def test_links_of_a_card_lead_to_pages(site: Path) -> None:
    text = (site / "methods" / "alm" / "index.html").read_text(encoding="utf-8")
    assert 'href="../../repository/trainers/sft/gemma3.yaml/"' in text
    page = (site / "repository/trainers/sft/gemma3.yaml/index.html").read_text(encoding="utf-8")
    assert "per_device_train_batch_size" in page


MADE = {f"docs/reference/{name}.md" for name in ("cli", "keys", "data_keys", "combinations")}
"""Pages that are on the site alone."""


@pytest.mark.parametrize("path", [*PAGES, *CARDS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_work_in_the_checkout_too(path: Path) -> None:
    text = re.sub(r"^( *)```.*?^\1```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if "://" not in link]
    targets = {os.path.relpath((path.parent / link).resolve(), ROOT) for link in links}
    assert {target for target in targets - MADE if not (ROOT / target).exists()} == set()


def test_addresses_are_well_formed(site: Path) -> None:
    pages = [page.read_text(encoding="utf-8") for page in site.rglob("*.html")]
    addresses = {address for page in pages for address in re.findall(r'<a[^>]*\shref="(\w+:[^"]*)"', page)}
    assert len(addresses) > 10
    for address in addresses:
        assert urlsplit(address).scheme == "https", address
        assert re.fullmatch(r"([\w-]+\.)+\w{2,}", urlsplit(address).hostname or ""), address
