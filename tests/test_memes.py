"Memes: ceilings and probes against scikit-learn, half a meme against both, the challenge's files."
import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from seer_nb.evaluate import memes
from seer_nb.evaluate.memes import MemesConfig

torch.set_num_threads(1)


def problem(n=400, dim=10, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(2, size=n)
    return torch.from_numpy((rng.normal(size=(n, dim)) + 0.4 * y[:, None] * rng.normal(size=dim)).astype(np.float32)), torch.from_numpy(y)


def test_ceiling_is_that_of_the_shares():
    "The share of positives of each kind, by scikit-learn; and no order of four kinds ranks better."
    import itertools
    rng = np.random.default_rng(0)
    kinds = rng.integers(4, size=120)
    y = (rng.random(120) < np.array([0.2, 0.5, 0.6, 0.9])[kinds]).astype(int)
    shares = np.array([y[kinds == k].mean() for k in range(4)])
    ceiling = memes.auc_ceiling(kinds, y)
    assert np.isclose(ceiling, roc_auc_score(y, shares[kinds]))
    assert max(roc_auc_score(y, np.array(order)[kinds]) for order in itertools.permutations(range(4))) <= ceiling + 1e-12
    assert memes.auc_ceiling(range(120), y) == 1.0 and memes.auc_ceiling([0] * 120, y) == 0.5


def test_ceiling_needs_both_classes():
    with pytest.raises(ValueError, match="both kinds"): memes.auc_ceiling(["a", "b"], [1, 1])


@pytest.mark.parametrize("l2", [1.0, 0.01])
def test_probe_is_scikit_learns(l2):
    x, y = problem()
    scores, found = memes.probe_auc(x[:300], y[:300], x[300:], [l2])
    scaler = StandardScaler().fit(x[:300])
    judge = LogisticRegression(C=2 / (l2 * 300), tol=1e-8, max_iter=2000)                 # a penalty on each of two columns is half of one on their difference
    theirs = judge.fit(scaler.transform(x[:300]), y[:300]).decision_function(scaler.transform(x[300:]))
    np.testing.assert_allclose(scores, theirs, atol=2e-3)
    assert np.isclose(memes.roc_auc(scores, y[300:]), roc_auc_score(y[300:], theirs), atol=1e-3)
    assert found["l2"] == l2 and 0.5 < found["validation"] <= 1


def test_penalty_is_the_best_held_out():
    x, y = problem(dim=150)
    best, found = memes.sweep_auc(x, y, [10.0, 1.0, 0.1, 1e-4])
    assert list(found) == [10.0, 1.0, 0.1, 1e-4] and found[best] == max(found.values()) and found[best] > found[1e-4]


def test_labels_of_the_test_set_choose_nothing():
    "The scores are the same whatever the test labels are: they are not asked for."
    x, y = problem()
    first, _ = memes.probe_auc(x[:300], y[:300], x[300:])
    again, _ = memes.probe_auc(x[:300], y[:300], x[300:])
    alone, _ = memes.probe_auc(x[:300], y[:300], x[300:310])
    assert torch.equal(first, again) and torch.allclose(first[:10], alone, atol=1e-6)


def test_bag_of_words_is_scikit_learns():
    texts = ["What a moon!", "my  Moon, my cat", "a-b c", "", "été à la mer"]
    known = memes.vocabulary(texts, least=1)
    theirs = CountVectorizer(binary=True, token_pattern=r"\w+").fit(texts)
    assert known == list(theirs.get_feature_names_out())
    assert (memes.bag_of_words(texts, known).numpy() == theirs.transform(texts).toarray()).all()
    assert memes.bag_of_words(["unheard of"], known).sum() == 0


def test_a_perfect_eye_stays_below_the_ceiling():
    "Knowing what is shown reaches the planted share and no more; with the words everything is known."
    toy = memes.toy_memes("test", 300)
    y = toy.images.labels.numpy()
    names = list(memes.SHOWN.values())
    planted = memes.TRUE_SHARE[[names.index(name) for name in toy.shown]]
    ceiling = memes.auc_ceiling(toy.shown, y)
    assert roc_auc_score(y, planted) <= ceiling < roc_auc_score(y, planted) + 0.05
    said = [next(name for name in names if name in text) for text in toy.texts]
    assert [a == b for a, b in zip(said, toy.shown)] == y.astype(bool).tolist()
    fitted = IsotonicRegression().fit_transform(planted, y)                                # any monotone change of the planted shares
    assert roc_auc_score(y, fitted) <= ceiling + 1e-12


def test_words_are_on_the_picture_or_not():
    a, b = (memes.toy_memes("train", 4, printed) for printed in (True, False))
    differs = (a.images[0][0] != b.images[0][0]).any(0)
    assert differs[44:].any() and not differs[:40].any()
    assert a.texts == b.texts and a.images.labels.equal(b.images.labels)


# ── the challenge's files ────────────────────────────────────────────────────────────────────────────────────────────────────

def challenge(root, train=30, test=20, dev="dev_seen.jsonl", seed=0):
    "A tiny set in the original layout."
    rng, folder = np.random.default_rng(seed), root / "hateful_memes"
    (folder / "img").mkdir(parents=True)
    for name, n, first in (("train.jsonl", train, 1000), (dev, test, 5000)):
        rows = [{"id": first + i, "img": f"img/{first + i:05}.png", "label": i % 2, "text": f"a harmless text {i // 2}"} for i in range(n)]
        for row in rows: (folder / row["img"]).write_bytes(cv2.imencode(".png", rng.integers(256, size=(24, 32, 3), dtype=np.uint8))[1].tobytes())
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_run_on_the_challenges_files(tmp_path):
    challenge(tmp_path)
    config = MemesConfig(run_dir=str(tmp_path / "run"), task="hateful_memes", root=str(tmp_path), image_size=16, paper_model="SEER 10B")
    result = memes.run_memes(config)
    assert memes.run_memes(config) == result
    assert (result.n, result.metric, result.chance, result.paper, result.protocol) == (20, "ROC-AUC", 0.5, 0.734, "memes")
    scores = np.load(tmp_path / "run/scores.npy", allow_pickle=False)
    assert np.isclose(result.value, roc_auc_score([i % 2 for i in range(20)], scores)) and result.ci_low <= result.value <= result.ci_high
    assert result.details["text_ceiling"] == 0.5 and result.details["texts_of_both_classes"] == 20 and "picture_ceiling" not in result.details
    with pytest.raises(ValueError, match="other parameters"): memes.run_memes(dataclasses.replace(config, l2_count=3))
    other = memes.run_memes(dataclasses.replace(config, paper_model=""))                # the same numbers, beside no published one
    assert (other.paper, other.value) == (None, result.value) and memes.run_memes(config) == result


@pytest.mark.parametrize("dev", ["dev_seen.jsonl", "dev.jsonl"])
def test_texts_follow_the_pictures(tmp_path, dev):
    challenge(tmp_path, dev=dev)
    some = memes.open_memes("hateful_memes", tmp_path, "test", 6)
    assert len(some.images) == len(some.texts) == 6 and some.images.labels.sum() == 3
    for i in range(6):
        number = int(some.images.name(i)[4:9]) - 5000
        assert some.texts[i] == f"a harmless text {number // 2}" and some.images.labels[i] == number % 2


@pytest.mark.parametrize("line, message", [('{"id": 1, "img": "img/01000.png", "label": 1}', "text"), ('{"id": 1, "img": "img/01000.png", "label": 1, "text": 5}', "a text is 5"),
                                           ('{"id": 1, "img": "../../secret.png", "label": 1, "text": ""}', "leads out"), ('{"id": 1, "img": "img/01000.png", "label": 3, "text": ""}', "not 0 or 1"),
                                           ("not json", "train.jsonl")])
def test_damaged_lists(tmp_path, line, message):
    folder = challenge(tmp_path)
    (folder / "train.jsonl").write_text((folder / "train.jsonl").read_text() + line + "\n")
    with pytest.raises(ValueError, match=message): memes.run_memes(MemesConfig(run_dir=str(tmp_path / "run"), task="hateful_memes", root=str(tmp_path), image_size=16))
    assert not (tmp_path / "run").exists()


def test_one_class_cannot_be_scored(tmp_path):
    folder = challenge(tmp_path)
    rows = [row for row in (folder / "dev_seen.jsonl").read_text().splitlines() if json.loads(row)["label"] == 0]
    (folder / "dev_seen.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="20 and 0 test memes|10 and 0 test memes"): memes.run_memes(MemesConfig(run_dir=str(tmp_path / "run"), task="hateful_memes", root=str(tmp_path), image_size=16))
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="(?s)train.jsonl.*where to get it.*licence"): memes.open_memes("hateful_memes", tmp_path, "train")


def test_changed_memes_are_another_result(tmp_path):
    "Other pixels, labels or texts under the same names: the old result is not returned."
    folder = challenge(tmp_path)
    config = MemesConfig(run_dir=str(tmp_path / "run"), task="hateful_memes", root=str(tmp_path), image_size=16, l2_count=2)
    again = lambda name: memes.run_memes(dataclasses.replace(config, run_dir=str(tmp_path / name)))
    found = [memes.run_memes(config)]
    (folder / "img/05000.png").write_bytes((folder / "img/05001.png").read_bytes())
    with pytest.raises(ValueError, match="holds other features: data"): memes.run_memes(config)
    found.append(again("pixels"))
    listing = folder / "dev_seen.jsonl"
    listing.write_text(listing.read_text().replace("text 0", "text 1"))
    found.append(memes.run_memes(dataclasses.replace(config, run_dir=str(tmp_path / "pixels"))))       # the pictures are the same: their features serve again
    rows = [json.loads(row) for row in listing.read_text().splitlines()]
    listing.write_text("".join(json.dumps({**row, "label": 1 - row["label"]}) + "\n" for row in rows))
    found.append(again("labels"))
    assert len({json.dumps(result.settings) for result in found}) == 4 and found[1].value != found[3].value
    assert found[3].value == pytest.approx(1 - found[1].value) and again("labels") == found[3]


class Killed(BaseException):
    "Nothing may catch it, as nothing can catch kill -9."


@pytest.mark.parametrize("n", [1, 3, 5])
def test_a_killed_extraction_goes_on_and_other_weights_are_refused(tmp_path, monkeypatch, n):
    "Of 30 and 20 memes in batches of 8, n batches are done when the network stops; the second run does the others, to the same bits."
    challenge(tmp_path)
    config = MemesConfig(run_dir=str(tmp_path / "whole"), task="hateful_memes", root=str(tmp_path), image_size=16, extract_batch=8, l2_count=2)
    whole, seen, real = memes.run_memes(config), [], memes.open_model
    def opened(stop, seed=0):
        def look(module, inputs):
            seen.append(len(inputs[0]))
            if len(seen) > stop: raise Killed
        def open_model(spec, **how):
            seen.clear()
            model = real(spec, **{**how, "seed": seed})
            model.register_forward_pre_hook(look)
            return model
        monkeypatch.setattr(memes, "open_model", open_model)
    half = dataclasses.replace(config, run_dir=str(tmp_path / "half"))
    opened(1 + n)                                                                          # one image shows how wide features are
    with pytest.raises(Killed): memes.run_memes(half)
    opened(99)
    result = memes.run_memes(half)
    assert seen == [1] + [8, 8, 8, 6, 8, 8, 4][n:] and dataclasses.replace(result, seconds=0) == dataclasses.replace(whole, seconds=0)
    assert np.array_equal(np.load(tmp_path / "half/scores.npy"), np.load(tmp_path / "whole/scores.npy"))
    opened(99, seed=1)
    with pytest.raises(ValueError, match="holds other features: weights"): memes.run_memes(half)


def test_one_positive_to_train_is_refused_at_once(tmp_path):
    folder = challenge(tmp_path)
    rows = [json.loads(row) for row in (folder / "train.jsonl").read_text().splitlines()]
    (folder / "train.jsonl").write_text("".join(json.dumps({**row, "label": int(i == 0)}) + "\n" for i, row in enumerate(rows)))
    with pytest.raises(ValueError, match="29 and 1 train memes"): memes.run_memes(MemesConfig(run_dir=str(tmp_path / "run"), task="hateful_memes", root=str(tmp_path), image_size=16))
    assert not (tmp_path / "run").exists()


def test_texts_with_other_ends_of_lines_and_a_mark(tmp_path):
    folder = challenge(tmp_path)
    rows = [json.loads(row) for row in (folder / "train.jsonl").read_text().splitlines()]
    rows[3]["text"] = "one\u2028two\x85three"
    (folder / "train.jsonl").write_text("\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows), encoding="utf-8", newline="")
    found = memes.open_memes("hateful_memes", tmp_path, "train")
    assert len(found.images) == 30 and found.texts[3] == rows[3]["text"]
