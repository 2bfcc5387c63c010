"""The monitor reads what a live run leaves half done, the form says what the command line says, and both are moved by a real browser."""
import dataclasses
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
import yaml

from seer_nb.core import MetricLog
from seer_nb.launch import parameters_of, read_params
from seer_nb.monitor import check_fields, describe, explore, live, parameter_form, presets_of, read_rows, read_run, run_figure, seconds_left, shell_line, watch

TOP = Path(__file__).resolve().parent.parent
PRETRAIN = TOP / "nbs/33_pretrain.ipynb"
PNG = b"\x89PNG"


def run_folder(path, steps=(10, 20, 30), **params):
    "A run folder as pretrain leaves it."
    path.mkdir()
    values = {"steps": 100, "batch_size": 32, "n_prototypes": 30} | params
    (path / "params.yaml").write_text("".join(f"{k}: {json.dumps(v)}\n" for k, v in values.items()))
    for step in steps: MetricLog(path / "metrics.jsonl").log(step=step, loss=3.4 - step / 100, images_per_s=64.0, prototype_usage=0.9, data_wait=0.1, eta_s=1.0)
    return path


@pytest.fixture(autouse=True)
def nobody(monkeypatch): monkeypatch.delenv("JPY_SESSION_NAME", raising=False)


@pytest.fixture
def lab(monkeypatch): monkeypatch.setenv("JPY_SESSION_NAME", "a notebook")


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_resumed_run_keeps_the_steps_that_count(tmp_path):
    "Killed after step 30, resumed at 20; whatever the writer does to its file, a reader sees one line of steps."
    run_folder(tmp_path / "run", (10, 20, 30))
    log = MetricLog(tmp_path / "run/metrics.jsonl")
    log.log(step=25, loss=1.0)
    assert [row["step"] for row in read_rows(log.path)] == [10, 20, 25]


@pytest.mark.parametrize("line", ["{", "[]", "1", '"x"', '{"step": "5"}', '{"step": true}', '{"step": -1}', '{"step": 1.5}', "[" * 100_000, "\0" * 50, '{"step": 1e400}', '{"a":' * 9])
def test_lines_that_are_no_rows(tmp_path, line):
    run = run_folder(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as f: f.write(line)
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [10, 20, 30]


@pytest.mark.parametrize("value", ["NaN", "1e999", '"high"', "[1]", "null", "1" + "0" * 400])
def test_values_that_are_no_numbers_are_gaps(tmp_path, value):
    run = run_folder(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 40, ' + ", ".join(f'"{k}": {value}' for k in ("loss", "images_per_s", "prototype_usage", "data_wait", "warnings")) + "}\n")
    assert read_rows(run / "metrics.jsonl")[-1]["loss"] is None
    assert PNG in watch(run).png and "step 40" in watch(run).text


def test_a_run_that_does_not_exist_yet(tmp_path):
    assert "not started" in watch(tmp_path / "later").text and not (tmp_path / "later").exists()


@pytest.mark.parametrize("missing", ["params.yaml", "metrics.jsonl"])
def test_missing_files(tmp_path, missing):
    run = run_folder(tmp_path / "run")
    (run / missing).unlink()
    assert PNG in watch(run).png and "checkpoints: none yet" in watch(run).text


@pytest.mark.parametrize("text", ["", "- a list\n", "steps: [\n", "steps: many\nn_prototypes: 0\n", "steps: 0\nbatch_size: 0\n", "steps: 2024-13-45\n", "n_prototypes: .nan\nsteps: .inf\n", "\0"])
def test_params_that_say_nothing(tmp_path, text):
    run = run_folder(tmp_path / "run")
    (run / "params.yaml").write_text(text)
    assert watch(run).text.startswith("step 30") and PNG in watch(run).png


def test_what_a_pipe_or_a_folder_in_place_of_a_file_does(tmp_path):
    "Opening a named pipe would wait for a writer for ever."
    run = run_folder(tmp_path / "run", ())
    os.mkfifo(run / "metrics.jsonl")
    os.mkfifo(run / "job.log")
    os.mkfifo(run / "bad_images.jsonl")
    (run / "params.yaml").unlink()
    (run / "params.yaml").mkdir()
    assert "no row of metrics yet" in watch(run).text


def test_time_left_and_silence(tmp_path):
    "70 steps of 32 images at 64 images/s are 35 s; one slow row of ten changes nothing; after two minutes without a row somebody should look."
    run = run_folder(tmp_path / "run", range(3, 31, 3))
    with open(run / "metrics.jsonl", "a") as f: f.write('{"step": 30, "loss": 3.1, "images_per_s": 0.5}\n')
    assert seconds_left(read_run(run)) == 35
    assert "35 s left" in describe(read_run(run)) and "still running" not in describe(read_run(run))
    os.utime(run / "metrics.jsonl", (time.time() - 120,) * 2)
    assert "last row 2.0 min ago: is it still running?" in describe(read_run(run))


def test_trouble_is_told(tmp_path):
    run = run_folder(tmp_path / "run")
    MetricLog(run / "metrics.jsonl").log(step=40, loss=3.4, warnings=["loss stuck at ln K"])
    (run / "ranks").mkdir()
    (run / "ranks/rank_3.txt").write_text("a stack\n" * 50 + "\x1b[31mrank 3 ran out of memory\n 10 %\r 20 %\r")
    (run / "bad_images.jsonl").write_text('{"name": "a.jpg", "reason": "truncated"}\n{"name": "b.jpg", "rea')
    (run / "checkpoints/step_00000020").mkdir(parents=True)
    text = describe(read_run(run))
    for part in ("warning: loss stuck at ln K", "── ranks/rank_3.txt", "\nrank 3 ran out of memory\n 20 %", "1 truncated", "checkpoints: 20"): assert part in text
    (run / "not_finite_step_41.safetensors").touch()
    assert "stopped: the loss is not finite, see not_finite_step_41.safetensors" in describe(read_run(run))


def test_figure_shows_ln_K_and_what_is_missing(tmp_path):
    axes = run_figure(read_run(run_folder(tmp_path / "run"))).axes
    assert "ln 30" in [t.get_text() for t in axes[0].texts] and axes[0].get_xlim() == (0, 100)
    (tmp_path / "run/metrics.jsonl").unlink()
    assert [ax.texts[0].get_text() for ax in run_figure(read_run(tmp_path / "run")).axes] == ["nothing yet"] * 4


# ── widgets without a browser ────────────────────────────────────────────────────────────────────────────────────────────────

def test_without_ipywidgets_there_is_a_figure(tmp_path, lab, monkeypatch):
    assert live() and watch(run_folder(tmp_path / "run", steps=(100,))).widget
    monkeypatch.setattr("seer_nb.monitor.find_spec", lambda name: None)
    view = watch(tmp_path / "run")
    assert view.widget is None and PNG in view.png


def test_the_view_follows_a_run_to_its_end(tmp_path, lab):
    box = watch(tmp_path / "run", every=0.01).widget
    follower, empty = threading.enumerate()[-1], box.children[1].value
    assert "not started" in box.children[0].value
    run_folder(tmp_path / "run", (10, 100))
    (tmp_path / "run/backbone.safetensors").touch()
    follower.join(60)
    assert not follower.is_alive() and "100 of 100 (100%), finished" in box.children[0].value and box.children[1].value != empty


def test_a_second_view_of_a_run_replaces_the_first(tmp_path, lab):
    first = watch(tmp_path / "run", every=0.01).widget
    follower = threading.enumerate()[-1]
    second = watch(tmp_path / "run", every=0.01).widget
    follower.join(60)
    assert not follower.is_alive() and first.comm is None and second.comm is not None
    second.close()


def test_what_files_say_is_no_html(tmp_path, lab):
    run = run_folder(tmp_path / "run", steps=(100,))
    MetricLog(run / "metrics.jsonl").log(step=101, loss=1.0, warnings=["<script>alert(1)</script>"])
    assert "<script>" not in watch(run).widget.children[0].value and "&lt;script&gt;" in watch(run).widget.children[0].value


def test_explorer_shows_an_error_and_keeps_the_figure(lab):
    def draw(x):
        from matplotlib.figure import Figure
        if x == 3: raise ValueError("3 does not go")
        return f"x is {x}", Figure((x, 1))
    slider, text, image = explore(draw, x=(1, range(5))).widget.children
    first = image.value
    slider.value = 2
    assert "x is 2" in text.value and image.value != first
    second = image.value
    slider.value = 3
    assert "error: 3 does not go" in text.value and image.value == second


# ── the form ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_presets_are_found_for_every_run():
    assert {"smoke", "seer_10b"} <= set(presets_of(PRETRAIN)) and set(presets_of(TOP / "nbs/evaluate/53_knn.ipynb")) == {"smoke", "seer_128gf", "seer_10b"}
    assert presets_of(TOP / "nbs/01_core.ipynb") == {}


@pytest.mark.parametrize("name, text", [("steps", "many"), ("steps", ""), ("steps", "[1"), ("compile", "1"), ("temperature", "{"), ("images", "no such folder"), ("images", "")])
def test_a_wrong_field_is_named(name, text):
    values, faults = check_fields(parameters_of(PRETRAIN), presets_of(PRETRAIN)["smoke"], {"seed": "7", name: text})
    assert list(faults) == [name] and values["seed"] == 7


def test_shell_line_gives_the_same_values():
    "Through a shell's words and the launcher's reader, the line means what the form shows."
    fields = {"images": "toyworld:7", "steps": "30", "weight_decay": "1.0e-06", "run_dir": "it's; $HOME `x` ü", "compile": "true", "cuts": "[[2],[7],[9,17],[]]"}
    cls, preset = parameters_of(PRETRAIN), presets_of(PRETRAIN)["toyworld"]
    values, faults = check_fields(cls, preset, fields)
    words = shlex.split(shell_line(PRETRAIN, preset, fields))
    assert not faults and words[:6] == ["python", "-m", "seer_nb.launch", "nbs/33_pretrain.ipynb", "-f", "nbs/params/pretrain/toyworld.yaml"]
    pairs = [(words[i + 1], words[i + 2]) for i, word in enumerate(words) if word == "-p"]
    assert read_params(cls, preset, pairs) == values


def test_form_offers_every_parameter_and_submits_what_it_shows(lab):
    sent = []
    form = parameter_form(PRETRAIN, submit=lambda notebook, params: sent.append((notebook, params))).widget
    choice, about, rows, text, button, _ = form.children
    boxes = {row.children[0].value: row.children[1] for row in rows.children}
    assert list(boxes) == [f.name for f in dataclasses.fields(parameters_of(PRETRAIN)) if f.name != "preset"]
    choice.value = str(presets_of(PRETRAIN)["seer_10b"])
    assert "496 A100" in about.value and button.disabled                       # its images are to be chosen
    boxes["images"].value = "toyworld:8"
    boxes["epsilon"].value = "a little"
    assert button.disabled and "must be float" in next(row for row in rows.children if row.children[0].value == "epsilon").children[2].value
    boxes["epsilon"].value = "0.03"                                             # the preset's own value: no change
    assert not button.disabled and "-p images toyworld:8<br>" in text.value
    button.click()
    (notebook, params), = sent
    assert notebook == PRETRAIN and params["images"] == "toyworld:8" and params["backbone"] == "regnety_10b"
    shown = re.sub(r"<br>", "\n", re.search("# as a preset(.*)</pre>", text.value, re.S)[1])
    assert yaml.safe_load(shown.replace("&#x27;", "'").replace("&quot;", '"')) == params
    choice.value = ""
    assert "nothing differs" in text.value and boxes["backbone"].value == "regnety_toy"


def test_a_notebook_without_parameters():
    with pytest.raises(ValueError, match="has no parameters"): parameter_form(TOP / "nbs/01_core.ipynb")


def test_a_form_in_a_folder_with_braces(tmp_path):
    (tmp_path / "runs {x}").mkdir()
    shutil.copy(PRETRAIN, tmp_path / "runs {x}")
    assert parameter_form(tmp_path / "runs {x}" / PRETRAIN.name).text.splitlines()[3:] == parameter_form(PRETRAIN).text.splitlines()[3:]


def test_a_broken_preset_is_told_and_not_sent(tmp_path, lab):
    shutil.copy(PRETRAIN, tmp_path)
    (tmp_path / "params/pretrain").mkdir(parents=True)
    (tmp_path / "params/pretrain/mine.yaml").write_text("stepz: 5\n")
    choice, about, rows, text, button, _ = parameter_form(tmp_path / PRETRAIN.name, submit=print).widget.children
    choice.value = str(tmp_path / "params/pretrain/mine.yaml")
    assert "did you mean &#x27;steps&#x27;" in about.value and button.disabled
    choice.value = ""
    assert not button.disabled and "nothing differs" in text.value


def test_form_without_submit_has_no_button(lab): assert "Button" not in str(parameter_form(PRETRAIN).widget.children)


# ── a real browser ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def need(found, message):
    "Skip with the reason, or fail where a browser is promised."
    if found: return found
    (pytest.fail if os.environ.get("SEER_NB_NEED_BROWSER") else pytest.skip)(f"{message}; apt-get install chromium, pip install playwright")


@contextmanager
def jupyter(folder, **env):
    "A JupyterLab of its own on the loopback, at home in a folder; yields its address and its token."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token, home = os.urandom(16).hex(), folder / "home"
    for name, settings in (("apputils-extension/notification", {"fetchNews": "false"}), ("notebook-extension/tracker", {"windowingMode": "none"})):
        file = home / f"config/lab/user-settings/@jupyterlab/{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(settings))
    environ = {**os.environ, "HOME": str(home), "JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTER_RUNTIME_DIR": str(home / "run"),
               "IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": os.pathsep.join([str(TOP), *filter(None, [os.environ.get("PYTHONPATH")])]),
               "JUPYTER_TOKEN": token, "OMP_NUM_THREADS": "1", **env}
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0",
                                   f"--ServerApp.root_dir={folder}", "--LabApp.extension_manager=readonly", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
                                  cwd=folder, env=environ, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            assert server.poll() is None, (folder / "lab.log").read_text()[-2000:]
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=5).close(); break
            except OSError: time.sleep(0.25)
        else: raise AssertionError((folder / "lab.log").read_text()[-2000:])
        yield f"http://127.0.0.1:{port}", token
    finally:
        server.terminate()                                                      # it stops its kernels
        try: server.wait(30)
        except subprocess.TimeoutExpired: server.kill(); server.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    "Open a notebook of a copy of nbs/ in JupyterLab, run all cells, `look` at its page until they have run, return it; `browser.folder` is the copy."
    chromium = need(shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome"), "no Chromium here")
    try: from playwright.sync_api import sync_playwright
    except ImportError: need(False, "playwright is not installed")
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(TOP / "nbs", folder / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
    shutil.copy(TOP / "settings.ini", folder)
    (folder / "tmp").mkdir()
    with jupyter(folder, TMPDIR=str(folder / "tmp")) as (address, token), sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])

        def run_all(notebook, look=lambda page: None):
            page = program.new_page(viewport={"width": 1300, "height": 1500})
            page.set_default_timeout(120_000)
            page.goto(f"{address}/lab/tree/{notebook}?token={token}&reset")
            page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
            page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
            prompts, error, calm = page.locator(".jp-CodeCell .jp-InputPrompt"), page.locator("[data-mime-type='application/vnd.jupyter.error']"), 0
            for n in range(480):
                if calm == 20 or not n:                                         # a kernel that was not quite there forgets what it is told
                    page.get_by_role("menuitem", name="Run", exact=True).click()
                    page.get_by_text("Run All Cells", exact=True).click()
                page.wait_for_timeout(250)
                assert not error.count(), error.first.inner_text()
                look(page)
                states = [text.strip() for text in prompts.all_inner_texts()]
                if re.fullmatch(r"\[\d+\]:", states[-1]): return page
                calm = 0 if "[*]:" in states else calm + 1
            page.screenshot(path=folder / "page.png")
            raise AssertionError(f"still running: {states}, {folder / 'page.png'}")

        run_all.folder = folder
        yield run_all
        program.close()


SHOTS = TOP / "runs/browser"


def output_with(page, text, of=".widget-html-content"):
    "The output of the cell that shows a text in a widget."
    return page.locator(".jp-OutputArea-output", has=page.locator(of, has_text=text)).first


def picture(output):
    "The bytes of the picture in an output."
    return bytes(output.locator("img").first.evaluate("async img => Array.from(new Uint8Array(await (await fetch(img.src)).arrayBuffer()))"))


def changed(page, look, before):
    "Wait until what `look` returns is something else, and return it."
    for _ in range(480):
        if (now := look()) != before: return now
        page.wait_for_timeout(125)
    raise AssertionError("nothing changed in a minute")


def shot(output, name):
    SHOTS.mkdir(parents=True, exist_ok=True)
    output.screenshot(path=SHOTS / f"{name}.png")


def test_the_page_is_alive_in_jupyterlab(browser):
    page = browser("nbs/44_monitor.ipynb")
    for slider, key, wanted in (("min_large", "ArrowRight", "share of the photograph"), ("seed", "ArrowRight", "share of the photograph"),
                                ("epsilon", "ArrowRight", "mean entropy"), ("iterations", "End", "mean entropy"), ("group_width", "ArrowRight", "million parameters")):
        output = output_with(page, slider, ".widget-slider")
        text, before = output.locator("pre").inner_text(), picture(output)
        output.locator(".widget-slider", has_text=slider).locator(".noUi-handle").press(key)
        assert changed(page, lambda: picture(output), before).startswith(PNG), slider
        assert wanted in output.locator("pre").inner_text() != text
        shot(output, slider)
    design = output_with(page, "w_0", ".widget-slider")                                           # a network that cannot be: told, and the figure stays
    before = picture(design)
    design.locator(".widget-slider", has_text="depth").locator(".noUi-handle").press("Home")
    changed(page, lambda: "error: RegNetConfig must have 4 stages" in design.locator("pre").inner_text(), False)
    assert picture(design) == before
    shot(design, "impossible")

    run, = browser.folder.glob("tmp/*/earlier")                                 # the run goes on, behind the kernel's back
    output = output_with(page, "step 42 of 60")
    before = picture(output)
    shot(output, "watch_before")
    with open(run / "metrics.jsonl", "a") as f: f.write('\n{"step": 55, "loss": 2.0, "images_per_s": 99, "warnings": ["a <b>warning"]}\n{"step": 60, "lo')
    output = output_with(page, "step 55 of 60")
    changed(page, lambda: picture(output), before)
    assert "warning: a <b>warning" in output.locator("pre").inner_text()
    shot(output, "watch_after")


def test_the_quickstart_in_jupyterlab(browser):
    seen = {}

    def look(page):
        for bar in page.locator(".widget-hbox", has=page.locator("[role=progressbar], .widget-hprogress")).all_inner_texts():
            if percent := re.match(r"(\w+)\D*(\d+)%", bar.replace("\n", " ")): seen.setdefault(percent[1], set()).add(int(percent[2]))
        if len(seen.get("pretrain", ())) == 3: shot(page, "quickstart_running")

    page = browser("nbs/00_quickstart.ipynb", look)
    assert len(seen["pretrain"]) > 3 and max(seen["pretrain"]) == 100                                # it moved while one watched
    run, = browser.folder.glob("**/runs/quickstart/*")
    assert {"metrics.jsonl", "results.jsonl", "backbone.safetensors"} <= {file.name for file in run.iterdir()}
    text = page.locator(".jp-Notebook").inner_text()
    assert "preset smoke, seed 0, 20 steps" in text and "pretraining gains" in text
    page.locator(".jp-OutputArea-output img").last.scroll_into_view_if_needed()
    shot(page, "quickstart")


def test_the_form_in_jupyterlab(browser):
    cells = ["from seer_nb.monitor import parameter_form", "parameter_form('nbs/33_pretrain.ipynb', submit=lambda notebook, params: [notebook, params['steps']])"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}})
    nbformat.write(notebook, browser.folder / "form.ipynb")
    page = browser("form.ipynb")
    form = output_with(page, "a key of REGNETY")
    row = lambda name: form.locator(".widget-hbox", has=page.get_by_text(name, exact=True)).last
    shot(form, "form_defaults")
    form.locator("select").select_option("toyworld")
    changed(page, lambda: "toyworld.yaml" in form.inner_text(), False)
    row("steps").locator("input").fill("many")
    changed(page, lambda: "steps must be int" in row("steps").inner_text(), False)
    row("images").locator("input").fill("nowhere")
    row("images").locator("input").press("Enter")
    changed(page, lambda: "no such folder" in row("images").inner_text(), False)
    shot(form, "form_errors")
    assert form.locator("button").is_disabled()
    row("images").locator("input").fill("toyworld:9")
    row("images").locator("input").press("Enter")
    row("steps").locator("input").fill("30")
    line = "python -m seer_nb.launch nbs/33_pretrain.ipynb -f nbs/params/pretrain/toyworld.yaml -p images toyworld:9 -p steps 30"
    changed(page, lambda: line in form.inner_text(), False)
    form.locator("button").click()
    changed(page, lambda: "['nbs/33_pretrain.ipynb', 30]" in form.inner_text(), False)
    shot(form, "form_sent")
