"""`make demo IMAGES=folder`: the quickstart, run as a job on a folder like those people have."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seer_nb import launch
from seer_nb.core import MetricLog
from seer_nb.weights import load_backbone

TOP = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("Fotos ü"), np.random.default_rng(0)
    (folder / "2019" / "Urlaub").mkdir(parents=True)
    for i, (mode, suffix) in enumerate([("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "bmp"), ("RGB", "webp")] * 4):
        size = rng.integers(30, 400, 2)
        noise = Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
        noise.convert(mode).save(folder / ["2019", "2019/Urlaub", "."][i % 3] / f"{i}.{suffix}")
    whole = (folder / "2019" / "0.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("no image")
    (folder / "nothing.jpg").touch()
    run = tmp_path_factory.mktemp("run") / "erster Versuch"
    status = launch.main([str(TOP / "nbs/00_quickstart.ipynb"), "-f", str(TOP / "nbs/params/quickstart/smoke.yaml"), "-p", "images", str(folder),
                          "-p", "run_dir", str(run), "-p", "steps", "2", "-p", "label_steps", "2", "-p", "train_images", "60", "-p", "test_images", "40"])
    assert status == 0
    return run


def test_leaves_what_the_readme_promises(job):
    names = {p.name for p in job.iterdir()}
    assert {"report.ipynb", "report.html", "metrics.jsonl", "results.jsonl", "backbone.safetensors", "params.yaml", "environment.txt",
            "bad_images.jsonl", "source.ipynb", "checkpoints"} <= names
    assert load_backbone(job / "backbone.safetensors").num_features > 0


def test_counts_bad_images_in_the_report(job):
    rows = [json.loads(line) for line in (job / "bad_images.jsonl").read_text().splitlines()]
    assert {row["name"]: row["reason"] for row in rows} == {"half.jpg": "truncated", "text.png": "unsupported", "nothing.jpg": "empty"}
    assert "3 images could not be used" in (job / "report.html").read_text()


def test_measures_every_network_on_every_task(job):
    rows = MetricLog(job / "results.jsonl").rows()
    assert {(r["model"], r["task"], r["protocol"]) for r in rows} == {
        (model, task, protocol) for model in ("random start", "pretrained", "with labels")
        for task in ("toy_scenes", "toy_digits", "toy_count", "toy_orientation") for protocol in ("linear", "knn")}
    assert all(0 <= r["value"] <= 1 and r["n"] == 40 for r in rows)
