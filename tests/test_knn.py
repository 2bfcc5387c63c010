"k-NN against scikit-learn and hand-computed votes."
import dataclasses

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from seer_nb.evaluate import knn
from seer_nb.evaluate.features import FeaturesConfig, TaskFeatures, run_features

torch.set_num_threads(1)


def problem(n=300, m=70, dim=16, classes=6, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, dim))
    labels = rng.integers(classes, size=n + m)
    features = (centres[labels] + 1.5 * rng.normal(size=(n + m, dim))).astype(np.float32)
    return features[:n], labels[:n], features[n:], labels[n:]


def sklearn_knn(x, y, k, temperature):
    "Cosine k-NN with weights exp(similarity / temperature); scikit-learn's cosine distance is 1 - similarity."
    return KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)).fit(x, y)


@pytest.mark.parametrize("k", [1, 20, 200])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_votes_are_scikit_learns(k, temperature):
    x, y, x_test, _ = problem()
    votes = knn.knn_votes(x, y, x_test, k, temperature)
    ref = sklearn_knn(x, y, k, temperature)
    np.testing.assert_allclose((votes / votes.sum(1, keepdim=True)).numpy(), ref.predict_proba(x_test), atol=2e-5)
    assert (votes.argmax(1).numpy() == ref.predict(x_test)).all()


def test_neighbours_are_scikit_learns_in_order():
    x, y, x_test, _ = problem()
    values, index = knn.nearest_neighbours(x, x_test, 10, chunk=7)
    distance, expected = sklearn_knn(x, y, 10, 0.1).kneighbors(x_test)
    assert (index.numpy() == expected).all()
    np.testing.assert_allclose(values.numpy(), 1 - distance, atol=1e-5)


def test_chunks_and_input_kinds_do_not_matter():
    x, y, x_test, _ = problem()
    whole = knn.knn_votes(x, y, x_test, 20)
    assert whole.shape == (70, 6) and whole.dtype == torch.float32
    assert torch.allclose(whole, knn.knn_votes(torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(x_test), 20, chunk=9), rtol=1e-4)
    assert torch.allclose(whole, knn.knn_votes(5 * x, y, 0.1 * x_test, 20), rtol=1e-4)      # length does not count


@pytest.mark.parametrize("k", [5, 250])
def test_blocks_do_not_matter(tmp_path, k):
    "Blocks smaller than k, a file that is memory-mapped, half precision on disk: all the same neighbours."
    x, y, x_test, _ = problem()
    values, index = knn.nearest_neighbours(x, x_test, k)
    np.save(tmp_path / "x.npy", x)
    for train in (x, torch.from_numpy(x), np.load(tmp_path / "x.npy", mmap_mode="r")):
        for block, chunk in ((1, 70), (37, 9), (299, 512), (300, 1)):
            v, i = knn.nearest_neighbours(train, x_test, k, block=block, chunk=chunk)
            assert torch.equal(i, index) and torch.allclose(v, values, atol=1e-6)
    assert np.array_equal(np.load(tmp_path / "x.npy"), x)                                  # scaled copies, not the file
    half = knn.nearest_neighbours(torch.from_numpy(x).half(), torch.from_numpy(x_test).half(), k)
    assert half[0].dtype == torch.float32 and torch.allclose(half[0], values, atol=1e-3)


class Rows:
    "Features that exist only while they are looked at; three of them point nearly where the test feature does."
    def __init__(self, n, near): self.n, self.near, self.most, self.seen = n, near, 0, 0
    def __len__(self): return self.n
    def __getitem__(self, part):
        if not isinstance(part, slice): return np.zeros(4)
        rows = np.arange(part.start, min(part.stop, self.n))
        self.most, self.seen = max(self.most, len(rows)), self.seen + len(rows)
        x = np.tile(np.float32([0, 1, 0, 0]), (len(rows), 1))
        for rank, row in enumerate(self.near): x[rows == row] = [1, 0, 0.1 * rank, 0]
        return x


def test_no_more_than_a_block_is_in_memory():
    near = [131_071, 3, 199_999]
    rows = Rows(200_000, near)
    assert knn.nearest_neighbours(rows, [[2.0, 0, 0, 0]], 3)[1].tolist() == [near]
    assert rows.most == 65_536 and rows.seen == 200_000                                    # each read once


@pytest.mark.parametrize("n,k", [(1000, 5), (999, 3), (64, 4), (63, 4), (16, 1), (500, 500)])
def test_largest_is_topk(n, k):
    table = torch.randn(20, n, generator=torch.Generator().manual_seed(n))
    table[:5] = table[:5].round()                                                          # ties
    values, columns = knn.largest(table, k)
    assert torch.equal(values, table.topk(k).values) and torch.equal(table.gather(1, columns), values)
    assert all(len(set(row)) == k for row in columns.tolist())                             # no column twice


@pytest.mark.parametrize("temperature", [0.1, 5.0])
def test_dot_product_votes_are_scikit_learns(temperature):
    "Without scaling to length 1 the similarity is the dot product; its exponential would overflow."
    x, y, x_test, _ = problem()
    votes = knn.knn_votes(20 * x, y, x_test, 30, temperature, normalize=False)
    table = (20 * x.astype(float)) @ x_test.T.astype(float)
    for m in range(len(x_test)):
        near = np.argsort(-table[:, m])[:30]
        weights = np.exp((table[near, m] - table[near[0], m]) / temperature)
        np.testing.assert_allclose(votes[m].numpy(), np.bincount(y[near], weights, 6), rtol=2e-2, atol=1e-4)


def test_votes_by_hand():
    votes = knn.knn_votes([[1.0, 0], [0, 1], [-1, 0], [1, 1]], [2, 0, 0, 2], [[3.0, 0]], k=3, temperature=0.5)
    expected = [[np.exp(-2), 0, 1 + np.exp(2 * 0.5**0.5 - 2)]]
    np.testing.assert_allclose(votes.numpy(), expected, rtol=1e-5)
    assert knn.knn_votes([[1.0, 0]], [0], [[1.0, 0]], 1, n_classes=4).shape == (1, 4)


def test_bad_input_is_refused():
    x, y, x_test, _ = problem()
    with pytest.raises(ValueError, match="between 1 and 300"): knn.knn_votes(x, y, x_test, 301)
    with pytest.raises(ValueError, match="between 1 and 300"): knn.knn_votes(x, y, x_test, 0)
    with pytest.raises(ValueError, match="temperature"): knn.knn_votes(x, y, x_test, 5, 0.0)
    with pytest.raises(ValueError, match="299 labels"): knn.knn_votes(x, y[1:], x_test, 5)
    with pytest.raises(ValueError, match="one label per image"): knn.knn_votes(x, np.eye(6)[y], x_test, 5)
    with pytest.raises(ValueError, match="no label"): knn.knn_votes(x, y - 1, x_test, 5)
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"): knn.knn_votes(x, y, x_test, 5)


def test_result():
    x, y, x_test, y_test = (torch.as_tensor(a) for a in problem(classes=5))
    features = TaskFeatures("toy_count", tuple("12345"), x, y, x_test, y_test, "w")
    result, votes, index = knn.score_knn(features, knn.KnnConfig(task="toy_count", model="m", k=20))
    ref = sklearn_knn(x.numpy(), y.numpy(), 20, 0.1)
    assert result.value == pytest.approx(ref.score(x_test.numpy(), y_test.numpy()))
    assert index.shape == (70, 20) and torch.equal(index, knn.nearest_neighbours(x, x_test, 20)[1])
    assert (result.protocol, result.n, result.settings["k"], result.chance) == ("knn", 70, 20, 0.2)


def test_run_from_a_folder_of_features(tmp_path):
    how = {"task": "toy_count", "train_images": 60, "test_images": 40}
    store = run_features(FeaturesConfig(run_dir=str(tmp_path / "f"), taps="res4:1x1 avgpool", dtype="float16", device="cpu", **how)).folder
    config = knn.KnnConfig(k=9, device="cpu", tap="res4:1x1", **how)
    direct = knn.run_knn(dataclasses.replace(config, run_dir=str(tmp_path / "a")))
    stored = knn.run_knn(dataclasses.replace(config, run_dir=str(tmp_path / "b"), features=str(store)))
    assert abs(direct.value - stored.value) <= 1 / 40 and stored.settings != direct.settings and stored.settings["weights"] == direct.settings["weights"]
    assert np.load(tmp_path / "b/neighbours.npy").shape == (40, 7)
    for change, message in [({"tap": "res5"}, "not train at res5"), ({"task": "toy_scenes"}, "not of toy_scenes"), ({"model": "random:regnety_400mf"}, "not of random"), ({"k": 61}, "between 1 and 60")]:
        with pytest.raises(ValueError, match=message): knn.run_knn(dataclasses.replace(config, run_dir=str(tmp_path / "c"), features=str(store), **change))
    (store / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="no complete features"): knn.run_knn(dataclasses.replace(config, run_dir=str(tmp_path / "c"), features=str(store)))
    assert not (tmp_path / "c").exists()
