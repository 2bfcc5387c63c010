"""The wheel: builds, holds the package and nothing else, imports in a bare environment that sees only PyTorch beside it."""
import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

TOP = Path(__file__).resolve().parent.parent
MODULES = sorted(p.relative_to(TOP).as_posix() for p in TOP.glob("seer_nb/**/*.py"))


def run(*words, **kwargs):
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "Built from a copy, so that no build folder is left behind."
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"): shutil.copy(TOP / name, folder)
    shutil.copytree(TOP / "seer_nb", folder / "seer_nb", ignore=shutil.ignore_patterns("__pycache__"))
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-w", "out", cwd=folder)
    path, = folder.glob("out/*.whl")
    return path


def test_wheel_holds_the_package(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert sorted(n for n in names if n.endswith(".py")) == MODULES
    assert {n.split("/")[0] for n in names} == {"seer_nb", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    data = sorted(p.relative_to(TOP).as_posix() for p in TOP.glob("seer_nb/**/*.csv"))
    assert sorted(n for n in names if n.endswith(".csv")) == data


def test_wheel_metadata(wheel):
    path = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(path).decode()
    base = [line for line in re.findall(r"^Requires-Dist: (.*)", text, re.M) if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in base} == {"torch", "torchvision", "numpy", "pillow", "opencv-python-headless", "tqdm", "safetensors"}
    assert any(line.startswith("torch") and "!=2.13.0" in line for line in base)
    assert set(re.findall(r"^Provides-Extra: (.*)", text, re.M)) == {"notebooks", "datasets", "peers", "tensorboard", "docs", "dev"}
    assert "Requires-Python: >=3.10" in text


def test_wheel_imports_in_a_bare_environment(wheel, tmp_path):
    "PyTorch and its neighbours are lent by this environment; the package comes from the wheel."
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path)
    run(sys.executable, "-m", "pip", "--python", tmp_path / "bin/python", "install", "--no-deps", "--no-index", wheel)
    packages, = tmp_path.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(str(Path(torch.__file__).parent.parent))
    code = ("import importlib, sys, seer_nb; print(seer_nb.__file__)\n"
            f"for name in {[m[:-3].replace('/', '.') for m in MODULES if not m.endswith('__init__.py')]!r}: importlib.import_module(name)")
    where = run(tmp_path / "bin/python", "-I", "-c", code, cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)


# ── versions ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def constraints():
    "The pins of constraints.txt that hold for this Python: name -> version."
    from packaging.requirements import Requirement
    lines = [Requirement(line) for line in (TOP / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {r.name: str(r.specifier).removeprefix("==") for r in lines if not r.marker or r.marker.evaluate()}


def test_constraints_pin_every_direct_dependency():
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(TOP / "settings.ini")
    wanted = " ".join(value for key, value in settings["DEFAULT"].items() if key.endswith("requirements")).split()
    assert {re.match(r"[\w-]+", w)[0] for w in wanted} <= set(constraints())


@pytest.mark.parametrize("name, below", [("fastcore", "2"), ("execnb", "0.2"), ("ghapi", "2.1"), ("nbdev", "3")])
def test_fragile_packages_are_installed_below(name, below):
    "nbdev 2.4.14 does not run with the next versions of these; any later install may raise them."
    from packaging.version import Version
    assert Version(metadata.version(name)) < Version(below)
