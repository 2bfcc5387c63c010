"""nbdev processors (settings.ini, `procs`): what every page of the site has beyond its notebook, with Quarto and without it."""
import re
from pathlib import Path

from execnb.nbio import mk_cell
from nbdev.config import get_config
from nbdev.process import Processor

TOP = Path(__file__).resolve().parent.parent
IMPORT = re.compile(r"(import|from) |[ )]|$")            # the first characters of a line in a cell of imports


class HeadingAboveSource(Processor):
    """Show the code that the package runs, under a heading for each exported name.

    By default nbdev replaces an exported cell by its signature. Here the signature goes, and the heading moves above the cell."""

    def begin(self):
        cells, moved = [], None
        for cell in self.nb.cells:
            if not cell.source.strip(): continue   # held nothing but a directive
            if getattr(cell, "has_sd", False):
                for output in cell.get("outputs", []):
                    output["data"] = {"text/markdown": [line for line in output["data"]["text/markdown"] if line.startswith("#")]}
                moved.insert(0, cell)   # nbdev lists them in reverse
            else:
                cells += moved or []
                moved = [cell]
        self.nb.cells = cells + (moved or [])


class FoldImports(Processor):
    "Fold the cells that only import."

    def cell(self, cell):
        lines = [line for line in cell.source.splitlines() if not line.startswith("#|")]
        if cell.cell_type == "code" and any(lines) and all(map(IMPORT.match, lines)):
            cell.source = f"#| code-fold: true\n#| code-summary: imports\n{cell.source}"


def minutes(cells) -> int:
    "Estimate the reading time: 200 words or 20 lines of code a minute."
    words = sum(len(c.source.split()) for c in cells if c.cell_type == "markdown" and not hasattr(c, "has_sd"))
    lines = sum(len(c.source.splitlines()) for c in cells if c.cell_type == "code" and "echo: false" not in c.source)
    return max(1, round(words / 200 + lines / 20))


def page_of(module: str) -> str:
    "Return the notebook that a module is made from, as a link from nbs/; '' if there is none."
    text = (TOP / module.replace(".", "/")).with_suffix(".py")
    found = re.search(r"File to edit: (?:\.\./)*nbs/(\S+?\.ipynb)", text.read_text(encoding="utf-8")) if text.exists() else None
    return found[1] if found else ""


class PageFacts(Processor):
    "Say under the title how long a page takes to read, which pages it builds on (those whose modules it imports), and that it opens in Colab if it has a cell for that."

    def begin(self):
        cells = self.nb.cells
        code = "\n".join(c.source for c in cells if c.cell_type == "code")
        modules = set(re.findall(r"^from (seer_nb\.[\w.]+) import", code, re.M)) - {"seer_nb.core", "seer_nb.viz"}      # everyone's ground floor
        file, config = Path(self.nb.path_).resolve().relative_to(TOP), get_config()
        up = "../" * (len(file.parts) - 2)
        pages = [f"[{re.sub('.*/|[0-9]+_', '', page[:-6])}]({up}{page})" for page in sorted(filter(None, map(page_of, modules)))]
        facts = f"{(n := minutes(cells))} minute{'s' * (n > 1)} to read"
        if pages: facts += f" · builds on {', '.join(pages)}"
        if "google.colab" in (TOP / file).read_text(encoding="utf-8"): facts += f" · [open in Colab](https://colab.research.google.com/github/{config.user}/{config.repo}/blob/{config.branch}/{file.as_posix()})"
        if cells[0].cell_type == "raw" and file.stem != "index": cells.insert(1, mk_cell(f"*{facts}*", "markdown"))
