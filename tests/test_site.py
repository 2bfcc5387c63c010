"""The site as Sphinx renders it where Quarto is missing: every page is there, with its words, its code, its figures, and its place."""
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
FILES = sorted(p.relative_to(TOP / "nbs").as_posix() for p in TOP.glob("nbs/**/*.ipynb") if not {".ipynb_checkpoints", "runs"} & {*p.relative_to(TOP).parts})


def page(file):
    path = Path(file)
    return (path.parent / re.sub(r"^\d+_", "", path.stem)).as_posix()


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "Built from a copy; warnings of Sphinx (a lost link, a broken table) are errors."
    top = tmp_path_factory.mktemp("site")
    for name in ("settings.ini", "_quarto.yml", "pyproject.toml"): shutil.copy(TOP / name, top)
    for name in ("nbs", "seer_nb", "docs"): shutil.copytree(TOP / name, top / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "runs"))
    core = json.loads((top / "nbs/01_core.ipynb").read_text())
    core["cells"].append({**core["cells"][-1], "cell_type": "code", "id": "0000hide", "outputs": [], "execution_count": None, "source": ["#| hide\n", "not_shown_anywhere = 1"]})
    (top / "nbs/01_core.ipynb").write_text(json.dumps(core))
    code = "import build; build.build_with_sphinx()"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(top / "docs"), str(top)])}
    done = subprocess.run([sys.executable, "-c", f"if __name__ == '__main__': {code}"], cwd=top, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return top / "_docs"


def words(text):
    "The words of a page or of code, without markup."
    return re.sub(r"\s+", "", html.unescape(re.sub(r"<[^>]+>", "", text)))


@pytest.mark.parametrize("file", FILES)
def test_page(site, file):
    cells = json.loads((TOP / "nbs" / file).read_text())["cells"]
    text = (site / f"{page(file)}.html").read_text()
    shown = words(text)
    assert words("".join(cells[0]["source"]).splitlines()[0].lstrip("# ")) in shown
    assert 'name="q"' in text                                                        # the search field
    assert all(f'href="{Path(os.path.relpath(page(f), Path(page(file)).parent)).as_posix()}.html"' in text for f in FILES if f not in (file, "index.ipynb"))
    exported = ["".join(c["source"]) for c in cells if c["cell_type"] == "code" and re.match(r"#\| exports?\b", "".join(c["source"]))]
    assert [s for s in exported if re.sub(r"\s+", "", re.sub(r"^#\|.*\n", "", s)) not in shown] == []
    figures = sum(mime.startswith("image/") for c in cells for o in c.get("outputs", []) for mime in o.get("data", {}))
    assert len(re.findall(r"<img\b", text)) >= figures


def test_hidden_cells_are_hidden(site): assert "not_shown_anywhere" not in (site / "core.html").read_text()


def test_search_finds_a_function(site):
    assert "stateless_rng" in (site / "searchindex.js").read_text()


def test_links_between_pages(site):
    "No page links to a page or a heading that is not there."
    lost = []
    for path in site.rglob("*.html"):
        for link in re.findall(r'href="([^"]+)"', path.read_text()):
            target, _, anchor = html.unescape(link).partition("#")
            if re.match(r"[a-z]+:", link): continue
            there = (path.parent / target.split("?")[0]).resolve() if target else path
            if not there.exists(): lost.append((path.name, link))
            elif anchor and there.suffix == ".html" and f'id="{anchor}"' not in there.read_text(): lost.append((path.name, link))
    assert lost == []
