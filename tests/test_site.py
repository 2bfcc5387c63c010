"""The site as Sphinx renders it where Quarto is missing: every page is there, with its words, its code, its figures, and its place."""
import html
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parent.parent
FILES = sorted(p.relative_to(TOP / "nbs").as_posix() for p in TOP.glob("nbs/**/*.ipynb") if not {".ipynb_checkpoints", "runs"} & {*p.relative_to(TOP).parts})


def page_name(file):
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
    text = (site / f"{page_name(file)}.html").read_text()
    shown = words(text)
    assert words("".join(cells[0]["source"]).splitlines()[0].lstrip("# ")) in shown
    assert 'name="q"' in text                                                        # the search field
    assert all(f'href="{Path(os.path.relpath(page_name(f), Path(page_name(file)).parent)).as_posix()}.html"' in text for f in FILES if f not in (file, "index.ipynb"))
    exported = ["".join(c["source"]) for c in cells if c["cell_type"] == "code" and re.match(r"#\| exports?\b", "".join(c["source"]))]
    assert [s for s in exported if re.sub(r"\s+", "", re.sub(r"^#\|.*\n", "", s)) not in shown] == []
    figures = sum(mime.startswith("image/") for c in cells for o in c.get("outputs", []) for mime in o.get("data", {}))
    assert len(re.findall(r"<img\b", text)) >= figures


def test_hidden_cells_are_hidden(site): assert "not_shown_anywhere" not in (site / "core.html").read_text()


def test_what_a_link_shows_elsewhere(site):
    "Title, subtitle and picture of a page, for search engines and for those who are sent its address."
    text = (site / "swav.html").read_text()
    for name, content in (("og:title", "SwAV"), ("og:description", "Codes, swapped prediction, and a monitor that notices collapse"), ("description", "Codes, swapped prediction, and a monitor that notices collapse"),
                          ("twitter:card", "summary_large_image")):
        assert re.search(rf'<meta[^>]*"{name}"[^>]*"{content}"|<meta[^>]*"{content}"[^>]*"{name}"', text), name
    picture, = re.findall(r'"og:image" content="https://[^"]*/seer_nb/([^"]+)"', text)
    assert (site / picture).stat().st_size > 10_000


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


@pytest.fixture(scope="module")
def browser(site):
    "Chromium, looking at the site over the loopback; `open_page(name, width, …)` returns a page and the errors it has met."
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    try: from playwright.sync_api import sync_playwright
    except ImportError: chromium = None
    if not chromium: (pytest.fail if os.environ.get("SEER_NB_NEED_BROWSER") else pytest.skip)("no Chromium or no playwright here; apt-get install chromium, pip install playwright")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as playwright:
        program = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])

        def open_page(name, width=1400, **options):
            page, errors = program.new_page(viewport={"width": width, "height": 1000}, **options), []
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("request", lambda request: errors.append(request.url) if "127.0.0.1" not in request.url and not request.url.startswith("data:") else None)
            page.goto(f"http://127.0.0.1:{server.server_port}/{name}.html")
            return page, errors
        yield open_page
        program.close()
    server.shutdown()


def shown(page, selector): return page.locator(selector).filter(visible=True)


def test_landing_page(browser):
    page, errors = browser("index")
    assert page.locator(".card").count() == 3 and [page.locator(".card > p").nth(i).inner_text() for i in (0, 2, 4)] == ["Read", "Run", "Import"]
    assert page.locator("img[src*=hero]").evaluate("image => image.complete && image.naturalWidth") > 500
    page.locator(".card a").first.click()
    assert page.locator("h1").inner_text().startswith("Quickstart") and errors == []


def test_search_leads_to_the_page(browser):
    page, errors = browser("index")
    page.locator("input[name=q]").filter(visible=True).fill("sinkhorn")
    page.keyboard.press("Enter")
    page.locator("#search-results li a", has_text="SwAV").first.click()
    assert page.locator("h1").inner_text().startswith("SwAV") and errors == []


def test_dark_and_light(browser):
    brightness = "element => getComputedStyle(element).backgroundColor.match(/[0-9]+/g).slice(0, 3).reduce((a, b) => a + +b, 0)"
    for scheme, low, high in (("dark", 0, 200), ("light", 600, 765)):
        page, _ = browser("swav", color_scheme=scheme)
        assert low <= page.locator("body").evaluate(brightness) <= high
        before = page.locator("body").evaluate(brightness)
        for _ in range(2): shown(page, ".theme-toggle").first.click()                  # auto, light, dark
        assert page.locator("body").get_attribute("data-theme") in ("dark", "light")
        assert abs(page.locator("body").evaluate(brightness) - before) > 300 or page.locator("body").get_attribute("data-theme") == scheme


def test_formulas_need_no_script_and_no_network(browser):
    page, errors = browser("swav", java_script_enabled=False)
    boxes = [math.bounding_box() for math in page.locator("math").filter(visible=True).all()]          # those of folded solutions are not
    assert len(boxes) > 5 and all(box["height"] > 5 and box["width"] > 3 for box in boxes) and errors == []


def test_imports_are_folded_and_figures_open(browser):
    page, errors = browser("evaluate/linear")
    imports = page.locator("details.hide pre").first
    assert not imports.is_visible()
    page.locator("details.hide summary").first.click()
    assert imports.is_visible() and "import" in imports.inner_text()
    page.locator(".cell_output img").first.click()
    assert page.locator("dialog.zoom img").is_visible()
    page.keyboard.press("Escape")
    page.locator("dialog.zoom img").wait_for(state="hidden")
    assert errors == []


def test_solutions_are_folded(browser):
    page, errors = browser("swav")
    solutions = page.locator("details", has=page.locator("summary", has_text="Solution"))
    assert solutions.count() > 1 and not any(solutions.nth(i).locator("p").first.is_visible() for i in range(solutions.count()))
    solutions.first.locator("summary").click()
    assert solutions.first.locator("p").first.is_visible() and errors == []


def test_pages_follow_each_other(browser):
    page, _ = browser("swav")
    assert "builds on" in page.locator("article").inner_text()
    page.locator(".related-pages .next-page").click()
    assert page.locator("h1").inner_text().startswith("LARC")


@pytest.mark.parametrize("width", [390, 1000, 1400])
def test_no_page_is_wider_than_the_screen(browser, width):
    wide = []
    page, _ = browser("index", width)
    for file in FILES:
        page.goto(re.sub(r"/[^/]*$", "/", page.url.replace("/evaluate/", "/")) + f"{page_name(file)}.html")
        if page.evaluate("document.documentElement.scrollWidth") > width: wide.append(file)
    assert wide == []


def test_pages_are_light(site):
    assert {path.name: path.stat().st_size for path in site.rglob("*.html") if path.stat().st_size > 2_000_000} == {}
