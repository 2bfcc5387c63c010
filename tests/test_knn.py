"k-NN against scikit-learn and hand-computed votes."
import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from seer_nb.evaluate import knn
from seer_nb.evaluate.features import TaskFeatures


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


def test_votes_by_hand():
    votes = knn.knn_votes([[1.0, 0], [0, 1], [-1, 0], [1, 1]], [2, 0, 0, 2], [[3.0, 0]], k=3, temperature=0.5)
    expected = [[np.exp(0), 0, np.exp(2) + np.exp(2 * 0.5**0.5)]]
    np.testing.assert_allclose(votes.numpy(), expected, rtol=1e-5)
    assert knn.knn_votes([[1.0, 0]], [0], [[1.0, 0]], 1, n_classes=4).shape == (1, 4)


def test_bad_input_is_refused():
    x, y, x_test, _ = problem()
    with pytest.raises(ValueError, match="between 1 and 300"): knn.knn_votes(x, y, x_test, 301)
    with pytest.raises(ValueError, match="between 1 and 300"): knn.knn_votes(x, y, x_test, 0)
    with pytest.raises(ValueError, match="temperature"): knn.knn_votes(x, y, x_test, 5, 0.0)
    with pytest.raises(ValueError, match="299 labels"): knn.knn_votes(x, y[1:], x_test, 5)
    x[0, 0] = np.nan
    with pytest.raises(ValueError, match="not finite"): knn.knn_votes(x, y, x_test, 5)


def test_result():
    x, y, x_test, y_test = (torch.as_tensor(a) for a in problem(classes=5))
    features = TaskFeatures("toy_count", tuple("12345"), x, y, x_test, y_test, "w")
    result, votes = knn.score_knn(features, knn.KnnConfig(task="toy_count", model="m", k=20))
    ref = sklearn_knn(x.numpy(), y.numpy(), 20, 0.1)
    assert result.value == pytest.approx(ref.score(x_test.numpy(), y_test.numpy()))
    assert (result.protocol, result.n, result.settings["k"], result.chance) == ("knn", 70, 20, 0.2)
