"The linear probe against scikit-learn, torch and hand-computed cases."
import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from seer_nb.evaluate import linear
from seer_nb.evaluate.features import TaskFeatures


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
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


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_accuracy_is_scikit_learns(k):
    rng = np.random.default_rng(k)
    scores, labels = rng.normal(size=(200, 6)), rng.integers(6, size=200)
    assert linear.top_k_accuracy(scores, labels, k) == pytest.approx(top_k_accuracy_score(labels, scores, k=k, labels=range(6)))
    assert linear.top_k_accuracy(torch.from_numpy(scores), torch.from_numpy(labels), k) == linear.top_k_accuracy(scores, labels, k)


def test_ties_and_nans_do_not_count_as_right():
    labels = np.arange(60) % 6
    assert linear.top_k_accuracy(np.zeros((60, 6)), labels) == pytest.approx(1 / 6)
    assert linear.top_k_accuracy(np.zeros((60, 6)), labels, 2) == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match="not a number"): linear.top_k_accuracy(np.full((60, 6), np.nan), labels)
    with pytest.raises(ValueError, match="do not fit"): linear.top_k_accuracy(np.zeros((60, 6)), labels[1:])


def test_mean_per_class_is_balanced_accuracy():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(300, 7)), rng.choice(7, 300, p=[0.6, 0.2, 0.1, 0.05, 0.05, 0, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # classes 5 and 6 are predicted and never true
        expected = balanced_accuracy_score(labels, scores.argmax(1))
    assert linear.mean_per_class_accuracy(scores, labels) == pytest.approx(expected)


def test_bootstrap_interval_covers_the_truth():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(100):
        low, high = linear.bootstrap_interval(np.mean, rng.random(200) < 0.3, n_resamples=200, seed=trial)
        covered += low <= 0.3 <= high
    assert 88 <= covered <= 100      # 95 expected
    pairs = linear.bootstrap_interval(lambda a, b: (a == b).mean(), np.arange(50), np.arange(50))
    assert pairs == (1.0, 1.0)       # arrays are resampled together


def test_stratified_split():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 2 + [3])
    first, second = linear.stratified_split(labels, 0.2, seed=3)
    assert sorted(torch.cat([first, second]).tolist()) == list(range(len(labels)))
    assert labels[second].bincount(minlength=4).tolist() == [10, 2, 1, 0]
    assert torch.equal(second, linear.stratified_split(labels, 0.2, seed=3)[1])
    assert not torch.equal(second, linear.stratified_split(labels, 0.2, seed=4)[1])


def test_sgd_takes_torch_steps():
    "Without batch norm and with one full batch, each epoch is one step of torch's Nesterov SGD from the same start."
    x, y = problem(n=64, dim=8)
    kwargs = dict(lr=0.5, batch_size=64, weight_decay=0.01, batch_norm=False, seed=1)
    begin, end = (linear.fit_sgd(x, y, 5, epochs=n, **{**kwargs, "lr": lr}) for n, lr in ((1, 0.0), (7, 0.5)))
    w = torch.cat([begin.weight, begin.bias[None]]).requires_grad_()
    optimizer = torch.optim.SGD([w], lr=0.0, momentum=0.9, nesterov=True, weight_decay=0.01)
    for epoch in range(7):
        optimizer.param_groups[0]["lr"] = 0.5 * 64 / 256 * [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001][epoch]
        loss = torch.nn.functional.cross_entropy(x @ w[:-1] + w[-1], y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    np.testing.assert_allclose(end.weight.numpy(), w[:-1].detach().numpy(), atol=1e-10)
    np.testing.assert_allclose(end.bias.numpy(), w[-1].detach().numpy(), atol=1e-10)


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
