from pathlib import Path

import pytest

from mmkd import shipped as recipes
from mmkd.shipped import copy_recipe, find_recipe, list_recipes, recipe_root

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The root of a package whose `_recipes` hold a few recipes, as in a wheel; the current folder is an empty one."""
    root = tmp_path / "package" / "_recipes"
    for name in ("kd/quickstart.yaml", "kd/qwen.yaml", "taid/quickstart.yaml"):
        write(root / "trainers" / name, f"method: {name.split('/')[0]}\n")
    write(root / "trainers" / "kd" / "README.md", "# KD\n")
    write(root / "data_recipes" / "easy_vqa.yaml", "source: easy_vqa\n")
    write(root / "eval" / "suites" / "text.yaml", "tasks: []\n")
    monkeypatch.setattr(recipes, "_PACKAGE", root.parent)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return root


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("kind", recipes.KINDS)
def test_recipe_root_is_the_checkout_unless_the_package_carries_recipes(kind, shipped, monkeypatch):
    assert recipe_root(kind) == shipped / kind
    monkeypatch.setattr(recipes, "_PACKAGE", CHECKOUT / "mmkd")
    assert recipe_root(kind) == CHECKOUT / kind


@pytest.mark.parametrize("function", [recipe_root, list_recipes, lambda kind: find_recipe("quickstart", kind)])
def test_unknown_kind_is_refused_with_the_known_ones(function):
    with pytest.raises(ValueError, match=r"'trainer' is no kind of recipe.*trainers, data_recipes, eval"):
        function("trainer")


def test_list_recipes_has_yaml_files_only_sorted_and_relative_to_their_kind(shipped):
    assert list_recipes() == ["kd/quickstart.yaml", "kd/qwen.yaml", "taid/quickstart.yaml"]
    assert list_recipes("data_recipes") == ["easy_vqa.yaml"]
    assert list_recipes("eval") == ["suites/text.yaml"]


@pytest.mark.parametrize(
    "name",
    ["kd/qwen", "kd/qwen.yaml", "trainers/kd/qwen", "trainers/kd/qwen.yaml", "./kd/qwen.yaml", Path("kd/qwen.yaml")],
)
def test_find_recipe_by_every_spelling_of_its_name(shipped, name):
    assert find_recipe(name) == shipped / "trainers" / "kd" / "qwen.yaml"


def test_find_recipe_of_another_kind(shipped):
    assert find_recipe("easy_vqa", "data_recipes") == shipped / "data_recipes" / "easy_vqa.yaml"
    assert find_recipe("eval/suites/text", "eval") == shipped / "eval" / "suites" / "text.yaml"


def test_find_recipe_prefers_an_existing_file(shipped):
    mine = write(Path("kd/qwen.yaml"), "method: kd\n")
    assert find_recipe("kd/qwen.yaml") == mine
    assert find_recipe("kd/qwen") == shipped / "trainers" / "kd" / "qwen.yaml"


@pytest.mark.parametrize("name", ["kd/quikstart", "trainers/kd/quikstart.yaml"])
def test_unknown_recipe_names_the_nearest_and_how_to_list(shipped, name):
    with pytest.raises(ValueError, match=rf"'{name}' is neither .* nearest is 'kd/quickstart.yaml'.*mmkd recipes ls"):
        find_recipe(name)


@pytest.mark.parametrize("name", ["kd", "", "kd/README.md", "../eval/suites/text", "suites/text"])
def test_what_is_not_a_recipe_of_the_kind_is_not_found(shipped, name):
    with pytest.raises(ValueError, match="neither a file nor a recipe that ships under trainers/"):
        find_recipe(name)


def test_unknown_recipe_of_a_kind_without_recipes_still_says_how_to_list(shipped):
    (shipped / "data_recipes" / "easy_vqa.yaml").unlink()
    with pytest.raises(ValueError, match="data_recipes/; `mmkd recipes ls` lists them all"):
        find_recipe("easy_vqa", "data_recipes")


@pytest.mark.parametrize(
    ("destination", "expected"),
    [
        ("mine.yaml", "mine.yaml"),
        ("new/folders/mine.yaml", "new/folders/mine.yaml"),
        (".", "qwen.yaml"),
        ("new/folder/", "new/folder/qwen.yaml"),
    ],
)
def test_copy_recipe_to_a_file_or_a_folder(shipped, destination, expected):
    copy = copy_recipe("kd/qwen", destination)
    assert copy == Path(expected)
    assert copy.read_text() == "method: kd\n"
    assert [path for path in Path().rglob("*") if path.is_file()] == [copy], "a partial copy was left behind"


def test_copy_recipe_of_another_kind(shipped):
    assert copy_recipe("easy_vqa", ".", kind="data_recipes").read_text() == "source: easy_vqa\n"


@pytest.mark.parametrize("destination", [".", "qwen.yaml"])
def test_copy_recipe_never_overwrites(shipped, destination):
    mine = write(Path("qwen.yaml"), "mine\n")
    with pytest.raises(ValueError, match=r"qwen\.yaml exists already"):
        copy_recipe("kd/qwen", destination)
    assert mine.read_text() == "mine\n"


def test_copy_recipe_leaves_nothing_when_it_fails(shipped, monkeypatch):
    def fill_the_disk(source, target):
        Path(target).write_text("meth")
        raise OSError("No space left on device")

    monkeypatch.setattr(recipes.shutil, "copyfile", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        copy_recipe("kd/qwen", "mine.yaml")
    assert list(Path().iterdir()) == []
