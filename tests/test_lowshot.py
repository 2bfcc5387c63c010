"Average precision, SVMs and label samples against scikit-learn, torchmetrics and hand-written rules."
import dataclasses
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import LinearSVC

from seer_nb.evaluate import lowshot
from seer_nb.evaluate.features import TaskFeatures
from seer_nb.evaluate.tasks import ROWS, TaskData, read_results, toy_row

COSTS = [0.01, 1.0, 20.0]


def ranking(n=300, classes=5, seed=0, digits=1):
    "Scores with many ties, and targets of 1, 0 and -1."
    rng = np.random.default_rng(seed)
    targets = rng.choice([1, 0, -1], size=(n, classes), p=[0.2, 0.7, 0.1])
    return (rng.normal(size=(n, classes)) + targets).round(digits), targets


def problem(n=120, dim=20, classes=4, seed=0):
    "Features of length 1, and targets of 1, 0 and -1."
    rng = np.random.default_rng(seed)
    targets = rng.choice([1, 0, -1], size=(n, classes), p=[0.25, 0.65, 0.1])
    x = np.abs(rng.normal(size=(n, dim)) + (targets == 1) @ rng.normal(size=(classes, dim)))
    return lowshot.normalize_features(x), torch.from_numpy(targets)


def liblinear(cost, **kwargs): return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=True, random_state=0, **{"tol": 1e-9, "max_iter": 200_000, **kwargs})


# ── average precision ────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("digits", [0, 1, 9])
def test_step_is_scikit_learns_and_torchmetrics(digits):
    from torchmetrics.classification import MultilabelAveragePrecision
    scores, targets = ranking(digits=digits)
    ours = lowshot.average_precision(scores, targets, "step")
    kept = targets >= 0
    judge = [average_precision_score(targets[k, c], scores[k, c]) for c, k in enumerate(kept.T)]
    np.testing.assert_allclose(ours, judge, rtol=1e-12)
    other = MultilabelAveragePrecision(5, average=None, ignore_index=-1)(torch.sigmoid(torch.from_numpy(scores)), torch.from_numpy(targets))
    np.testing.assert_allclose(ours, other, rtol=1e-5)


def by_the_rule(scores, truth, levels=None):
    "The envelope as the VOC papers define it, one recall at a time; scores without ties."
    ranked = truth[np.argsort(-scores)]
    precision, recall = np.cumsum(ranked) / np.arange(1, len(ranked) + 1), np.cumsum(ranked) / ranked.sum()
    best_from = lambda r: max((p for p, q in zip(precision, recall) if q >= r - 1e-12), default=0.0)
    return np.mean([best_from(r) for r in (recall[ranked == 1] if levels is None else levels)])


def test_area_and_11_point_follow_the_voc_rules():
    scores, targets = ranking(n=150, digits=12)
    for c in range(5):
        keep = targets[:, c] >= 0
        s, t = scores[keep, c], targets[keep, c]
        assert lowshot.average_precision(scores[:, c], targets[:, c]) == pytest.approx(by_the_rule(s, t), abs=1e-12)
        assert lowshot.average_precision(scores[:, c], targets[:, c], "11-point") == pytest.approx(by_the_rule(s, t, np.arange(11) / 10), abs=1e-12)


def test_recall_levels_are_met_exactly():
    "Ten positives, three of them in front: recall 3/10 is reached at precision 1, though 3 * 0.1 is above 3/10 in floating point."
    truth = [1] * 3 + [0] * 5 + [1] * 7
    assert lowshot.average_precision(-np.arange(15.0), truth, "11-point") == pytest.approx((4 * 1 + 7 * 10 / 15) / 11)


def test_order_of_the_file_does_not_matter():
    scores, targets = ranking(digits=0)
    shuffle = np.random.default_rng(1).permutation(len(scores))
    for kind in ("area", "11-point", "step"):
        np.testing.assert_allclose(lowshot.average_precision(scores, targets, kind), lowshot.average_precision(scores[shuffle], targets[shuffle], kind))


def test_classes_without_positives():
    scores, targets = ranking()
    targets[:, 2] = np.minimum(targets[:, 2], 0)
    ap = lowshot.average_precision(scores, targets)
    assert ap.isnan().tolist() == [False, False, True, False, False]
    assert lowshot.mean_average_precision(scores, targets) == pytest.approx(ap[[0, 1, 3, 4]].mean().item())
    with pytest.raises(ValueError, match="no class has a positive"): lowshot.mean_average_precision(scores, np.zeros_like(targets))


def test_bad_rankings_are_refused():
    with pytest.raises(ValueError, match="not a number"): lowshot.average_precision([0.1, float("nan")], [0, 1])
    with pytest.raises(ValueError, match="do not fit"): lowshot.average_precision([0.1, 0.2], [0, 1, 1])
    with pytest.raises(ValueError, match="targets must be"): lowshot.average_precision([0.1, 0.2], [0, 2])
    with pytest.raises(ValueError, match="kind"): lowshot.average_precision([0.1, 0.2], [0, 1], "101-point")


# ── support vector machines ──────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("n, dim", [(120, 20), (40, 90)])
def test_svms_are_scikit_learns(n, dim):
    x, targets = problem(n, dim)
    signs = torch.where(targets > 0, 1, -1)
    for fit in lowshot.fit_svms(x, signs, COSTS, tolerance=1e-10):
        for c in range(4):
            judge = liblinear(fit.cost).fit(x, signs[:, c])
            np.testing.assert_allclose(fit.weight[:, c], judge.coef_[0], atol=1e-4)
            np.testing.assert_allclose(fit.bias[c], judge.intercept_[0], atol=1e-4)
            np.testing.assert_allclose(fit.scores(x)[:, c], judge.decision_function(x), atol=1e-4)
            margin = np.maximum(0, 1 - signs[:, c].numpy() * judge.decision_function(x)) ** 2
            value = 0.5 * (judge.coef_**2).sum() + 0.5 * judge.intercept_[0] ** 2 + fit.cost * (margin * np.where(signs[:, c] > 0, 2, 1)).sum()
            assert fit.objective[c].item() == pytest.approx(value, rel=1e-7)


def test_sign_zero_leaves_a_sample_out():
    x, targets = problem()
    fit, = lowshot.fit_svms(x, torch.where(targets < 0, 0, 2 * targets - 1), [5.0], tolerance=1e-10)
    for c in range(4):
        keep = targets[:, c] >= 0
        alone, = lowshot.fit_svms(x[keep], 2 * targets[keep, c : c + 1] - 1, [5.0], tolerance=1e-10)
        np.testing.assert_allclose(fit.scores(x)[:, c], alone.scores(x)[:, 0], atol=1e-4)


def test_gap_bounds_what_is_left():
    x, targets = problem(60, 80)
    signs = torch.where(targets > 0, 1, -1)
    best = [fit.objective for fit in lowshot.fit_svms(x, signs, [0.1, 1000.0], tolerance=1e-12)]
    for fit, optimum in zip(lowshot.fit_svms(x, signs, [1000.0, 0.1], tolerance=1e-2), best):
        assert (fit.objective - optimum <= fit.gap + 1e-9).all() and (fit.objective >= optimum - 1e-9 * optimum).all()
        assert (fit.gap <= 1e-2 * fit.objective).all()


def test_warm_starts_do_not_change_the_answer():
    x, targets = problem()
    signs = torch.where(targets > 0, 1, -1)
    for fit in lowshot.fit_svms(x, signs, [0.01, 1, 10, 100], tolerance=1e-10):
        cold, = lowshot.fit_svms(x, signs, [fit.cost], tolerance=1e-10)
        np.testing.assert_allclose(fit.scores(x), cold.scores(x), atol=1e-3)


def test_repeated_and_constant_features_are_no_trouble():
    x, targets = problem()
    singular = torch.cat([x, x, torch.zeros(len(x), 3), torch.ones(len(x), 1)], 1)
    fit, = lowshot.fit_svms(singular, torch.where(targets > 0, 1, -1), [1.0])
    assert fit.weight.isfinite().all() and torch.allclose(fit.weight[:20], fit.weight[20:40], atol=1e-8)


def test_dead_network_scores_the_share_of_positives():
    targets = problem()[1]
    dead = lowshot.normalize_features(torch.zeros(len(targets), 7))
    _, _, scores = lowshot.svm_protocol(dead, targets, dead, COSTS)
    share = (targets == 1).sum(0) / (targets >= 0).sum(0)
    np.testing.assert_allclose(lowshot.average_precision(scores, targets), share, rtol=1e-6)


def test_bad_svms_are_refused():
    x, targets = problem()
    signs = torch.where(targets > 0, 1, -1)
    for bad, match in (((x, signs, []), "costs"), ((x, signs, [1.0, -1.0]), "costs"), ((x[1:], signs, [1.0]), "signs"), ((x, 2 * signs, [1.0]), "signs"),
                       ((x * float("nan"), signs, [1.0]), "not finite")):
        with pytest.raises(ValueError, match=match): list(lowshot.fit_svms(*bad))


# ── the VOC07 protocol ───────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_are_scikit_learns(folds):
    rng = np.random.default_rng(folds)
    positive = rng.random((101, 6)) < [0.1, 0.3, 0.5, 0.7, 0.9, 0.25]
    ours = lowshot.stratified_folds(torch.from_numpy(positive), folds)
    for c in range(6):
        for f, (_, held_out) in enumerate(StratifiedKFold(folds).split(positive, positive[:, c])):
            assert torch.nonzero(ours[:, c] == f)[:, 0].tolist() == held_out.tolist()
    with pytest.raises(ValueError, match="too few"): lowshot.stratified_folds(torch.arange(30)[:, None] < 2, 3)


def test_protocol_is_the_loop_over_scikit_learn():
    "Costs, cross-validated AP and test scores of the loop that VISSL runs: a class, a cost, a fold at a time."
    (x, targets), costs = problem(150, 15, 3), [0.01, 1.0, 100.0]
    x_test = problem(60, 15, 3, seed=1)[0]
    chosen, validated, scores = lowshot.svm_protocol(x, targets, x_test, costs)
    for c in range(3):
        y = np.where(targets[:, c] > 0, 1, -1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ap = [cross_val_score(liblinear(cost, tol=1e-6), x, y, cv=3, scoring="average_precision").mean() for cost in costs]
        np.testing.assert_allclose(validated[:, c], ap, atol=2e-3)
        assert chosen[c] == pytest.approx(costs[int(np.argmax(ap))])
        np.testing.assert_allclose(scores[:, c], liblinear(chosen[c].item(), tol=1e-6).fit(x, y).decision_function(x_test), atol=0.02)


# ── samples of labels ────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_published_samples_never_change():
    labels = torch.arange(40) % 4
    assert lowshot.draw_shots(labels, 4, 2)[0].tolist() == [4, 5, 9, 10, 15, 16, 23, 34]
    assert lowshot.draw_shots(labels, 4, 1, seed=3, sample=2)[0].tolist() == [1, 10, 23, 28]


def test_shots_are_nested_balanced_and_never_difficult():
    targets = problem(400)[1]
    before = set()
    for k in (1, 4, 9):
        rows, signs = lowshot.draw_shots(targets, 4, k, sample=1)
        assert (signs == 1).sum(0).tolist() == [k] * 4 and (signs == -1).sum(0).tolist() == [3 * k] * 4 and signs.any(1).all()
        assert (targets[rows][signs == 1] == 1).all() and (targets[rows][signs == -1] == 0).all()
        drawn = {(row, c, int(signs[i, c])) for i, row in enumerate(rows.tolist()) for c in range(4) if signs[i, c]}
        assert before < drawn
        before = drawn


def test_shots_of_single_labels_are_one_against_the_rest():
    labels = torch.arange(90) % 3
    rows, signs = lowshot.draw_shots(labels, 3, 5)
    assert labels[rows].bincount().tolist() == [5, 5, 5]
    assert (signs.argmax(1) == labels[rows]).all() and (signs.sum(1) == -1).all()
    with pytest.raises(ValueError, match="class 0 has 30 positive images, 31 are needed"): lowshot.draw_shots(labels, 3, 31)


def test_samples_are_fair_and_differ():
    labels = torch.arange(20) % 2
    counts = sum(torch.zeros(20).index_add(0, lowshot.draw_shots(labels, 2, 3, sample=s)[0], torch.ones(6)) for s in range(400))
    assert (counts / 400 - 0.3).abs().max() < 0.1                      # six of twenty; four standard deviations


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def config(tmp_path, **kwargs):
    return lowshot.LowShotConfig(**{"run_dir": str(tmp_path / "run"), "task": "toy_count", "costs": "0.1,10", "shots": "1,3", "samples": 2, "limit": 40, **kwargs})


@pytest.fixture
def toy(monkeypatch):
    "Features in place of the network's; returns the list of extractions."
    x, targets = problem(400, 12, 5)
    classes, labels = tuple("abcde"), (targets == 1).long().argmax(1)
    calls = []

    def drawn_features(model, train, test, config):
        calls.append(task := config.task)
        y = targets if task == "toy_voc" else labels
        return TaskFeatures(task, classes, x[:300].float(), y[:300], x[300:].float(), y[300:], "w")

    rows = ROWS | {"toy_voc": dataclasses.replace(toy_row("toy_count"), slug="toy_voc", metric="mAP", paper={"svm": {"seer": 0.9}}, paper_source="a table")}
    monkeypatch.setattr("seer_nb.evaluate.tasks.ROWS", rows)
    monkeypatch.setattr(lowshot, "drawn_features", drawn_features)
    monkeypatch.setattr(lowshot, "open_task", lambda task, root, split, n: TaskData(task, split, classes, (targets if task == "toy_voc" else labels)[:300], None))
    monkeypatch.setattr(lowshot, "weights_hash", lambda model: "w")
    return calls


def test_run_measures_each_protocol_once(tmp_path, toy):
    results = lowshot.run_lowshot(config(tmp_path))
    assert [(r.protocol, r.settings.get("k"), r.metric) for r in results] == [("svm", None, "mAP"), ("lowshot", 1, "mAP"), ("lowshot", 3, "mAP"), ("limited", None, "top-1")]
    assert lowshot.run_lowshot(config(tmp_path)) == results == read_results(tmp_path / "run/results.jsonl") and len(toy) == 1
    assert np.load(tmp_path / "run/svm_scores.npy").shape == (100, 5)
    assert all(r.ci_low <= r.value <= r.ci_high and r.n == 100 for r in results)


def test_run_goes_on_after_a_kill(tmp_path, toy, monkeypatch):
    whole = lowshot.run_lowshot(config(tmp_path / "whole"))
    keep, wrote = lowshot.append_result, []

    def killed(path, result):
        if len(wrote) == 2: raise KeyboardInterrupt
        wrote.append(keep(path, result))

    monkeypatch.setattr(lowshot, "append_result", killed)
    with pytest.raises(KeyboardInterrupt): lowshot.run_lowshot(config(tmp_path))
    monkeypatch.setattr(lowshot, "append_result", keep)
    first = read_results(tmp_path / "run/results.jsonl")
    again = lowshot.run_lowshot(config(tmp_path))
    assert len(first) == 2 and again[:2] == first                    # with the seconds of the first time
    assert [r.value for r in again] == [r.value for r in whole]


def test_several_labels_per_image(tmp_path, toy):
    svm, *shots = lowshot.run_lowshot(config(tmp_path, task="toy_voc", protocols="svm,lowshot", paper_model="seer"))
    assert (svm.metric, svm.paper, svm.paper_source) == ("mAP", 0.9, "a table") and shots[0].paper is None
    assert svm.value > 1.3 * svm.chance and shots[0].details["top1"] is None
    with pytest.raises(ValueError, match="one label per image"): lowshot.run_lowshot(config(tmp_path, task="toy_voc", run_dir=str(tmp_path / "b")))


@pytest.mark.parametrize("bad, match", [({"protocols": "svm,shots"}, "no protocol 'shots'"), ({"costs": "0,1"}, "positive"), ({"costs": "a"}, "could not convert"),
                                        ({"shots": "1,300"}, "are needed for k = 300"), ({"shots": "0"}, "at least 1"), ({"limit": 301}, "between 1 and 300"),
                                        ({"samples": 0}, "samples"), ({"folds": 1}, "folds"), ({"paper_model": "seer_10b"}, "no published score")])
def test_nothing_is_written_for_a_bad_config(tmp_path, toy, bad, match):
    with pytest.raises(ValueError, match=match): lowshot.run_lowshot(config(tmp_path, **bad))
    assert not (tmp_path / "run").exists() and not toy


def test_a_thousand_images_have_a_row_of_their_own(tmp_path, toy, monkeypatch):
    "A limited run of X is listed as X_1000 (here X_40) if there is such a row and nothing else was left out; the same run started as X_1000 draws from all images of X."
    row = dataclasses.replace(toy_row("toy_count"), slug="toy_count_40", limit=40)
    for where in ("seer_nb.evaluate.tasks.ROWS", "seer_nb.evaluate.lowshot.ROWS"): monkeypatch.setattr(where, ROWS | {"toy_count_40": row})
    by_name = {task: lowshot.run_lowshot(config(tmp_path / task, task=task)) for task in ("toy_count", "toy_count_40")}
    for results in by_name.values(): assert [r.task for r in results] == ["toy_count"] * 3 + ["toy_count_40"]
    assert [r.value for r in by_name["toy_count"]] == [r.value for r in by_name["toy_count_40"]] and len(set(by_name["toy_count_40"][-1].details["samples"])) > 1
    assert [r.details["interval"] for r in results] == ["95 %, bootstrap over test images"] + ["lowest to highest of 2 samples of the labels"] * 3
    assert lowshot.run_lowshot(config(tmp_path / "toy_count_40", task="toy_count_40")) == by_name["toy_count_40"] and len(toy) == 2      # measured once
    assert lowshot.run_lowshot(config(tmp_path, limit=30, protocols="limited"))[0].task == "toy_count"


def test_only_the_images_that_are_drawn_go_through_the_network(tmp_path, monkeypatch):
    "Without the SVM on all labels the rest is not extracted, and the scores are the same."
    config = lowshot.LowShotConfig(run_dir=str(tmp_path / "some"), task="toy_digits", train_images=200, test_images=50, protocols="lowshot,limited", shots="1,2", samples=2, limit=40, costs="1", folds=2)
    seen, plain = [], lowshot.extract_features
    monkeypatch.setattr(lowshot, "extract_features", lambda model, data, **how: seen.append(len(data)) or plain(model, data, **how))
    some = lowshot.run_lowshot(config)
    assert 40 <= seen[0] < 120 and seen[1] == 50
    everything = lowshot.run_lowshot(dataclasses.replace(config, run_dir=str(tmp_path / "all"), protocols="svm,lowshot,limited"))
    assert seen[2] == 200 and [r.value for r in some] == pytest.approx([r.value for r in everything[1:]], abs=1e-6)
