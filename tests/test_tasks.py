"The table of tasks, models from other libraries, results, features, and runs that can be called twice."
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from seer_nb.evaluate import features, knn, linear, scoreboard, tasks
from seer_nb.toyworld import TOY_TASKS, toy_task


def test_the_table_and_the_toy_world_agree():
    table = tasks.TASKS
    assert list(table.slug) == list(TOY_TASKS) and list(table.columns) == [f.name for f in dataclasses.fields(tasks.Task)]
    for slug, toy in TOY_TASKS.items():
        assert (table.classes[slug], table.train[slug], table.test[slug]) == (len(toy.classes), toy.train, toy.test)
        assert table.chance[slug] == pytest.approx(1 / len(toy.classes))
    with pytest.raises(AttributeError): tasks.TASK


@pytest.mark.parametrize("slug", list(TOY_TASKS))
def test_open_task(slug):
    data = tasks.open_task(slug, split="test", n=20)
    images, labels = toy_task(slug, "test", 20)
    assert len(data) == 20 and data.classes == TOY_TASKS[slug].classes and torch.equal(data.labels, labels)
    assert all(torch.equal(image, images[i]) and label == labels[i] for i, (image, label) in enumerate(data))
    assert len(list(data)) == 20


def test_open_task_refuses():
    with pytest.raises(ValueError, match="did you mean 'toy_digits'"): tasks.open_task("toy_digit")
    with pytest.raises(ValueError, match="not 'val'"): tasks.open_task("toy_digits", split="val")
    with pytest.raises(ValueError, match="were asked for"): tasks.open_task("toy_digits", n=10**7)


@pytest.mark.parametrize("spec, dim", [("torchvision:resnet18", 512), ("torchvision:mobilenet_v3_small", 1024), ("torchvision:regnet_y_400mf", 440),
                                       ("timm:regnety_002", 368), ("timm:vit_tiny_patch16_224", 192)])
def test_published_architectures(spec, dim):
    if spec.startswith("timm"): pytest.importorskip("timm")
    model = tasks.open_model(spec, pretrained=False)
    assert not model.training
    with torch.inference_mode(): assert model(torch.zeros(2, 3, 224, 224)).shape == (2, dim)


def test_timm_brings_its_own_pixel_statistics():
    pytest.importorskip("timm")
    assert tasks.open_model("timm:vit_tiny_patch16_224", pretrained=False).preprocess.mean == (0.5, 0.5, 0.5)
    assert tasks.open_model("timm:resnet18", pretrained=False).preprocess.mean == tasks.IMAGENET_MEAN


def test_transformers_from_a_local_folder(tmp_path):
    hf = pytest.importorskip("transformers")
    vit = hf.ViTModel(hf.ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8))
    vit.save_pretrained(tmp_path / "vit")
    hf.RegNetModel(hf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8)).save_pretrained(tmp_path / "regnet")
    images = torch.randn(2, 3, 32, 32)
    model = tasks.open_model(f"transformers:{tmp_path / 'vit'}")
    with torch.inference_mode():
        assert torch.allclose(model(images), vit.eval()(images).last_hidden_state[:, 0], atol=1e-5)
        assert tasks.open_model(f"transformers:{tmp_path / 'regnet'}")(images).shape == (2, 16)


def test_open_model_refuses():
    for spec, message in {"regnety_toy": "write KIND:NAME", "random:": "write KIND:NAME", "tim:resnet18": "did you mean 'timm'",
                          "random:regnety_to": "did you mean 'regnety_toy'", "torchvision:resnet19": "did you mean 'resnet18'"}.items():
        with pytest.raises(ValueError, match=message): tasks.open_model(spec)


def test_untrained_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = tasks.open_model("random:regnety_toy", seed=3)
    assert torch.equal(torch.rand(1), expected)
    assert tasks.weights_hash(first) == tasks.weights_hash(tasks.open_model("random:regnety_toy", seed=3))
    next(first.parameters()).data.view(-1)[0] += 1e-3
    assert tasks.weights_hash(first) != tasks.weights_hash(tasks.open_model("random:regnety_toy", seed=3))


def a_result(**changes):
    result = tasks.Result("toy_count", "m", "knn", {"k": 20}, "top-1", 0.5, 0.4, 0.6, 100, 0.1, 0.2, None, "", 0)
    return dataclasses.replace(result, **changes)


def test_results_survive_the_disk(tmp_path):
    path = tmp_path / "deep" / "results.jsonl"
    assert tasks.read_results(path) == [] and tasks.find_result(path, seed=0) is None
    rows = [a_result(), a_result(seed=1, paper=0.7, paper_source="a table", details={"l2": 0.1})]
    for row in rows: tasks.append_result(path, row)
    with open(path, "a") as f: f.write('{"task": "toy_co')        # killed while writing
    assert tasks.read_results(path) == rows
    assert tasks.find_result(path, seed=1) == rows[1] and tasks.find_result(path, settings={"k": 200}) is None
    path.write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(ValueError, match="not a file of results"): tasks.read_results(path)


class Probe(nn.Module):
    "Features that show what came in, with a batch norm that is in eval mode while its parent trains."
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.train()
        self.norm.eval()

    def forward(self, x): return self.pool(self.norm(x))


def test_extraction_keeps_order_and_model():
    images = torch.stack([torch.full((3, 8, 8), i, dtype=torch.uint8) for i in range(50)])
    model = Probe()
    before, state = {m: m.training for m in model.modules()}, tasks.weights_hash(model)
    out = features.extract_features(model, images, batch_size=7)
    expected = (torch.arange(50)[:, None] / 255 - torch.tensor(tasks.IMAGENET_MEAN)) / torch.tensor(tasks.IMAGENET_STD)
    assert out.dtype == torch.float32 and torch.allclose(out, expected, atol=1e-4)
    assert {m: m.training for m in model.modules()} == before and before[model.pool] and not before[model.norm]
    assert tasks.weights_hash(model) == state
    model.preprocess = features.Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3)
    assert torch.allclose(features.extract_features(model, images)[:, 0], (torch.arange(50) / 255 - 0.5) / 0.5, atol=1e-4)


def test_extraction_sees_what_the_weights_want(tmp_path):
    "The preprocessing stored in a file reaches the features: blue first, and another proportion of size and crop."
    from seer_nb.regnet import regnety
    from seer_nb.weights import Preprocess, save_backbone
    backbone = regnety("regnety_toy").eval()
    backbone.preprocess = Preprocess(40, 40, channel_order="BGR")
    save_backbone(backbone, tmp_path / "b.safetensors")
    model = tasks.open_model(f"seer:{tmp_path / 'b.safetensors'}")
    images = torch.randint(0, 256, (4, 3, 32, 48), dtype=torch.uint8)
    with torch.inference_mode(): as_they_are, cropped = backbone(Preprocess().normalize(images).flip(1)), backbone(Preprocess(64, 64)(images).flip(1))
    assert torch.allclose(features.extract_features(model, images), as_they_are, atol=1e-5)
    assert torch.allclose(features.extract_features(model, images, size=64), cropped, atol=1e-5)


def test_extraction_restores_the_model_after_an_error():
    model = Probe()
    with pytest.raises(ValueError, match="different sizes"):
        features.extract_features(model, [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(3, 9, 8, dtype=torch.uint8)])
    assert model.training and not model.norm.training


def test_resize_crop_is_close_to_pil():
    from PIL import Image
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((90, 70), Image.BICUBIC)
    mine = features.Preprocess(32, 28).resize_crop(torch.from_numpy(np.array(smooth)).permute(2, 0, 1))
    pil = np.array(smooth.resize((round(90 * 32 / 70), 32), Image.BILINEAR))
    top, left = (pil.shape[0] - 28) // 2, (pil.shape[1] - 28) // 2
    difference = np.abs(mine.permute(1, 2, 0).numpy().astype(int) - pil[top:top + 28, left:left + 28].astype(int))
    assert mine.shape == (3, 28, 28) and difference.max() <= 10 and difference.mean() < 1


@pytest.mark.parametrize("run, config", [(linear.run_linear, linear.LinearConfig(train_images=120, test_images=60, l2_count=3)),
                                         (knn.run_knn, knn.KnnConfig(train_images=120, test_images=60, k=20))])
def test_a_run_measures_once(run, config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, run_dir=str(tmp_path / "run"), task="toy_orientation")
    first = run(config)
    scores = np.load(tmp_path / "run" / "scores.npy", allow_pickle=False)
    data = tasks.open_task("toy_orientation", split="test", n=60)
    assert first.n == 60 and first.value == linear.top_k_accuracy(scores, data.labels)
    assert {p.name for p in (tmp_path / "run").iterdir()} - {"neighbours.npy"} == {"params.yaml", "environment.txt", "scores.npy", "results.jsonl"}

    monkeypatch.setattr(features, "extract_features", None)      # a second measurement would fail
    assert run(config) == first and len(tasks.read_results(tmp_path / "run" / "results.jsonl")) == 1


def test_bad_configurations_leave_no_folder(tmp_path):
    for run, config in [(linear.run_linear, linear.LinearConfig(task="toy_coun")), (linear.run_linear, linear.LinearConfig(solver="x")),
                        (linear.run_linear, linear.LinearConfig(paper_model="seer_10b")), (knn.run_knn, knn.KnnConfig(k=10**6)),
                        (knn.run_knn, knn.KnnConfig(model="random:x")), (knn.run_knn, knn.KnnConfig(temperature=0.0))]:
        with pytest.raises(ValueError): run(dataclasses.replace(config, run_dir=str(tmp_path / "run")))
        assert not (tmp_path / "run").exists()


def test_scoreboard_groups_seeds_and_keeps_kinds_apart():
    rows = [a_result(seed=s, value=v, settings={"k": 20, "weights": w}) for s, v, w in [(0, 0.9, "old"), (0, 0.4, "a"), (1, 0.5, "b"), (2, 0.6, "c")]]
    rows += [a_result(settings={"k": 200, "weights": "a"}), a_result(task="dtd", paper=0.8, paper_source="a table")]
    table = scoreboard.score_table(rows)
    first = table.iloc[0]
    assert len(table) == 3 and first.seeds == 3 and first.here == pytest.approx(50) and first["std"] == pytest.approx(10)
    assert list(table.kind) == ["toy", "toy", "real"] and list(table.protocol) == ["knn k=20", "knn k=200", "knn k=20"]
    shown = scoreboard.readable(table)
    assert sorted(shown["paper, %"]) == ["80.0 [a table]", "–", "–"]


def test_one_extraction_serves_all_probes(monkeypatch):
    calls = []
    monkeypatch.setattr(features, "extract_features", lambda model, data, **kw: calls.append(data) or torch.randn(len(data), 8))
    results = scoreboard.evaluate_backbone(nn.Linear(1, 1), ["toy_count"], name="m", seed=4, train_images=100, test_images=50, knn=(5, 20))
    assert len(calls) == 2 and [(r.protocol, r.settings.get("k")) for r in results] == [("linear", None), ("knn", 5), ("knn", 20)]
    assert all((r.model, r.seed, r.n) == ("m", 4, 50) for r in results)
