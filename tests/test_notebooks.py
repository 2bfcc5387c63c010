"""What every notebook owes the others: clean, in sync with the package, in the sidebar, in the right order."""
import ast
import dataclasses
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest
import yaml

from seer_nb.launch import notebook_name, parameters_of, read_params

TOP = Path(__file__).resolve().parent.parent
NBS = TOP / "nbs"
FILES = sorted(p.relative_to(NBS).as_posix() for p in NBS.rglob("*.ipynb") if not {".ipynb_checkpoints", "runs"} & {*p.relative_to(TOP).parts})
RUNS = [f for f in FILES if re.match(r"00_|33_|90_|evaluate/(5[1-8]|6)", f)]   # papermill runs these: the jobs, and every evaluation; 59 is their statistics
PRESETS = sorted(p.relative_to(NBS).as_posix() for p in NBS.glob("params/**/*.y*ml"))
BASE = {"torch", "torchvision", "numpy", "PIL", "cv2", "tqdm", "safetensors", "seer_nb"}   # the base install, by import name
EXTRAS = {"jupyterlab", "papermill", "nbconvert", "nbformat", "nbclient", "seaborn", "matplotlib", "pandas", "ipywidgets", "submitit",
          "skimage", "sklearn", "timm", "transformers", "lightly", "nbdev", "fastcore", "execnb", "IPython", "pytest"}
MACHINE_PATH = re.compile(r"(?<![\w.…])/(root|home|work|tmp|usr|opt|var|mnt|srv|Users|private)/\w")

each_notebook = pytest.mark.parametrize("file", FILES)


def cells(file, kind=None):
    return [c for c in nbformat.read(NBS / file, as_version=4).cells if kind in (None, c.cell_type)]


def tree(cell):
    "The syntax tree of a code cell; magics and shell lines count as nothing."
    return ast.parse("\n".join(line for line in cell.source.splitlines() if not line.lstrip().startswith(("%", "!"))))


def directives(cell): return re.findall(r"^\s*#\s*\|\s*([\w-]+)", cell.source, re.M)


def imports(nodes):
    "Yield the dotted names that absolute import statements among the nodes bring in; `from a import b` yields a and a.b."
    for node in nodes:
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level: yield from [node.module, *(f"{node.module}.{a.name}" for a in node.names)]


def texts(cell):
    "Yield the source and every textual output of a cell."
    yield cell.source
    for output in cell.get("outputs", []):
        if output.output_type == "stream": yield output.text
        yield from (str(text) for mime, text in output.get("data", {}).items() if mime.startswith("text/"))


def sidebar():
    "The notebooks that _quarto.yml lists, in order."
    def walk(entry):
        if isinstance(entry, str): yield entry
        elif "contents" in entry:
            for inner in entry["contents"]: yield from walk(inner)
        else: yield entry["href"]
    return list(walk(yaml.safe_load((TOP / "_quarto.yml").read_text())["website"]["sidebar"]))


def module_of(file):
    "evaluate/53_knn.ipynb is seer_nb.evaluate.knn"
    return ".".join(["seer_nb", *Path(file).parent.parts, notebook_name(file)])


BACK = {("seer_nb.images", "seer_nb.toyworld"), ("seer_nb.images", "seer_nb.shards"),   # open_images("toyworld:N") and ("x.tar") look ahead
        ("seer_nb.launch", "seer_nb.evaluate.tasks")}                                       # a suite looks at its tasks
NUMBER = {module_of(f): int(Path(f).name[:2]) for f in FILES if Path(f).name[:2].isdigit()}
# Read after the trainer, imported by it: what many processes need uses nothing of a run.
NUMBER |= {"seer_nb.distributed": 31.1, "seer_nb.sharding": 31.2, "seer_nb.checkpoints": 31.3}


def generated(folder):
    return {p.relative_to(folder).as_posix(): p.read_text() for p in sorted(folder.rglob("*.py")) if "__pycache__" not in p.parts}


# ── files and names ──────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_no_stray_notebooks():
    "Notebooks live in nbs/ and nbs/evaluate/ and are called NN_name."
    elsewhere = [p for p in TOP.rglob("*.ipynb") if p.relative_to(TOP).parts[0] not in ("nbs", "runs", "build") and p.relative_to(TOP).parts[0][0] not in "._"]
    badly_named = [f for f in FILES if not re.fullmatch(r"(evaluate/)?\d\d_[a-z][a-z0-9_]*\.ipynb|index\.ipynb", f)]
    assert not elsewhere and not badly_named


def test_page_names_are_unique():
    pages = [(Path(f).parent, notebook_name(f)) for f in FILES]
    assert sorted(set(pages)) == sorted(pages)


def test_sidebar_and_files_agree():
    assert sorted(sidebar()) == FILES
    assert (NBS / "_quarto.yml").resolve() == TOP / "_quarto.yml"


@each_notebook
def test_small_enough(file):
    assert (NBS / file).stat().st_size < 1.5e6, "store smaller figures"


@each_notebook
def test_kernelspec(file):
    "papermill reads the language from here."
    assert nbformat.read(NBS / file, 4).metadata.kernelspec == {"name": "python3", "display_name": "python3", "language": "python"}


# ── clean and in sync ────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    "A copy of the tree in which nbdev has cleaned every notebook and written the package anew."
    copy = tmp_path_factory.mktemp("tree") / "seer_nb"
    copy.mkdir()
    for name in ("settings.ini", "pyproject.toml", "setup.py", "_quarto.yml"): shutil.copy(TOP / name, copy)
    shutil.copytree(NBS, copy / "nbs", symlinks=True, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "runs"))
    for command in ("nbdev_clean", "nbdev_export"):
        done = subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


@each_notebook
def test_clean(file, rebuilt):
    assert (rebuilt / "nbs" / file).read_text() == (NBS / file).read_text(), f"run: nbdev_clean --fname nbs/{file}"


def test_package_in_sync(rebuilt):
    new, old = generated(rebuilt / "seer_nb"), generated(TOP / "seer_nb")
    assert sorted(new) == sorted(old), "run: nbdev_export, and remove modules that no notebook makes"
    assert [name for name in new if new[name] != old[name]] == [], "run: nbdev_export"


def test_pyproject_in_sync(rebuilt):
    assert (rebuilt / "pyproject.toml").read_text() == (TOP / "pyproject.toml").read_text()


def test_readme_is_current():
    spec = importlib.util.spec_from_file_location("readme", TOP / "docs/readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.readme(json.loads((NBS / "index.ipynb").read_text())) == (TOP / "README.md").read_text(), "run: make readme"


# ── what stands in the cells ─────────────────────────────────────────────────────────────────────────────────────────────────

@each_notebook
def test_title_has_a_cell_of_its_own(file):
    "The site takes title and description from the first cell and drops whatever else is in it."
    first, *rest = cells(file)[0].source.splitlines()
    assert re.fullmatch(r"# \S.*", first)
    assert [line for line in rest if line.strip()][0].startswith("> ")
    assert all(re.match(r"> |- \w+: |\s*$", line) for line in rest), "put the lead into a second cell"


@each_notebook
def test_exports_into_its_own_module(file):
    source = "\n".join(c.source for c in cells(file, "code"))
    exports = any({"export", "exports", "exporti"} & set(directives(c)) for c in cells(file, "code"))
    assert re.findall(r"^#\| default_exp (\S+)", source, re.M) == ([module_of(file).removeprefix("seer_nb.")] if exports else [])


@each_notebook
def test_imports_have_cells_of_their_own(file):
    "Building the site runs import cells alone."
    mixed = [c.source for c in cells(file, "code") if not {"export", "exports", "exporti", "eval"} & set(directives(c))
             and len({isinstance(n, (ast.Import, ast.ImportFrom)) for n in tree(c).body}) == 2]
    assert mixed == []


@each_notebook
def test_no_machine_paths(file):
    assert [line for c in cells(file) for text in texts(c) for line in text.splitlines() if MACHINE_PATH.search(line)] == []


@each_notebook
def test_no_errors_or_warnings_stored(file):
    outputs = [o for c in cells(file, "code") for o in c.outputs]
    assert [o.ename for o in outputs if o.output_type == "error"] == []
    assert [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr" and "Warning" in o.text] == []


@each_notebook
def test_links_lead_somewhere(file):
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", "\n".join(c.source for c in cells(file, "markdown")))
    assert [link for link in links if not (NBS / file).parent.joinpath(link).exists()] == []


# ── parameters ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

@each_notebook
def test_cells_that_submit_are_not_run_by_the_job(file):
    "A job executes its page: a cell that sends it to a cluster would send it again."
    for cell in cells(file, "code"):
        for call in [n for n in ast.walk(tree(cell)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") in ("submit", "submit_suite")]:
            here = [k.value.value for k in call.keywords if k.arg == "cluster" and isinstance(k.value, ast.Constant)]
            if "#| export" in cell.source or here in (["debug"], ["local"]): continue
            assert "skip-execution" in cell.metadata.get("tags", []) and "eval" in directives(cell), cell.source


@each_notebook
def test_parameters_tag(file):
    "One tagged cell in a notebook that papermill runs, none elsewhere."
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells(file)) == (file in RUNS)


@pytest.mark.parametrize("file", RUNS)
def test_run_parameters(file):
    "Every run has a folder, a seed and a preset, and papermill can read each line of the cell."
    cls = parameters_of(NBS / file)
    assert {"run_dir": "str", "seed": "int", "preset": "str"}.items() <= {name: f.type for name, f in cls.__dataclass_fields__.items()}.items()
    assert cls().run_dir == ""
    cell = next(c for c in cells(file) if "parameters" in c.metadata.get("tags", []))
    assigned = [t.id for n in tree(cell).body for t in ([n.target] if isinstance(n, ast.AnnAssign) else getattr(n, "targets", []))]
    assert assigned == list(cls.__dataclass_fields__)


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_fits_its_notebook(preset):
    "Known names, right types; it knows its own name and opens with a comment."
    folder, path = Path(preset).parent.name, NBS / preset
    notebook, = (f for f in RUNS if notebook_name(f) == folder)
    values = read_params(parameters_of(NBS / notebook), path)
    assert path.suffix == ".yaml" and values["preset"] == path.stem
    assert path.read_text().startswith("# ")
    assert not MACHINE_PATH.search(path.read_text())


@pytest.mark.parametrize("preset", [p for p in PRESETS if p.startswith("params/") and Path(p).stem not in ("smoke", "toyworld")])
def test_a_preset_of_full_size_has_no_toy_value(preset):
    "What a preset does not name has the value of the parameters cell: it must not be a smaller one than the configuration's own."
    folder = Path(preset).parent.name
    notebook, = (f for f in RUNS if notebook_name(f) == folder)
    if not notebook.startswith("evaluate/") or folder in ("scoreboard", "audit"): return
    module = importlib.import_module(f"seer_nb.evaluate.{folder}")
    config, = (c for name, c in vars(module).items() if name.endswith("Config") and getattr(c, "__module__", "") == module.__name__)
    cell, defaults = vars(parameters_of(NBS / notebook)()), {f.name: f.default for f in dataclasses.fields(config)}
    named = read_params(parameters_of(NBS / notebook), NBS / preset)
    assert {k: v for k, v in cell.items() if k not in named and v != defaults[k] and k not in ("run_dir", "preset")} == {}


# ── who may import whom ──────────────────────────────────────────────────────────────────────────────────────────────────────

@each_notebook
def test_cells_with_imports_run_nothing(file):
    "Building the site runs every cell that imports something, and no others: beside imports such a cell may only define."
    for cell in cells(file, "code"):
        if "export" in " ".join(directives(cell)) or not list(imports(ast.walk(tree(cell)))): continue
        doing = [node for node in tree(cell).body if not isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))]
        assert not doing, f"split this cell: imports and definitions, then what uses them\n{cell.source}"


@pytest.mark.parametrize("file", [f for f in FILES if f not in ("index.ipynb", "00_quickstart.ipynb")])
def test_imports_only_pages_above(file):
    me = module_of(file)
    used = {name for c in cells(file, "code") for name in imports(ast.walk(tree(c))) if name in NUMBER}
    assert [name for name in used if NUMBER[name] >= NUMBER[me] and name != me and (me, name) not in BACK] == []


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("evaluate/")])
def test_evaluations_do_not_know_the_trainer(file):
    exported = [c for c in cells(file, "code") if {"export", "exports", "exporti"} & set(directives(c))]
    used = {name for c in exported for name in imports(ast.walk(tree(c)))}
    assert not used & {"seer_nb.trainer", "seer_nb.pretrain"}


BASE_MODULES = sorted(m for m, n in NUMBER.items() if n <= 42 and (TOP / f"{m.replace('.', '/')}.py").exists())


@pytest.mark.parametrize("module", BASE_MODULES)
def test_base_modules_name_only_the_base_install(module):
    "Everything else is imported inside the function that needs it."
    body = ast.parse((TOP / f"{module.replace('.', '/')}.py").read_text())
    inside = {n for f in ast.walk(body) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) for n in ast.walk(f)}
    used = {name.split(".")[0] for name in imports(n for n in ast.walk(body) if n not in inside)}
    assert used <= BASE | sys.stdlib_module_names


def test_base_modules_import_without_the_extras():
    code = f"""
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
for name in {BASE_MODULES!r}: importlib.import_module(name)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cited_works_stand_in_the_bibliography():
    "A page links to a work where it speaks of it; references.bib holds every one, and none that no page cites."
    address = r"https://(?:arxiv\.org/abs|doi\.org|www\.jstor\.org)/[^\s)\]\"\\}]+"
    entries = set(re.findall(rf"url = {{({address})}}", (NBS / "references.bib").read_text(encoding="utf-8")))
    cited = {url for path in NBS.rglob("*.ipynb") if "96_" not in path.name and ".ipynb_checkpoints" not in path.parts
             for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "markdown" for url in re.findall(rf"\]\(({address})\)", "".join(cell["source"]))}
    assert cited == entries


@pytest.mark.parametrize("file", [f for f in FILES if not re.match(r"index|9[567]_", f)])
def test_says_what_one_will_be_able_to_do(file):
    "The lead ends with what the page is good for."
    lead = [c for c in json.loads((NBS / file).read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown"][1]
    assert "**You will be able to** " in "".join(lead["source"])


@pytest.mark.parametrize("file", [f for f in FILES if not re.match(r"index|9[567]_", f)])
def test_every_exercise_has_a_solution(file):
    "Folded, in a form that JupyterLab, Quarto and Sphinx render alike; its code can at least be read by Python."
    last = "".join(json.loads((NBS / file).read_text(encoding="utf-8"))["cells"][-1]["source"])
    _, exercises = last.split("## Exercises\n")
    parts = re.split(r"(?m)^(?=\d+\. )", re.sub(r"(?s)<details>.*?</details>", lambda m: m[0].replace("\n", "\r"), exercises))[1:]       # a list in a solution is no exercise
    assert len(parts) >= 2 and [int(part.split(".")[0]) for part in parts] == list(range(1, len(parts) + 1))
    for part in parts:
        solution, = re.findall(r"(?s)\n\n<details>\n<summary>Solution</summary>\n\n(.+)\n\n</details>\n*$", part.replace("\r", "\n"))
        for code in re.findall(r"(?sm)^ *```python\n(.*?)^ *```", solution): compile(textwrap.dedent(code), file, "exec")
