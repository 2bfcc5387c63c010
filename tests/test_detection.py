"Detection against pycocotools and hand-made cases: readers, scores, the network, a run that was stopped, two ranks."
import dataclasses
import json
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from seer_nb.core import MetricLog
from seer_nb.distributed import run_ranks
from seer_nb.evaluate import detection, finetune
from seer_nb.evaluate.detection import (DetectionConfig, DetectionData, Pyramid, coco_average_precision, detect, freeze_batch_norm, make_target, open_detection, open_detector,
                                        read_coco, run_detection, run_lengths, voc_average_precision)
from seer_nb.evaluate.finetune import Preempted, train_step
from seer_nb.evaluate.metrics import precision_area
from seer_nb.regnet import regnety

pytest.importorskip("pycocotools")
RUN = DetectionConfig(train_images=16, test_images=5, width=16, head_width=32, sizes="64 96", max_size=96, anchor=8, rois=16, proposals=30, batch_size=4, steps=4, lr=0.02, drops="3",
                      warmup_steps=2, log_every=1, checkpoint_every=2, resamples=5, test_batch=2, device="cpu", timeout=60.0)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("seer_nb.core.environment_text", lambda: "a test\n")
    yield
    torch.set_num_threads(before)


def random_claims(n_images=30, classes=3, seed=0):
    "A made-up test set without crowds, and claims of which some are near a true box."
    rng = np.random.default_rng(seed)
    targets, results = [], []
    for i in range(n_images):
        k = int(rng.integers(0, 5))
        corner, sides = rng.uniform(0, 60, (k, 2)), rng.uniform(8, 40, (k, 2))
        boxes, labels = np.concatenate([corner, corner + sides], 1), rng.integers(1, classes + 1, k)
        targets.append(make_target(boxes, labels, [False] * k, [None] * k))
        for box, label in zip(boxes, labels):
            for _ in range(int(rng.integers(0, 3))):
                x0, y0, x1, y1 = (box + rng.normal(0, 3, 4)).tolist()
                results.append({"image_id": i, "category_id": int(label), "bbox": [x0, y0, max(x1 - x0, 1.0), max(y1 - y0, 1.0)], "score": float(rng.random())})
        for _ in range(2):
            results.append({"image_id": i, "category_id": int(rng.integers(1, classes + 1)), "bbox": [*rng.uniform(0, 60, 2).tolist(), 20.0, 20.0], "score": float(rng.random())})
    return DetectionData("made_up", [f"c{k}" for k in range(classes)], [str(i) for i in range(n_images)], lambda i: torch.zeros(3, 100, 100, dtype=torch.uint8), targets.__getitem__), results


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_area_is_scikit_learns_step_curve_made_to_fall():
    "With all objects among the claims, the area under the interpolated curve is at least scikit-learn's step-wise one, and equal where precision falls anyway."
    from sklearn.metrics import average_precision_score
    rng = np.random.default_rng(0)
    for _ in range(20):
        hits = rng.random(40) < np.linspace(0.9, 0.1, 40)
        theirs = average_precision_score(hits, -np.arange(40.0))
        assert precision_area(hits, hits.sum(), "area") >= theirs - 1e-12 and precision_area(hits, hits.sum()) == pytest.approx(theirs)
    falling = [1] * 5 + [0] * 9
    assert precision_area(falling, 5, "area") == pytest.approx(average_precision_score(falling, -np.arange(14.0))) == 1
    hits, positives = rng.random(500) < 0.5, 400
    recall, precision = np.cumsum(hits) / positives, np.cumsum(hits) / np.arange(1, 501)
    dense = np.mean([max([p for p, r in zip(precision, recall) if r >= x], default=0) for x in np.linspace(0, 1, 4001)])     # the definition, by points
    assert precision_area(hits, positives, "area") == pytest.approx(dense, abs=2e-3)
    eleven = np.mean([max([p for p, r in zip(precision, recall) if r >= x], default=0) for x in np.arange(0, 1.01, 0.1)])
    assert precision_area(hits, positives, "11-point") == pytest.approx(eleven, abs=1e-9)


def test_boxes_are_judged_as_pycocotools_does():
    "VOC's AP and COCO's AP50 differ in how a claim chooses among objects and in 101 points; where objects are far apart they agree within the points."
    data, results = random_claims()
    mine, theirs = np.nanmean(voc_average_precision(data, results)), coco_average_precision(data, results)["AP50"]
    assert 0.2 < theirs < 0.95 and abs(mine - theirs) < 0.02


def test_difficult_objects_count_neither_way():
    far = [[0, 0, 10, 10], [50, 50, 60, 60], [80, 0, 90, 10]]
    data = DetectionData("x", ["c"], ["0"], None, lambda i: make_target(far, [1, 1, 1], [False, True, False], [None] * 3), lambda i: (100, 100))
    claim = lambda box, score: {"image_id": 0, "category_id": 1, "bbox": [box[0], box[1], 10, 10], "score": score}
    assert voc_average_precision(data, [claim(far[1], 0.99), claim(far[1], 0.98), claim(far[0], 0.9), claim(far[2], 0.8)]) == [1.0]
    assert voc_average_precision(data, [claim(far[0], 0.9), claim(far[0], 0.85), claim(far[2], 0.8)]) == [0.5 + 0.5 * 2 / 3]     # the same object twice
    assert coco_average_precision(data, [claim(far[1], 0.99), claim(far[0], 0.9), claim(far[2], 0.8)])["AP"] == pytest.approx(1)    # a crowd swallows claims


def test_an_interval_holds_the_score_and_narrows_with_images():
    widths = []
    for n in (10, 80):
        numbers = coco_average_precision(*random_claims(n), resamples=30)
        assert numbers["low"] < numbers["AP"] < numbers["high"]
        widths.append(numbers["high"] - numbers["low"])
    assert widths[1] < widths[0]


def test_outlines_in_all_of_cocos_forms():
    from pycocotools import mask as tools
    square = np.zeros((40, 50), bool)
    square[10:20, 5:25] = True
    flat = square.T.reshape(-1)                                       # COCO counts down the columns
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [0]]))).tolist()
    runs = np.diff([0, *edges, flat.size]).tolist()
    for form in ([[5, 10, 25, 10, 25, 20, 5, 20]], {"size": [40, 50], "counts": runs}, square):
        coded = run_lengths(form, (40, 50))
        assert np.array_equal(tools.decode(json.loads(json.dumps(coded))).astype(bool), square)


# ── readers ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def write_image(path, side=(30, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", side[::-1], (10, 200, 30)).save(path)


@pytest.fixture
def coco_folder(tmp_path):
    about = {"images": [{"id": 5, "file_name": "000005.jpg", "height": 30, "width": 40}, {"id": 6, "file_name": "000006.jpg", "height": 30, "width": 40}],
             "categories": [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}],
             "annotations": [{"image_id": 5, "category_id": 90, "bbox": [1, 2, 10, 20], "iscrowd": 0, "area": 77.5, "segmentation": [[1, 2, 11, 2, 11, 22, 1, 22]]},
                             {"image_id": 5, "category_id": 1, "bbox": [3, 3, 0, 5], "iscrowd": 0, "area": 0, "segmentation": [[]]}]}
    for part in ("train2017", "val2017"):
        for image in about["images"]: write_image(tmp_path / "coco" / part / image["file_name"])
        (tmp_path / "coco/annotations").mkdir(exist_ok=True)
        (tmp_path / f"coco/annotations/instances_{part}.json").write_text(json.dumps(about))
    return tmp_path


def test_coco_as_downloaded(coco_folder):
    "Classes sorted by number, a box without width dropped, images without objects left out of training only, the annotated area kept."
    test, train = (open_detection("coco_detection", coco_folder, split) for split in ("test", "train"))
    image, target = test[0]
    assert test.classes == ("person", "toothbrush") and (len(test), len(train)) == (2, 1)
    assert image.shape == (3, 30, 40) and test.shape(0) == (30, 40)
    assert target["boxes"].tolist() == [[1, 2, 11, 22]] and target["labels"].tolist() == [2] and target["areas"].tolist() == [77.5]
    assert len(test.target(1)["labels"]) == 0


@pytest.mark.parametrize("change, message", [({"file_name": "../000005.jpg"}, "no file name"), ({"file_name": "/etc/passwd"}, "no file name"), ({"id": "x"}, "no COCO annotation")])
def test_coco_files_stay_below_their_folder(coco_folder, change, message):
    path = coco_folder / "coco/annotations/instances_val2017.json"
    about = json.loads(path.read_text())
    about["images"][0].update(change)
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=message): read_coco(coco_folder / "coco", "test")


def voc_folder(root, names):
    box = "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>30</ymax></bndbox></object>"
    for year, part, name in names:
        top = root / f"VOCdevkit/VOC{year}"
        write_image(top / f"JPEGImages/{name}.jpg")
        for sub in ("ImageSets/Main", "Annotations"): (top / sub).mkdir(parents=True, exist_ok=True)
        (top / f"ImageSets/Main/{part}.txt").write_text(f"{name}\n")
        (top / f"Annotations/{name}.xml").write_text(f"<annotation>{box.format('tvmonitor', 0)}{box.format('dog', 1)}</annotation>")


def test_voc_as_unpacked(tmp_path):
    voc_folder(tmp_path / "VOC07", [("2007", "trainval", "000005"), ("2007", "test", "000001"), ("2012", "trainval", "2008_000002")])
    both, one, test = (open_detection(slug, tmp_path, split) for slug, split in (("voc0712_detection", "train"), ("voc07_detection", "train"), ("voc0712_detection", "test")))
    assert (len(both), len(one), len(test)) == (2, 1, 1) and both.slug == "voc0712_detection"
    image, target = both[1]
    assert image.shape == (3, 30, 40) and target["boxes"].tolist() == [[1, 2, 20, 30]] * 2
    assert target["labels"].tolist() == [20, 12] and target["ignore"].tolist() == [False, True] and len(both.classes) == 20


def test_voc_hostile_files(tmp_path):
    voc_folder(tmp_path, [("2007", "test", "000001")])
    (tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").write_text("../../x\n")
    with pytest.raises(ValueError, match="no file name"): open_detection("voc07_detection", tmp_path, "test")
    bomb = tmp_path / "bomb.xml"
    for text in ("<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>", "<annotation", "<annotation>" + "<object/>" * 200_000 + "</annotation>", "<annotation><object/></annotation>"):
        bomb.write_text(text)
        with pytest.raises(ValueError, match="annotation of VOC"): detection.voc_target(bomb)


def test_what_is_missing_is_named(tmp_path):
    for slug in ("coco_detection", "voc07_detection"):
        with pytest.raises(FileNotFoundError, match=rf"(?s){slug} is not there: .* is missing.*where to get it: .*licence"): open_detection(slug, tmp_path, "train")


# ── the network ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_pyramid_is_torchvisions_own():
    "The same levels as torchvision's BackboneWithFPN makes of the stages of torchvision's RegNet with the same weights."
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.regnet import BlockParams, RegNet
    from seer_nb.weights import convert_state
    body = regnety("regnety_toy", width_rule="torchvision").eval()
    theirs = RegNet(BlockParams.from_init_params(depth=6, w_0=16, w_a=40.0, w_m=2.8, group_width=16, se_ratio=0.25), num_classes=5, stem_width=16).eval()
    theirs.load_state_dict(convert_state({k: t.clone() for k, t in body.state_dict().items()}, "torchvision"), strict=False)
    widths = [s.width for s in body.config.stages]
    flat = torch.nn.Sequential(*[torch.nn.Sequential(theirs.stem, theirs.trunk_output[0]), *list(theirs.trunk_output)[1:]])
    both, ours = BackboneWithFPN(flat, {str(k): str(k) for k in range(4)}, widths, 24), Pyramid(body, 24)
    both.fpn.load_state_dict(ours.fpn.state_dict())
    images = torch.randn(2, 3, 64, 96)
    want, got = both(images), ours(images)
    assert list(want) == list(got)
    for name in want: torch.testing.assert_close(got[name], want[name], atol=1e-5, rtol=1e-4)


def test_frozen_batch_norm_keeps_function_and_stays(tmp_path):
    body = regnety("regnety_toy")
    for _ in range(3): body(torch.randn(4, 3, 64, 64))
    images = torch.randn(2, 3, 64, 64)
    before = body.eval()(images)
    frozen = freeze_batch_norm(body).train()
    for _ in range(2): torch.testing.assert_close(frozen(images), before, atol=1e-4, rtol=1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.modules())


def test_only_a_regnety_has_stages_here():
    with pytest.raises(ValueError, match="needs the stages of a RegNetY"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(detection, "open_model", lambda *args, **kw: torch.nn.Linear(2, 2))
            open_detector(RUN, 3)


def test_blue_and_red_are_swapped_for_weights_that_want_it():
    detector = open_detector(RUN, 3)
    image = open_detection("toy_shapes", "", "test", 1)[0][0]
    plain = detection._inputs(detector, [image], torch.device("cpu"))[0]
    detector.preprocess = dataclasses.replace(detector.preprocess, channel_order="BGR")
    assert torch.equal(detection._inputs(detector, [image], torch.device("cpu"))[0], plain.flip(0))


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("straight")
    return folder, run_detection(dataclasses.replace(RUN, run_dir=str(folder), masks=True))


def losses(folder): return [row["loss"] for row in MetricLog(folder / "metrics.jsonl").rows()]


def test_a_stopped_run_ends_with_the_same_bits(straight, tmp_path):
    folder, result = straight
    config = dataclasses.replace(RUN, run_dir=str(tmp_path), masks=True)
    with pytest.MonkeyPatch.context() as patch:
        def stopping(training, *rest):
            if training.step == 1: signal.raise_signal(signal.SIGTERM)
            return train_step(training, *rest)
        patch.setattr(finetune, "train_step", stopping)
        with pytest.raises(Preempted, match="step 2 of 4"): run_detection(config)
    torch.rand(5)                                                  # whatever else has drawn from the generator
    again = run_detection(config)
    for name in ("model.safetensors", "predictions.json"): assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert losses(tmp_path) == losses(folder) and again.value == result.value and "mask AP" in again.details


def test_predictions_are_those_of_the_stored_network(straight):
    from safetensors.torch import load_file
    folder, _ = straight
    detector = open_detector(dataclasses.replace(RUN, masks=True), 3)
    detector.load_state_dict(load_file(folder / "model.safetensors"))
    mine, stored = detect(detector, open_detection("toy_shapes", "", "test", 5), 2), json.loads((folder / "predictions.json").read_text())
    np.testing.assert_allclose([r["score"] for r in mine], [r["score"] for r in stored], atol=1e-4)
    assert [r["image_id"] for r in mine] == [r["image_id"] for r in stored]


def on_ranks(settings):
    from seer_nb.evaluate.detection import DetectionConfig, run_detection
    return {"value": run_detection(DetectionConfig(**settings)).value}


def test_two_ranks_take_the_step_of_one(tmp_path):
    "Frozen BatchNorm: images do not see each other. The sampling of regions is each rank's own, so only the first loss is compared, with every region taken."
    config = dataclasses.replace(RUN, batch_norm="frozen", sizes="96", rois=1000, steps=2, drops="", checkpoint_every=1)
    torch.manual_seed(0)
    run_detection(dataclasses.replace(config, run_dir=str(tmp_path / "one")))
    two, other = run_ranks(on_ranks, 2, dataclasses.asdict(dataclasses.replace(config, run_dir=str(tmp_path / "two"))), timeout=180)
    assert two == other
    assert losses(tmp_path / "two")[0] == pytest.approx(losses(tmp_path / "one")[0], rel=0.1)
    results = json.loads((tmp_path / "two/predictions.json").read_text())
    assert all(0 <= r["image_id"] < 5 for r in results)


def test_voc_run_reports_eleven_points(tmp_path):
    voc_folder(tmp_path, [("2007", "trainval", "000005"), ("2007", "test", "000001")])
    result = run_detection(dataclasses.replace(RUN, task="voc07_detection", root=str(tmp_path), run_dir=str(tmp_path / "run"), train_images=0, test_images=0, steps=1, drops=""))
    assert result.metric == "box AP50" and 0 <= result.value <= 1 and result.n == 1 and result.paper is None


def test_the_printed_score_stands_beside_the_measured_one(coco_folder, monkeypatch):
    "48.5 box AP of COCO, a fraction, with its source; a model without a printed score is refused before anything is written; it does not move the number."
    config = dataclasses.replace(RUN, task="coco_detection", root=str(coco_folder), run_dir=str(coco_folder / "run"), paper_model="SEER (size per row unknown)", train_images=0, test_images=0, steps=1, drops="",
                                 batch_size=1, masks=True)
    for changes, message in (({"paper_model": "SEER 10B"}, "no published score of 'SEER 10B' on coco_detection"), ({"task": "voc07_detection", "masks": False}, "no published score"), ({"rois": 0}, "rois must be")):
        with pytest.raises(ValueError, match=message): run_detection(dataclasses.replace(config, **changes))
    assert not (coco_folder / "run").exists()
    result = run_detection(config)
    assert (result.task, result.metric, result.paper, result.n) == ("coco_detection", "box AP", 0.485, 2) and "2103.01988" in result.paper_source and "mask AP" in result.details
    assert "paper_model" not in result.settings
