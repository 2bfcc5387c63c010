"The table of tasks, models from other libraries, results, features, and runs that can be called twice."
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from seer_nb.evaluate import features, knn, linear, lowshot, robustness, scoreboard, tasks
from seer_nb.evaluate.readers import Listing
from seer_nb.toyworld import TOY_TASKS, toy_task

TOP = Path(__file__).resolve().parent.parent


def test_the_table_and_the_toy_world_agree():
    table = tasks.TASKS
    assert list(table.slug) == list(tasks.ROWS) and list(table.columns) == [f.name for f in dataclasses.fields(tasks.Task)]
    for slug, toy in TOY_TASKS.items():
        assert (table.classes[slug], table.train[slug], table.test[slug]) == (len(toy.classes), toy.train, toy.test)
        assert table.chance[slug] == pytest.approx(1 / len(toy.classes))
    with pytest.raises(AttributeError): tasks.TASK


# ── the real rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_rows_are_whole():
    "Nobody is sent looking for a data set without an address, a licence, a layout, and a word on where its sizes come from."
    for slug, row in tasks.ROWS.items():
        assert slug == row.slug and row.classes != 1 and row.train >= 0 and (row.page or row.classes > 1 and row.test > 0)
        if tasks.is_toy(slug): continue
        assert all(getattr(row, name) for name in ("dataset", "split", "metric", "transform", "layout", "get", "licence", "group", "checked", "protocol"))
        assert row.transform == "uncut" or row.transform in tasks.FAMILIES
        assert bool(row.paper) == bool(row.paper_source) and all(0 < score < 1 for known in row.paper.values() for score in known.values())
        if row.metric == "top-1" and not row.page: assert row.chance == pytest.approx(1 / row.classes)


def test_scores_are_those_printed():
    "Copied by hand from the tables: percent, an error in percent, a fraction; a probe's score is no finetuning's."
    paper = {slug: row.paper for slug, row in tasks.ROWS.items()}
    assert paper["clevr_count"] == {"linear": {"SEER 10B": 0.8928, "SEER 128GF": 0.8798}}
    assert paper["svhn"]["linear"]["SEER 10B"] == 0.864 and paper["imagenet_r"]["robustness"]["SEER 10B"] == 0.561
    assert paper["mnist"] == {"linear": {"SEER 10B": 0.9942}} and paper["hateful_memes"] == {"memes": {"SEER 10B": 0.734}}
    assert paper["inaturalist18"]["finetune"]["SEER 10B"] == 0.847 and set(paper["inaturalist18"]) == {"finetune"}
    assert paper["imagenet1k_1pct"] == {"finetune": {"SEER-2021 128GF": 0.575, "SEER-2021 256GF": 0.605}} and paper["svhn_1000"] == {}
    assert paper["copydays"] == {"copies": {"SEER 32GF": 0.83, "SEER 64GF": 0.832, "SEER 128GF": 0.865, "SEER 256GF": 0.878, "SEER 10B": 0.906}}
    assert paper["im2gps"]["geolocation"] == {"Supervised IN1K RG-128GF": 0.342, "SwAV IN1K RG-128GF": 0.426, "SEER 128GF": 0.426, "SEER 256GF": 0.439}
    assert not [model for known in paper.values() for scores in known.values() for model in scores if "minus" in model]


def test_one_network_has_one_name():
    "All that is printed of a network is found by one name, whatever the source calls it."
    imagenet = tasks.ROWS["imagenet1k"].paper
    assert {f"SEER {size}": (imagenet["linear"][f"SEER {size}"], imagenet["finetune"][f"SEER {size}"]) for size in ("32GF", "64GF", "128GF", "256GF", "10B")} == {
        "SEER 32GF": (0.7403, 0.834), "SEER 64GF": (0.7525, 0.84), "SEER 128GF": (0.7596, 0.845), "SEER 256GF": (0.7751, 0.852), "SEER 10B": (0.798, 0.858)}
    for name in (tasks.model_name(row) for row in tasks.published_rows()):
        if name.startswith("SEER") and "minus" not in name: assert name in {f"SEER {size}" for size in ("8GF", "16GF", "32GF", "64GF", "128GF", "256GF", "10B")} | {
            "SEER", "SEER (size per row unknown)", "SEER-2021 128GF", "SEER-2021 256GF", "SEER 128GF, other finetuning"}
    assert not [key for key in tasks.MODELS if key in tasks.MODELS.values()]       # no name leads to a name that leads on


def test_two_networks_have_two_names():
    "Whatever is printed twice under one name by one protocol is the same number, or one network of SEER measured again; and the known pairs stay apart."
    found = {}
    for row in tasks.published_rows():
        if row["metric"] not in tasks.FRACTION: continue
        key = row["benchmark"].removesuffix(" val"), tasks.model_name(row), tasks.printed_protocol(row)
        found.setdefault(key, []).append(tasks.FRACTION[row["metric"]](float(row["value"])))
    apart = {key: max(scores) - min(scores) for key, scores in found.items() if max(scores) - min(scores) > 1e-9}
    assert {key[1:] for key in apart} == {(f"SEER {size}", "finetune") for size in ("32GF", "64GF", "128GF", "256GF")} and max(apart.values()) < 0.001    # timm's re-evaluation
    finetuned, linear, supervised = (tasks.ROWS["imagenet1k"].paper[protocol] for protocol in ("finetune", "linear", "supervised"))
    assert (finetuned["SEER 128GF"], finetuned["SEER-2021 128GF"]) == (0.845, 0.838)          # one printed name, two papers
    assert (supervised["RegNetY-16GF, V1"], supervised["RegNetY-16GF, V2"], linear["SWAG RegNetY-16GF"]) == (0.80424, 0.82886, 0.83976)
    assert (linear["RotNet RN50 - 105 epochs, ImageNet-1K"], linear["RotNet RN50 - 105 epochs, ImageNet-22K"]) == (0.482, 0.5489)
    assert tasks.ROWS["imagenet_a"].paper["robustness"]["SEER 128GF, other finetuning"] == 0.4 and "SEER 128GF" not in tasks.ROWS["imagenet_a"].paper["robustness"]


def test_a_score_stands_beside_its_protocol():
    "Linear beside linear, by either solver; finetuned beside finetuned; nothing of SEER beside k-NN; no model, no comparison."
    score = lambda *asked: tasks.paper_score(*asked)[0]
    assert score("imagenet1k", "SEER 10B", "linear") == score("imagenet1k", "SEER 10B", "linear_sgd") == 0.798 and score("imagenet1k", "SEER 10B", "finetune") == 0.858
    assert tasks.paper_score("copydays", "SEER 10B") == tasks.paper_score("copydays", "SEER 10B", "copies") == (0.906, "vissl projects/SEER/README.md")
    assert tasks.paper_score("imagenet1k", "", "knn") == tasks.paper_score("toy_digits", "") == (None, "")
    for task, protocol in (("imagenet1k", "knn"), ("imagenet1k", "robustness"), ("clevr_count", "knn"), ("clevr_count", "finetune"), ("imagenet_a", "corruption"), ("imagenet1k", "")):
        with pytest.raises(ValueError, match=f"no published score of 'SEER 10B' on {task}"): tasks.paper_score(task, "SEER 10B", protocol)
    with pytest.raises(ValueError, match="did you mean 'SEER 10B'"): tasks.paper_score("svhn", "SEER 10b", "linear")
    assert "paper_model" not in knn.KnnConfig.__dataclass_fields__


def test_what_is_said_about_the_paper():
    "Not compared, not published, and compared are three things."
    said = lambda **changes: tasks.paper_text(a_result(**changes))
    assert said() == "nothing is published for toy_count by knn" and said(task="my own") == "nothing is published for my own by knn"
    assert said(task="clevr_count", protocol="linear") == "not compared; published: SEER 10B 89.3%; SEER 128GF 88.0%" == said(task="clevr_count", protocol="linear_sgd")
    assert said(task="clevr_count") == "nothing is published for clevr_count by knn"
    assert said(paper=0.5, paper_source="a table") == "50.0% (a table)"


def test_published():
    pytest.importorskip("pandas")
    table = tasks.published()
    assert len(table) == 511 and (table.source != "").all()
    words = table[table.number.isna() & ~table.value.str.contains("=")]
    assert table[table.number.isna()].drop(words.index).value.tolist() == ["<=-10", ">=10", ">=10", "<=-10"] and set(words.slug) == {"utk_faces", "dollar_street"}
    assert (table.slug != "").all()
    one = tasks.published("resisc45")
    assert set(one.slug) == {"resisc45"} and one[one.model == "CLIP ViT-B/16"].number.tolist() == [92.7]
    with pytest.raises(ValueError, match="did you mean 'resisc45'"): tasks.published("resisc")


def listing(labels, seen=None):
    "A reader of images whose red channel is their number."
    def read(folder, split):
        if seen is not None: seen.append((folder, split))
        return Listing(("a", "b", "c"), labels, lambda i: torch.full((3, 8, 8), i % 256, dtype=torch.uint8), [f"{i}.png" for i in range(len(labels))])
    return read


DRAWN = [91, 94, 102, 130, 163]   # whatever NumPy does to its own permutation


def test_draw_images():
    "Every image can be drawn, classes and what is left over are dealt without favour, seeds and samples differ, and the draw is the same for ever."
    labels = torch.tensor([2, 0, 1, 0, 2, 0, 1, 0, 0, 2] * 20)
    assert tasks.draw_images(labels, 5).tolist() == DRAWN
    for balanced in (True, False):
        draw = lambda n, **kw: tasks.draw_images(labels, n, balanced=balanced, **kw)
        assert draw(200).tolist() == list(range(200)) and draw(50).dtype == torch.int64 and set(draw(50).tolist()) < set(draw(51).tolist())
        assert {i for s in range(60) for i in draw(20, sample=s).tolist()} == set(range(200))
        assert len({tuple(draw(5, seed=seed, sample=sample).tolist()) for seed in range(4) for sample in range(5)}) == 20
        assert draw(7).tolist() == tasks.draw_images(labels.numpy(), 7, balanced=balanced).tolist()
    extra = torch.stack([labels[tasks.draw_images(labels, 4, seed=seed)].bincount(minlength=3) for seed in range(90)])
    assert extra.min() == 1 and all(10 < n for n in (extra == 2).sum(0).tolist())        # the fourth image is not always of the first class
    assert all(tasks.draw_images(labels, n).bincount(minlength=200).max() == 1 for n in (1, 199))
    for bad in (0, 201):
        with pytest.raises(ValueError, match="between 1 and 200"): tasks.draw_images(labels, bad)
    with pytest.raises(ValueError, match="balanced=False"): tasks.draw_images(labels[:, None], 5)
    assert len(tasks.draw_images(labels[:, None], 5, balanced=False)) == 5


def test_fewer_images(monkeypatch, tmp_path):
    "Training images are of all classes alike, test images keep the mixture; the images stay with their labels and names, and the suite of 1000 limits only the training images."
    labels = np.array([0] * 30 + [1] * 4 + [2] * 10)
    monkeypatch.setitem(tasks.READERS, "dtd", listing(labels))
    data = tasks.open_task("dtd", tmp_path, "train", n=14)
    assert np.bincount(data.labels).tolist() == [5, 4, 5]
    places = [int(image[0, 0, 0]) for image, _ in data]
    assert places == sorted(set(places)) and labels[places].tolist() == data.labels.tolist() and data.name(3) == f"{places[3]}.png"
    assert [int(image[0, 0, 0]) for image, _ in tasks.open_task("dtd", tmp_path, "train", n=14)] == places
    tested = tasks.open_task("dtd", tmp_path, "test", n=14)
    places = [int(image[0, 0, 0]) for image, _ in tested]
    assert places == tasks.draw_images(labels, 14, balanced=False).tolist() and labels[places].tolist() == tested.labels.tolist()
    with pytest.raises(ValueError, match="dtd has 44 test images, 45 were asked for"): tasks.open_task("dtd", tmp_path, "test", n=45)
    monkeypatch.setitem(tasks.ROWS, "dtd_1000", dataclasses.replace(tasks.ROWS["dtd_1000"], limit=6))
    assert np.bincount(tasks.open_task("dtd_1000", tmp_path, "train").labels).tolist() == [2, 2, 2]
    assert len(tasks.open_task("dtd_1000", tmp_path, "test")) == 44


def test_several_labels(monkeypatch, tmp_path):
    labels = np.array([[1, 0, -1], [0, 1, 1]], np.int8)
    monkeypatch.setitem(tasks.READERS, "voc07", listing(labels))
    data = tasks.open_task("voc07", tmp_path, "test")
    assert data.labels.dtype == torch.int8 and data.labels.tolist() == labels.tolist() and data[0][1].tolist() == [1, 0, -1]
    assert len(tasks.open_task("voc07", tmp_path, "test", n=1)) == 1

    class Lazy:   # labels that are made row by row
        ndim, shape = 2, (2, 3)
        def __len__(self): return 2
        def __getitem__(self, i): return labels[i]
    monkeypatch.setitem(tasks.READERS, "openimages", listing(Lazy()))
    data = tasks.open_task("openimages", tmp_path, "train")
    assert len(data) == 2 and data[1][1].tolist() == [0, 1, 1]


def test_shared_folders_and_parts(monkeypatch, tmp_path):
    "Two tasks may share a download; a folder of its own goes first. Known and new cameras are two test sets of one reader."
    seen = []
    read = listing(np.array([0, 1]), seen)
    for slug in ("clevr_dist", "wilds_iwildcam"): monkeypatch.setitem(tasks.READERS, slug, read)
    for slug in ("clevr_dist", "clevr_dist_1000"): tasks.open_task(slug, tmp_path, "test")
    (tmp_path / "clevr_dist").mkdir()
    for slug in ("clevr_dist", "clevr_dist_1000"): tasks.open_task(slug, tmp_path, "train")
    for slug in ("wilds_iwildcam", "iwildcam_ood"): tasks.open_task(slug, tmp_path, "test")
    assert [(folder.name, part) for folder, part in seen] == [("clevr", "test"), ("clevr", "test"), ("clevr_dist", "train"), ("clevr_dist", "train"),
                                                              ("wilds_iwildcam", "id_test"), ("wilds_iwildcam", "test")]


def test_missing_without_a_filename(monkeypatch, tmp_path):
    def read(folder, split): raise FileNotFoundError(f"{folder}/scenes.json is missing")
    monkeypatch.setitem(tasks.READERS, "clevr_count", read)
    with pytest.raises(FileNotFoundError, match=r"clevr_count is not there: \S+scenes.json is missing\n.*CLEVR_v1.0.zip\n.*CC BY") as error: tasks.open_task("clevr_count", tmp_path)
    assert "clevr_count or clevr" in str(error.value)


# ── squares ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("slug, steps", [
    ("imagenet1k", lambda v2: [v2.Resize(256), v2.CenterCrop(224)]), ("sun397", lambda v2: [v2.Resize((224, 224))]),
    ("imagenet_v2", lambda v2: [v2.Resize(224), v2.CenterCrop(224)]), ("mnist", lambda v2: [v2.Pad(2), v2.Resize(224)]),
    ("objectnet", lambda v2: [v2.Resize(224, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)]), ("cifar10", lambda v2: [v2.Resize(224)])])
def test_squares_of_the_test(slug, steps):
    "As torchvision makes them from VISSL's lists."
    from torchvision.transforms import v2
    size = {"mnist": (28, 28), "cifar10": (32, 32)}.get(slug, (90, 130))
    image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made, asked = tasks.eval_transform(slug).resize_crop(image), v2.Compose(steps(v2))(image)
    assert made.shape == (3, 224, 224) and torch.equal(made, asked)


FAMILY_OF = {   # by hand, from VISSL's lists of transforms and the text of the fairness paper; of hashtags and wikiart nothing is published
    "natural": """imagenet1k places205 inaturalist18 food101 caltech101 dtd openimages oxford_flowers oxford_pets stanford_cars fgvc_aircrafts gtsrb kinetics700 kitti_dist
        wilds_iwildcam iwildcam_ood imagenet_a imagenet_r imagenet_sketch imagenet1k_1pct imagenet1k_10pct places205_lowshot hateful_memes
        casual_conversations dollar_street utk_faces hashtags wikiart caltech101_1000 dtd_1000 kitti_dist_1000 oxford_flowers_1000 oxford_pets_1000""",
    "whole": """cifar10 cifar100 euro_sat patch_camelyon resisc45 small_norb_azimuth small_norb_elevation stl10 miap
        cifar100_1000 euro_sat_1000 patch_camelyon_1000 small_norb_azimuth_1000 small_norb_elevation_1000""",
    "whole_unflipped": "svhn dsprites_loc dsprites_orient svhn_1000 dsprites_loc_1000 dsprites_orient_1000",
    "warp": "clevr_count clevr_dist sun397 ucf101 voc07 voc07_lowshot clevr_count_1000 clevr_dist_1000 sun397_1000",
    "mnist": "mnist", "centre": "imagenet_v2 imagenet_real im2gps im2gps3k", "centre_bicubic": "objectnet",
    "uncut": "coco_detection voc07_detection voc0712_detection copydays roxford5k rparis6k"}


def test_every_row_has_its_family():
    "A benchmark whose images are cut otherwise than in the paper is another benchmark."
    expected = {slug: family for family, slugs in FAMILY_OF.items() for slug in slugs.split()}
    assert {slug: row.transform for slug, row in tasks.ROWS.items() if not tasks.is_toy(slug)} == expected
    assert {row.transform for slug, row in tasks.ROWS.items() if tasks.is_toy(slug)} == {"square"}


def test_the_model_brings_its_statistics():
    model = tasks.Preprocess(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), interpolation="bicubic", channel_order="BGR")
    made = tasks.eval_transform("food101", model, size=112)
    assert (made.size, made.crop, made.mean, made.std, made.interpolation, made.channel_order) == (128, 112, model.mean, model.std, "bicubic", "BGR")
    assert made(torch.zeros(3, 50, 60, dtype=torch.uint8)).unique().tolist() == [-2.0]


def test_training_views():
    "A pure function of (seed, image, epoch); mirrored where a mirrored image means the same, and nowhere else."
    image = (torch.arange(64, dtype=torch.uint8) * 4).expand(3, 64, 64)            # brighter to the right
    def views(slug): return [tasks.train_transform(slug, size=32)(image, 1, 2, epoch) for epoch in range(40)]
    rising = {slug: sum(bool((v[0, 0].float().diff() >= 0).all()) for v in views(slug)) for slug in ("food101", "stl10", "clevr_count", "svhn", "dsprites_loc")}
    assert all(10 < rising[slug] < 30 for slug in ("food101", "stl10", "clevr_count"))
    assert rising["svhn"] == rising["dsprites_loc"] == 40 and len({v.numpy().tobytes() for v in views("mnist")}) == 1
    assert all(torch.equal(a, b) for a, b in zip(views("food101"), views("food101")))
    assert len({v.numpy().tobytes() for v in views("food101")}) > 30 and len({v.numpy().tobytes() for v in views("clevr_count")}) == 2
    with pytest.raises(ValueError, match="57_detection.ipynb keeps whole images"): tasks.train_transform("coco_detection")


# ── check ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_check(monkeypatch, tmp_path, capsys):
    def images(n): return listing(np.zeros(n, np.int64))
    monkeypatch.setitem(tasks.READERS, "dtd", images(1880))
    monkeypatch.setitem(tasks.READERS, "sun397", images(7))            # about: the split is drawn
    assert tasks.main(["check", "--root", str(tmp_path), "--tasks", "dtd,sun397,food101,coco_detection"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in out[:4]] == [["dtd", "ready"], ["sun397", "ready"], ["food101", "missing"], ["coco_detection", "missing"]]
    assert out[4] == "2 ready, 2 missing"
    monkeypatch.setitem(tasks.READERS, "dtd", images(1879))
    assert tasks.main(["check", "--root", str(tmp_path), "--tasks", "dtd"]) == 1
    assert "differs    train: 1,879 images, the table says 1,880 (TFDS); test: 1,879" in capsys.readouterr().out


def test_check_goes_on_after_a_broken_set(monkeypatch, tmp_path, capsys):
    def broken(folder, split): raise KeyError("annotations")
    monkeypatch.setitem(tasks.READERS, "inaturalist18", broken)
    assert tasks.main(["check", "--root", str(tmp_path)]) == 1
    states = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()[:-1]}
    assert set(states) == {slug for slug in tasks.ROWS if not tasks.is_toy(slug)} and states["inaturalist18"] == "broken" and states["voc07"] == "missing"


def test_check_from_the_command_line(tmp_path):
    run = lambda *words: subprocess.run([sys.executable, "-m", "seer_nb.evaluate.tasks", "check", *words], capture_output=True, text=True, cwd=TOP)
    done = run("--root", str(tmp_path), "--tasks", "dtd,food")
    assert done.returncode == 2 and "did you mean 'food101'" in done.stderr and "Traceback" not in done.stderr


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


def test_timm_weights_that_do_not_exist():
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="no weights 'resnet18.a1_in1'.*did you mean 'resnet18.a1_in1k'"): tasks.open_model("timm:resnet18.a1_in1", pretrained=False)


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
                          "random:regnety_to": "did you mean 'regnety_toy'", "torchvision:resnet19": "did you mean 'resnet18'", "seer": "'seer' is not a model: write"}.items():
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
    images = torch.stack([torch.full((3, 8, 8), i % 256, dtype=torch.uint8) for i in range(50)])
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


def test_a_wrong_root_or_kind_of_labels_leaves_no_folder(tmp_path, monkeypatch):
    "The folder is there for the corrected config; several labels per image are refused before the first pass."
    table = torch.zeros(40, 20, dtype=torch.int8)
    for run, config in ((linear.run_linear, linear.LinearConfig(task="dtd")), (linear.run_linear, linear.LinearConfig(task="dtd", solver="sgd")), (knn.run_knn, knn.KnnConfig(task="dtd"))):
        with pytest.raises(FileNotFoundError, match="where to get it"): run(dataclasses.replace(config, run_dir=str(tmp_path / "run"), root=str(tmp_path / "nowhere")))
    for module, run, config in ((linear, linear.run_linear, linear.LinearConfig), (knn, knn.run_knn, knn.KnnConfig)):
        monkeypatch.setattr(module, "open_task", lambda slug, root, split, n: tasks.TaskData(slug, split, "ab", table, None))
        with pytest.raises(ValueError, match="label.* per image"): run(config(run_dir=str(tmp_path / "run"), task="voc07"))
    assert not (tmp_path / "run").exists()


def test_a_page_of_one_process_refuses_many(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items(): monkeypatch.setenv(name, value)
    for run, config in ((linear.run_linear, linear.LinearConfig), (knn.run_knn, knn.KnnConfig), (lowshot.run_lowshot, lowshot.LowShotConfig), (robustness.run_robustness, robustness.RobustnessConfig)):
        with pytest.raises(ValueError, match="runs on one process, not on 2.*51_features"): run(config(run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
    tasks.check_ranks("55_finetune")                             # trains on many
    assert all((TOP / f"nbs/evaluate/{page}.ipynb").is_file() for page in tasks.ALONE)


def test_scoreboard_groups_seeds_and_keeps_kinds_apart():
    rows = [a_result(seed=s, value=v, settings={"k": 20, "weights": w}) for s, v, w in [(0, 0.9, "a"), (0, 0.4, "a"), (1, 0.5, "b"), (2, 0.6, "c")]]
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


def test_every_benchmark_has_a_reader():
    without = {slug for slug, row in tasks.ROWS.items() if not row.page and not {slug, slug.removesuffix("_1000"), row.folder} & set(tasks.READERS)}
    assert without == set(TOY_TASKS) and set(tasks.READERS) <= set(tasks.ROWS)


PAGED = [slug for slug, row in tasks.ROWS.items() if row.page]


@pytest.mark.parametrize("slug", PAGED)
def test_what_another_page_reads(slug, tmp_path, capsys):
    "One clear error that names the page; `check` says whether the folder is there and claims nothing about what is inside."
    page = tasks.ROWS[slug].page
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=rf"^{slug} is no list of labelled images.*nbs/evaluate/{page}.ipynb"): tasks.open_task(slug, tmp_path, split)
    state, note = tasks.check_task(slug, tmp_path)
    if tasks.is_toy(slug): assert (state, note) == ("ready", "needs no files")
    else:
        assert state == "missing" and str(tmp_path) in note and page in note
        (tmp_path / (tasks.ROWS[slug].folder or slug)).mkdir()
        state, note = tasks.check_task(slug, tmp_path)
        assert state == "elsewhere" and page in note
        assert tasks.main(["check", "--root", str(tmp_path), "--tasks", slug]) == 0 and "1 elsewhere" in capsys.readouterr().out


def test_pages_that_read():
    "All sets of these pages are there, each with a toy of its own to run on; and no page is named that the others do not."
    pages = {"60_fairness_labels", "61_fairness_geography", "62_fairness_similarity", "63_copies", "64_geolocation", "65_words", "66_memes", "67_style"}
    assert {tasks.ROWS[slug].page for slug in PAGED} == pages | {"57_detection"} == {tasks.ROWS[slug].page for slug in PAGED if tasks.is_toy(slug)} | {"57_detection"}
    assert all(np.isnan(tasks.ROWS[slug].chance) or tasks.ROWS[slug].page == "57_detection" for slug in PAGED)
    assert tasks.ROWS["rparis6k"].paper == {"copies": {"ResNet-50 supervised IN1K": 0.6931}} and tasks.ROWS["casual_conversations"].paper == tasks.ROWS["utk_faces"].paper == {}


def test_a_data_set_that_is_not_there_needs_no_library(monkeypatch, tmp_path):
    for package in ("h5py", "scipy", "pandas"): monkeypatch.setitem(sys.modules, package, None)
    assert {tasks.check_task(slug, tmp_path)[0] for slug in tasks.ROWS if not tasks.is_toy(slug)} == {"missing"}
