"Copy detection against independent R-MAC, torch's power mean, scikit-learn's PCA and average precision, faiss, and hand-computed cases."
import dataclasses
import itertools
import json
import math
import os
import pickle
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score
from torch import nn

from seer_nb.checkpoints import CheckpointError, lock_folder, unlock
from seer_nb.core import make_config, write_atomic
from seer_nb.evaluate import copies
from seer_nb.evaluate.copies import CopiesConfig, PCAWhitening, Recipe, Wanted
from seer_nb.evaluate.tasks import open_model, read_results


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def photo(seed, height=60, width=80):
    "A smooth random picture, uint8 [3, H, W]."
    noise = torch.from_numpy(np.random.default_rng(seed).uniform(0, 255, (1, 3, 5, 7))).float()
    return F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 255)[0].byte()


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, quality=95)


# ── pooling ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def slow_rmac(one, levels):
    "R-MAC of one map [C, h, w], square by square, in exact fractions, from the text of the paper."
    C, H, W = one.shape
    w = min(H, W)
    m = min(range(1, 7), key=lambda n: abs(Fraction(w * w - w * Fraction(max(H, W) - w, n), w * w) - Fraction(2, 5)))
    total = torch.zeros(C, dtype=torch.float64)
    for level in range(1, levels + 1):
        side = int(Fraction(2 * w, level + 1))
        if side == 0: continue
        n_y, n_x = level + (m if H > W else 0), level + (m if W > H else 0)
        for i in range(n_y):
            for j in range(n_x):
                y = math.floor(Fraction(i * (H - side), n_y - 1)) if n_y > 1 else 0
                x = math.floor(Fraction(j * (W - side), n_x - 1)) if n_x > 1 else 0
                best = torch.tensor([max(one[c, y + a, x + b].item() for a in range(side) for b in range(side)) for c in range(C)], dtype=torch.float64)
                total += best / best.norm()
    return total / total.norm()


@pytest.mark.parametrize("shape", [(7, 7), (6, 9), (9, 6), (3, 14), (2, 2), (1, 5), (1, 1)])
@pytest.mark.parametrize("levels", [1, 3])
def test_rmac_is_the_slow_one(shape, levels):
    maps = torch.rand(2, 4, *shape, generator=torch.Generator().manual_seed(0)) + 0.01
    np.testing.assert_allclose(copies.rmac(maps, levels).numpy(), np.stack([slow_rmac(one, levels) for one in maps]), atol=1e-6)


def test_regions_lie_inside_and_reach_the_borders():
    for height, width in itertools.product(range(1, 20), (1, 3, 7, 16, 40)):
        regions = copies.rmac_regions(height, width, 3)
        assert all(0 <= y <= height - side and 0 <= x <= width - side for y, x, side in regions)
        assert max(y + side for y, _, side in regions) == height and max(x + side for _, x, side in regions) == width
        largest = [place for *place, side in regions if side == min(height, width)]
        if height == width: assert largest[0] == [0, 0]
        else: assert len(largest) >= 2 and (max(height, width) > 7 * min(height, width) or np.diff(sorted(map(sum, largest[:7]))).max() <= min(height, width))    # neighbours touch


def test_a_square_map_has_1_4_and_9_regions():
    assert [len(copies.rmac_regions(14, 14, levels)) for levels in (1, 2, 3)] == [1, 5, 14]
    assert copies.rmac_regions(14, 14, 2)[1:] == [(0, 0, 9), (0, 5, 9), (5, 0, 9), (5, 5, 9)]
    for bad in ((0, 3, 1), (3, 3, 0)):
        with pytest.raises(ValueError, match="R-MAC"): copies.rmac_regions(*bad)


@pytest.mark.parametrize("p", [1, 3, 4.5])
def test_gem_is_the_power_mean_of_torch(p):
    maps = torch.rand(3, 5, 6, 4)
    torch.testing.assert_close(copies.gem(maps, p), F.lp_pool2d(maps, p, (6, 4)).flatten(1) / 24 ** (1 / p), rtol=1e-4, atol=1e-6)


def test_gem_runs_from_average_to_maximum_without_overflow():
    maps = torch.rand(2, 3, 5, 5) + 0.1
    torch.testing.assert_close(copies.gem(maps, 1), F.adaptive_avg_pool2d(maps, 1).flatten(1))
    assert torch.equal(copies.gem(maps, math.inf), F.adaptive_max_pool2d(maps, 1).flatten(1))
    assert (copies.gem(maps, 2) < copies.gem(maps, 8)).all()
    assert copies.gem(maps * 1e30, 8).isfinite().all() and copies.gem(torch.zeros(1, 2, 3, 3), 4).isfinite().all()
    with pytest.raises(ValueError, match="above 0"): copies.gem(maps, 0)


# ── whitening ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def vectors(n=400, dim=12, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(n, dim)) * np.linspace(3, 0.3, dim) @ np.linalg.qr(rng.normal(size=(dim, dim)))[0] + 5).astype(np.float32)


@pytest.mark.parametrize("n", [3, 12])
def test_whitening_is_scikit_learns(n):
    x = vectors()
    ours = PCAWhitening.fit(torch.from_numpy(x).split(70), n)
    theirs = PCA(n, whiten=True, svd_solver="full").fit(x)
    expected = theirs.transform(x[:50]) / math.sqrt(len(x) - 1)               # theirs divides the sum of squares by N - 1
    found = ours(torch.from_numpy(x[:50])).numpy()
    np.testing.assert_allclose(found * np.sign((found * expected).sum(0)), expected, atol=1e-5)


def test_whitening_far_from_the_origin_and_the_floor():
    x = torch.from_numpy(vectors())
    near, far = PCAWhitening.fit([x], 5), PCAWhitening.fit((x + 1000).split(64), 5)
    np.testing.assert_allclose((near(x) @ near(x).T).numpy(), (far(x + 1000) @ far(x + 1000).T).numpy(), atol=1e-4)
    flat = torch.cat([x, torch.zeros(len(x), 1)], 1)                           # a direction in which nothing varies
    spread = PCAWhitening.fit([flat], 13).matrix.norm(dim=1)
    assert float(spread[-1] / spread[0]) == pytest.approx(1e5 ** 0.5, rel=1e-3)


@pytest.mark.parametrize("batches, n, message", [([torch.rand(5, 3)], 4, "5 vectors of 3"), ([torch.rand(3, 3)], 3, "3 vectors"), ([], 1, "0 vectors"), ([torch.rand(5, 3)], 0, "do not give 0"),
                                                 ([torch.full((5, 3), math.nan)], 2, "not finite"), ([torch.ones(5, 3)], 2, "all vectors are equal")])
def test_whitening_refuses(batches, n, message):
    with pytest.raises(ValueError, match=message): PCAWhitening.fit(batches, n)


# ── scoring ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_plain_form_is_scikit_learns():
    rng = np.random.default_rng(0)
    scores, targets = rng.normal(size=(20, 30)), rng.random((20, 30)) < 0.2
    targets[:, 0] = True
    ranks, positives = np.argsort(-scores, 1), [np.flatnonzero(t) for t in targets]
    expected = np.mean([average_precision_score(t, s) for t, s in zip(targets, scores)])
    assert copies.mean_average_precision(ranks, positives, plain=True) == pytest.approx(expected)
    assert copies.mean_average_precision(ranks, positives) < expected
    junk = [np.setdiff1d(np.arange(5, 12), p) for p in positives]              # junk is as if it had never been in the database
    without = np.mean([average_precision_score(np.delete(t, j), np.delete(s, j)) for t, s, j in zip(targets, scores, junk)])
    assert copies.mean_average_precision(ranks, positives, junk, plain=True) == pytest.approx(without)


def test_trapezoids_are_an_integral():
    "The area under the line that joins (recall, precision) before and after each hit, by NumPy."
    rng = np.random.default_rng(1)
    for _ in range(20):
        hits = rng.random(25) < 0.3
        hits[3] = True
        at, area, found = np.flatnonzero(hits), 0.0, 0
        for place in at:
            before = found / place if place else 1.0
            area += np.trapezoid([before, (found + 1) / (place + 1)], [found / len(at), (found + 1) / len(at)])
            found += 1
        assert copies.query_precision(at, len(at)) == pytest.approx(area)


def test_revisitop_by_hand():
    "Six images; 0 and 4 are right, 2 and 5 junk. The ranking 2 0 1 5 3 4 is 0 1 3 4 without junk: right at the places 1 and 4."
    expected = ((1 + 1) / 2 + (1 / 3 + 2 / 4) / 2) / 2
    ranks = [[2, 0, 1, 5, 3, 4]]
    assert copies.mean_average_precision(ranks, [[0, 4]], [[2, 5]]) == pytest.approx(expected)
    assert copies.mean_average_precision(ranks, [[0, 4]], [[2, 5]], plain=True) == pytest.approx((1 + 2 / 4) / 2)
    assert copies.mean_average_precision(ranks, [[0, 4]]) == pytest.approx(((0 + 1 / 2) / 2 + (1 / 5 + 2 / 6) / 2) / 2)
    at = copies.places(ranks[0], [0, 4], [2, 5])
    assert at.tolist() == [0, 3] and [copies.precision_at(at, k) for k in (1, 2, 10)] == [1, 1 / 2, 2 / 4]     # at 10: down to the last right one
    cut = copies.places(ranks[0][:3], [0, 4], [2, 5])                          # the second is not found
    assert copies.query_precision(cut, 2) == pytest.approx(0.5)


def test_queries_without_a_right_image_are_left_out_and_contradictions_refused():
    assert copies.mean_average_precision([[0, 1], [1, 0]], [[0], []]) == 1
    with pytest.raises(ValueError, match="no query"): copies.mean_average_precision([[0, 1]], [[]])
    with pytest.raises(ValueError, match="image 1 is both"): copies.mean_average_precision([[0, 1]], [[1]], [[1]])
    with pytest.raises(ValueError): copies.mean_average_precision([[0, 1]], [[1], [0]])


def test_chance_is_what_random_orders_get():
    wanted, rng = [Wanted(0, [1, 2], junk=[5])] * 40, np.random.default_rng(0)
    orders = [copies.mean_average_precision([rng.permutation(12)], [[1, 2]], [[5]]) for _ in range(3000)]
    assert copies.chance_precision(wanted, 12) == pytest.approx(np.mean(orders), abs=0.03)
    cut = [copies.query_precision(copies.places(rng.permutation(12)[:4], [1, 2], [5]), 2) for _ in range(3000)]
    assert copies.chance_precision(wanted, 12, depth=4) == pytest.approx(np.mean(cut), abs=0.03)


def test_groups_are_resampled_together():
    values, groups = np.repeat([1.0, 0, 1, 0, 1, 0], 20), np.repeat(list("abcdef"), 20)
    value, low, high = copies.grouped_mean(np.append(values, np.nan), np.append(groups, "g"))
    _, alone_low, alone_high = copies.grouped_mean(values, np.arange(120))
    assert value == 0.5 and high - low > 2 * (alone_high - alone_low)
    value, low, high = copies.grouped_mean([1, 0, 1, 1], ["a", "a", "b", "a"])
    assert value == 0.75 and low < high
    value, low, high = copies.grouped_mean([1, 0, math.nan], ["a", "a", "b"])      # one building says nothing about others
    assert value == 0.5 and math.isnan(low) and math.isnan(high)


# ── search ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def unit(n, dim, seed): return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("depth", [0, 7])
def test_faiss_finds_the_same(depth):
    pytest.importorskip("faiss")
    queries, database = unit(20, 16, 0), unit(300, 16, 1)
    ours = copies.search(queries, database, depth)
    assert torch.equal(ours, copies.search(queries, database, depth, backend="faiss")) and ours.shape == (20, depth or 300)
    with pytest.raises(ValueError, match="not finite"): copies.search(queries, database * math.nan, backend="faiss")


def test_search_is_a_sort_and_scores_do_not_need_all_of_it():
    queries, database = unit(20, 16, 0), unit(300, 16, 1)
    assert torch.equal(copies.search(queries, database), (queries @ database.T).argsort(dim=1, descending=True))
    wanted = [Wanted(i, [int(copies.search(queries[i:i + 1], database)[0, i])]) for i in range(20)]      # the right one of query i has place i
    whole, cut = (copies.score_queries(queries, database, wanted, depth=depth).precision for depth in (0, 10))
    assert np.array_equal(whole[:10], cut[:10]) and (cut[10:] == 0).all() and (whole[10:] > 0).all()


@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_equals_have_one_order(backend):
    "Every image is there three times; equals come in the order of the database, late ones after the others, also where the depth cuts through them."
    if backend == "faiss": pytest.importorskip("faiss")
    queries, database = unit(20, 16, 0), unit(100, 16, 1).repeat(3, 1)
    first = (queries @ database[:100].T).argsort(dim=1, descending=True)
    expected = (first[:, :, None] + 100 * torch.arange(3)).flatten(1)
    for depth in (1, 2, 7, 299, 300): assert torch.equal(copies.search(queries, database, depth, backend), expected[:, :depth])
    late = torch.stack([first + 100, first + 200, first], 2).flatten(1)
    for depth in (2, 7, 300): assert torch.equal(copies.search(queries, database, depth, backend, last=[range(100)] * 20), late[:, :depth])


@pytest.mark.parametrize("backend", ["torch", "faiss"])
@pytest.mark.parametrize("depth", [0, 5])
def test_a_constant_model_finds_nothing(backend, depth):
    if backend == "faiss": pytest.importorskip("faiss")
    same, wanted = F.normalize(torch.ones(30, 16)), [Wanted(i, [i, i + 1]) for i in range(8)]
    found = copies.score_queries(same[:8], same, wanted, depth=depth, backend=backend)
    assert found.plain.tolist() == [0 if depth else (1 / 29 + 2 / 30) / 2] * 8 and not found.first[:, 0].any()
    assert found.top[0].tolist() == [2, 3, 4, 5, 6, 7, 8][:depth or 7]


def test_a_missing_faiss_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'seer_nb\[peers\]'"): copies.search(unit(2, 4, 0), unit(2, 4, 0), backend="faiss")


# ── attacks and the toy set ──────────────────────────────────────────────────────────────────────────────────────────────────

def test_attacks_do_what_they_say():
    image = photo(0, 120, 160)
    for percent in copies.CROPS:
        kept = copies.attack(f"crops_{percent}", image)
        assert kept[0].numel() / image[0].numel() == pytest.approx(1 - percent / 100, abs=0.02)
    assert copies.attack("jpegqual_30", image).shape == (3, 30, 40)
    assert torch.equal(copies.attack("original", image), image)
    one, same, other = (copies.attack("strong", image, 3, k) for k in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    before = image.clone()
    copies.attack("strong", image, 1)
    assert torch.equal(before, image)


def test_toy_pixels_are_on_one_side_only():
    "Numbered pixels: no distractor or training image shows a pixel of an original."
    toy = copies.toy_copies(["original"], n_distractors=12, n_training=12)
    assert len(toy.database) == 50 and len(toy.queries) == 38 and len(toy.training) == 12
    assert all(torch.equal(toy.queries[w.query], toy.database[w.positives[0]]) for w in toy.splits["original"])
    seen = []
    real = copies.region
    try:
        copies.region = lambda rng, pixels: seen.append(pixels) or real(rng, pixels)
        copies.toy_copies(["original"], n_distractors=19, n_training=19)
    finally: copies.region = real
    from seer_nb.toyworld import pictures
    originals = {name: np.array_split(pixels, 3, axis=1)[1] for name, pixels in pictures().items()}
    assert len(seen) == 38 and not any(np.shares_memory(part, original) for part in seen for original in originals.values())


# ── descriptors ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def model(): return open_model("random:regnety_toy")


def test_shapes_and_batches_do_not_matter(model):
    images = [photo(i, *size) for i, size in enumerate([(60, 80), (80, 60), (60, 80), (40, 96), (60, 80), (64, 64), (96, 41)])]
    recipe = Recipe(side=64)
    whole, small = (copies.describe(model, images, recipe, batch_size=b) for b in (32, 1))
    torch.testing.assert_close(whole, small, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole[3], copies.describe(model, images[3:4], recipe)[0], atol=1e-5, rtol=0)
    assert not model.training and whole.shape == (7, 128)


def test_no_more_images_wait_than_eight_batches(model, monkeypatch):
    images, sizes = [photo(i, 20 + i, 64) for i in range(40)], []
    real = copies.tap_features
    monkeypatch.setattr(copies, "tap_features", lambda model, x, taps: sizes.append(len(x)) or real(model, x, taps))
    read = []
    class Watched:
        def __len__(self): return len(images)
        def __getitem__(self, i):
            read.append(i)
            assert len(read) - sum(sizes) <= 8 * 2 + 1
            return images[i]
    assert len(copies.describe(model, Watched(), Recipe(side=64), batch_size=2)) == 40 and sum(sizes) == 40


def test_whitened_scales_are_the_sum_of_all_regions(model):
    images = [photo(i) for i in range(6)]
    recipe = Recipe(side=64, scales=(1.0, 0.5))
    whitening = copies.fit_whitening(model, images, recipe, 8)
    expected = sum(copies.add_up(copies.region_vectors(copies.tap_features(model, model.preprocess.normalize(torch.stack([copies.view(images, i, side) for i in range(6)])), ["res4"])["res4"].detach()), whitening)
                   for side in (64, 32))
    torch.testing.assert_close(copies.describe(model, images, recipe, whitening), F.normalize(expected), atol=1e-5, rtol=0)


def test_models_without_maps_or_stages_are_told(model):
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Identity()
        def forward(self, x): return self.blocks(x.flatten(2).transpose(1, 2)[:, :50]).mean(1)
    images = [photo(0, 64, 64)]
    with pytest.raises(ValueError, match="50 tokens, not a map"): copies.describe(Tokens(), images, Recipe("blocks", side=64))
    assert copies.describe(Tokens(), images, Recipe("blocks", "mean", side=64)).shape == (1, 3)
    with pytest.raises(ValueError, match="no tap 'res4'"): copies.describe(Tokens(), images, Recipe(side=64))
    assert copies.describe(model, [photo(0, 80, 9)], Recipe("res5", side=64)).shape == (1, 352)      # a narrow picture is a map of one column
    with pytest.raises(ValueError, match="no images"): copies.describe(model, [], Recipe())


def test_images_that_cannot_be_read_are_named(model, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    with pytest.raises(ValueError, match="image 0 .broken.jpg. cannot be read"): copies.describe(model, copies.open_images(tmp_path), Recipe(side=64))


def test_boxes_are_cut_after_resizing():
    image = torch.zeros(3, 100, 200, dtype=torch.uint8)
    image[:, 20:60, 50:150] = 255
    boxed = copies.Chosen([image], [0], boxes=[[50, 20, 150, 60]])
    seen = copies.view(boxed, 0, 100)
    assert seen.shape == (3, 20, 50) and seen[:, 1:-1, 1:-1].float().mean() > 250
    assert copies.view(copies.Chosen(boxed, [0]), 0, 100).shape == (3, 20, 50)                         # of a part of a part, too
    for box in ([300, 0, 400, 50], [10, 10, 10, 40]):
        with pytest.raises(ValueError, match="empty or outside"): copies.view(copies.Chosen([image], [0], boxes=[box]), 0, 100)


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "CopyDays and Revisited Oxford with their folders and names, and a few pictures."
    root = tmp_path_factory.mktemp("data")
    images = {200000 + 100 * k: photo(k, 60 + 4 * k, 80) for k in range(6)}
    for number, image in images.items():
        save(root / f"copydays/database/{number}.jpg", image)
        save(root / f"copydays/database_and_distractors/original_{number}.jpg", image)
        save(root / f"copydays/queries/original_{number}.jpg", image)
        save(root / f"copydays/queries/crops_50_{number}.jpg", copies.crop(image, 50))
        save(root / f"copydays/queries/jpegqual_3_{number}.jpg", copies.recompress(image, 3, 1))
        save(root / f"copydays/queries/jpegqual/30/{number}.jpg", copies.recompress(image, 30, 1))
        for k in (1, 2): save(root / f"copydays/queries/strong_{number + k}.jpg", copies.attack("strong", image, k))
    for k in range(8): save(root / f"copydays/database_and_distractors/distractor_{200000 + k}.jpg", photo(50 + k))
    for k in range(8): save(root / f"copydays/train/{k}.jpg", photo(80 + k))
    for slug, towns in (("roxford5k", "abc"), ("rparis6k", "de")):
        names, rows = [], []
        for k, town in enumerate(towns):
            image = photo(ord(town), 90, 120)
            save(root / f"{slug}/jpg/{town}_hall_000000.jpg", image)
            shown = {"easy": image[:, 10:, 10:], "hard": copies.attack("strong", image, k), "junk": copies.recompress(image, 50, 1)}
            for kind, part in shown.items(): save(root / f"{slug}/jpg/{town}_{kind}.jpg", part)
            start = len(names)
            names += [f"{town}_{kind}" for kind in shown]
            rows.append({"bbx": np.array([10.0, 10, 110, 80]), "easy": np.array([start], np.int32), "hard": [start + 1], "junk": np.array([[start + 2]], np.uint16)})
        truth = {"gnd": rows, "imlist": names, "qimlist": [f"{town}_hall_000000" for town in towns]}
        (root / slug / f"gnd_{slug}.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    return root


def test_copydays_by_its_names(tree):
    data = copies.read_copydays(tree / "copydays")
    assert {name: len(wanted) for name, wanted in data.splits.items()} == {"strong": 12, "crops_50": 6, "jpegqual_3": 6, "jpegqual_30": 6, "original": 6}
    assert len(data.database) == 14 and len(data.training) == 8
    for wanted in data.splits.values():
        for w in wanted:
            assert copies.read_number(data.queries.name(w.query)) // 100 == copies.read_number(data.database.name(w.positives[0])) // 100 == int(w.group)
            assert "distractor" not in data.database.name(w.positives[0]) and len(w.positives) == 1
    assert not any("jpegqual_30" in data.queries.name(w.query).replace("/", "_") for w in data.splits["jpegqual_3"])
    assert len(copies.read_copydays(tree / "copydays", distractors=False).database) == 6


@pytest.mark.parametrize("name, message", [("strong_300001.jpg", "has no original"), ("strng_200001.jpg", "does not begin with an attack"), ("strong_first.jpg", "has no number")])
def test_copydays_refuses(tmp_path, name, message):
    save(tmp_path / "database/200000.jpg", photo(0))
    save(tmp_path / "queries" / name, photo(0))
    with pytest.raises(ValueError, match=message): copies.read_copydays(tmp_path, distractors=False)
    with pytest.raises(FileNotFoundError): copies.read_copydays(tmp_path)


def test_the_cities(tree):
    data = copies.read_revisited(tree / "roxford5k", "roxford5k")
    assert [w.positives.tolist() for w in data.splits["medium"]] == [[0, 1], [3, 4], [6, 7]] and [w.junk.tolist() for w in data.splits["medium"]] == [[2], [5], [8]]
    for name, right, junk in (("easy", [3], [5, 4]), ("hard", [4], [5, 3])):
        assert data.splits[name][1].positives.tolist() == right and data.splits[name][1].junk.tolist() == junk
    assert [w.group for w in data.splits["hard"]] == ["a_hall", "b_hall", "c_hall"]
    assert len(data.training) == 8 and copies.view(data.queries, 0, 120).shape == (3, 70, 100)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_protocol_of_pickle_and_every_kind_of_list(tmp_path, protocol):
    kinds = [[3, 1], (3, 1), np.array([3, 1]), np.array([3, 1], ">i4"), np.array([[3], [1]], np.uint8), [np.int64(3), 1], np.array([3.0, 1.0])]
    rows = [{"bbx": [0, np.float64(1.5), 2, 3], "easy": kind, "hard": np.zeros((0, 0)), "junk": []} for kind in kinds]
    path = tmp_path / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps({"imlist": list("abcd"), "qimlist": list("abcdefg"), "gnd": rows}, protocol))
    truth = copies.read_truth(path)
    assert all(row["easy"].tolist() == [3, 1] and row["hard"].tolist() == [] and row["bbx"].tolist() == [0, 1.5, 2, 3] for row in truth["gnd"])


class Touch:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.parametrize("where", ["top", "list", "array"])
def test_hostile_pickles_run_nothing(tmp_path, where):
    bad, row = Touch(tmp_path / "ran"), {"bbx": [0, 0, 1, 1], "easy": [0], "hard": [], "junk": []}
    truth = {"imlist": ["a"], "qimlist": ["q"], "gnd": [row]}
    if where == "list": truth["imlist"] = [bad]
    if where == "array": row["easy"] = bad
    path = tmp_path / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps(bad if where == "top" else truth))
    with pytest.raises(ValueError, match="mkdir.*Nothing was run"): copies.read_truth(path)
    assert not (tmp_path / "ran").exists()


def loop():
    endless = [0]
    endless.append(endless)
    return endless


@pytest.mark.parametrize("change", [{"imlist": ["../../secret"]}, {"imlist": ["/etc/passwd"]}, {"qimlist": []}, {"imlist": None}, {"gnd": [{"bbx": [0, 0, 1, 1]}]},
                                    *({"gnd": [{"bbx": [0, 0, 1, 1], "easy": easy, "hard": [], "junk": []}]} for easy in ([1], [-1], [0.5], ["0"], [[0]], None, loop(), {"0": 0})),
                                    {"gnd": [{"bbx": [0, 0, 1], "easy": [0], "hard": [], "junk": []}]}, {"gnd": [{"bbx": [0, 0, 1, math.nan], "easy": [0], "hard": [], "junk": []}]}])
def test_lists_that_mean_nothing_are_refused(tmp_path, change):
    path = tmp_path / "gnd_roxford5k.pkl"
    truth = {"imlist": ["a"], "qimlist": ["q"], "gnd": [{"bbx": [0, 0, 1, 1], "easy": [0], "hard": [], "junk": []}]}
    path.write_bytes(pickle.dumps(truth))
    copies.read_truth(path)
    path.write_bytes(pickle.dumps(truth | change))
    with pytest.raises(ValueError, match="gnd_roxford5k.pkl is not a ground truth of revisitop"): copies.read_truth(path)


@pytest.mark.parametrize("easy, hard, junk", [([0, 0], [], []), ([0], [0], []), ([1], [], [2, 1]), ([], [2], [2])])
def test_an_image_stands_in_one_list(tmp_path, easy, hard, junk):
    path = tmp_path / "gnd_roxford5k.pkl"
    path.write_bytes(pickle.dumps({"imlist": list("abc"), "qimlist": ["q"], "gnd": [{"bbx": [0, 0, 1, 1], "easy": easy, "hard": hard, "junk": junk}]}))
    with pytest.raises(ValueError, match=r"names image \d twice"): copies.read_truth(path)


def test_small_files_do_not_become_large(tmp_path):
    "An array of a trillion bytes that are not there; one list of 200,000 entries, or one long name, that stands there 2,000 times."
    path, row = tmp_path / "gnd_roxford5k.pkl", {"bbx": [0, 0, 1, 1], "easy": np.array([0]), "hard": [], "junk": []}
    text = pickle.dumps({"imlist": ["a"], "qimlist": ["q"], "gnd": [row]}, protocol=3)
    raw = pickle.dumps(np.array([0]).tobytes(), protocol=3)[2:-3]
    assert text.count(raw) == 1
    path.write_bytes(text.replace(raw, pickle.dumps(2**40, protocol=3)[2:-1]))
    with pytest.raises(ValueError, match="an array without bytes"): copies.read_truth(path)
    many = row | {"easy": list(range(200_000))}
    path.write_bytes(pickle.dumps({"imlist": ["a"] * 200_000, "qimlist": ["q"] * 2000, "gnd": [many] * 2000}))
    assert path.stat().st_size < 2_000_000
    with pytest.raises(ValueError, match="millions of entries"): copies.read_truth(path)
    path.write_bytes(pickle.dumps({"imlist": ["a/" * 2**21] * 2000, "qimlist": ["q"], "gnd": [row]}))
    with pytest.raises(ValueError, match="imlist holds other things than names"): copies.read_truth(path)


def test_cut_and_foreign_files_are_refused(tmp_path):
    whole = pickle.dumps({"imlist": ["a"], "qimlist": [], "gnd": []})
    for content in (whole[:-5], b"", b"PK\3\4 a zip"):
        (tmp_path / "gnd.pkl").write_bytes(content)
        with pytest.raises(ValueError, match="gnd.pkl"): copies.read_truth(tmp_path / "gnd.pkl")


class Killed(BaseException):
    "Nothing may catch it, as nothing can catch kill -9."


def kill_before_save(monkeypatch, n):
    "The n-th file, from 0, is not written any more."
    left = iter(range(n))
    def save(path, content):
        if next(left, None) is None: raise Killed
        write_atomic(path, content)
    monkeypatch.setattr(copies, "write_atomic", save)


class Counted:
    "Images that say how often they were read."
    def __init__(self, images): self.images, self.read = images, 0
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        self.read += 1
        return self.images[i]


@pytest.mark.parametrize("n", range(7))
def test_what_was_described_before_a_kill_is_not_described_again(model, tmp_path, monkeypatch, n):
    "Three blocks of training images, the whitening, three blocks of the database: killed before each is written, the second run does what is left, to the same bits."
    images, recipe = Counted([photo(i, *((60, 80), (80, 60), (64, 64))[i % 3]) for i in range(10)]), Recipe(side=64)
    def both(folder):
        whitening = copies.fit_whitening(model, images, recipe, 8, folder=folder and folder / "training", block=4)
        return copies.describe(model, images, recipe, whitening, folder=folder and folder / "database", block=4)
    whole, images.read = both(None), 0
    kill_before_save(monkeypatch, n)
    with pytest.raises(Killed): both(tmp_path)
    monkeypatch.undo()
    images.read = 0
    assert torch.equal(both(tmp_path), whole)
    assert images.read == (10 - 4 * n if n < 3 else 0) + (10 if n < 4 else 10 - 4 * (n - 4))
    images.read = 0
    assert torch.equal(both(tmp_path), whole) and images.read == 0


@pytest.mark.parametrize("block", [3, 12, 40])
def test_blocks_of_another_size_lose_no_picture(model, tmp_path, monkeypatch, block):
    images, recipe, path = Counted([photo(i) for i in range(10)]), Recipe(side=64), tmp_path / "moments.npz"
    whole, images.read = copies.image_moments(model, images, recipe), 0
    kill_before_save(monkeypatch, 1)
    with pytest.raises(Killed): copies.image_moments(model, images, recipe, path=path, block=4)
    monkeypatch.undo()
    images.read = 0
    found = copies.image_moments(model, images, recipe, path=path, block=block)
    assert images.read == 6 and found.count == whole.count
    pair = [PCAWhitening.from_moments(moments, 4) for moments in (found, whole)]
    torch.testing.assert_close(*(w.matrix.T @ w.matrix for w in pair), rtol=1e-3, atol=1e-3)


def test_a_whitening_of_other_directions_is_not_taken(model, tmp_path):
    images, recipe = [photo(i) for i in range(4)], Recipe(side=64)
    first = copies.fit_whitening(model, images, recipe, 2, folder=tmp_path)
    for n in (1, 3, 10**6):
        with pytest.raises(ValueError, match=f"keeps a whitening of 2 directions, {n} are wanted"): copies.fit_whitening(model, images, recipe, n, folder=tmp_path)
    assert torch.equal(copies.fit_whitening(model, images, recipe, 2, folder=tmp_path).matrix, first.matrix)
    with pytest.raises(ValueError, match="do not give 1000000 directions"): copies.fit_whitening(model, images, recipe, 10**6, folder=tmp_path / "new")
    assert len(copies.fit_whitening(model, images, recipe, 3, folder=tmp_path / "new").matrix) == 3


def test_vectors_that_are_not_finite_are_not_kept(model, tmp_path, monkeypatch):
    images, recipe, real = [photo(i) for i in range(10)], Recipe(side=64), copies.add_moments
    whole, calls = copies.fit_whitening(model, images, recipe, 8, block=4), iter(range(10))
    monkeypatch.setattr(copies, "add_moments", lambda batches, moments: real((x * (math.nan if next(calls) == 1 else 1) for x in list(batches)), moments))
    with pytest.raises(ValueError, match="the model's weights or the device are broken"): copies.fit_whitening(model, images, recipe, 8, folder=tmp_path, block=4)
    with np.load(tmp_path / "moments.npz") as found: assert found["done"] == 4
    assert torch.equal(copies.fit_whitening(model, images, recipe, 8, folder=tmp_path, block=4).matrix, whole.matrix)


def test_what_another_process_has_kept_stays(tmp_path):
    def late():
        np.save(tmp_path / "x.npy", np.ones(3))
        return np.zeros(3)
    assert copies.kept(tmp_path / "x.npy", late).tolist() == [1, 1, 1]


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_a_run_on_copydays(tree, tmp_path):
    config = CopiesConfig(run_dir=str(tmp_path / "run"), task="copydays", root=str(tree), image_size=64, whitening=16, paper_model="SEER 10B", tap="res3")
    result = copies.run_copies(config)
    splits = result.details["splits"]
    assert splits["original"]["mAP"] == 1 and splits["jpegqual_30"]["mAP"] > splits["strong"]["mAP"] == result.value > result.chance
    assert result.n == 12 and result.ci_low <= result.value <= result.ci_high and result.paper == pytest.approx(0.906) and "README" in result.paper_source
    assert splits["strong"]["plain"] >= splits["strong"]["mAP"] and set(splits["strong"]) == {"mAP", "low", "high", "n", "without", "plain", "mP@1", "mP@5", "mP@10"}
    assert copies.run_copies(config) == result and read_results(tmp_path / "run/results.jsonl") == [result]
    only = copies.run_copies(dataclasses.replace(config, run_dir=str(tmp_path / "only"), splits="strong", distractors=False))
    assert list(only.details["splits"]) == ["strong"] and only.settings["database"] == 6 and only.value >= result.value - 0.3
    (tmp_path / "only/results.jsonl").unlink()                                          # a run that was killed goes on with smaller batches
    again = copies.run_copies(dataclasses.replace(config, run_dir=str(tmp_path / "only"), splits="strong", distractors=False, extract_batch=5))
    assert again.value == pytest.approx(only.value, abs=1e-6)
    assert np.load(tmp_path / "only/neighbours.npy").shape == (12, 6) and np.load(tmp_path / "only/precision.npy").mean() == pytest.approx(only.value)


def test_a_killed_run_goes_on_and_other_weights_start_anew(tree, tmp_path, monkeypatch):
    config = CopiesConfig(run_dir=str(tmp_path / "whole"), task="copydays", root=str(tree), image_size=64, whitening=16, tap="res3", splits="strong")
    whole, half = copies.run_copies(config), dataclasses.replace(config, run_dir=str(tmp_path / "half"))
    kill_before_save(monkeypatch, 3)                                                    # moments, whitening, queries
    with pytest.raises(Killed): copies.run_copies(half)
    monkeypatch.undo()
    found = {path.name for path in (tmp_path / "half/descriptors").rglob("*.np?")}
    assert found == {"whitening.npy", "0-11.npy"}
    assert dataclasses.replace(copies.run_copies(half), seconds=0) == dataclasses.replace(whole, seconds=0)
    for name in ("precision", "neighbours"): assert np.array_equal(np.load(tmp_path / f"half/{name}.npy"), np.load(tmp_path / f"whole/{name}.npy"))
    monkeypatch.setattr(copies, "open_model", lambda spec, seed, device: open_model(spec, seed=seed + 1, device=device))       # other weights in the same file
    other, fresh = (copies.run_copies(dataclasses.replace(config, run_dir=str(tmp_path / name))) for name in ("half", "fresh"))
    assert other.settings["weights"] != whole.settings["weights"] and dataclasses.replace(other, seconds=0) == dataclasses.replace(fresh, seconds=0)


def test_two_runs_do_not_share_a_folder(tree, tmp_path):
    config = CopiesConfig(run_dir=str(tmp_path / "run"), task="copydays", root=str(tree), image_size=64, whitening=16, tap="res3", splits="strong")
    result = copies.run_copies(config)
    [folder] = (tmp_path / "run/descriptors").iterdir()
    (tmp_path / "run/results.jsonl").unlink()
    lock = lock_folder(folder)
    with pytest.raises(CheckpointError, match="still going"): copies.run_copies(config)
    unlock(lock)
    assert copies.run_copies(config).value == result.value
    unlock(lock_folder(folder))                                                         # a run gives it back


def test_a_published_score_can_be_put_beside_later(tree, tmp_path, monkeypatch):
    config = CopiesConfig(run_dir=str(tmp_path / "run"), task="copydays", root=str(tree), image_size=64, tap="res3", splits="strong")
    alone = copies.run_copies(config)
    monkeypatch.setattr(copies, "region_batches", None)                                 # nothing is described again
    beside = copies.run_copies(dataclasses.replace(config, paper_model="SEER 10B"))
    assert (alone.paper, beside.paper, beside.value) == (None, pytest.approx(0.906), alone.value)
    assert copies.run_copies(config) == alone and len(read_results(tmp_path / "run/results.jsonl")) == 2


def test_other_data_are_another_result(tree, tmp_path):
    "A pixel, a name, a picture for whitening or a line of the truth may change below the same root; how fast it is computed may, too."
    shutil.copytree(tree, tmp_path / "data")
    at = tmp_path / "data/copydays"
    config = CopiesConfig(run_dir=str(tmp_path / "run"), task="copydays", root=str(tmp_path / "data"), image_size=64, whitening=16, tap="res3", splits="strong")
    results = [copies.run_copies(config)]
    assert copies.run_copies(dataclasses.replace(config, extract_batch=4, device="cpu")) == results[0]
    save(at / "queries/crops_50_200000.jpg", photo(99))                        # the first query's file
    results.append(copies.run_copies(dataclasses.replace(config, extract_batch=4)))
    (at / "database_and_distractors/distractor_200003.jpg").rename(at / "database_and_distractors/distractor_300003.jpg")
    results.append(copies.run_copies(config))
    save(at / "train/0.jpg", photo(98))
    results.append(copies.run_copies(config))
    assert read_results(tmp_path / "run/results.jsonl") == results and len({json.dumps(r.settings) for r in results}) == 4
    assert copies.run_copies(config) == results[-1]
    city = copies.read_revisited(tree / "roxford5k", "roxford5k")
    other = city._replace(splits={name: [w._replace(junk=[]) for w in split] for name, split in city.splits.items()})
    boxed = city._replace(queries=copies.Chosen(city.queries.images, range(3), [[0, 0, 50, 50]] * 3))
    assert len({tuple(copies.copies_data(data)) for data in (city, other, boxed)}) == 3


@pytest.mark.parametrize("task", ["roxford5k", "rparis6k"])
def test_a_run_on_a_city_whitened_on_the_other(tree, tmp_path, task):
    config = CopiesConfig(run_dir=str(tmp_path / "run"), task=task, root=str(tree), image_size=96, whitening=8, pooling="gem", tap="res3")
    if task == "roxford5k": config = dataclasses.replace(config, whitening=4)
    result = copies.run_copies(config)
    assert set(result.details["splits"]) == {"easy", "medium", "hard"} and result.value == result.details["splits"]["medium"]["mAP"] > result.chance
    assert result.details["splits"]["easy"]["mAP"] >= result.details["splits"]["hard"]["mAP"] and result.settings["training"] == {"roxford5k": 6, "rparis6k": 9}[task] + 2 * (task == "roxford5k") + 3 * (task == "rparis6k")


@pytest.mark.parametrize("change, message", [
    ({"task": "toy_scenes"}, "no set of copies"), ({"splits": "crops_50"}, "name it among the splits"), ({"splits": "strong crops_11"}, "no split 'crops_11'"), ({"tap": "layer4"}, "no tap 'layer4'"),
    ({"tap": "res4:1"}, "not a tap"), ({"pooling": "max"}, "no pooling"), ({"pooling": "flat"}, "one size"), ({"levels": 0}, "above 0"), ({"scales": "big"}, "numbers"), ({"scales": ""}, "scales"), ({"image_size": 4}, "sides must lie"),
    ({"depth": 10**6}, "depth"), ({"backend": "annoy"}, "no backend"), ({"paper_model": "SEER"}, "no published score"), ({"model": "random:regnety_9"}, "regnety_9"),
    ({"root": "nowhere"}, "where to get it"), ({"whitening": 4, "whitening_images": "nowhere"}, "no such folder")])
def test_a_run_refuses_before_it_writes(tree, tmp_path, change, message):
    config = make_config(CopiesConfig, {"run_dir": str(tmp_path / "run"), "task": "copydays", "splits": "strong", "root": str(tree), **change})
    with pytest.raises((ValueError, FileNotFoundError), match=message): copies.run_copies(config)
    assert not (tmp_path / "run").exists()


def test_missing_splits_are_said_as_they_are(tree, tmp_path):
    with pytest.raises(ValueError, match="no split 'crops_5'.*crops_10.*original"): copies.open_copies(CopiesConfig(splits="strong crops_5"))
    with pytest.raises(ValueError, match="name it among the splits"): copies.open_copies(CopiesConfig(splits="crops_10"))
    (tmp_path / "copydays").mkdir()
    (tmp_path / "copydays/database").symlink_to(tree / "copydays/database")
    save(tmp_path / "copydays/queries/crops_50_200000.jpg", photo(0))
    with pytest.raises(ValueError, match="copydays has no queries of 'strong'"): copies.open_copies(CopiesConfig(task="copydays", root=str(tmp_path), distractors=False))


def test_a_city_without_hard_views(tree, tmp_path):
    shutil.copytree(tree / "roxford5k", tmp_path / "roxford5k")
    path = tmp_path / "roxford5k/gnd_roxford5k.pkl"
    truth = pickle.loads(path.read_bytes())
    for row in truth["gnd"]: row["hard"] = []
    truth["gnd"][0]["easy"] = []
    path.write_bytes(pickle.dumps(truth))
    config = CopiesConfig(run_dir=str(tmp_path / "run"), task="roxford5k", root=str(tmp_path), image_size=96, tap="res3")
    with pytest.raises(ValueError, match="no query of the split 'hard' has a right image"): copies.run_copies(config)
    assert not (tmp_path / "run").exists()
    split = copies.run_copies(dataclasses.replace(config, splits="medium easy")).details["splits"]["easy"]
    assert (split["n"], split["without"]) == (2, 1)


def test_whitening_needs_pictures(tree, tmp_path):
    data = Path(tree, "copydays")
    (tmp_path / "copydays").mkdir()
    for name in ("queries", "database"): (tmp_path / "copydays" / name).symlink_to(data / name)
    config = CopiesConfig(run_dir=str(tmp_path / "run"), task="copydays", root=str(tmp_path), splits="strong", distractors=False, whitening=4)
    with pytest.raises(ValueError, match="give whitening_images"): copies.run_copies(config)
    assert copies.open_copies(dataclasses.replace(config, whitening_images=str(data / "train"))).training.name(0) == "0.jpg"
