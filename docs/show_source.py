"""An nbdev processor (settings.ini, `procs`): a page shows the code that the package runs, under a heading for each exported name.

By default nbdev replaces an exported cell by its signature. Here the signature goes and the cell stays."""
from nbdev.process import Processor


class HeadingAboveSource(Processor):
    "Move the headings that nbdev adds below an exported cell above it, without the signature that the cell shows anyway."

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
