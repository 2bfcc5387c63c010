"Metrics against scikit-learn, torchmetrics and the slow bootstrap."
import warnings

import numpy as np
import pytest
import sklearn.metrics as judge
import torch

from seer_nb.evaluate import linear, metrics


def predictions(n=300, classes=6, seed=0, rounded=False):
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=np.r_[0.5, np.full(classes - 1, 0.5 / (classes - 1))])
    scores = rng.normal(size=(n, classes)) + np.eye(classes)[labels]
    return scores.round(1) if rounded else scores, labels


@pytest.mark.parametrize("k", [1, 2, 4])
def test_top_k_accuracy_is_scikit_learns(k):
    scores, labels = predictions(seed=k)
    assert metrics.top_k_accuracy(scores, labels, k) == pytest.approx(judge.top_k_accuracy_score(labels, scores, k=k, labels=range(6)))
    assert metrics.top_k_accuracy(torch.from_numpy(scores), torch.from_numpy(labels), k) == metrics.top_k_accuracy(scores, labels, k)


def test_ties_and_nans_do_not_count_as_right():
    labels = np.arange(60) % 6
    assert metrics.top_k_accuracy(np.zeros((60, 6)), labels) == pytest.approx(1 / 6)
    assert metrics.top_k_accuracy(np.zeros((60, 6)), labels, 2) == pytest.approx(2 / 6)
    with pytest.raises(ValueError, match="not a number"): metrics.top_k_accuracy(np.full((60, 6), np.nan), labels)
    with pytest.raises(ValueError, match="do not fit"): metrics.top_k_accuracy(np.zeros((60, 6)), labels[1:])


def test_mean_per_class_is_balanced_accuracy():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(300, 7)), rng.choice(7, 300, p=[0.6, 0.2, 0.1, 0.05, 0.05, 0, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")      # classes 5 and 6 are predicted and never true
        expected = judge.balanced_accuracy_score(labels, scores.argmax(1))
    assert metrics.mean_per_class_accuracy(scores, labels) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_macro_f1_is_scikit_learns(seed):
    scores, labels = predictions(n=40, classes=12, seed=seed)     # some classes are never true, some never predicted
    assert metrics.macro_f1(scores, labels) == pytest.approx(judge.f1_score(labels, scores.argmax(1), labels=np.unique(labels), average="macro"))


@pytest.mark.parametrize("rounded", [False, True])     # rounded scores have ties
def test_rankings_are_scikit_learns(rounded):
    scores, labels = predictions(rounded=rounded)
    targets = (labels[:, None] == np.arange(6)) | (np.random.default_rng(1).random((300, 6)) < 0.1)
    for c in range(6):
        assert metrics.roc_auc(scores[:, c], targets[:, c]) == pytest.approx(judge.roc_auc_score(targets[:, c], scores[:, c]))
        assert metrics.average_precision(scores[:, c], targets[:, c]) == pytest.approx(judge.average_precision_score(targets[:, c], scores[:, c]))
    assert metrics.mean_average_precision(scores, targets.astype(int)) == pytest.approx(judge.average_precision_score(targets, scores, average="macro"))


def test_unknown_labels_are_left_out():
    scores, labels = predictions(rounded=True)
    targets = (labels[:, None] == np.arange(6)).astype(int)
    targets[np.random.default_rng(2).random(targets.shape) < 0.3] = -1
    targets[targets[:, 5] == 1, 5] = 0                            # a class without a positive
    known = [targets[:, c] >= 0 for c in range(6)]
    expected = [judge.average_precision_score(targets[k, c], scores[k, c]) for c, k in enumerate(known[:5])]
    assert metrics.mean_average_precision(torch.from_numpy(scores), torch.from_numpy(targets)) == pytest.approx(np.mean(expected))
    assert metrics.roc_auc(scores[:, 0], targets[:, 0]) == pytest.approx(judge.roc_auc_score(targets[known[0], 0], scores[known[0], 0]))
    with pytest.raises(ValueError, match="at least one positive"): metrics.average_precision(scores[:, 5], targets[:, 5])


def test_calibration_error_is_torchmetrics():
    from torchmetrics.functional.classification import multiclass_calibration_error
    scores, labels = predictions(n=2000)
    p = torch.from_numpy(3 * scores).softmax(1)
    for bins in (5, 15): assert metrics.calibration_error(p.amax(1), metrics.top_k_hits(p, labels), bins) == pytest.approx(
        multiclass_calibration_error(p, torch.from_numpy(labels), 6, n_bins=bins, norm="l1").item(), abs=1e-6)


def test_counted_bootstrap_is_the_slow_one():
    scores, labels = predictions(n=400)
    hits = metrics.top_k_hits(scores, labels).numpy()
    losses = np.random.default_rng(3).normal(size=400)            # every value different
    for fast, slow in ((metrics.mean_interval(hits, n_resamples=1500), metrics.bootstrap_interval(np.mean, hits, n_resamples=1500)),
                       (metrics.mean_interval(losses, n_resamples=1500), metrics.bootstrap_interval(np.mean, losses, n_resamples=1500)),
                       (metrics.mean_per_class_interval(hits, labels, n_resamples=1500),
                        metrics.bootstrap_interval(metrics.mean_per_class_accuracy, scores, labels, n_resamples=800))):
        assert fast == pytest.approx(slow, abs=0.02)


def test_resamples_in_several_parts():
    "More different values than fit into one table."
    values = np.random.default_rng(0).normal(size=20_000)
    low, high = metrics.mean_interval(values, n_resamples=300)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 / 20_000**0.5, rel=0.2)


def test_intervals_cover_the_truth():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        first, second = rng.random(200) < 0.4, rng.random(200) < 0.3
        low, high = metrics.paired_interval(first, second, n_resamples=500, seed=trial)
        covered += low <= 0.1 <= high
    assert 180 <= covered <= 198      # 190 expected
    pairs = metrics.bootstrap_interval(lambda a, b: (a == b).mean(), np.arange(50), np.arange(50))
    assert pairs == (1.0, 1.0)        # arrays are resampled together


def test_pairing_sees_what_intervals_apart_do_not():
    rng = np.random.default_rng(0)
    first = rng.random(1000) < 0.6
    second = first ^ (rng.random(1000) < 0.01)
    low, high = metrics.paired_interval(first, second)
    apart = np.subtract(*metrics.mean_interval(first)[::-1])
    assert high - low < apart / 3
    assert metrics.paired_interval(first, first) == (0, 0)


@pytest.mark.parametrize("metric", metrics.METRICS)
def test_measure(metric):
    scores, labels = predictions(classes=2 if metric == "ROC-AUC" else 6)
    if metric == "mAP": labels = (labels[:, None] == np.arange(6)).astype(int)
    value, low, high = metrics.measure(metric, torch.from_numpy(scores), torch.from_numpy(labels), n_resamples=100)
    assert low < value < high and value == pytest.approx(metrics.METRICS[metric](scores, labels))
    assert (value, low, high) == metrics.measure(metric, scores, labels, n_resamples=100)


@pytest.mark.parametrize("metric, shape, expected", [("mAP", (125_436, 9_605), 40), ("mAP", (50_000, 800), 100), ("mAP", (4_952, 20), 1000), ("macro-F1", (50_000, 1000), 1000)])
def test_a_large_table_is_resampled_less(metric, shape, expected, monkeypatch):
    drawn = []
    monkeypatch.setitem(metrics.METRICS, metric, lambda scores, labels: 0.5)
    monkeypatch.setattr(metrics, "bootstrap_interval", lambda *args, n_resamples, seed: (drawn.append(n_resamples), (0.4, 0.6))[1])
    zeros = torch.zeros(1, 1).expand(shape)                       # takes no memory
    assert metrics.measure(metric, zeros, zeros) == (0.5, 0.4, 0.6) and drawn == [expected]


def test_the_linear_page_still_offers_them():
    assert linear.top_k_accuracy is metrics.top_k_accuracy and linear.bootstrap_interval is metrics.bootstrap_interval
