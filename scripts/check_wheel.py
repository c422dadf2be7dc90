"""Build the sdist and the wheel; check what they hold, and that the wheel works without the checkout."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("trainers", "data_recipes", "eval")
SCRIPTS = {"mmkd": "mmkd.commands.main:main", "mmkd-train": "mmkd.commands.main:train_main"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        dist, elsewhere = Path(folder, "dist"), Path(folder, "elsewhere")
        elsewhere.mkdir()
        # The wheel is built from the sdist, as an installer without a wheel would.
        run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(ROOT))
        (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
        check_sdist(sdist)
        check_wheel(wheel)
        check_installed(wheel, Path(folder, "venv"), elsewhere)
        print(f"{sdist.name} and {wheel.name}: contents, entry points and shipped recipes are as they should be.")


def check_sdist(sdist: Path) -> None:
    """Every recipe, page, test and script of the checkout is in the sdist, and nothing that a checkout collects is."""
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    expect_all(files_under(*RECIPES, "docs", "mmkd", "scripts", "tests"), names, sdist.name)
    stray = [name for name in names if name.split("/", 1)[0] in {".venv", ".cache", ".git", "runs", "dist"}]
    expect(not stray, f"{sdist.name} holds {sorted(stray)[:5]}; see only-include in pyproject.toml.")


def check_wheel(wheel: Path) -> None:
    """The wheel installs `mmkd` and nothing else, with every recipe file of the checkout and the two commands."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        config = ConfigParser()
        config.read_string(archive.read(entry_points).decode())
    top_level = {name.split("/", 1)[0] for name in names} - {entry_points.split("/", 1)[0]}
    expect(top_level == {"mmkd"}, f"{wheel.name} would install {sorted(top_level)}; only mmkd may be importable.")
    # Modules, what lies beside them, and py.typed, without which type checkers ignore the annotations.
    expect_all(
        {*files_under("mmkd"), "mmkd/py.typed"} | {f"mmkd/_recipes/{name}" for name in files_under(*RECIPES)},
        names,
        wheel.name,
    )
    scripts = dict(config["console_scripts"])
    expect(scripts == SCRIPTS, f"{wheel.name} installs the commands {scripts} and not {SCRIPTS}.")


def check_installed(wheel: Path, venv: Path, elsewhere: Path) -> None:
    """The installed wheel imports and lists its own recipes, from a folder that knows nothing of the checkout."""
    run(sys.executable, "-m", "venv", "--without-pip", str(venv))
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", str(python))
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    # Dependencies come from this environment. Its own .pth files, such as the one of the editable install that leads
    # back to the checkout, are not followed from here; nor could pip see them, as the wheel is installed already.
    (site_packages,) = venv.glob("lib/python*/site-packages")
    dependencies = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "dependencies.pth").write_text("\n".join(dependencies) + "\n")

    program = "import mmkd, mmkd.shipped as r; print(mmkd.__file__, *map(r.recipe_root, r.KINDS), sep='\\n')"
    for path in run(str(python), "-c", program, cwd=elsewhere).splitlines():
        inside = Path(path).resolve().is_relative_to(site_packages.resolve())
        expect(inside, f"The installed mmkd uses {path}, which is not the wheel's.")
    shipped = {name for name in files_under(*RECIPES) if name.endswith(".yaml")}
    for kind in RECIPES:
        expect(any(name.startswith(f"{kind}/") for name in shipped), f"There is no recipe under {kind}/.")
    listed = set(run(str(venv / "bin" / "mmkd"), "recipes", "ls", cwd=elsewhere).split())
    expect_all(shipped, listed, "the output of `mmkd recipes ls`")
    run(str(venv / "bin" / "mmkd"), "prepare", "python_docs", cwd=elsewhere)
    made = elsewhere / ".cache" / "mmkd" / "python_docs" / "train.jsonl"
    expect(made.is_file(), f"`mmkd prepare python_docs` of the installed wheel did not write {made}.")


def files_under(*folders: str) -> set[str]:
    """The files of the checkout's folders, relative to its root, without what Python compiled and editors leave."""
    paths = (path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.as_posix() for path in paths if "__pycache__" not in path.parts and not path.name.startswith(".")}


def run(*command: str, cwd: Path | None = None) -> str:
    """The command's standard output; ends the program with all of its output when it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    expect(result.returncode == 0, f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def expect_all(wanted: set[str], found: set[str], where: str) -> None:
    missing = sorted(wanted - found)
    expect(not missing, f"{len(missing)} names are missing from {where}: {', '.join(missing[:10])}")


def expect(condition: bool, complaint: str) -> None:
    if not condition:
        sys.exit(complaint)


if __name__ == "__main__":
    main()
