"""`make` and the launcher behind `make demo`: bad input, failing cells, paths with spaces, the right kernel, no work twice."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from seer_nb import launch

TOP = Path(__file__).resolve().parent.parent


def write_notebook(path, code, parameters="run_dir: str = ''\nseed: int = 0\nimages: str = 'toyworld:8'"):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


# ── the launcher ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("make, problem", [
    (lambda folder: folder / "nowhere", "no such folder"),
    (lambda folder: (folder / "empty").mkdir() or folder / "empty", "holds no image"),
    (lambda folder: "", "no such folder"),
])
def test_bad_folder_is_an_error_before_anything_is_written(tmp_path, capsys, make, problem):
    notebook = write_notebook(tmp_path / "05_x.ipynb", "raise AssertionError('ran')")
    status = launch.main([str(notebook), "-p", "images", str(make(tmp_path)), "-p", "run_dir", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert status == 2 and problem in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_good_folder_with_spaces_and_accents(tmp_path):
    from PIL import Image
    folder = tmp_path / "meine Fotos é"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "ein Bild.png")
    notebook = write_notebook(tmp_path / "05_x.ipynb", "open(run_dir + '/seen.txt', 'w').write(images)")
    assert launch.main([str(notebook), "-p", "images", str(folder), "-p", "run_dir", str(tmp_path / "run é 1")]) == 0
    assert (tmp_path / "run é 1/seen.txt").read_text() == str(folder)


@pytest.mark.parametrize("words, problem", [
    (["-p", "sed", "1"], "did you mean 'seed'?"),
    (["-p", "seed", "one"], "must be int"),
    (["-f", "nowhere/x.yaml"], "no preset 'x'"),
])
def test_wrong_parameters(tmp_path, capsys, words, problem):
    notebook = write_notebook(tmp_path / "05_x.ipynb", "raise AssertionError('ran')")
    assert launch.main([str(notebook), "-p", "run_dir", str(tmp_path / "run"), *words]) == 2
    assert problem in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_missing_notebook(capsys):
    assert launch.main(["nowhere.ipynb"]) == 2
    assert "no notebook nowhere.ipynb" in capsys.readouterr().err


def test_failing_cell_leaves_the_report(tmp_path, capsys):
    notebook = write_notebook(tmp_path / "05_x.ipynb", "print('before')\nraise RuntimeError('no luck')")
    assert launch.main([str(notebook), "-p", "run_dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "before" in error                                    # what the cell printed, above the bar
    assert "RuntimeError: no luck" in error and str(tmp_path / "report.html") in error
    assert "papermill-error-cell" in (tmp_path / "report.ipynb").read_text()
    assert "no luck" in (tmp_path / "report.html").read_text()


def test_kernel_is_the_one_of_this_environment(tmp_path, monkeypatch):
    "A kernel of the same name in the user's home and on JUPYTER_PATH is not taken."
    for root in ("home/.local/share/jupyter", "path"):
        spec = tmp_path / root / "kernels/python3"
        spec.mkdir(parents=True)
        (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "decoy", "language": "python"}))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "path"))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    notebook = write_notebook(tmp_path / "05_x.ipynb", "import sys; open(run_dir + '/python', 'w').write(sys.prefix)")
    launch.run_notebook(notebook, {"run_dir": str(tmp_path)}, show=False)
    assert (tmp_path / "python").read_text() == sys.prefix


def alive(pid):
    "Say whether a process runs (a zombie does not)."
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


def test_no_kernel_outlives_its_run(tmp_path):
    notebook = write_notebook(tmp_path / "05_x.ipynb", "import os; open(run_dir + '/pid', 'w').write(str(os.getpid()))")
    launch.run_notebook(notebook, {"run_dir": str(tmp_path)}, show=False)
    assert not alive((tmp_path / "pid").read_text())


def test_interrupted(tmp_path):
    "Ctrl-C ends the kernel, keeps the report so far, and says how to go on, without a traceback."
    code = "import os, time\nprint('here')\nopen(run_dir + '/pid', 'w').write(str(os.getpid()))\ntime.sleep(600)"
    notebook = write_notebook(tmp_path / "05_x.ipynb", code)
    job = subprocess.Popen([sys.executable, "-m", "seer_nb.launch", notebook, "-p", "run_dir", tmp_path], cwd=TOP, stderr=subprocess.PIPE, text=True,
                           preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))   # a shell makes its background jobs deaf to it
    pid = tmp_path / "pid"
    while not (pid.exists() and pid.read_text()):
        assert job.poll() is None
        time.sleep(.1)
    job.send_signal(signal.SIGINT)
    error = job.communicate(timeout=300)[1]
    assert job.returncode == 130 and f"run_dir {tmp_path}" in error and "Traceback" not in error
    assert not alive(pid.read_text()) and (tmp_path / "report.html").exists()


# ── make ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

FAKE = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent.parent
if sys.argv[1] == "-I": print((here / "works").exists())
else: open(here / "calls", "a").write(json.dumps(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def house(tmp_path):
    "A copy of what make looks at, with a virtual environment whose Python only takes notes."
    for name in ("Makefile", "settings.ini", "setup.py", "constraints.txt"): shutil.copy(TOP / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("pyvenv.cfg", "works"): (tmp_path / ".venv" / name).touch()
    (tmp_path / ".venv/bin/fake.py").write_text(FAKE)
    script(tmp_path / ".venv/bin/python", f'exec "{sys.executable}" "{tmp_path}/.venv/bin/fake.py" "$@"')
    return tmp_path


def script(path, line):
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)


def make(house, *words, status=0):
    "Run make and return what the environment's Python was asked to do."
    calls = house / ".venv/calls"
    calls.unlink(missing_ok=True)
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", *words], cwd=house, env=env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def installs(calls): return sum("install" in call for call in calls)


def test_demo_passes_what_was_asked(house):
    demo = make(house, "demo", "IMAGES=my photos/é 'x'", "SEED=3", "PRESET=smoke")[-1]
    assert demo[:4] == ["-m", "seer_nb.launch", "nbs/00_quickstart.ipynb", "-f"]
    assert demo[4:] == ["nbs/params/quickstart/smoke.yaml", "-p", "images", "my photos/é 'x'", "-p", "seed", "3"]


def test_demo_without_options(house):
    assert make(house, "demo")[-1][2:] == ["nbs/00_quickstart.ipynb", "-f", "nbs/params/quickstart/toyworld.yaml"]


def test_empty_images_is_passed_on_and_not_forgotten(house):
    assert make(house, "demo", "IMAGES=")[-1][-3:] == ["-p", "images", ""]


def test_installed_once_and_again_when_the_versions_change(house):
    assert installs(make(house, "demo")) == 1
    assert installs(make(house, "demo")) == 0
    later = (house / ".venv/.installed-notebooks").stat().st_mtime + 10
    os.utime(house / "constraints.txt", (later, later))
    assert installs(make(house, "demo")) == 1


def test_tests_install_what_the_demo_needs(house):
    script(house / ".venv/bin/nbdev_test", "exit 0")
    assert installs(make(house, "test")) == 1
    assert installs(make(house, "demo")) == 0


def test_moved_environment_is_installed_again(house):
    make(house, "demo")
    (house / ".venv/works").unlink()
    assert installs(make(house, "demo")) == 1


def test_a_folder_that_is_no_environment_is_left_alone(house):
    precious = house / "precious"
    precious.mkdir()
    (precious / "file").touch()
    make(house, "demo", "VENV=precious", status=2)
    assert [p.name for p in precious.iterdir()] == ["file"]


def test_help_names_every_target(house):
    shown = subprocess.run(["make", "help"], cwd=house, capture_output=True, text=True).stdout
    targets = re.search(r"^\.PHONY: (.*)", (TOP / "Makefile").read_text(), re.M)[1].split()
    assert re.findall(r"^  make (\w+)", shown, re.M) == targets
