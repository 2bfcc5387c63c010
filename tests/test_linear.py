"The linear probe against scikit-learn, torch and hand-computed cases."
import dataclasses
import functools
import os
import signal

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from seer_nb.core import MetricLog
from seer_nb.evaluate import linear
from seer_nb.evaluate.annotations import Claims
from seer_nb.evaluate.features import TaskFeatures, extract, extract_taps
from seer_nb.evaluate.metrics import measure
from seer_nb.evaluate.tasks import ROWS, TaskData, open_model, open_task, read_results, train_transform, weights_hash
from seer_nb.images import BadImage
from seer_nb.monitor import describe, read_run


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr("seer_nb.core.environment_text", lambda: "a test\n")       # else a second per run
    yield
    torch.set_num_threads(before)


def problem(n=400, dim=30, classes=5, seed=0):
    "Correlated features of overlapping classes, standardised, in double precision."
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=g, dtype=torch.float64) / dim**0.5
    centres = 0.5 * torch.randn(classes, dim, generator=g, dtype=torch.float64)
    labels = torch.randint(0, classes, (n,), generator=g)
    features = (centres[labels] + torch.randn(n, dim, generator=g, dtype=torch.float64)) @ mix
    return linear.standardize(features)[0], labels


def sklearn_fit(x, y, l2):
    return LogisticRegression(C=1 / (l2 * len(x)), tol=1e-10, max_iter=10_000).fit(x.numpy(), y.numpy())


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("classes", [2, 5])
def test_logistic_regression_is_scikit_learns(l2, classes):
    x, y = problem(classes=classes)
    mine, ref = linear.fit_logistic(x, y, classes, l2=l2, tolerance=1e-9, max_iterations=5000), sklearn_fit(x, y, l2)
    probabilities = mine.scores(x).softmax(1).numpy()
    if classes > 2:      # for two classes scikit-learn fits one weight vector with another penalty
        w = np.vstack([ref.coef_.T, ref.intercept_])
        value, _ = linear.logistic_loss(torch.from_numpy(w), x, y, l2)
        assert mine.loss == pytest.approx(value, abs=1e-9) and mine.loss <= value + 1e-12
        np.testing.assert_allclose(mine.weight.numpy(), ref.coef_.T, atol=1e-4)
        np.testing.assert_allclose(probabilities, ref.predict_proba(x.numpy()), atol=1e-5)
        assert (probabilities.argmax(1) == ref.predict(x.numpy())).all()
    else:                # two opposite weight vectors w/2, -w/2: |w|^2/2 of penalty instead of |w|^2
        half = sklearn_fit(x, y, l2 / 2)
        np.testing.assert_allclose(probabilities, half.predict_proba(x.numpy()), atol=1e-5)


def test_single_precision_and_warm_start_reach_the_same_optimum():
    x, y = problem()
    exact = linear.fit_logistic(x, y, 5, l2=1e-3, tolerance=1e-9, max_iterations=5000)
    single = linear.fit_logistic(x.float(), y, 5, l2=1e-3)
    strong = linear.fit_logistic(x.float(), y, 5, l2=1.0)
    warm = linear.fit_logistic(x.float(), y, 5, l2=1e-3, start=strong)
    assert single.loss == pytest.approx(exact.loss, abs=1e-4) and warm.loss == pytest.approx(exact.loss, abs=1e-4)
    assert single.weight.dtype == torch.float32


def test_a_start_on_an_eighth_changes_the_way_and_not_the_end():
    "Of 64 samples per feature and more; samples sorted by class."
    x, y = problem(n=1300, dim=20)
    order = y.argsort()
    x, y, zeros = x[order], y[order], linear.LinearFit(torch.zeros(20, 5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64), 0.0, 0)
    ours, cold = (linear.fit_logistic(x, y, 5, l2=1e-3, start=start, tolerance=1e-9, max_iterations=5000) for start in (None, zeros))
    ref = sklearn_fit(x, y, 1e-3)
    assert ours.loss == pytest.approx(cold.loss, abs=1e-12) and ours.loss <= linear.logistic_loss(torch.from_numpy(np.vstack([ref.coef_.T, ref.intercept_])), x, y, 1e-3)[0] + 1e-12
    np.testing.assert_allclose(ours.weight.numpy(), ref.coef_.T, atol=1e-4)


def test_the_bound_changes_the_way_and_not_the_end():
    x, y = problem(dim=60)
    start = torch.zeros(61, 5, dtype=torch.float64)
    loss = lambda w: linear.logistic_loss(w, x, y, 1e-3)
    bound = linear.curvature_bound(x)
    _, plain = linear.minimize_lbfgs(loss, start, tolerance=1e-8, max_iterations=5000)
    _, guided = linear.minimize_lbfgs(loss, start, tolerance=1e-8, max_iterations=5000,
                                       inverse=lambda g, history: linear.invert_bound(g, history, bound, 1e-3))
    assert guided[-1] == pytest.approx(plain[-1], abs=1e-9) and len(guided) < len(plain)


def test_bound_is_a_bound():
    "Boehning: no second derivative of the loss is larger than half the covariance (per class) plus the penalty."
    x, y = problem(n=100, dim=6, classes=3)
    x = x - x.mean(0)
    w = 0.5 * torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    f = lambda v: torch.nn.functional.cross_entropy(x @ v.view(6, 3) + w[-1], y)
    hessian = torch.autograd.functional.hessian(f, w[:-1].flatten())
    values, axes = linear.curvature_bound(x)
    bound = torch.kron(axes @ values.diag() @ axes.T, torch.eye(3, dtype=torch.float64))
    assert torch.linalg.eigvalsh(bound - hessian).min() > -1e-10


def test_a_large_problem_is_sampled_for_the_bound():
    x, _ = problem(n=2000, dim=6)
    values, axes = linear.curvature_bound(x)
    sampled = x[:: 2000 // 96]
    torch.testing.assert_close(axes @ values.diag() @ axes.T, sampled.T @ sampled / (2 * len(sampled)))
    assert linear.fit_logistic(x, torch.arange(2000) % 5, 5, l2=1e-2, tolerance=1e-8).loss < np.log(5)


def test_more_features_than_samples_and_constant_features():
    x, y = problem(n=40, dim=80)
    x[:, 0] = 3.0
    x = linear.standardize(x)[0]
    fit = linear.fit_logistic(x, y, 5, l2=1e-2, tolerance=1e-8)
    ref = sklearn_fit(x, y, 1e-2)
    assert fit.weight.isfinite().all() and fit.weight[0].abs().max() == 0
    np.testing.assert_allclose(fit.scores(x).softmax(1).numpy(), ref.predict_proba(x.numpy()), atol=1e-5)


def test_labels_are_checked():
    x, y = problem()
    with pytest.raises(ValueError, match="labels go from"): linear.fit_logistic(x, y, 4)
    with pytest.raises(ValueError, match="399 labels"): linear.fit_logistic(x, y[1:], 5)


def test_stratified_split():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    first, second = linear.stratified_split(labels, 0.2, seed=3)
    assert sorted(torch.cat([first, second]).tolist()) == list(range(len(labels)))
    assert labels[second].bincount(minlength=4).tolist() == [10, 2, 1, 0]
    assert torch.equal(second, linear.stratified_split(labels, 0.2, seed=3)[1])
    assert not torch.equal(second, linear.stratified_split(labels, 0.2, seed=4)[1])


def test_a_penalty_cannot_be_chosen_without_a_second_sample():
    with pytest.raises(ValueError, match="one sample only"): linear.sweep_l2(torch.randn(4, 3), torch.arange(4), 4, [1e-3, 1.0])


def toy_maps(n=96, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (n,), generator=g)
    maps = {"res4:2x1": torch.randn(n, 5, 2, 1, generator=g) + labels[:, None, None, None], "avgpool": 3 * torch.randn(n, 7, 1, 1, generator=g)}
    maps["avgpool"][:, 0, 0, 0] += 2 * labels
    return maps, labels


HEADS = ("res4:2x1/eval_mlp", "avgpool/eval_mlp", "avgpool/mlp")


@pytest.mark.parametrize("decay_norm", [False, True])
def test_heads_are_trained_as_by_a_plain_loop(decay_norm):
    "Every head on its own, with torch's layers and optimizer, batch norm with or without decay, and the rate of each epoch."
    maps, labels = toy_maps()
    recipe = linear.Recipe(epochs=6, batch_size=32, lr=0.4, steps=(2, 4, 5), weight_decay=0.05, decay_norm=decay_norm)
    heads = linear.make_heads(HEADS, maps, 4, seed=3)
    starts = {name: {k: v.clone() for k, v in head.state_dict().items()} for name, head in heads.items()}
    linear.train_heads(heads, linear.cached_batches(maps, labels, batch_size=32, seed=1), recipe)
    for name in HEADS:
        x = maps[name.split("/")[0]]
        layers = [torch.nn.BatchNorm2d(x.shape[1])] * name.endswith("eval_mlp") + [torch.nn.Flatten(), torch.nn.Linear(x[0].numel(), 4)]
        plain = torch.nn.Sequential(*layers)
        plain.load_state_dict(starts[name])
        norm = list(layers[0].parameters())
        optimizer = torch.optim.SGD([{"params": plain[-1].parameters(), "weight_decay": 0.05}, {"params": norm, "weight_decay": 0.05 * decay_norm}][:1 + bool(norm)],
                                    lr=0.4 * 32 / 256, momentum=0.9, nesterov=True)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4, 5])
        for epoch in range(6):
            for rows in linear.epoch_rows(np.arange(96), 32, 1, epoch):
                loss = torch.nn.functional.cross_entropy(plain(x[rows]), labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            schedule.step()
        for key, value in plain.state_dict().items(): torch.testing.assert_close(heads[name].state_dict()[key], value, msg=f"{name} {key}")


def test_nesterov_and_decay_by_hand():
    maps, labels = toy_maps(32)
    recipe = linear.Recipe(epochs=3, batch_size=32, lr=0.5, steps=(), weight_decay=0.1)
    heads = linear.make_heads(("avgpool/mlp",), maps, 4)
    w = torch.cat([heads["avgpool/mlp"][-1].weight, heads["avgpool/mlp"][-1].bias[:, None]], 1).detach().double()
    x, velocity = torch.cat([maps["avgpool"].flatten(1), torch.ones(32, 1)], 1).double(), 0
    linear.train_heads(heads, linear.cached_batches(maps, labels, batch_size=32), recipe)
    for _ in range(3):
        p = (x @ w.T).softmax(1) - torch.nn.functional.one_hot(labels, 4)
        gradient = p.T @ x / 32 + 0.1 * w                     # bias decayed
        velocity = 0.9 * velocity + gradient
        w = w - 0.5 * 32 / 256 * (gradient + 0.9 * velocity)
    torch.testing.assert_close(heads["avgpool/mlp"][-1].weight.double(), w[:, :-1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(heads["avgpool/mlp"][-1].bias.double(), w[:, -1], atol=1e-5, rtol=1e-5)


def test_cosine_is_torchs():
    recipe = linear.probe_recipe("patch_camelyon", epochs=10)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.003)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=3e-5)
    for epoch in range(10):
        assert linear.learning_rate(recipe, epoch) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_several_labels_end_where_scikit_learn_does():
    "Sigmoid cross entropy with unknown labels left out: one logistic regression per class, on the images that say something about it."
    x, y = problem(n=90, dim=6, classes=3)
    rng = np.random.default_rng(0)
    targets = torch.nn.functional.one_hot(y, 3)
    targets[torch.from_numpy(rng.random((90, 3)) < 0.3)] = -1
    heads = linear.make_heads(("avgpool/mlp",), maps := {"avgpool": x.float()[..., None, None]}, 3)
    recipe = linear.Recipe(epochs=250, batch_size=90, lr=0.5 * 256 / 90, steps=(), weight_decay=0.02)
    linear.train_heads(heads, linear.cached_batches(maps, targets, batch_size=90), recipe)
    scores = linear.head_scores(heads, maps)["avgpool/mlp"]
    with_one = np.hstack([x.numpy(), np.ones((90, 1))])      # the bias is decayed as a weight is
    for c in range(3):
        known = targets[:, c].numpy() >= 0
        ref = LogisticRegression(C=1 / (0.02 * known.sum()), fit_intercept=False, tol=1e-10, max_iter=10_000).fit(with_one[known], targets[known, c].numpy())
        np.testing.assert_allclose(scores[:, c].numpy(), ref.decision_function(with_one), atol=2e-3)
    value = linear.measure("mAP", scores, targets, n_resamples=20)[0]
    expected = [average_precision_score(t[k], s[k]) for t, s in zip(targets.T.numpy(), scores.T.numpy()) for k in [t >= 0]]
    assert value == pytest.approx(np.mean(expected))


def test_published_recipes():
    "The exceptions of the paper, written down once more from VISSL's files."
    recipe = linear.probe_recipe
    assert set(linear.RECIPES) <= set(ROWS)
    assert (recipe("dtd").epochs, recipe("dtd").lr, recipe("dtd").steps, recipe("dtd").weight_decay, recipe("dtd").batch_size) == (28, 0.01, (8, 16, 24), 5e-4, 256)
    assert [(recipe(t).epochs, recipe(t).schedule) for t in ("clevr_count", "clevr_dist", "ucf101")] == [(50, "cosine"), (100, "cosine"), (50, "cosine")]
    assert [recipe(t).steps for t in ("places205", "inaturalist18", "wilds_iwildcam", "openimages")] == [(4, 8, 12), (24, 48, 72), (24, 48, 72), (2, 4, 6)]
    assert recipe("ucf101").weight_decay == 0.01 and recipe("openimages").decay_norm and not recipe("imagenet1k").decay_norm
    assert linear.learning_rate(recipe("openimages"), 0) == 0.003 and linear.learning_rate(recipe("dtd", batch_size=64), 0) == 0.0025
    with pytest.raises(ValueError, match="schedule"): recipe("dtd", schedule="linear")
    with pytest.raises(TypeError): recipe("dtd", leraning_rate=1)


def test_the_head_is_chosen_without_test_labels():
    maps, labels = toy_maps(200)
    test_maps, test_labels = toy_maps(80, seed=1)
    recipe = linear.Recipe(epochs=8, batch_size=32, lr=0.5)
    batches = lambda rows: linear.cached_batches(maps, labels, rows, batch_size=32)
    for choose in ("validation", "test"):
        scores, found = linear.probe_heads(HEADS, batches, (maps, labels), test_maps, test_labels, recipe, n_classes=4, choose=choose)
        _, other = linear.probe_heads(HEADS, batches, (maps, labels), test_maps, test_labels.flip(0), recipe, n_classes=4, choose=choose)
        assert linear.top_k_accuracy(scores, test_labels) == found["heads"][found["head"]] > 0.4
        if choose == "validation": assert other["head"] == found["head"] == max(found["validation"], key=found["validation"].get)
        else: assert found["head"] == max(found["heads"], key=found["heads"].get) and "validation" not in found


def test_memory_mapped_features_are_those_in_memory(tmp_path):
    model, taps = open_model("random:regnety_toy"), ["res3:2x1", "avgpool"]
    data = open_task("toy_count", n=40)
    store = extract(model, {"train": data}, tmp_path, taps=taps, batch_size=16)
    mapped, held = (linear.fold_taps(x) for x in ({tap: store.features("train", tap) for tap in taps}, extract_taps(model, data, taps, batch_size=16)))
    direct = linear.frozen_maps(model, torch.stack([data.read(i) for i in range(16)]), taps)
    for tap in taps:
        assert torch.equal(mapped[tap], held[tap])
        torch.testing.assert_close(mapped[tap][:16], direct[tap])                # folded as the map was
    both = []
    for maps in (mapped, held):
        heads = linear.make_heads(("res3:2x1/eval_mlp",), maps, 5)
        linear.train_heads(heads, linear.cached_batches(maps, data.labels, batch_size=8), linear.Recipe(epochs=2))
        both.append(linear.head_scores(heads, maps)["res3:2x1/eval_mlp"])
    assert torch.equal(*both)
    model.train()
    with pytest.raises(ValueError, match="eval"): linear.frozen_maps(model, data.read(0)[None], taps)


def test_the_backbone_stays_frozen_and_views_are_a_function_of_seed_image_epoch():
    model, data = open_model("random:regnety_toy"), open_task("toy_count", n=24)
    before = weights_hash(model)
    batches = linear.trunk_batches(model, data, ["avgpool"], augment="crop", batch_size=8, seed=5)
    first, again, later = (torch.cat([maps["avgpool"] for maps, _ in batches(epoch)]) for epoch in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, later)
    heads = linear.make_heads(("avgpool/eval_mlp",), {"avgpool": first}, 5)
    linear.train_heads(heads, batches, linear.Recipe(epochs=1, batch_size=8, lr=1.0))
    assert weights_hash(model) == before and not model.training
    crop, image = train_transform("toy_count", model.preprocess, 64, "crop"), data.read(0)
    assert not torch.equal(crop(image, 0, 0, 0), crop(image, 0, 1, 0))
    assert torch.equal(train_transform("toy_count", model.preprocess, 64)(image, 0, 0, 0), image)      # directions matter there


def toy_features(n=300, classes=4):
    x, y = problem(n=n, dim=12, classes=classes)
    x = x.float()
    return TaskFeatures("toy_count", tuple("abcd"[:classes]), x[:200], y[:200], x[200:], y[200:], "w")


def test_result_of_both_solvers():
    for solver, protocol in (("lbfgs", "linear"), ("sgd", "linear_sgd")):
        config = linear.LinearConfig(task="toy_count", model="m", solver=solver, seed=2, lr=1.0)
        result, scores = linear.score_linear(toy_features(), config)
        assert (result.protocol, result.n, result.seed, result.model) == (protocol, 100, 2, "m")
        assert result.ci_low <= result.value <= result.ci_high and result.value > 0.4
        assert result.value == linear.top_k_accuracy(scores, toy_features().test_labels)
        assert result.settings["solver"] == solver and result.settings["weights"] == "w"


def test_the_penalty_is_chosen_without_test_images():
    features = toy_features()
    config = linear.LinearConfig(task="toy_count")
    honest = linear.score_linear(features, config)[0].details["l2"]
    shuffled = TaskFeatures(**{**vars(features), "test_labels": features.test_labels.flip(0), "test_features": -features.test_features})
    assert linear.score_linear(shuffled, config)[0].details["l2"] == honest


def test_more_seeds_are_added_and_not_measured_twice(tmp_path):
    config = linear.LinearConfig(run_dir=str(tmp_path), task="toy_count", train_images=60, test_images=40, solver="sgd", heads="avgpool/mlp res4:1x2/eval_mlp",
                                 epochs=2, batch_size=16, lr=0.1)
    first = linear.run_linear(config)
    more = linear.run_linear(dataclasses.replace(config, seeds=3))
    rows = read_results(tmp_path / "results.jsonl")
    assert first == more == rows[0] and [r.seed for r in rows] == [0, 1, 2]
    assert len({r.details["loss"] for r in rows}) == 3 and len({r.settings["weights"] for r in rows}) == 1
    assert linear.top_k_accuracy(np.load(tmp_path / "scores.npy"), open_task("toy_count", split="test", n=40).labels) == first.value
    with pytest.raises(ValueError, match="other parameters"): linear.run_linear(dataclasses.replace(config, epochs=3))


# two seeds of two fits (32 images, then 40) of three epochs: 3 * 2 + 3 * 3 steps each; a head is chosen in between
RUN = linear.LinearConfig(task="toy_count", train_images=40, test_images=20, solver="sgd", heads="avgpool/mlp res4:1x2/eval_mlp", epochs=3, batch_size=12, lr=0.1, seeds=2,
                          checkpoint_every=4, augment="flip")


def files_of(folder):
    "What a run says, but for how long it took."
    rows = [{**row, "images_per_s": 0} for row in MetricLog(folder / "metrics.jsonl").rows()]
    return rows, [dataclasses.replace(r, seconds=0) for r in read_results(folder / "results.jsonl")], (folder / "scores.npy").read_bytes()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    torch.set_num_threads(1)
    linear.run_linear(dataclasses.replace(RUN, run_dir=str(folder)))
    return folder


def interrupt(patch, at, action):
    "Let `action` happen before the loss of a head is computed for the n-th time; there are two heads."
    count, plain = [0], linear.head_loss
    def head_loss(*args):
        count[0] += 1
        if count[0] == 2 * at: action()
        return plain(*args)
    patch.setattr(linear, "head_loss", head_loss)


def test_a_line_per_epoch_that_the_monitor_shows(straight):
    rows = MetricLog(straight / "metrics.jsonl").rows()
    assert [(r["seed"], r["epoch"], r["step"]) for r in rows] == [(k // 6, 1 + k % 3, 15 * (k // 6) + (2, 4, 6, 9, 12, 15)[k % 6]) for k in range(12)]
    assert [r["learning_rate"] for r in rows[:3]] == pytest.approx([linear.learning_rate(linear.config_recipe(RUN), e) for e in range(3)])
    assert all(r["loss"] == pytest.approx(np.mean(list(r["losses"].values()))) and r["images_per_s"] > 0 for r in rows)
    said = describe(read_run(straight))
    assert "step 30" in said and f"loss {rows[-1]['loss']:.3f} nats" in said and "images/s" in said and "checkpoints: " in said


def test_a_stopped_run_ends_with_the_same_bits(straight, tmp_path):
    "Told to stop at the end of an epoch, in the second fit, and in the second seed, where it goes on with two loader processes."
    config = dataclasses.replace(RUN, run_dir=str(tmp_path))
    for at, step, number in ((2, 2, signal.SIGTERM), (6, 8, signal.SIGUSR2), (15, 23, signal.SIGTERM)):
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, at, lambda: signal.raise_signal(number))
            with pytest.raises(linear.Preempted, match=f"told to stop; step {step} is saved"): linear.run_linear(config)
    linear.run_linear(dataclasses.replace(config, workers=2))
    assert files_of(tmp_path) == files_of(straight)


def test_a_killed_run_ends_with_the_same_bits(straight, tmp_path):
    "kill -9 before the first checkpoint, in the second fit, and, with a loader process, after the first seed."
    config = dataclasses.replace(RUN, run_dir=str(tmp_path))
    for at, workers in ((2, 0), (8, 0), (14, 1)):
        pid = os.fork()
        if pid == 0:
            interrupt(pytest.MonkeyPatch(), at, lambda: os.kill(os.getpid(), signal.SIGKILL))
            try: linear.run_linear(dataclasses.replace(config, workers=workers))
            finally: os._exit(0)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    linear.run_linear(config)
    assert files_of(tmp_path) == files_of(straight)


def test_views_are_the_same_for_any_number_of_workers():
    model, data = open_model("random:regnety_toy"), open_task("toy_count", n=24)
    one, two = (linear.trunk_batches(model, data, ["avgpool"], augment="crop", batch_size=8, seed=5, workers=n) for n in (0, 2))
    for done in (0, 2):
        both = [list(batches(3, done)) for batches in (one, two)]
        assert len(both[0]) == len(both[1]) == 3 - done and all(torch.equal(a["avgpool"], b["avgpool"]) and torch.equal(y, z) for (a, y), (b, z) in zip(*both))


@pytest.mark.parametrize("augment", ["", "flip"])
def test_open_images_labels_row_by_row(tmp_path, augment):
    "Training labels as rows on demand, from a store and through the backbone, end as those of a table do; two heads, chosen by held-out images."
    table = torch.from_numpy(np.random.default_rng(0).integers(-1, 2, (40, 6)).astype(np.int8))
    image, column = np.nonzero(table.numpy() >= 0)
    rows = Claims(np.searchsorted(image, np.arange(41)), column, table.numpy()[image, column], 6)
    pixels, found = torch.randint(256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), []
    config = linear.LinearConfig(task="openimages", solver="sgd", heads="avgpool/mlp avgpool/eval_mlp", augment=augment, epochs=2, batch_size=16)
    for name, labels in (("rows", rows), ("table", table)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear, "open_task", lambda slug, root, split, n: TaskData(slug, split, "abcdef", labels, pixels.__getitem__))
            patch.setattr(linear, "measure", functools.partial(measure, n_resamples=20))
            found.append(linear.run_linear(dataclasses.replace(config, run_dir=str(tmp_path / name), image_size=32)))
    assert isinstance(TaskData("openimages", "train", "abcdef", rows, None).labels, Claims) and found[0].metric == "mAP"
    assert dataclasses.replace(found[0], seconds=0, chance=0) == dataclasses.replace(found[1], seconds=0, chance=0)      # its chance is not a number


def test_a_bad_image_is_replaced_with_its_label(tmp_path):
    def read(i):
        if i == 3: raise BadImage("truncated", "cut short")
        return torch.full((3, 32, 32), 20 * i, dtype=torch.uint8)
    data = TaskData("toy_count", "train", tuple("abcdefghijkl"), torch.arange(12), read)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3))
    [(maps, labels)] = linear.trunk_batches(model.eval(), data, ["avgpool"], augment="none", bad_images=tmp_path / "bad.jsonl")(0)
    for x, i in zip(maps["avgpool"], labels): torch.testing.assert_close(x, linear.frozen_maps(model, read(int(i))[None], ["avgpool"])["avgpool"][0])
    assert 3 not in labels and len(labels) == 12 and "truncated" in (tmp_path / "bad.jsonl").read_text()


def test_what_needs_the_images_is_refused_on_features():
    config = linear.LinearConfig(task="toy_count", solver="sgd")
    with pytest.raises(ValueError, match="images"): linear.score_linear(toy_features(), dataclasses.replace(config, augment="crop"))
    with pytest.raises(ValueError, match="res4"): linear.score_linear(toy_features(), dataclasses.replace(config, heads="res4/mlp"))


def test_both_solvers_of_the_race_end_alike():
    row = linear.race_scikit_learn(600, 20, 5, separation=2.0, l2=1e-2, rounds=1)
    assert row["ours_objective"] == pytest.approx(row["scikit_learn_objective"], rel=1e-4)
    assert row["ours_accuracy"] == pytest.approx(row["scikit_learn_accuracy"], abs=0.02) and row["times_faster"] > 0


def test_features_that_say_nothing_leave_the_frequencies():
    "A dead backbone: no NaN, and the bias is what the labels alone tell."
    labels = torch.tensor([0] * 8 + [1] * 4)
    for features in (torch.zeros(12, 3), torch.ones(12, 3)):
        fit = linear.fit_logistic(features, labels, 2, l2=1e-3)
        scores = features[:1] @ fit.weight + fit.bias
        assert torch.allclose(scores.softmax(1), torch.tensor([[2 / 3, 1 / 3]]), atol=1e-3)


def test_product_of_unlike_numbers_is_an_error():
    with pytest.raises(RuntimeError): linear.product(torch.ones(2, 3), torch.ones(3, 2, dtype=torch.float64))
    assert torch.equal(linear.product(torch.ones(2, 3, requires_grad=True), torch.ones(3, 2)), torch.full((2, 2), 3.0))
