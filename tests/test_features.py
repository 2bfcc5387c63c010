"Taps against peers, views against torchvision's crops, and a store that kills, ranks and bad folders do not fool."
import dataclasses
import json
import os
import signal
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.v2 import functional as tvf

from seer_nb.checkpoints import CheckpointError
from seer_nb.distributed import run_ranks
from seer_nb.evaluate import features as feat
from seer_nb.evaluate import tasks
from seer_nb.evaluate.annotations import Claims
from seer_nb.evaluate.tasks import TaskData, open_model, weights_hash
from seer_nb.images import BadImage
from seer_nb.regnet import regnety
from seer_nb.streaming import StreamedBackbone
from seer_nb.swav import SwAV, SwAVHead
from seer_nb.weights import Preprocess, load_checkpoint, save_backbone, save_checkpoint

torch.set_num_threads(1)
TAPS = ["res3:1x1", "res4:2x1", "avgpool"]


@pytest.fixture(scope="module")
def model():
    return open_model("random:regnety_toy")


def images(n=40, seed=0):
    return torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def task(n=40, seed=0, read=None, **changes):
    pixels = images(n, seed)
    return TaskData(**{"slug": "toy_count", "split": "train", "classes": ("a", "b"), "labels": torch.arange(n) % 2, "read": read or pixels.__getitem__,
                       "name": lambda i: f"folder {i}/ä\n{i}.png", **changes})


def splits(): return {"train": task(40), "test": task(23, 1)}


def same(store, other): return all(torch.equal(store.features(s, t), other.features(s, t)) for s in store.plan["images"] for t in store.plan["taps"])


# ── taps and views ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_taps_are_torchvisions():
    net = open_model("torchvision:resnet18", pretrained=False)
    x = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        want = create_feature_extractor(net, {"layer2": "layer2", "layer4": "layer4", "flatten": "flatten"})(x)
        got = feat.tap_features(net, x, ["avgpool", "layer4", "layer2:2x2"])
    assert list(got) == ["avgpool", "layer4", "layer2:2x2"]
    assert torch.equal(got["layer4"], want["layer4"]) and torch.equal(got["avgpool"].flatten(1), want["flatten"])
    assert torch.equal(got["layer2:2x2"], nn.functional.adaptive_avg_pool2d(want["layer2"], 2))


def test_taps_are_timms():
    net = pytest.importorskip("timm").create_model("regnety_002", num_classes=0).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.inference_mode(): assert torch.equal(feat.tap_features(net, x, ["s4"])["s4"], net.forward_features(x))


def test_streamed_backbone_has_the_same_taps(tmp_path, model):
    path, x = save_backbone(model, tmp_path / "b.safetensors"), torch.randn(4, 3, 32, 32)
    taps = ["res2:2x2", "res5", *TAPS]
    with torch.inference_mode(): want = feat.tap_features(model, x, taps)
    streamed = StreamedBackbone(path, micro_batch=4)
    got = feat.tap_features(streamed, x, taps)
    assert list(got) == taps and all(torch.equal(got[t], want[t]) for t in taps)
    assert torch.equal(feat.extract_features(streamed, images(4)), feat.extract_features(model, images(4)))
    with pytest.raises(ValueError, match="res2 to res5"): feat.tap_features(streamed, x, ["head"])


def test_head_on_top_and_gradients():
    net = nn.Sequential(OrderedDict(backbone=regnety("regnety_toy"), head=nn.Linear(352, 5))).eval()
    x = torch.randn(2, 3, 32, 32)
    got = feat.tap_features(net, x, ["head", "avgpool", "res4:1x1"])
    assert torch.equal(got["head"].flatten(1), net(x)) and torch.equal(got["avgpool"].flatten(1), net.backbone(x))
    got["res4:1x1"].sum().backward()                                    # whoever trains below a tap can
    assert net.backbone.stages.res3[0].a[0].weight.grad.abs().sum() > 0 and net.head.weight.grad is None
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("layout, batch_norm", [("seer_nb", True), ("vissl", False)])
def test_the_swav_head_of_a_checkpoint(tmp_path, layout, batch_norm):
    "From a folder of shards, and from a file in VISSL's names: the embeddings that SwAV computes. Without such a head: an error."
    torch.manual_seed(0)
    swav, x = SwAV(regnety("regnety_toy"), SwAVHead(352, (24, 20), 8, 10, batch_norm)).eval(), torch.randn(3, 3, 32, 32)
    save_file({name: t.contiguous() for name, t in swav.state_dict().items()}, tmp_path / "swav.safetensors")
    (tmp_path / "folder").mkdir()
    path = tmp_path / "folder" / ("model.safetensors" if layout == "seer_nb" else "model.torch")
    save_checkpoint(load_checkpoint(tmp_path / "swav.safetensors"), path, layout=layout, max_shard_size=10**6)
    spec = f"seer:{path.parent if layout == 'seer_nb' else path}"
    model = feat.open_tapped(spec, ["head", "res4:1x1"])
    with torch.inference_mode(): got, want = feat.tap_features(model, x, ["head", "avgpool", "res4:1x1"]), swav.backbone(x)
    with torch.inference_mode(): torch.testing.assert_close(got["head"].flatten(1), swav.head(want)[0])
    torch.testing.assert_close(got["avgpool"].flatten(1), want)
    assert weights_hash(feat.open_tapped(spec, ["avgpool"])) == weights_hash(open_model(spec)) != weights_hash(model)
    store = feat.run_features(feat.FeaturesConfig(run_dir=str(tmp_path / "run"), model=spec, task="toy_count", taps="head", train_images=9, test_images=5, device="cpu"))
    torch.testing.assert_close(store.features("test", "head").norm(dim=1), torch.ones(5))


def test_no_head_no_tap(tmp_path, model):
    config = feat.FeaturesConfig(run_dir=str(tmp_path / "run"), task="toy_count", taps="head", device="cpu")
    for spec, message in ((f"seer:{save_backbone(model, tmp_path / 'b.safetensors')}", "b.safetensors: there is no SwAV head"), ("random:regnety_toy", "no tap 'head'")):
        with pytest.raises(ValueError, match=message): feat.run_features(dataclasses.replace(config, model=spec))
    assert not (tmp_path / "run").exists()


def test_a_map_that_the_network_overwrites_is_kept():
    net = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), relu=nn.ReLU(inplace=True)))
    x = torch.randn(1, 3, 4, 4)
    with torch.inference_mode(): assert torch.equal(feat.tap_features(net, x, ["conv"])["conv"], net.conv(x))


@pytest.mark.parametrize("warp", [False, True])
def test_views_are_torchvisions_crops(warp):
    photo, preprocess = images(1)[0].repeat(1, 2, 3)[:, :50, :70], Preprocess(40, 32, warp=warp)
    resized = tvf.resize(photo, [40, 40] if warp else [40], antialias=True)
    names = ["topleft", "topright", "bottomleft", "bottomright", "center"]
    crops = [feat.view_image(photo, name, preprocess) for name in names]
    assert all(torch.equal(a, b) for a, b in zip(crops, tvf.five_crop(resized, [32, 32])))
    assert torch.equal(feat.view_image(photo, "center@60-flip", preprocess), tvf.horizontal_flip(Preprocess(60, 32, warp=warp).resize_crop(photo)))
    for bad in ("center@20", "centre", "center@60-flop"):
        with pytest.raises(ValueError, match="view"): feat.view_image(photo, bad, preprocess)


def test_views_are_averaged(model):
    x = images(9)
    parts = [feat.extract_taps(model, x, TAPS, size=24, views=[v]) for v in ("topleft", "center-flip", "center@40")]
    got = feat.extract_taps(model, x, TAPS, size=24, views=["topleft", "center-flip", "center@40"])
    for tap in TAPS: torch.testing.assert_close(got[tap], sum(p[tap] for p in parts) / 3)


# ── the store ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_store_keeps_order_names_labels_and_values(tmp_path, model):
    data = splits()
    store = feat.extract(model, data, tmp_path / "s", taps=TAPS, batch_size=16)
    for split, images_ in data.items():
        want = feat.extract_taps(model, images_, TAPS, batch_size=16)
        assert all(torch.equal(store.features(split, tap), want[tap]) for tap in TAPS)
        assert store.names(split) == [images_.name(i) for i in range(len(images_))] and torch.equal(store.labels(split), images_.labels)
    before = (tmp_path / "s/train/avgpool.npy").read_bytes()
    store.features("train").zero_()                                     # a probe that normalises in place
    assert (tmp_path / "s/train/avgpool.npy").read_bytes() == before
    assert store.task_features("res4:2x1").test_features.shape == (23, 256)


def claims(n, classes=9605, seed=0):
    "Few known labels of many classes; the first image has none."
    rng = np.random.default_rng(seed)
    counts = np.r_[0, rng.integers(0, 5, n - 1)]
    columns = np.concatenate([np.sort(rng.choice(classes, k, replace=False)) for k in counts])
    return Claims(np.r_[0, counts.cumsum()], columns, rng.integers(0, 2, len(columns)), classes)


def test_labels_given_as_rows_on_demand(tmp_path):
    "Open Images without `n`: what is known is stored, and no table of all images and classes is made."
    many = {split: task(n, labels=claims(n, seed=n), classes=[f"c{i}" for i in range(9605)], slug="openimages") for split, n in (("train", 40), ("test", 23))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Claims, "__array__", None)
        patch.setattr(Claims, "__getitem__", None)
        store = feat.extract(Tiny(), many, tmp_path / "s")
        kept, other = store.labels("train"), feat.data_fingerprint(task(40, labels=claims(40, seed=1), classes=many["train"].classes))
    assert isinstance(kept, Claims) and (kept[:] == many["train"].labels[:]).all() and (kept[7] == many["train"].labels[7]).all()
    assert (tmp_path / "s/train/labels.npy").stat().st_size < 40 * 9605 / 10 and other != feat.data_fingerprint(many["train"])
    assert store.task_features().test_labels.shape == (23, 9605)
    rows = np.load(tmp_path / "s/test/labels.npy")
    for field, value in (("image", 99), ("class", 9605), ("class", -1)):
        bad = rows.copy()
        bad[field][-1] = value
        np.save(tmp_path / "s/test/labels.npy", bad)
        with pytest.raises(ValueError, match="not as it was written"): store.labels("test")


def test_workers_make_no_difference(tmp_path, model):
    stores = [feat.extract(model, splits(), tmp_path / f"{w}", taps=TAPS, batch_size=8, size=24, workers=w, views=["center", "center-flip"]) for w in (0, 2)]
    assert same(*stores)


def test_half_precision(tmp_path, model):
    store = feat.extract(model, splits(), tmp_path / "h", dtype="float16")
    want = feat.extract_features(model, splits()["train"])
    assert torch.equal(store.features("train"), want.half())

    class Loud(nn.Module):
        def forward(self, x): return x.mean((2, 3)) + 1e5
    with pytest.raises(ValueError, match="store float32"): feat.extract(Loud(), splits(), tmp_path / "l", dtype="float16")
    assert feat.extract(Loud(), splits(), tmp_path / "m").features("train").min() > 9e4


def killed_at(n, model, folder):
    "Extract in a child that is killed with SIGKILL at its n-th step on disk; return whether it lived to the end."
    pid = os.fork()
    if pid == 0:
        count = 0
        def step(function):
            def wrapped(*args, **kwargs):
                nonlocal count
                count += 1
                if count == n: os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)
            return wrapped
        feat.os = type("os", (), {"fsync": staticmethod(step(os.fsync))})
        feat.write_atomic, feat.MetricLog.log = step(feat.write_atomic), step(feat.MetricLog.log)
        feat.np.save, feat.shutil.rmtree = step(np.save), step(feat.shutil.rmtree)
        feat.np.lib.format.open_memmap = step(np.lib.format.open_memmap)
        try: feat.extract(model, splits(), folder, taps=["avgpool", "conv:1x2"], batch_size=16, save_every=0)
        except BaseException: os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status)
    return status == 0


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x): return self.conv(x).mean((2, 3))


def test_killed_anywhere(tmp_path):
    "Kill at every other step there is: what is opened is whole, and the next run finishes; a second kill on the way does no harm either."
    tiny, how = Tiny(), {"taps": ["avgpool", "conv:1x2"], "batch_size": 16}
    whole = feat.extract(tiny, splits(), tmp_path / "w", **how)
    for n in range(1, 60, 2):
        folder = tmp_path / f"{n}"
        done = killed_at(n, tiny, folder)
        if not (folder / "manifest.json").exists():
            with pytest.raises(FileNotFoundError, match="no complete features"): feat.open_store(folder)
            killed_at(7, tiny, folder)
        again = feat.extract(tiny, splits(), folder, **how)
        assert same(again, whole) and again.names("test") == whole.names("test")
        if done: break
    assert n > 20 and done


def test_an_image_that_cannot_be_used_is_named(model):
    def fails(i): raise BadImage("truncated", "the end is missing")
    with pytest.raises(ValueError, match=r"(?s)image 0 .* cannot be read: truncated: the end is missing"): feat.extract_features(model, task(read=fails))


def test_only_what_is_missing_is_computed_and_torn_logs_are_mended(tmp_path, model):
    folder, read = tmp_path / "s", []
    def fails(i):
        if i == 20: raise OSError("gone")
        return images(40)[i]
    with pytest.raises(ValueError, match=r"(?s)image 20 .* cannot be read: gone"): feat.extract(model, {"train": task(read=fails)}, folder, taps=TAPS, batch_size=8)
    done = feat.rows_done(folder, "train", 40)
    assert done[:16].all() and not done[16:].any()
    with open(folder / "progress/0.jsonl", "ab") as log: log.write(b'{"split": "train", "start": 16, "stop": 40')     # cut by a power failure
    def noted(i): read.append(i); return images(40)[i]
    plan = feat.make_plan(model, {"train": task(read=noted)}, TAPS, ["center"], 0, "float32")
    looks, read = read, []
    store = feat.extract(model, {"train": task(read=noted)}, folder, taps=TAPS, batch_size=8)
    assert sorted(read) == sorted([*looks, *range(16, 40)]) and store.plan == plan
    want = feat.extract_taps(model, images(40), TAPS, batch_size=8)
    assert all(torch.equal(store.features("train", tap), want[tap]) for tap in TAPS)


def many(folder, taps, broken):
    import os
    import torch
    from seer_nb.distributed import rank, setup
    from seer_nb.evaluate import features as feat
    from seer_nb.evaluate.tasks import TaskData, open_model
    setup("cpu")
    def data(n, seed):
        pixels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        def read(i):
            if i == broken and n == 40: raise OSError("gone")
            return pixels[i]
        return TaskData("toy_count", "train", ("a", "b"), torch.arange(n) % 2, read, lambda i: f"folder {i}/ä\n{i}.png")
    try: feat.extract(open_model("random:regnety_toy"), {"train": data(40, 0), "test": data(23, 1)}, folder, taps=taps, batch_size=8)
    except ValueError as error: return str(error)
    return "done"


def test_ranks_fail_together_and_one_goes_on(tmp_path, model):
    folder = tmp_path / "r"
    errors = run_ranks(many, 2, str(folder), TAPS, 28)
    assert errors[0] == errors[1] and "image 28 (folder 28" in errors[0] and errors[0].startswith("rank 1")
    assert 0 < feat.rows_done(folder, "train", 40).sum() < 40
    assert same(feat.extract(model, splits(), folder, taps=TAPS, batch_size=8), feat.extract(model, splits(), tmp_path / "one", taps=TAPS, batch_size=8))


def test_stale_features_are_refused(tmp_path, model):
    folder, data = tmp_path / "s", splits()
    feat.extract(model, data, folder, taps=TAPS)
    other = open_model("random:regnety_toy")
    other.preprocess = dataclasses.replace(other.preprocess, mean=(0.5, 0.5, 0.5))
    for key, model_, data_, how in [("weights", open_model("random:regnety_toy", seed=1), data, {}), ("preprocess", other, data, {}), ("taps", model, data, {"taps": TAPS[:2]}),
                                    ("views", model, data, {"views": ["center-flip"]}), ("size", model, data, {"size": 24}), ("dtype", model, data, {"dtype": "float16"}),
                                    ("images", model, {**data, "train": task(39)}, {}), ("data", model, {**data, "train": task(40, 5)}, {}),
                                    ("data", model, {**data, "test": task(23, 1, name=str)}, {}), ("task", model, {k: task(len(d), s, slug="x") for s, (k, d) in enumerate(data.items())}, {}),
                                    ("data", model, {**data, "train": task(40, labels=torch.arange(40) // 20)}, {})]:
        with pytest.raises(ValueError, match=f"holds other features: {key}"): feat.extract(model_, data_, folder, **{"taps": TAPS, **how})
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="weights"): feat.extract(open_model("random:regnety_toy", seed=1), data, folder, taps=TAPS)     # begun, not complete


def test_damaged_and_hostile_folders(tmp_path, model):
    folder = tmp_path / "s"
    store = feat.extract(model, splits(), folder, taps=TAPS)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in ({"images": {"../train": 40}}, {"taps": ["../../x"]}, {"images": 3}):
        (folder / "manifest.json").write_text(json.dumps({**manifest, "plan": {**manifest["plan"], **change}}))
        with pytest.raises(ValueError, match="describes no features"): feat.open_store(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(folder / "test/avgpool.npy", 500)
    with pytest.raises(ValueError, match="not as it was written"): feat.open_store(folder)
    x = np.load(folder / "train/avgpool.npy")
    np.save(folder / "train/avgpool.npy", np.asfortranarray(x.reshape(20, -1)))
    with pytest.raises(ValueError, match="not as it was written"): store.features("train")
    with pytest.raises(ValueError, match="not val at avgpool"): store.features("val")


def test_two_runs_do_not_share_a_folder(tmp_path, model):
    lock = feat.lock_folder(tmp_path / "s")
    with pytest.raises(CheckpointError, match="still going"): feat.extract(model, splits(), tmp_path / "s")
    feat.unlock(lock)
    assert len(feat.extract(model, splits(), tmp_path / "s").features("test")) == 23


def test_nothing_is_written_for_what_cannot_be(tmp_path, model):
    for how, message in [({"taps": ["res9"]}, "no tap"), ({"taps": []}, "taps must be"), ({"taps": ["avgpool", "avgpool"]}, "different"), ({"views": ["up"]}, "not a view"),
                         ({"views": ["topleft"]}, "size="), ({"dtype": "int8"}, "float16")]:
        with pytest.raises(ValueError, match=message): feat.extract(model, splits(), tmp_path / "s", **how)
    with pytest.raises(ValueError, match="no train images"): feat.extract(model, {"train": images(0)}, tmp_path / "s")
    with pytest.raises(ValueError, match="name of a split"): feat.extract(model, {"a/b": images(3)}, tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_run(tmp_path):
    config = feat.FeaturesConfig(run_dir=str(tmp_path / "r"), task="toy_digits", taps="res4:1x1 avgpool", train_images=50, test_images=30, device="cpu")
    store = feat.run_features(config)
    stamp = (store.folder / "train/avgpool.npy").stat().st_mtime_ns
    assert feat.run_features(dataclasses.replace(config, extract_batch=7, workers=1)).fingerprint == store.fingerprint
    assert (store.folder / "train/avgpool.npy").stat().st_mtime_ns == stamp and store.plan["name"] == config.model
    with pytest.raises(ValueError, match="other parameters"): feat.run_features(dataclasses.replace(config, taps="avgpool"))


def test_run_streamed(tmp_path, model):
    config = feat.FeaturesConfig(model=f"seer:{save_backbone(model, tmp_path / 'b.safetensors')}", task="toy_count", taps="res4:1x1 avgpool", train_images=9, test_images=5, device="cpu")
    stores = [feat.run_features(dataclasses.replace(config, run_dir=str(tmp_path / f"{stream}"), stream=stream)) for stream in (False, True)]
    for tap in ("res4:1x1", "avgpool"): torch.testing.assert_close(stores[0].features("train", tap), stores[1].features("train", tap))


def test_a_size_follows_the_rule_of_the_task():
    "MNIST is padded before it grows, CLEVR is warped, a photograph loses its margin; images of no task are cut in the model's own proportion."
    digit, scene, photo = (torch.zeros(3, *sides, dtype=torch.uint8) for sides in ((28, 28), (40, 60), (40, 60)))
    digit += 255
    model, asked = Preprocess(40, 32), {}
    for slug, image in (("mnist", digit), ("clevr_count", scene), ("food101", photo), ("mine", photo)):
        data = TaskData(slug, "test", "a", torch.zeros(1), [image].__getitem__)
        asked[slug] = feat.sized(model, 64, data.slug)
        assert feat.view_image(image, "center", asked[slug]).shape == (3, 64, 64)
    padded = feat.view_image(digit, "center", asked["mnist"])
    assert torch.equal(padded, asked["mnist"].resize_crop(digit)) and padded[0, 0, 0] == 0 and padded[0, 32, 32] == 255
    assert asked["clevr_count"].warp and asked["food101"].size == round(64 * 256 / 224) and asked["mine"].size == 80


def test_a_store_made_by_another_rule_of_the_task_is_refused(tmp_path, monkeypatch):
    model, data = open_model("random:regnety_toy"), TaskData("dtd", "train", "ab", torch.zeros(4), torch.zeros(4, 3, 40, 60, dtype=torch.uint8).__getitem__)
    feat.extract(model, {"train": data}, tmp_path / "store", taps=["avgpool"], size=32)
    monkeypatch.setitem(tasks.ROWS, "dtd", dataclasses.replace(tasks.ROWS["dtd"], transform="warp"))
    with pytest.raises(ValueError, match="holds other features: preprocess"): feat.extract(model, {"train": data}, tmp_path / "store", taps=["avgpool"], size=32)
