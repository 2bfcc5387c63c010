"""Render the notebooks as a site into _docs/: with Quarto where it is installed, else with Sphinx.

Both start from the same pages, processed by nbdev, and both take the sidebar from _quarto.yml."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import yaml

TOP = Path(__file__).resolve().parent.parent
SITE, SOURCE, DRAFT = TOP / "_docs", TOP / "build/docs", TOP / "build/site"
CALLOUT = re.compile(r"^(:{3,}) *\{ *\.callout-(\w+)[^}]*\}", re.M)
DIV = re.compile(r"^(:{3,}) *\{ *\.([\w-]+) *\}", re.M)


def sidebar() -> list:
    "Return [(section title, [notebook, …]), …] from _quarto.yml; pages outside a section have the title ''."
    contents = yaml.safe_load((TOP / "_quarto.yml").read_text())["website"]["sidebar"]["contents"]
    name = lambda entry: entry["href"] if isinstance(entry, dict) else entry
    return [(e["section"], [name(c) for c in e["contents"]]) if isinstance(e, dict) and "section" in e else ("", [name(e)]) for e in contents]


def page_name(notebook: str) -> str:
    "Return the page of a notebook without number and suffix: evaluate/53_knn.ipynb is evaluate/knn, as nbdev has it."
    path = Path(notebook)
    return (path.parent / re.sub(r"^\d+[a-z]?_", "", path.stem)).as_posix()


def links(text: str, here: str, base: str) -> str:
    "Let links to notebooks and to the published site lead to pages of this site."
    up = "../" * here.count("/")
    text = re.sub(r"\]\((?![a-z]+:)([^)#]+)\.ipynb", lambda m: f"]({page_name(m[1])}.ipynb", text)
    # nbdev's link to a method or a private name has no heading to lead to; it leads to the page
    return re.sub(rf"\]\({re.escape(base)}/([^)#]+)\.html(#[a-z]\w*(?=\))|)[^)]*", rf"]({up}\1.ipynb\2", text)


def sphinx_cells(cell, here: str, base: str):
    "Turn one processed cell into what MyST-NB reads: directives become tags, Quarto's callouts MyST's."
    if cell.cell_type == "raw": return
    if cell.cell_type == "code":
        options = dict(re.findall(r"^#\| *([\w-]+): *(.*)$", cell.source, re.M))
        written = [o.text if o.output_type == "stream" else o.get("data", {}).get("text/markdown", "") for o in cell.get("outputs", [])]
        if options.get("output") == "asis" or options.get("echo") == "false" and any("text/markdown" in o.get("data", {}) for o in cell.get("outputs", [])):
            for text in written: yield from sphinx_cells(nbformat.v4.new_markdown_cell(text), here, base)
            return
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        tags = cell.metadata.setdefault("tags", [])
        if options.get("echo") == "false": tags.append("remove-input")
        if options.get("output") == "false": tags.append("remove-output")
        if options.get("code-fold") == "true": tags.append("hide-input")
        if cell.source: yield cell
    else:
        cell.source = links(DIV.sub(r"\1{container} \2", CALLOUT.sub(r"\1{\2}", cell.source)), here, base)
        yield cell


def sphinx_page(notebook: str, base: str):
    "Write one page of the Sphinx source from nbdev's processed notebook."
    nb = nbformat.read(TOP / "_proc" / notebook, 4)
    head = next((yaml.safe_load(c.source.strip().strip("-")) for c in nb.cells if c.cell_type == "raw"), {})
    here, about = page_name(notebook), head.get("description", "")
    nb.metadata |= {"og:description": about, "myst": {"html_meta": {"description": about}}}
    title = nbformat.v4.new_markdown_cell(f"# {head.get('title', here)}\n\n*{about}*")
    nb.cells = [title] + [new for cell in nb.cells for new in sphinx_cells(cell, here, base)]
    if here == "index": nb.cells.append(nbformat.v4.new_markdown_cell(toctree()))
    path = SOURCE / f"{here}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, path)


def toctree() -> str:
    "Return the sidebar as MyST directives."
    def part(title, notebooks):
        caption = f":caption: {title}\n" if title else ""
        return f"```{{toctree}}\n:hidden:\n{caption}\n" + "\n".join(map(page_name, notebooks)) + "\n```"
    return "\n\n".join(part(title, [n for n in notebooks if n != "index.ipynb"]) for title, notebooks in sidebar() if notebooks != ["index.ipynb"])


def build_with_sphinx():
    import nbdev.doclinks
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs
    refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    proc_nbs(force=True, n_workers=2)
    for old in (SOURCE, DRAFT): shutil.rmtree(old, ignore_errors=True)
    config = get_config()
    for _, notebooks in sidebar():
        for notebook in notebooks: sphinx_page(notebook, config.doc_host + config.doc_baseurl)
    (SOURCE / "_static").mkdir()
    for path in (TOP / "nbs/styles.css", TOP / "docs/zoom.js", TOP / "nbs/social.png"): shutil.copy(path, SOURCE / "_static")
    for path in (TOP / "nbs").glob("*.png"): shutil.copy(path, SOURCE)
    subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", TOP / "docs",
                    "-D", f"html_static_path={SOURCE / '_static'}", SOURCE, DRAFT], check=True)
    shutil.rmtree(SITE, ignore_errors=True)
    DRAFT.rename(SITE)


def build_with_quarto():
    subprocess.run([sys.executable, TOP / "docs/readme.py"], check=True)   # newer than index.ipynb: nbdev_docs leaves it alone
    path = os.pathsep.join(filter(None, [str(TOP / "docs"), os.environ.get("PYTHONPATH")]))
    subprocess.run([Path(sys.executable).with_name("nbdev_docs")], env={**os.environ, "PYTHONPATH": path}, check=True)


if __name__ == "__main__":
    os.chdir(TOP)
    build_with_quarto() if shutil.which("quarto") else build_with_sphinx()
    print(f"open {SITE / 'index.html'}")
