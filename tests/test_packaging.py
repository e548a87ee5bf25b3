"""What is in the tree is in the wheel, and the wheel works where there is no tree."""

import fnmatch
import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
ROOTS = {
    "rope_scaling": ROOT / "rope_scaling",
    "rope_scaling.recipes": ROOT / "recipes",
    "rope_scaling.eval": ROOT / "eval",
}


def packages_in_the_tree():
    for name, folder in ROOTS.items():
        for file in folder.rglob("__init__.py"):
            inner = file.parent.relative_to(folder).parts
            yield ".".join([name, *inner]), file.parent


def test_every_folder_with_an_init_is_a_package():
    assert sorted(SETTINGS["packages"]) == sorted(name for name, _ in packages_in_the_tree())


def data_files():
    """Files that belong to a package and are no modules of one, with the package's name and folder."""
    folders = {folder: name for name, folder in packages_in_the_tree()}
    for folder, name in folders.items():
        for file in folder.rglob("*"):
            owner = next(parent for parent in file.parents if parent in folders)
            is_module = file.suffix == ".py" and file.parent == folder
            is_guide = file.name == "README.md" and folder.parent == ROOT
            if file.is_file() and owner == folder and not is_module and not is_guide and file.suffix != ".pyc":
                yield name, file.relative_to(folder).as_posix()


def test_every_data_file_matches_a_pattern():
    for name, file in data_files():
        assert any(fnmatch.fnmatch(file, pattern) for pattern in SETTINGS["package-data"].get(name, [])), file


def test_the_embedded_weights_are_at_most_12_megabytes():
    assert (ROOT / "rope_scaling" / "demo" / "model" / "model.safetensors").stat().st_size <= 12_000_000


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from the tree's own files, without build isolation and so without the network."""
    work = tmp_path_factory.mktemp("build")
    tree = work / "tree"
    ignore = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignore)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(work / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "absent from the `packages` configuration" not in done.stdout + done.stderr
    return next((work / "dist").glob("*.whl"))


def test_the_wheel_holds_every_package_and_data_file(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for name, folder in packages_in_the_tree():
        inside = name.replace(".", "/")
        assert f"{inside}/__init__.py" in names
        assert {f"{inside}/{file.name}" for file in folder.glob("*.py")} <= names
    data = {f"{name.replace('.', '/')}/{file}" for name, file in data_files()}
    assert data <= names
    assert "rope_scaling/demo/model/model.safetensors" in data
    assert "rope_scaling/eval/metrics/retrieval_score/retrieval_score.py" in data
    assert not any(name.startswith(("recipes/", "eval/", "tests/")) for name in names)


def test_the_wheel_works_from_an_empty_folder(wheel, tmp_path):
    """Installed beside the libraries of this environment, run from a folder that holds nothing."""
    venv.create(tmp_path / "venv", system_site_packages=False, with_pip=False)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, str(wheel)],
        check=True,
        capture_output=True,
    )
    here = next(path for path in map(Path, sys.path) if (path / "torch").is_dir())
    # Only packages, not the .pth files that make this checkout importable.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "PYTHONPATH": f"{site}{os.pathsep}{here}"
    }
    (tmp_path / "empty").mkdir()

    def run(*arguments):
        return subprocess.run(
            [str(python), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path / "empty",
            env=environment,
            check=False,
        )

    where = run(
        "-c",
        "import rope_scaling, rope_scaling.eval.run, rope_scaling.recipes as r; print(rope_scaling.__file__, "
        "r.__file__)",
    )
    assert where.returncode == 0, where.stderr
    assert all(Path(path).is_relative_to(site) for path in where.stdout.split())
    described = run("-m", "rope_scaling.cli.main", "describe", "demo", "--method", "yarn", "--factor", "8")
    assert described.returncode == 0, described.stderr
    assert "256 trained, 256 as loaded, 2048 now" in described.stdout
    listed = run(
        "-c",
        "from importlib import resources; print([f.name for f in resources.files('rope_scaling.recipes').iterdir()])",
    )
    assert "pretrain_demo.yaml" in listed.stdout
