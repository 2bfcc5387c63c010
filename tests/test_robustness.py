"Robustness against scikit-learn, torchmetrics, timm's lists, SciPy and hand-computed cases."
import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.special
import torch
from sklearn.metrics import accuracy_score
from torch import nn

from seer_nb.core import stateless_rng
from seer_nb.evaluate import robustness, tasks
from seer_nb.evaluate.tasks import TaskData, open_model
from seer_nb.weights import convert_state, save_backbone


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def answers(n=200, classes=20, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=n)
    return rng.normal(size=(n, classes)) + 2 * np.eye(classes)[labels], labels


# ── scoring ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_masked_accuracy_is_that_of_the_remaining_columns():
    logits, labels = answers()
    present = np.array([1, 4, 7, 19])
    kept = np.isin(labels, present)
    expected = accuracy_score(labels[kept], present[logits[kept][:, present].argmax(1)])
    assert robustness.masked_top1(logits[kept], labels[kept], present) == pytest.approx(expected)
    assert robustness.masked_top1(logits[kept], labels[kept]) == pytest.approx(expected)      # all four occur
    assert robustness.masked_top1(logits, labels, range(20)) == pytest.approx(accuracy_score(labels, logits.argmax(1)))
    with pytest.raises(ValueError, match="not among the present"): robustness.masked_top1(logits, labels, present)


def test_masking_changes_no_logit_of_a_present_class_and_not_its_input():
    logits = torch.from_numpy(answers()[0])
    before, masked = logits.clone(), robustness.mask_classes(logits, [3, 5])
    assert torch.equal(logits, before) and torch.equal(masked[:, [3, 5]], logits[:, [3, 5]]) and masked.isneginf().sum() == 200 * 18
    for present in ([], [20], [-1]):
        with pytest.raises(ValueError, match="present"): robustness.mask_classes(logits, present)


def test_real_accuracy_is_timms(tmp_path):
    from timm.data.real_labels import RealLabelsImagenet
    logits, labels = answers(n=60, classes=1000)
    sets = [[int(l), int((l + 1) % 1000)] if i % 5 else [] for i, l in enumerate(labels)]
    (tmp_path / "real.json").write_text(json.dumps(sets))
    judge = RealLabelsImagenet([f"ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(60)], real_json=str(tmp_path / "real.json"), topk=(1,))
    judge.add_result(torch.from_numpy(logits))
    matrix = np.zeros((60, 1000), int)
    for i, s in enumerate(sets): matrix[i, s] = 1
    assert 100 * robustness.real_accuracy(logits, matrix) == pytest.approx(judge.get_accuracy(k=1))
    assert robustness.set_hits(logits, matrix)[1].tolist() == [i for i in range(60) if i % 5]


def test_objectnet_masks_what_no_image_shows():
    logits, labels = answers(n=300, classes=12)
    groups = {0: [0, 1], 1: [4], 2: [7, 8, 9]}                    # three coarse classes over six of twelve
    coarse = labels % 3
    sets = np.array([[c in groups[k] for c in range(12)] for k in coarse], int)
    columns = sorted(sum(groups.values(), []))
    owner = np.array([next(k for k, g in groups.items() if c in g) for c in columns])
    expected = accuracy_score(coarse, owner[logits[:, columns].argmax(1)])
    assert robustness.objectnet_accuracy(logits, sets) == pytest.approx(expected)
    assert robustness.objectnet_accuracy(logits, sets) > robustness.real_accuracy(logits, sets)
    only_first = sets * (coarse == 0)[:, None]               # a part of the test set, with the mask of the whole
    assert robustness.objectnet_accuracy(logits, only_first, columns) == pytest.approx(accuracy_score([0] * sum(coarse == 0), owner[logits[coarse == 0][:, columns].argmax(1)]))


def test_difficult_labels_are_no_hits_and_broken_logits_an_error():
    assert robustness.real_accuracy([[1.0, 2.0]], [[1, -1]]) == 0
    with pytest.raises(ValueError, match="not a number"): robustness.real_accuracy([[1.0, math.nan]], [[1, 0]])
    with pytest.raises(ValueError, match="no image has a label"): robustness.objectnet_accuracy([[1.0, 2.0]], [[0, 0]], [0])


def test_classes_that_do_not_fit_are_refused():
    data = TaskData("t", "test", "abc", torch.tensor([0, 2]), None)
    assert robustness.targets_for(data, 3).tolist() == [0, 2]
    with pytest.raises(ValueError, match="do not belong together"): robustness.targets_for(data, 1000)
    sets = TaskData("t", "test", "abc", torch.ones(2, 17), None)
    assert robustness.targets_for(sets, 17).shape == (2, 17)
    with pytest.raises(ValueError, match="do not belong together"): robustness.targets_for(sets, 3)


@pytest.mark.parametrize("which", ["imagenet_a", "imagenet_r"])
def test_folders_of_two_hundred_classes_land_on_timms_outputs(which, tmp_path):
    "timm ships the WordNet ids of ImageNet-A and -R, and separately the output number of each; the reader numbers the folders."
    readers = pytest.importorskip("seer_nb.evaluate.readers")
    from importlib import resources
    from PIL import Image
    lists = resources.files("timm.data") / "_info"
    synsets, indices = ((lists / f"{which}_{kind}.txt").read_text().split() for kind in ("synsets", "indices"))
    for synset in synsets:
        folder = tmp_path / which.replace("_", "-") / synset
        folder.mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(folder / "a.png")
    listing = getattr(readers, f"read_{which}")(tmp_path, "test")
    data = TaskData(which, "test", listing.classes, listing.labels, listing.read)
    assert robustness.targets_for(data, 1000).unique().tolist() == sorted(int(i) for i in indices)
    expected = dict(zip(synsets, map(int, indices)))
    assert [expected[name.split("/")[-2]] for name in listing.names] == data.labels.tolist()


# ── calibration ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("n_bins", [1, 10, 15])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0])
def test_calibration_error_is_torchmetrics(n_bins, sharpness):
    from torchmetrics.functional.classification import multiclass_calibration_error
    logits, labels = answers(n=500)
    p = torch.from_numpy(sharpness * logits).softmax(1)
    confidence, guess = p.max(1)
    expected = multiclass_calibration_error(p, torch.from_numpy(labels), num_classes=20, n_bins=n_bins, norm="l1")
    assert robustness.calibration_error(confidence, guess.numpy() == labels, n_bins) == pytest.approx(float(expected), abs=1e-6)


def test_confidence_bins_hold_every_sample_once():
    mean, accuracy, share = robustness.confidence_bins([0.0, 0.05, 1.0, 1.0], [0, 1, 1, 0], n_bins=10)
    assert share.tolist() == [0.5, *[0] * 8, 0.5] and accuracy[[0, -1]].tolist() == [0.5, 0.5] and mean[-1] == 1
    with pytest.raises(ValueError, match="between 0 and 1"): robustness.calibration_error([1.2], [1])


# ── corruptions ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def photo():
    import skimage.data
    return torch.from_numpy(skimage.data.astronaut()[:224, 100:324].copy()).permute(2, 0, 1)


@pytest.mark.parametrize("name", robustness.CORRUPTIONS)
def test_every_corruption_is_gradual_reproducible_and_keeps_the_shape(photo, name):
    before = photo.clone()
    damaged = [robustness.corrupt(photo, name, s, stateless_rng(3, s)) for s in (1, 2, 3, 4, 5)]
    errors = [(d.float() - photo).square().mean().item() for d in damaged]
    assert errors == sorted(errors) and errors[0] > 0 and torch.equal(photo, before)
    assert all(d.shape == photo.shape and d.dtype == torch.uint8 for d in damaged)
    assert torch.equal(damaged[2], robustness.corrupt(photo, name, 3, stateless_rng(3, 3)))
    wide = robustness.corrupt(photo[:, :60], name, 5)
    assert wide.shape == (3, 60, 224)


def test_blurs_keep_a_plain_image_plain():
    plain = torch.full((3, 64, 64), 117, dtype=torch.uint8)
    for name in ("defocus_blur", "motion_blur", "zoom_blur", "pixelate"):
        inner = robustness.corrupt(plain, name, 5)[:, 16:48, 16:48]
        assert (inner.int() - 117).abs().max() <= 1, name


def test_defocus_is_a_convolution_with_a_disk(photo):
    from scipy.ndimage import convolve
    y, x = np.mgrid[-4:5, -4:5]
    disk = np.clip(4.5 - np.hypot(x, y), 0, 1)
    red = photo[0].numpy() / 255
    expected = convolve(red, disk / disk.sum(), mode="mirror")
    image = photo.permute(1, 2, 0).numpy().astype(np.float32) / 255
    np.testing.assert_allclose(robustness.defocus_blur(image, 4, None)[..., 0], expected, atol=1e-5)


def test_the_same_blur_at_twice_the_size(photo):
    "Radii scale with the image: blur then shrink is shrink then blur, nearly."
    small = torch.nn.functional.avg_pool2d(photo[None].float(), 2)[0].round().to(torch.uint8)
    a = torch.nn.functional.avg_pool2d(robustness.corrupt(photo, "defocus_blur", 5)[None].float(), 2)[0]
    b = robustness.corrupt(small, "defocus_blur", 5).float()
    untouched = (small.float() - b).square().mean()
    assert (a - b).square().mean() < untouched / 20


def test_jpeg_and_brightness_are_pillows_and_skimages(photo):
    import io

    from PIL import Image
    from skimage.color import hsv2rgb, rgb2hsv
    pixels = photo.permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=15)
    judge = np.asarray(Image.open(buffer)).astype(int)
    assert np.abs(robustness.corrupt(photo, "jpeg_compression", 3).permute(1, 2, 0).numpy() - judge).mean() < 1
    hsv = rgb2hsv(pixels)
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.3, 0, 1)
    assert np.abs(robustness.corrupt(photo, "brightness", 3).permute(1, 2, 0).numpy() - 255 * hsv2rgb(hsv)).max() < 2


def test_corrupted_tasks_depend_on_image_seed_and_severity_alone():
    images = torch.full((4, 3, 16, 16), 128, dtype=torch.uint8)
    data = TaskData("t", "test", "ab", torch.zeros(4), images.__getitem__)
    view = robustness.corrupted(data, "gaussian_noise", 2)
    second = view[1][0]
    assert torch.equal(robustness.corrupted(data, "gaussian_noise", 2)[1][0], second) and torch.equal(view[1][0], second)
    others = [view[0][0], robustness.corrupted(data, "gaussian_noise", 2, seed=1)[1][0], robustness.corrupted(data, "gaussian_noise", 3)[1][0]]
    assert not any(torch.equal(second, o) for o in others) and torch.equal(data[1][0], images[1])
    cut = robustness.corrupted(robustness.cut_as_trained(data, robustness.Preprocess(16, 8), 4), "gaussian_noise", 2)
    assert cut[1][0].shape == (3, 4, 4)


# ── effective robustness ─────────────────────────────────────────────────────────────────────────────────────────────────────

def test_line_is_least_squares_on_scipys_logits():
    rng = np.random.default_rng(0)
    clean = rng.uniform(0.5, 0.9, 12)
    shifted = scipy.special.expit(1.3 * scipy.special.logit(clean) - 1 + 0.1 * rng.normal(size=12))
    slope, intercept = robustness.fit_line(clean, shifted)
    a = np.stack([scipy.special.logit(clean), np.ones(12)], 1)
    np.testing.assert_allclose([slope, intercept], np.linalg.lstsq(a, scipy.special.logit(shifted), rcond=None)[0])
    np.testing.assert_allclose(robustness.on_line(clean, (slope, intercept)), scipy.special.expit(a @ [slope, intercept]))
    gaps = robustness.effective_robustness(clean, shifted, (slope, intercept))
    assert abs((scipy.special.logit(shifted) - scipy.special.logit(shifted - gaps)).mean()) < 1e-9      # none on average, on the logit scale


@pytest.mark.parametrize("clean, shifted", [([0.5], [0.4]), ([0.5, 0.5], [0.4, 0.3]), ([0.5, 1.0], [0.4, 0.5]), ([0.5, 0.6], [0.0, 0.5]), ([0.5, 0.6], [0.4]),
                                            ([50, 60], [40, 45])])
def test_lines_that_cannot_be(clean, shifted):
    with pytest.raises(ValueError): robustness.fit_line(clean, shifted)


def test_published_accuracies_are_those_of_the_table():
    seer = robustness.published_accuracies(robustness.SCALING)
    assert len(seer) == 7 and all(list(models) == list(seer["ImageNet-1k"]) for models in seer.values())
    assert seer["ImageNet-R"]["SEER 10B"] == pytest.approx(0.561)
    with pytest.raises(ValueError, match="not accuracies"): robustness.published_accuracies("README geolocalization")
    with pytest.raises(ValueError, match="no published table"): robustness.published_accuracies("README")


# ── classifiers ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_probe_is_the_standardised_fit_in_one_layer(monkeypatch):
    g = torch.Generator().manual_seed(0)
    features, labels = torch.randn(120, 6, generator=g) * torch.tensor([1, 10, 0.01, 1, 1, 1]) + 5, torch.arange(120) % 3
    features[:, 5] = 2.0                                                     # a dead channel
    features[:, 0] += labels
    data = TaskData("toy", "train", "abc", labels, None)
    monkeypatch.setattr(robustness, "open_task", lambda *a, **k: data)
    monkeypatch.setattr(robustness, "extract_features", lambda *a, **k: features)
    head = robustness.fit_probe(nn.Identity(), "toy")
    x = robustness.standardize(features.double())[0]
    fits = [robustness.fit_logistic(x, labels, 3, l2=float(l2)).scores(x).float() for l2 in np.geomspace(1e-5, 10, 7)]
    assert any(torch.allclose(head(features), scores, atol=1e-3) for scores in fits)


def test_seer_checkpoint_with_its_classifier(tmp_path):
    backbone = open_model("random:regnety_toy")
    head, vissl = nn.Linear(backbone.num_features, 1000), convert_state(backbone.state_dict(), to="vissl")
    state = {"classy_state_dict": {"base_model": {"model": {"trunk": vissl, "heads": {"0.clf.0.weight": head.weight.data, "0.clf.0.bias": head.bias.data}}}}}
    torch.save(state, tmp_path / "finetuned.torch")
    model = robustness.open_classifier(f"seer:{tmp_path / 'finetuned.torch'}")
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), head(backbone(images)), atol=1e-4, rtol=1e-4)
    save_backbone(backbone, tmp_path / "pretrained.safetensors")
    with pytest.raises(ValueError, match="classifier"): robustness.open_classifier(f"seer:{tmp_path / 'pretrained.safetensors'}")


def test_timm_and_torchvision_bring_heads_and_preprocessing():
    timm = pytest.importorskip("timm")
    ours = robustness.open_classifier("timm:resnet10t.c3_in1k", pretrained=False, seed=3)
    recipe = timm.data.resolve_model_data_config(ours)
    theirs = timm.data.create_transform(**recipe, is_training=False)
    image = (torch.rand(3, 300, 260, generator=torch.Generator().manual_seed(0)) * 255).to(torch.uint8)
    image = nn.functional.avg_pool2d(image[None].float(), 9, 1, 4)[0].to(torch.uint8)
    from torchvision.transforms.functional import to_pil_image
    assert ours.preprocess(image).shape == theirs(to_pil_image(image)).shape
    assert (ours.preprocess(image) - theirs(to_pil_image(image))).abs().max() < 0.05
    assert ours(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    from torchvision.models import get_model_weights
    tv, weights = robustness.open_classifier("torchvision:regnet_y_400mf", pretrained=False), get_model_weights("regnet_y_400mf").DEFAULT
    assert (tv.preprocess(image) - weights.transforms()(image)).abs().max() < 0.05
    with pytest.raises(ValueError, match="resnet10t"): robustness.open_classifier("timm:resnet10")


def test_probe_files_are_checked(tmp_path):
    from safetensors.torch import save_file
    backbone = open_model("random:regnety_toy")
    save_file({"weight": torch.zeros(3, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is no probe"): robustness.load_probe(tmp_path / "a.safetensors", backbone)
    save_file({"weight": torch.zeros(3, 4), "bias": torch.zeros(3)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="belongs to the backbone None"): robustness.load_probe(tmp_path / "b.safetensors", backbone)


# ── a whole run on files in the shape of ImageNet-A ──────────────────────────────────────────────────────────────────────────

@pytest.fixture
def imagenet_a(monkeypatch):
    "Six images of three classes, the colour of each names its class; a classifier that reads the colour, and prefers a class that is not there."
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    data = TaskData("imagenet_a", "test", map(str, range(1000)), labels, lambda i: torch.full((3, 8, 8), 40 * int(labels[i]), dtype=torch.uint8))
    row = tasks.Task("imagenet_a", "robustness", "ImageNet-A", 200, 0, 6, "", "top-1", 1 / 200, "natural", "", "", "", {"robustness": {"SEER 10B": 0.527}}, "a table")
    monkeypatch.setitem(tasks.ROWS, "imagenet_a", row)

    def opened(slug, root="", split="train", *, n=0):
        assert (slug, split) == ("imagenet_a", "test")
        part = robustness.copy.copy(data)
        part.labels = data.labels[:n or None]
        return part

    class Reader(nn.Module):
        def forward(self, images):
            level = images.mean((1, 2, 3))
            logits = -((level[:, None] - torch.tensor([self.preprocess.normalize(torch.full((3, 1, 1), 40 * c, dtype=torch.uint8)).mean() for c in range(3)])) ** 2)
            return torch.cat([logits, torch.full((len(images), 997), 5.0)], 1)

    model = Reader()
    model.preprocess = robustness.Preprocess()
    monkeypatch.setattr(robustness, "open_task", opened)
    monkeypatch.setattr(robustness, "open_classifier", lambda *a, **k: model)
    return model


def test_a_run_masks_the_classes_of_the_whole_test_set(tmp_path, imagenet_a):
    config = robustness.RobustnessConfig(run_dir=str(tmp_path / "run"), model="seer:x", task="imagenet_a", paper_model="SEER 10B")
    result = robustness.run_robustness(config)
    assert (result.value, result.paper, result.protocol, result.n) == (1.0, 0.527, "robustness", 6)
    assert result.details["classes_present"] == 3 and result.settings["scoring"] == "present classes"
    part = robustness.run_robustness(dataclasses.replace(config, run_dir=str(tmp_path / "part"), test_images=2))
    assert part.details["classes_present"] == 3 and part.n == 2           # not the two classes of the part
    plain = robustness.score_logits(torch.from_numpy(np.load(tmp_path / "run" / "scores.npy")), torch.tensor([0, 1, 2, 0, 1, 2]))[0]
    assert plain.sum() == 0                                                # without the mask the absent class wins


class Preferring(nn.Module):
    "A classifier whose logits fall with the distance of a class from the front of a list."

    def __init__(self, order):
        super().__init__()
        self.order, self.preprocess = order, robustness.Preprocess()

    def forward(self, images):
        logits = torch.zeros(len(images), 1000)
        for rank, c in enumerate(self.order): logits[:, c] = 10.0 - rank
        return logits


def test_runs_on_original_files_of_real_and_objectnet(tmp_path, monkeypatch):
    "The label sets come from the files as they are downloaded."
    pytest.importorskip("seer_nb.evaluate.readers")
    from PIL import Image
    def put(path, text=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is None: Image.new("RGB", (40, 30), (90, 120, 30)).save(path)
        else: path.write_text(text)
    for i in (1, 2, 3): put(tmp_path / f"imagenet_real/val/ILSVRC2012_val_0000000{i}.JPEG")
    put(tmp_path / "imagenet_real/real.json", "[[999, 7], [], [386]]")
    maps = tmp_path / "objectnet/objectnet-1.0/mappings"
    put(maps / "folder_to_objectnet_label.json", '{"alarm_clock": "Alarm clock", "fish": "Fish", "spoon": "Spoon"}')
    put(maps / "objectnet_to_imagenet_1k.json", '{"Alarm clock": "analog clock; digital clock", "Fish": "tench"}')
    put(maps / "pytorch_to_imagenet_2012_id.json", '{"409": 2, "530": 0, "0": 1}')
    put(maps / "imagenet_to_label_2012_v2", "digital clock\ntench\nanalog clock\n")
    for folder in ("alarm_clock", "fish", "spoon"): put(tmp_path / f"objectnet/objectnet-1.0/images/{folder}/a.png")
    model = Preferring([500, 7, 530])                         # 500 is right for no image; then 7 (ReaL) and 530, one of the two clocks
    monkeypatch.setattr(robustness, "open_classifier", lambda *a, **k: model)
    config = robustness.RobustnessConfig(root=str(tmp_path), model="timm:x", image_size=32)
    run = lambda task: robustness.run_robustness(dataclasses.replace(config, task=task, run_dir=str(tmp_path / "run" / task)))
    real = run("imagenet_real")
    assert (real.value, real.n, real.details["left_out"]) == (0.0, 2, 1)      # not masked: the answer is 500
    net = run("objectnet")
    assert (net.value, net.n, net.details["classes_present"]) == (0.5, 2, 3)  # masked to the clocks and the fish; the spoon is no ImageNet class
    model.order = [7]
    monkeypatch.setattr(robustness, "weights_hash", lambda model: "other")
    again = robustness.run_robustness(dataclasses.replace(config, task="imagenet_real", run_dir=str(tmp_path / "run" / "again")))
    assert (again.value, again.n) == (0.5, 2)


def test_a_killed_run_goes_on_and_a_done_one_is_returned(tmp_path, imagenet_a, monkeypatch):
    config = robustness.RobustnessConfig(run_dir=str(tmp_path / "run"), model="seer:x", task="imagenet_a", corruptions="contrast brightness")
    passes, extract = [], robustness.extract_features

    def counted(*args, **kwargs):
        passes.append(1)
        if len(passes) == 5: raise KeyboardInterrupt
        return extract(*args, **kwargs)

    monkeypatch.setattr(robustness, "extract_features", counted)
    with pytest.raises(KeyboardInterrupt): robustness.run_robustness(config)       # one clean pass and three corrupted ones are done
    result = robustness.run_robustness(config)
    assert len(passes) == 5 + 1 + 7 and result.protocol == "corruption"
    assert {name: len(values) for name, values in result.details["corrupted"].items()} == {"contrast": 5, "brightness": 5}
    assert result.value == pytest.approx(np.mean(list(result.details["corrupted"].values())))
    assert robustness.run_robustness(config) == result and len(passes) == 13


def test_bad_configurations_leave_no_folder(tmp_path):
    for bad in ({"task": "imagenet_z"}, {"corruptions": "fog"}, {"paper_model": "seer"}, {"probe_task": "toy_digits"}, {"probe_task": "toy_scenes", "probe": "x"}, {}):
        with pytest.raises(ValueError): robustness.run_robustness(robustness.RobustnessConfig(**dict(run_dir=str(tmp_path / "run"), train_images=20, test_images=20) | bad))
        assert not (tmp_path / "run").exists()
