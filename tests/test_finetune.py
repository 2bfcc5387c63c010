"Fine-tuning against plain torch, torchvision and timm: one step, a whole run on two ranks, a run that was stopped, the files it leaves."
import dataclasses
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from seer_nb.checkpoints import saved_steps
from seer_nb.core import MetricLog, RunDir
from seer_nb.distributed import run_ranks
from seer_nb.evaluate import finetune
from seer_nb.evaluate.finetune import Classifier, FinetuneConfig, Head, Preempted, classification_loss, learning_rate, recipe, run_finetune, start_training, train_step
from seer_nb.evaluate.tasks import TaskData, open_task, read_results
from seer_nb.images import BadImage
from seer_nb.regnet import regnety
from seer_nb.swav import SwAV, SwAVHead
from seer_nb.weights import Preprocess, convert_state, load_backbone, load_classifier, save_backbone

RUN = FinetuneConfig(train_images=34, test_images=19, image_size=32, batch_size=12, epochs=2, lr=0.1, milestones="1", weight_decay=1e-3, augment="crop", colours="swav",
                     log_every=1, checkpoint_every=2, device="cpu", timeout=60.0, test_batch=4)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("seer_nb.core.environment_text", lambda: "a test\n")       # else a second per run
    yield
    torch.set_num_threads(before)


def losses(folder): return [row["loss"] for row in MetricLog(folder / "metrics.jsonl").rows()]


# ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_two_steps_are_those_of_torchvision_and_plain_sgd():
    "The same weights in torchvision's RegNet, its parameters grouped by hand: after two steps every tensor is the same."
    config = dataclasses.replace(RUN, weight_decay=0.1, head_lr=0.2, head_weight_decay=0.01, label_smoothing=0.1)
    torch.manual_seed(0)
    ours = Classifier(regnety("regnety_toy", width_rule="torchvision"), Head(352, 5, seed=1), Preprocess(32, 32))
    theirs = RegNet(BlockParams.from_init_params(depth=6, w_0=16, w_a=40.0, w_m=2.8, group_width=16, se_ratio=0.25), num_classes=5, stem_width=16)
    state = {**ours.backbone.state_dict(), "heads.0.classifier.weight": ours.head.classifier.weight, "heads.0.classifier.bias": ours.head.classifier.bias}
    theirs.load_state_dict(convert_state({name: t.detach().clone() for name, t in state.items()}, "torchvision"))
    norms = [p for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    rest = [p for name, p in theirs.named_parameters() if not name.startswith("fc.") and not any(p is n for n in norms)]
    sgd = torch.optim.SGD([{"params": norms, "weight_decay": 0.0}, {"params": rest}, {"params": theirs.fc.parameters(), "lr": 0.2, "weight_decay": 0.01}],
                          lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1)
    images, labels = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])
    normal = v2.functional.normalize(images.float() / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    training = start_training(ours.train(), config, CPU)
    for _ in range(2):
        sgd.zero_grad()
        loss = F.cross_entropy(theirs.train()(normal), labels, label_smoothing=0.1)
        loss.backward()
        sgd.step()
        mine = train_step(training, lambda: classification_loss(ours, images, labels, config), 0.1)
        torch.testing.assert_close(mine, loss.detach(), atol=1e-5, rtol=1e-4)
    state = {**ours.backbone.state_dict(), **{f"heads.0.classifier.{n}": getattr(ours.head.classifier, n) for n in ("weight", "bias")}}
    for name, tensor in convert_state(state, "torchvision").items(): torch.testing.assert_close(tensor, theirs.state_dict()[name], atol=2e-4, rtol=1e-3, msg=name)


def test_a_timm_network_takes_the_same_step(tmp_path):
    "Any backbone goes through the same door; its file keeps its own names."
    import timm
    spec = dataclasses.replace(RUN, model="timm:resnet10t.c3_in1k", train_images=17)
    backbone = timm.create_model("resnet10t", num_classes=0)
    backbone.preprocess = Preprocess()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "open_model", lambda *args, **kw: backbone)
        patch.setattr(finetune, "weights_hash", lambda model: "untrained")
        result = run_finetune(dataclasses.replace(spec, run_dir=str(tmp_path), epochs=1))
    from safetensors.torch import load_file
    state, fresh = load_file(tmp_path / "model.safetensors"), timm.create_model("resnet10t", num_classes=0)
    fresh.load_state_dict({name.removeprefix("backbone."): t for name, t in state.items() if name.startswith("backbone.")})
    test = open_task("toy_scenes", split="test", n=19)
    with torch.no_grad(): features = fresh.eval()(torch.stack([Preprocess(32, 32)(test[i][0]) for i in range(19)]))
    logits = F.linear(features, state["head.classifier.weight"], state["head.classifier.bias"])
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy"), logits.numpy(), atol=1e-4, rtol=1e-3)
    assert result.model == spec.model


def test_schedules_are_torchs():
    config = FinetuneConfig(batch_size=512)
    p = torch.nn.Parameter(torch.zeros(1))
    for schedule, theirs in (("steps", lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [30, 60, 90, 100])), ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 105, 2e-3))):
        sgd, ours = torch.optim.SGD([p], lr=0.2), dataclasses.replace(config, schedule=schedule, end_lr=1e-3)
        scheduler = theirs(sgd)
        for epoch in range(105):
            assert learning_rate(epoch, ours) == pytest.approx(sgd.param_groups[0]["lr"], rel=1e-9)
            sgd.step()
            scheduler.step()


def test_published_recipes():
    "The numbers of VISSL's configurations, by hand."
    want = {"base": (105, 0.1, "30 60 90 100", 0, 224), "inaturalist18": (24, 0.1, "7 14 21", 0, 224), "im2gps": (15, 0.1, "4 8 12 13 14", 1e-4, 224),
            "patch_camelyon": (105, 0.01, "30 60 90", 5e-4, 224), "semi_supervised": (70, 0.05, "30", 0, 224), "low_shot_1000": (90, 0.1, "30 60", 5e-4, 224),
            "tricks_384": (105, 0.1, "30 60 90 100", 0, 384)}
    for name, numbers in want.items():
        c = recipe(name)
        assert (c.epochs, c.lr, c.milestones, c.weight_decay, c.image_size) == numbers and c.momentum == 0.9 and not c.decay_norm
    with pytest.raises(ValueError, match="no recipe 'tricks'"): recipe("tricks")


# ── images ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_views_are_torchvisions_boxes():
    "Cut and resized as torchvision does, mirrored half the time; over many draws the boxes have torchvision's distribution."
    image = torch.stack([torch.arange(90).repeat(120, 1).T, torch.arange(120).repeat(90, 1), torch.zeros(90, 120)]).to(torch.uint8)      # a pixel says where it is
    view = finetune.training_view(dataclasses.replace(RUN, task="food101", colours="none", image_size=48, interpolation="bicubic"), Preprocess())
    views = [view(image, 0, i, 0) for i in range(600)]
    assert 240 < sum(int(v[1, 0, 0]) > int(v[1, 0, -1]) for v in views) < 360
    mine = [int(v[0, -1, 0]) - int(v[0, 0, 0]) for v in views]                     # height of the box, about
    torch.manual_seed(0)
    theirs = [v2.RandomResizedCrop.make_params(v2.RandomResizedCrop(48), [image])["height"] * 47 / 48 for _ in range(1500)]
    assert np.abs(np.quantile(mine, [0.1, 0.5, 0.9]) - np.quantile(theirs, [0.1, 0.5, 0.9])).max() <= 4
    from seer_nb.core import stateless_rng
    from seer_nb.multicrop import ATTEMPTS, fit_boxes
    rng = stateless_rng(3, 5, 2)
    mirrored, box = rng.random() < 0.5, fit_boxes(rng.random((1, 2 * ATTEMPTS + 2)), 90, 120, np.array([[0.08, 1.0]]))[0].tolist()
    want = tvf.resized_crop(image, *box, [48, 48], v2.InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(view(image, 3, 5, 2), want.flip(2) if mirrored else want)


@pytest.mark.parametrize("task, views, square", [("imagenet1k", 40, "centre"), ("imagenet1k_1pct", 40, "centre"), ("stl10", 2, "whole"), ("patch_camelyon", 2, "whole"), ("clevr_count", 2, "warp"),
                                                 ("clevr_dist_1000", 2, "warp"), ("sun397", 2, "warp"), ("ucf101", 2, "warp"), ("svhn", 1, "whole"), ("dsprites_orient", 1, "whole"), ("mnist", 1, "padded")])
def test_images_are_treated_as_the_task_says(task, views, square):
    "The families of the paper's linear probes: only photographs are cut at random, digits and sprites never mirrored. What the loader delivers, and what is tested."
    image = torch.randint(1, 256, (3, 28, 28) if task == "mnist" else (3, 60, 60) if square == "whole" else (3, 60, 90), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = dataclasses.replace(RUN, task=task, augment="task", colours="none", image_size=32, batch_size=40)
    data = TaskData(task, "train", ("a",), torch.zeros(1, dtype=torch.int64), lambda i: image)
    delivered, _ = next(iter(finetune.train_loader(config, data, Preprocess())))
    assert (len({v.numpy().tobytes() for v in delivered}) >= 38) if views == 40 else (len({v.numpy().tobytes() for v in delivered}) == views)
    resize = {"centre": [v2.Resize(37, antialias=True), v2.CenterCrop(32)], "whole": [v2.Resize(32, antialias=True)], "warp": [v2.Resize((32, 32), antialias=True)],
              "padded": [v2.Pad(2), v2.Resize(32, antialias=True)]}[square]
    tested = finetune.eval_preprocess(config, Preprocess()).resize_crop(image)
    assert torch.equal(tested, v2.Compose(resize)(image))
    if views < 40: assert any(torch.equal(v, tested) for v in delivered)
    cut = next(iter(finetune.train_loader(dataclasses.replace(config, augment="crop"), data, Preprocess())))[0]       # VISSL's base recipe, asked for by name
    assert len({v.numpy().tobytes() for v in cut}) >= 38


def test_384_pixels_on_top_of_the_task():
    "tricks_384_swav: Resize 384, CenterCrop 384, bicubic; colours change, a scene to count in stays whole, a digit is not mirrored."
    tricks = recipe("tricks_384", task="imagenet1k")
    image = torch.randint(0, 256, (3, 400, 500), dtype=torch.uint8)
    want = v2.Compose([v2.Resize(384, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(384)])(image)
    assert torch.equal(finetune.eval_preprocess(tricks, Preprocess()).resize_crop(image), want)
    ramp = (torch.arange(64, dtype=torch.uint8) * 4).expand(3, 64, 64)             # brighter to the right, whatever the colours
    view = finetune.training_view(recipe("tricks_384", task="svhn"), Preprocess())
    seen = [view(ramp, 0, i, 0).float().mean((0, 1)) for i in range(20)]
    assert all(v[:100].mean() <= v[-100:].mean() for v in seen) and len({v.numpy().tobytes() for v in seen}) > 15
    finetune.check_finetune(dataclasses.replace(tricks, task="clevr_count"))         # one preset for a suite
    with pytest.raises(ValueError, match="resize must be 0"): finetune.check_finetune(dataclasses.replace(tricks, task="clevr_count", resize=400))


def test_colour_jitter_of_patch_camelyon_reaches_its_range():
    "ColorJitter(.4, .4, .4, .4): factors in 0.6 … 1.4, hue within ± 0.4 of a turn; tricks: 0.2 … 1.8 and ± 0.2, in 80 of 100 views."
    from seer_nb.core import stateless_rng
    seen = {}
    def keep(image, plan):
        seen.setdefault(name, []).append((plan.factor[0], plan.jitter[0], plan.grey[0], plan.sigma[0]))
        return [image]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "render_fast", keep)
        for name in ("jitter", "swav"):
            for i in range(400): finetune.recolour(torch.zeros(3, 8, 8, dtype=torch.uint8), stateless_rng(0, i), **finetune.COLOURS[name])
    for name, strength, hue, share in (("jitter", 0.4, 0.4, 1.0), ("swav", 0.8, 0.2, 0.8)):
        factor, jitter, grey, sigma = map(np.array, zip(*seen[name]))
        assert 1 - strength <= factor[:, :3].min() < 1.05 - strength and 0.95 + strength < factor[:, :3].max() <= 1 + strength
        assert -hue <= factor[:, 3].min() < 0.05 - hue and hue - 0.05 < factor[:, 3].max() <= hue
        assert abs(jitter.mean() - share) < 0.06
        assert abs(grey.mean() - 0.2 * (name == "swav")) < 0.06 and abs((sigma > 0).mean() - 0.5 * (name == "swav")) < 0.08
    assert finetune.COLOURS["none"] == {} and RUN.colours == "swav"


@pytest.mark.parametrize("kind, theirs", [("mixup", v2.MixUp), ("cutmix", v2.CutMix)])
def test_mixing_is_torchvisions(kind, theirs):
    images, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0, 2])
    torch.manual_seed(3)
    want = theirs(alpha=0.7, num_classes=4)(images, labels)
    torch.manual_seed(3)
    got = finetune.mix(images, labels, 4, **{kind: 0.7})
    assert all(map(torch.equal, got, want)) and not torch.equal(got[0], images)
    assert finetune.mix(images, labels, 4)[1] is labels


def test_a_batch_is_mixed_by_seed_and_step_alone(tmp_path):
    "Whatever the generator did before: the same run has the same losses; another seed has others."
    start = save_backbone(regnety("regnety_toy"), tmp_path / "start.safetensors")
    mixed = dataclasses.replace(RUN, mixup=0.5, cutmix=1.0, epochs=0.7)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.rand(3)
        run_finetune(dataclasses.replace(mixed, seed=seed, run_dir=str(tmp_path / name), model="seer:" + str(start)))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


def test_semi_supervised_list(tmp_path):
    "SimCLR's form, file names alone, and whole paths; a name twice in the data set must be given with its folder."
    names = ["n01/n01_5.JPEG", "n01/x.JPEG", "n02/n02_7.JPEG", "n02/x.JPEG"]
    data = TaskData("imagenet1k", "train", ("n01", "n02"), [0, 0, 1, 1], lambda i: None, names.__getitem__)
    path = tmp_path / "1percent.txt"
    for text, want in (("n02_7.JPEG\nn01_5.JPEG\n", [0, 2]), ("n02/x.JPEG\n\nn01_5.JPEG", [0, 3]), ("n01_5.JPEG\nn01_5.JPEG\n", [0])):
        path.write_text(text)
        assert finetune.listed_images(data, path) == want
    for text, message in (("x.JPEG\n", "several images"), ("n03_1.JPEG\n", "1 of 1 names .* such as 'n03_1.JPEG'"), ("\n", "names no image")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message): finetune.listed_images(data, path)


def test_a_bad_image_is_replaced_with_its_label(tmp_path):
    "Image i shows its label; number 3 cannot be read. No view may come with another image's label."
    def read(i):
        if i == 3: raise BadImage("truncated", "cut short")
        return torch.full((3, 8, 8), int(labels[i]), dtype=torch.uint8)
    labels = torch.arange(12)
    data = TaskData("toy_scenes", "train", tuple("abcdefghijkl"), labels, read)
    loader = finetune.train_loader(dataclasses.replace(RUN, augment="none", colours="none", image_size=8), data, Preprocess(), bad_images=tmp_path / "bad.jsonl")
    images, got = next(iter(loader))
    assert (images[:, 0, 0, 0] == got).all() and 3 not in got and len(got) == 12
    assert "truncated" in (tmp_path / "bad.jsonl").read_text()


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    torch.set_num_threads(1)
    return folder, run_finetune(dataclasses.replace(RUN, run_dir=str(folder)))


def test_files_of_a_run(straight):
    folder, result = straight
    scores, test = np.load(folder / "scores.npy"), open_task("toy_scenes", split="test", n=19)
    assert scores.dtype == np.float32 and result.value == np.mean(scores.argmax(1) == test.labels.numpy()) and result.n == 19
    backbone, classifier = (load(folder / "model.safetensors") for load in (load_backbone, load_classifier))
    assert backbone.preprocess == Preprocess(32, 32)
    with torch.no_grad(): logits = classifier(backbone(torch.stack([backbone.preprocess(test[i][0]) for i in range(19)])))
    np.testing.assert_allclose(scores, logits.numpy(), atol=1e-4, rtol=1e-3)
    assert [row["learning_rate"] for row in MetricLog(folder / "metrics.jsonl").rows()] == pytest.approx([0.1 * 12 / 256] * 3 + [0.01 * 12 / 256] * 3)
    assert saved_steps(folder / "checkpoints")[-1] == 6 == result.details["steps"]


@pytest.mark.parametrize("step", [2, 5])
def test_a_stopped_run_ends_with_the_same_bits(straight, tmp_path, step):
    folder, result = straight
    with pytest.MonkeyPatch.context() as patch:
        def stopping(training, *rest):
            if training.step == step: signal.raise_signal(signal.SIGTERM)
            return train_step(training, *rest)
        patch.setattr(finetune, "train_step", stopping)
        if step == 5: run_finetune(dataclasses.replace(RUN, run_dir=str(tmp_path)))                  # told in the last step: there is nothing left to stop
        else:
            with pytest.raises(Preempted, match=f"step {step + 1} of 6 is saved"): run_finetune(dataclasses.replace(RUN, run_dir=str(tmp_path)))
    again = run_finetune(dataclasses.replace(RUN, run_dir=str(tmp_path), log_every=1))
    for name in ("model.safetensors", "scores.npy"): assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert losses(tmp_path) == losses(folder) and dataclasses.replace(again, seconds=0) == dataclasses.replace(result, seconds=0)


def test_nothing_is_written_for_what_cannot_run(tmp_path):
    folder = tmp_path / "run"
    (tmp_path / "list.txt").write_text("no_such_image.png\n")
    for changes, message in (({"task": "toy_scene"}, "did you mean"), ({"model": "seer:/nowhere/x.safetensors"}, "no file"), ({"head": "swav"}, "no|none"),
                             ({"train_images": 0, "train_list": str(tmp_path / "list.txt")}, "no_such_image"), ({"paper_model": "seer_10b"}, "no published score"), ({"resize": 8}, "crop <= size")):
        with pytest.raises((ValueError, FileNotFoundError), match=message): run_finetune(dataclasses.replace(RUN, run_dir=str(folder), **changes))
    assert not folder.exists()


def test_another_configuration_is_refused_in_the_same_folder(straight):
    folder, result = straight
    with pytest.raises(ValueError, match="lr was 0.1, now 0.2"): run_finetune(dataclasses.replace(RUN, run_dir=str(folder), lr=0.2))
    assert run_finetune(dataclasses.replace(RUN, run_dir=str(folder), workers=1)) == result                  # where it runs is free to change


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        run_finetune(dataclasses.replace(RUN, run_dir=str(tmp_path), lr=1e30, epochs=4))
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("batch_norm", [True, False])
def test_swav_head_keeps_the_first_layer(tmp_path, batch_norm):
    from safetensors.torch import save_file
    torch.manual_seed(0)
    swav = SwAV(regnety("regnety_toy"), SwAVHead(352, (24, 16), 8, 10, batch_norm))
    save_file({name: t.contiguous() for name, t in swav.state_dict().items()}, tmp_path / "swav.safetensors")
    config = dataclasses.replace(RUN, model=f"seer:{tmp_path}/swav.safetensors", head="swav", run_dir=str(tmp_path / "run"), epochs=1)
    model = finetune.new_classifier(config, 17)
    assert torch.equal(model.head.projection[0].weight, swav.head.projection[0].weight) and model.head.classifier.weight.shape == (17, 24)
    x, layers = torch.randn(6, 352), swav.head.projection[:3] if batch_norm else swav.head.projection[:1]
    want = layers(x) if batch_norm else torch.nn.BatchNorm1d(24)(layers(x)).relu()
    torch.testing.assert_close(model.head.projection(x), want)
    run_finetune(config)
    again, test = finetune.load_finetuned(tmp_path / "run" / "model.safetensors"), open_task("toy_scenes", split="test", n=19)
    np.testing.assert_allclose(finetune.score_images(again, test).numpy(), np.load(tmp_path / "run" / "scores.npy"), atol=1e-4, rtol=1e-3)


def test_load_finetuned_refuses_a_backbone_alone(tmp_path):
    with pytest.raises(ValueError, match="0 classifiers"): finetune.load_finetuned(save_backbone(regnety("regnety_toy"), tmp_path / "b.safetensors"))


# ── many ranks ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def on_ranks(settings, images, labels, state):
    "Run; run again in another folder, told to stop on rank 1 in the second step, and go on; then take one step from a given state."
    import dataclasses
    import signal
    import torch
    from seer_nb.distributed import rank, setup
    from seer_nb.evaluate import finetune
    from seer_nb.regnet import regnety
    config, plain = finetune.FinetuneConfig(**settings), finetune.train_step
    result = finetune.run_finetune(config)
    other = dataclasses.replace(config, run_dir=config.run_dir + "_stopped")
    def told(training, *rest):
        if training.step == 1 and rank() == 1: signal.raise_signal(signal.SIGUSR2)
        return plain(training, *rest)
    finetune.train_step = told
    try: finetune.run_finetune(other)
    except finetune.Preempted as error: said = str(error)
    finetune.train_step = plain
    again = finetune.run_finetune(other)
    model = finetune.Classifier(regnety("regnety_toy"), finetune.Head(352, 5), finetune.Preprocess())
    model.load_state_dict(state)
    device = setup("cpu")
    training = finetune.start_training(finetune.place_model(model, config, device), config, device)
    mine = slice(rank() * len(images) // 2, (rank() + 1) * len(images) // 2)
    plain(training, lambda: finetune.classification_loss(model, images[mine], labels[mine], config), 0.1)
    stepped = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in model.state_dict().items()}
    alone = finetune.place_model(finetune.Classifier(regnety("regnety_toy"), finetune.Head(352, 5), finetune.Preprocess()), dataclasses.replace(config, norm_group=1), device).train()
    with torch.no_grad(): alone(images[mine].float() / 255)                              # each rank is a group, with averages of its own
    own = (mean := next(alone.buffers())).clone()
    finetune.agree_on_buffers(alone)
    return {"value": result.value, "again": again.value, "said": said, "stepped": stepped, "own": own, "agreed": mean}


def test_two_ranks_equal_one_and_stop_together(straight, tmp_path):
    """The curve of one process; one step that changes every weight as one process does; and after a signal to one rank the bits of two undisturbed ranks.

    19 test images: the ranks have unequal shares.
    """
    folder, alone = straight
    torch.manual_seed(0)
    model = Classifier(regnety("regnety_toy"), Head(352, 5), Preprocess())
    images, labels, state = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8), torch.arange(16) % 5, {name: t.clone() for name, t in model.state_dict().items()}
    two, other = run_ranks(on_ranks, 2, dataclasses.asdict(dataclasses.replace(RUN, run_dir=str(tmp_path / "two"))), images, labels, state, timeout=180)
    for name in ("value", "again", "said"): assert two[name] == other[name]
    assert torch.equal(two["agreed"], two["own"]) and torch.equal(other["agreed"], two["own"]) and not torch.equal(other["own"], two["own"])     # one network at the end
    assert two["value"] == two["again"] and "step 3 of 6 is saved" in two["said"]
    training = start_training(model.train(), RUN, CPU)
    train_step(training, lambda: classification_loss(model, images, labels, RUN), 0.1)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point(): continue
        moved = (tensor - state[name]).norm()
        assert (two["stepped"][name] - tensor).norm() <= 0.05 * moved + 1e-6, name                  # a ReLU that rounding turns on or off is a percent
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "two"))[0], torch.tensor(losses(folder))[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "two")), torch.tensor(losses(folder)), atol=0.05, rtol=0)  # BatchNorm on a few tiny crops magnifies rounding
    for name in ("model.safetensors", "scores.npy"): assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "two_stopped" / name).read_bytes()
    assert losses(tmp_path / "two") == losses(tmp_path / "two_stopped")
    row, = read_results(tmp_path / "two" / "results.jsonl")
    assert row.value == two["value"] and row.n == 19
    model, test = finetune.load_finetuned(tmp_path / "two" / "model.safetensors"), open_task("toy_scenes", split="test", n=19)
    np.testing.assert_allclose(finetune.score_images(model, test).numpy(), np.load(tmp_path / "two" / "scores.npy"), atol=1e-4, rtol=1e-3)


def test_sharded_alone_with_checkpointed_stages_is_the_plain_run(straight, tmp_path):
    folder, _ = straight
    run_finetune(dataclasses.replace(RUN, run_dir=str(tmp_path), sharded=True, cuts="[[1],[1],[],[]]", channels_last=False, epochs=0.7))
    torch.testing.assert_close(losses(tmp_path)[0], losses(folder)[0], atol=2e-4, rtol=0)
    assert losses(tmp_path)[1] == pytest.approx(losses(folder)[1], abs=0.1)
