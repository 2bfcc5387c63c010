"""Write README.md from nbs/index.ipynb (standard library only): python docs/readme.py"""
import json
import re
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^\s*#\s*\|.*\n?", re.M)


def fence(text, language=""): return f"```{language}\n{text.rstrip()}\n```"


def output_text(output):
    "The text of a cell output, or an empty string; figures stay on the site."
    text = output["text"] if output["output_type"] == "stream" else output.get("data", {}).get("text/plain", "")
    return "".join(text)


def readme(index: dict) -> str:
    "Return a notebook (its JSON) as Markdown whose links work from the top folder."
    parts = ["<!-- made from nbs/index.ipynb by `make readme`; edit the notebook -->"]
    for cell in index["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = re.sub(r"^:::.*\n?", "", source, flags=re.M)                     # the site's boxes
            parts.append(re.sub(r"\]\((?![a-z]+:|#|/)([^)]+)\)", r"](nbs/\1)", source))
        elif cell["cell_type"] == "code" and not re.search(r"^\s*#\s*\|\s*hide\b", source, re.M):
            code = DIRECTIVE.sub("", source).strip()
            if code and "echo: false" not in source: parts.append(fence(code, "python"))
            parts += [fence(text) for text in map(output_text, cell["outputs"]) if text.strip()]
    return "\n\n".join(part.strip() for part in parts) + "\n"


if __name__ == "__main__":
    (TOP / "README.md").write_text(readme(json.loads((TOP / "nbs/index.ipynb").read_text(encoding="utf-8"))), encoding="utf-8")
