"""The mapping of the repository's folders below one import name."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_DIR = PROJECT["tool"]["setuptools"]["package-dir"]
TOP_FOLDERS = ("kernels", "blocks", "bench")


def test_every_folder_with_python_is_listed():
    # A forgotten folder imports from an editable install and is missing from the wheel.
    folders = {
        path.parent.relative_to(ROOT).as_posix()
        for top in ("src", *TOP_FOLDERS)
        for path in (ROOT / top).rglob("*.py")
    }
    assert set(PACKAGE_DIR.values()) == folders
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == set(PACKAGE_DIR)


def test_every_package_has_an_init():
    assert not [f for f in PACKAGE_DIR.values() if not (ROOT / f / "__init__.py").exists()]


@pytest.mark.parametrize("name", TOP_FOLDERS)
def test_no_folder_leaks_as_a_top_level_package(name):
    spec = importlib.util.find_spec(name)
    if spec is None:
        return
    places = [spec.origin, *(spec.submodule_search_locations or [])]
    ours = (ROOT / name).resolve()
    assert not [p for p in places if p and Path(p).resolve().is_relative_to(ours)]


def test_import_needs_no_extra(tmp_path):
    optional = ["matplotlib", "tqdm", "transformers", "triton"]
    code = f"import sys; sys.modules.update(dict.fromkeys({optional})); import backfuse"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_wheel_holds_every_package_and_nothing_else(tmp_path):
    # Built from a copy: a build in the checkout would leave folders that the next build packs.
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", PROJECT["project"]["readme"], "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("src", *TOP_FOLDERS):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "-w", str(tmp_path), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

    (wheel,) = tmp_path.glob("backfuse-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = [archive.read(name) for name in names if name.endswith("entry_points.txt")]
    expected = {"backfuse/py.typed"} | {
        f"{package.replace('.', '/')}/{path.name}"
        for package, folder in PACKAGE_DIR.items()
        for path in (ROOT / folder).glob("*.py")
    }
    assert expected <= names
    assert {name for name in names if name.endswith(".py")} <= expected
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"backfuse"}
    assert any(b"backfuse = backfuse.cli:main" in text for text in entry_points)
