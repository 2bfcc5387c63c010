"Figures are optional: importing needs nothing, drawing without matplotlib says what to install."
import subprocess
import sys

BLOCKED = "import sys\nfor name in ('matplotlib', 'seaborn', 'skimage', 'pandas'): sys.modules[name] = None\n"


def run(code): return subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True)


def test_modules_import_without_the_notebook_extras():
    done = run("import seer_nb.viz, seer_nb.images, seer_nb.multicrop")
    assert done.returncode == 0, done.stderr


def test_drawing_without_matplotlib_says_what_to_install():
    done = run("import torch, seer_nb.viz as viz\nviz.show_images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))")
    assert done.returncode and "pip install 'seer_nb[notebooks]'" in done.stderr
