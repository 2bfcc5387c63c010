"Plans against torchvision's distributions, the fast renderer against the plain one, the plain one against torchvision's transforms."
import dataclasses
import itertools

import cv2
import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader

from seer_nb import multicrop
from seer_nb.core import stateless_rng
from seer_nb.images import Samples, StatelessSampler
from seer_nb.multicrop import (ATTEMPTS, RATIO, Colours, CropPlan, GpuAugment, MultiCrop, collate_crops, draw_plan, fit_boxes, init_worker, normalize,
                               render_fast, render_plain)

LARGE, SMALL = (0.14, 1.0), (0.05, 0.14)


def picture(height=375, width=500, seed=0):
    "Smooth shapes with edges, texture and saturated colours: what photographs have."
    rng = np.random.default_rng(seed)
    low = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = cv2.resize(low, (width, height), interpolation=cv2.INTER_CUBIC).astype(int)
    image += rng.integers(-12, 13, (height, width, 1))
    image[height // 3: height // 2, width // 4: width // 2] = (250, 30, 20)
    return torch.from_numpy(image.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def plans(count, height=375, width=500, crops=((160, LARGE), (96, SMALL)), **options):
    size, scale = np.array([s for s, _ in crops]), np.array([r for _, r in crops])
    return [draw_plan(stateless_rng(1, i), height, width, size, scale, **options) for i in range(count)]


def gap(a, b): return (a.int() - b.int()).abs().numpy()


# --- the plan against torchvision -------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [LARGE, SMALL])
@pytest.mark.parametrize("height, width", [(375, 500), (600, 200), (64, 64)])
def test_boxes_have_the_distribution_of_RandomResizedCrop(scale, height, width):
    ks = pytest.importorskip("scipy.stats").ks_2samp
    n = 4000
    ours = fit_boxes(np.random.default_rng(3).random((n, 2 * ATTEMPTS + 2)), height, width, np.tile([scale], (n, 1)))
    torch.manual_seed(3)
    image = torch.empty(3, height, width)
    theirs = np.array([T.RandomResizedCrop.get_params(image, scale, RATIO) for _ in range(n)])
    for measure in (lambda t, l, h, w: h * w, lambda t, l, h, w: w / h, lambda t, l, h, w: t / (height - h + 1), lambda t, l, h, w: l / (width - w + 1)):
        assert ks(measure(*ours.T), measure(*theirs.T)).pvalue > 1e-3


def test_boxes_of_extreme_images_fall_back_to_the_centre_as_torchvision_does():
    for height, width in ((20, 400), (400, 20), (8, 400), (1, 1), (1, 50), (50, 1)):
        ours = fit_boxes(np.random.default_rng(0).random((50, 2 * ATTEMPTS + 2)), height, width, np.tile([[0.999, 1.0]], (50, 1)))
        theirs = T.RandomResizedCrop.get_params(torch.empty(3, height, width), (0.999, 1.0), RATIO)
        assert (ours[:, 2:] > 0).all() and (ours[:, :2] >= 0).all()
        assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
        if max(height, width) > 1 and min(theirs[2:]) > 0: assert (ours == theirs).all()


def test_every_number_of_the_plan_has_its_distribution():
    kstest = pytest.importorskip("scipy.stats").kstest
    many = plans(3000, crops=((96, LARGE),) * 2)
    all_of = lambda name: np.concatenate([getattr(plan, name) for plan in many])
    n = len(all_of("flip"))
    for name, p in (("flip", 0.5), ("jitter", 0.8), ("grey", 0.2)):
        assert abs(all_of(name).mean() - p) < 4 * (p * (1 - p) / n) ** 0.5, name
    factor, sigma = all_of("factor"), all_of("sigma")
    for k in range(3): assert kstest(factor[:, k], "uniform", (0.2, 1.6)).pvalue > 1e-3
    assert kstest(factor[:, 3], "uniform", (-0.2, 0.4)).pvalue > 1e-3
    assert abs((sigma > 0).mean() - 0.5) < 0.03 and kstest(sigma[sigma > 0], "uniform", (0.1, 1.9)).pvalue > 1e-3
    counts = np.array([(all_of("order") == order).all(1).sum() for order in itertools.permutations(range(4))])
    assert counts.sum() == n and ((counts - n / 24) ** 2 / (n / 24)).sum() < 60       # chi-squared, 23 degrees: p about 4e-5
    both = np.stack([plan.flip for plan in many])
    assert abs((both[:, 0] == both[:, 1]).mean() - 0.5) < 0.04                        # crops of an image are independent


def test_plans_are_functions_of_their_keys():
    crop = MultiCrop()
    same = lambda a, b: all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(CropPlan))
    base = crop.plan(375, 500, 1, 2, 3)
    np.random.seed(9); torch.manual_seed(9)
    assert same(base, crop.plan(375, 500, 1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)): assert not same(base, crop.plan(375, 500, *other))
    tall = crop.plan(500, 375, 1, 2, 3)                                                # another shape moves the boxes only
    assert np.array_equal(tall.factor, base.factor) and np.array_equal(tall.sigma, base.sigma)


# --- the plain renderer against torchvision's own transforms ----------------------------------------------------------

def test_plain_is_what_torchvision_does_with_these_numbers(monkeypatch):
    image = picture()
    for plan in plans(40):
        for v, got in enumerate(render_plain(image, plan)):
            box, factor = plan.box[v].tolist(), plan.factor[v].tolist()
            monkeypatch.setattr(T.RandomResizedCrop, "get_params", staticmethod(lambda *_: box))
            monkeypatch.setattr(T.ColorJitter, "get_params", staticmethod(lambda *_: (torch.tensor(plan.order[v]), *factor)))
            sigma = float(plan.sigma[v])
            recipe = T.Compose([
                T.RandomResizedCrop(int(plan.size[v])), T.RandomHorizontalFlip(float(plan.flip[v])),
                T.RandomApply([T.ColorJitter(0.8, 0.8, 0.8, 0.2)], float(plan.jitter[v])), T.RandomGrayscale(float(plan.grey[v])),
                T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(sigma)) if sigma else x), T.PILToTensor()])
            assert torch.equal(got, recipe(Image.fromarray(image.permute(1, 2, 0).numpy())))


# --- the fast renderer against the plain one --------------------------------------------------------------------------

def only(**changes):
    "A plan of one whole-image crop with nothing in it but the changes."
    plan = dict(size=np.array([160]), box=np.array([[10, 20, 300, 380]]), flip=np.array([False]), jitter=np.array([False]),
                order=np.array([[0, 1, 2, 3]]), factor=np.array([[1.0, 1.0, 1.0, 0.0]]), grey=np.array([False]), sigma=np.zeros(1))
    return CropPlan(**{**plan, **{k: np.array([v]) for k, v in changes.items()}})


STAGES = {                             # changes -> largest allowed mean, 99th percentile, maximum
    "resize down": (dict(), 0.1, 1, 1), "resize up": (dict(box=[5, 6, 70, 80]), 0.1, 1, 1), "flip": (dict(flip=True), 0.1, 1, 1),
    "grey": (dict(grey=True), 0.1, 1, 1), "blur .1": (dict(sigma=0.1), 0.4, 1, 3), "blur .35": (dict(sigma=0.35), 0.8, 3, 6),
    "blur 1": (dict(sigma=1.0), 0.8, 4, 40), "blur 2": (dict(sigma=2.0), 0.8, 5, 40)}   # the maximum lies on the border


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("seed", [0, 1])
def test_each_stage_is_within_its_tolerance(stage, seed):
    changes, mean, p99, largest = STAGES[stage]
    image = picture(seed=seed)
    d = gap(render_fast(image, only(**changes))[0], render_plain(image, only(**changes))[0])
    assert d.mean() <= mean and np.percentile(d, 99) <= p99 and d.max() <= largest, (d.mean(), np.percentile(d, 99), d.max())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_colours(seed):
    crop = render_plain(picture(seed=seed), only())[0].permute(1, 2, 0).numpy().copy()
    pil = Image.fromarray(crop)
    for step, plain, factors, mean, largest in ((0, TF.adjust_brightness, (0.2, 0.7, 1.0, 1.31, 1.8), 0.01, 1), (1, TF.adjust_contrast, (0.2, 0.7, 1.0, 1.31, 1.8), 0.01, 1),
                                                (2, TF.adjust_saturation, (0.2, 0.7, 1.0, 1.31, 1.8), 0.3, 1), (3, TF.adjust_hue, (-0.2, -0.07, 0.0, 0.13, 0.2), 1.2, 16)):
        for factor in factors:
            ours = multicrop._turn_hue(crop, factor) if step == 3 else multicrop._blend(crop, step, factor)
            d = np.abs(ours.astype(int) - np.asarray(plain(pil, factor)).astype(int))
            assert d.mean() <= mean and d.max() <= largest, (step, factor, d.mean(), d.max())


def compare(image, count):
    pairs = [pair for plan in plans(count, *image.shape[1:]) for pair in zip(render_fast(image, plan), render_plain(image, plan))]
    return np.array([(gap(a, b).mean(), np.percentile(gap(a, b), 99)) for a, b in pairs]).T


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_whole_plans_of_photographs_are_within_the_stated_tolerance(name):
    photo = getattr(pytest.importorskip("skimage.data"), name)()
    means, p99s = compare(torch.from_numpy(photo.copy()).permute(2, 0, 1), 40)
    assert means.mean() < 0.6 and np.mean(means < 1.5) > 0.95 and np.mean(p99s <= 8) > 0.95


def test_whole_plans_of_glaring_colours_are_close():
    means, p99s = compare(picture(), 40)                 # a step of the 8-bit hue is 6 levels of a saturated colour
    assert means.mean() < 0.9 and np.median(p99s) <= 4


def test_both_renderers_cut_the_same_box():
    "An image whose colours are its coordinates: a box shifted by a pixel would be seen."
    ramp = np.zeros((250, 250, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(250)[:, None], np.arange(250)
    image = torch.from_numpy(ramp).permute(2, 0, 1)
    for plan in plans(50, 250, 250, jitter=0.0, grey=0.0, blur=0.0):
        for v, (a, b) in enumerate(zip(render_fast(image, plan), render_plain(image, plan))):
            assert gap(a, b).max() <= 1
            top, left, h, w = plan.box[v]
            assert abs(a[0].float().mean() - (top + (h - 1) / 2)) < 0.6 and abs(a[1].float().mean() - (left + (w - 1) / 2)) < 0.6


# --- the object -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("height, width", [(1, 1), (1, 40), (40, 1), (2, 3), (8, 8), (8, 400), (400, 8), (97, 31)])
def test_tiny_and_extreme_images(height, width):
    image = picture(max(height, 8), max(width, 8))[:, :height, :width]
    crop = MultiCrop(large_size=32, small_size=16)
    for index in range(20):
        views = crop(image, 0, index)
        assert [tuple(view.shape) for view in views] == [(3, 32, 32)] * 2 + [(3, 16, 16)] * 6
        assert all(view.dtype == torch.uint8 for view in views)
        plain = render_plain(image, crop.plan(height, width, 0, index))
        assert np.mean([gap(a, b).mean() for a, b in zip(views, plain)]) < 3


def test_memory_layout_of_the_image_changes_nothing_and_the_image_is_left_alone():
    image, crop = picture(), MultiCrop(n_small=4, large_size=160)
    planes, before = image.contiguous(), image.clone()
    assert image.permute(1, 2, 0).is_contiguous() and planes.is_contiguous()
    for index in range(5):
        for a, b in zip(crop(image, 0, index), crop(planes, 0, index)): assert torch.equal(a, b)
    for view in MultiCrop(jitter=0.0, grey=0.0, blur=0.0, flip=0.0, large_size=375)(image): view.zero_()
    assert torch.equal(image, before)


def test_the_number_of_threads_changes_nothing_and_is_not_touched():
    image, crop, threads = picture(), MultiCrop(), (torch.get_num_threads(), cv2.getNumThreads())
    one = crop(image)
    assert (torch.get_num_threads(), cv2.getNumThreads()) == threads
    try:
        init_worker(0)
        assert torch.get_num_threads() == 1 and cv2.getNumThreads() == 1
        assert all(torch.equal(a, b) for a, b in zip(crop(image), one))
    finally:
        torch.set_num_threads(threads[0]); cv2.setNumThreads(threads[1])


def test_bad_arguments():
    for bad in (dict(n_large=-1), dict(n_large=0, n_small=0), dict(large_size=0), dict(small_size=-5), dict(large_scale=(0, 1)), dict(small_scale=(0.5, 0.2)),
                dict(large_scale=(0.5, 1.5)), dict(flip=1.1), dict(blur=-0.1), dict(sigma=(2, 1)), dict(strength=3), dict(strength=-1)):
        with pytest.raises(ValueError): MultiCrop(**bad)
    with pytest.raises(TypeError): MultiCrop(n_lrge=2)
    with pytest.raises(TypeError, match="uint8"): MultiCrop()(picture().float())
    for shape in ((375, 500, 3), (1, 3, 8, 8), (3, 0, 8), (1, 8, 8)):
        with pytest.raises(ValueError, match="shape"): MultiCrop()(torch.zeros(shape, dtype=torch.uint8))


def test_strength_zero_and_only_small_crops():
    crop = MultiCrop(n_large=0, n_small=3, strength=0.0, grey=0.0, blur=0.0)
    views = crop(picture())
    quiet = render_fast(picture(), dataclasses.replace(crop.plan(375, 500), jitter=np.zeros(3, bool)))
    assert len(views) == 3 and all(gap(a, b).mean() < 2 for a, b in zip(views, quiet))   # to 8-bit HSV and back


def test_normalize():
    batch = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    want = TF.normalize(batch / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert torch.allclose(normalize(batch), want, atol=1e-5) and torch.allclose(normalize(batch[0]), want[0], atol=1e-5)
    assert normalize(batch, torch.bfloat16).dtype == torch.bfloat16
    last = batch.to(memory_format=torch.channels_last)
    assert normalize(last).is_contiguous(memory_format=torch.channels_last) and torch.equal(normalize(last), normalize(batch))
    with pytest.raises(TypeError, match="uint8"): normalize(want)


# --- colours on the device --------------------------------------------------------------------------------------------

SETTINGS = dict(n_large=2, n_small=2, large_size=64, small_size=32)


def both(count=24, source=picture, **options):
    "The batches of the CPU path and those of GpuAugment, for the same images and plans."
    crop = MultiCrop(**{**SETTINGS, **options})
    cut = dataclasses.replace(crop, on_device=True)
    images = [source(90 + i, 120, seed=i) for i in range(count)]
    batches, colours = collate_crops([cut(image, 3, i, 1) for i, image in enumerate(images)])
    return collate_crops([crop(image, 3, i, 1) for i, image in enumerate(images)]), batches, colours


def noise(height, width, seed): return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).permute(2, 0, 1)


@pytest.mark.parametrize("source", [picture, noise])
def test_the_device_renders_the_same_pixels(source):
    here, batches, colours = both(source=source)
    there = GpuAugment()(batches, colours)
    for a, b in zip(here, there):
        assert b.dtype == torch.uint8 and b.shape == a.shape and b.is_contiguous(memory_format=torch.channels_last)
        d = gap(a, b)
        assert (d == 0).mean() > 0.98 and d.mean() < 0.05 and np.mean([gap(x, y).mean() < 0.25 for x, y in zip(a, b)]) == 1


@pytest.mark.parametrize("only, share", [(dict(jitter=0, grey=0, blur=0), 1), (dict(flip=0, jitter=0, grey=1, blur=0), 0.995), (dict(flip=0, jitter=0, grey=0, blur=1), 0.995),
                                         (dict(flip=0, jitter=1, grey=0, blur=0), 0.98), (dict(flip=1, jitter=0, grey=0, blur=0), 1)])
def test_each_stage_on_the_device(only, share):
    here, batches, colours = both(**only)
    there = GpuAugment()(batches, colours)
    assert all((gap(a, b) == 0).mean() >= share and gap(a, b).mean() < 0.02 for a, b in zip(here, there))
    if only.get("flip", 1) or only["jitter"] or only["blur"]: assert any(not torch.equal(a, b) for a, b in zip(batches, there))


def test_nothing_to_do_changes_nothing_and_crops_are_left_alone():
    _, batches, colours = both(flip=0, jitter=0, grey=0, blur=0)
    before = [batch.clone() for batch in batches]
    assert all(torch.equal(a, b) for a, b in zip(GpuAugment()(batches, colours), before))
    _, batches, colours = both()
    before = [batch.clone() for batch in batches]
    GpuAugment()(batches, colours)
    assert all(torch.equal(a, b) for a, b in zip(batches, before))


def test_the_device_is_never_asked_for_a_value():
    "Tensors on the meta device have none: a mask in brackets, .item() or nonzero() would raise."
    _, batches, colours = both()
    ghosts = GpuAugment()([batch.to("meta") for batch in batches], colours)
    assert [ghost.shape for ghost in ghosts] == [batch.shape for batch in batches] and ghosts[0].device.type == "meta"


def test_an_image_does_not_depend_on_its_batch():
    _, batches, colours = both(12)
    whole = GpuAugment()(batches, colours)
    for i in (0, 5, 11):
        alone = GpuAugment()([batch[i:i + 1] for batch in batches], Colours(*(part[:, i:i + 1] for part in colours)))
        assert all(gap(a[i:i + 1], b).max() <= 1 and (gap(a[i:i + 1], b) == 0).mean() > 0.999 for a, b in zip(whole, alone))


def test_cutting_alone_is_the_first_half_of_the_recipe():
    image = picture()
    crops, plan = MultiCrop(**SETTINGS, on_device=True)(image, 1, 2, 3)
    plain = render_fast(image, dataclasses.replace(plan, flip=plan.flip & False, jitter=plan.jitter & False, grey=plan.grey & False, sigma=0 * plan.sigma))
    assert all(torch.equal(a, b) for a, b in zip(crops, plain))
    same = MultiCrop(**SETTINGS).plan(*image.shape[1:], 1, 2, 3)
    assert all(np.array_equal(getattr(plan, f.name), getattr(same, f.name)) for f in dataclasses.fields(CropPlan))


def test_wrong_batches_are_refused():
    _, batches, colours = both(4)
    with pytest.raises(ValueError, match="do not fit"): GpuAugment()(batches[:3], colours)
    with pytest.raises(ValueError, match="do not fit"): GpuAugment()([batch[:2] for batch in batches], colours)
    with pytest.raises(TypeError, match="uint8"): GpuAugment()([batch.float() for batch in batches], colours)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    here, batches, colours = both()
    sent = [batch.cuda() for batch in batches]
    GpuAugment()(sent, colours)                                                        # loads the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: there = GpuAugment()(sent, colours)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert all((gap(a, b.cpu()) == 0).mean() > 0.98 and gap(a, b.cpu()).mean() < 0.05 for a, b in zip(here, there))


class Pictures:
    def __len__(self): return 7
    def name(self, i): return str(i)
    def __getitem__(self, i): return picture(60, 80, seed=i)


def test_workers_give_the_crops_of_the_main_process():
    "Also that a worker forked after OpenCV has run in the parent does not hang."
    crop, runs = MultiCrop(n_small=1, large_size=32, small_size=16), {}
    crop(picture(400, 400))
    for workers in (0, 2):
        loader = DataLoader(Samples(Pictures(), crop, seed=5), sampler=StatelessSampler(7, seed=5), batch_size=4, num_workers=workers,
                            collate_fn=collate_crops, worker_init_fn=init_worker if workers else None, timeout=60 if workers else 0)
        runs[workers] = [batch for batch, _ in zip(loader, range(4))]
    loader = DataLoader(Samples(Pictures(), dataclasses.replace(crop, on_device=True), seed=5), sampler=StatelessSampler(7, seed=5), batch_size=4, num_workers=2,
                        collate_fn=collate_crops, worker_init_fn=init_worker, timeout=60)
    batch, colours = next(iter(loader))
    assert all((gap(a, b) == 0).mean() > 0.95 for a, b in zip(GpuAugment()(batch, colours), runs[0][0]))
    for a, b in zip(runs[0], runs[2]):
        assert [tuple(x.shape) for x in a] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)]
        assert all(torch.equal(x, y) and y.is_contiguous(memory_format=torch.channels_last) for x, y in zip(a, b))
