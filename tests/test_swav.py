"""The SwAV loss against lightly's and against a dense reference; Sinkhorn where numbers are hard."""
import math

import pytest
import torch
import torch.nn.functional as F

from seer_nb.swav import Queue, SwAV, SwAVHead, sinkhorn, swapped_prediction, swav_codes, swav_loss


def cosines(seed, *shape, dim=32):
    g = torch.Generator().manual_seed(seed)
    *lead, B, K = shape
    return F.normalize(torch.randn(*lead, B, dim, generator=g), dim=-1) @ F.normalize(torch.randn(K, dim, generator=g), dim=-1).T


def value_and_gradients(loss_function, scores):
    leaves = [s.clone().requires_grad_() for s in scores]
    loss = loss_function(leaves)
    return loss.detach(), torch.autograd.grad(loss, leaves)


def dense(scores, n_large, temperature, epsilon, n_iters, queue=None):
    "The loss straight from the paper's equations, in float64, rewriting Q."
    scores, loss = [s.double() for s in scores], 0
    for a in range(n_large):
        S = scores[a].detach() if queue is None else torch.cat([scores[a].detach(), queue[a].double()])
        Q = (S / epsilon).exp()
        for _ in range(n_iters):
            Q = Q / Q.sum(0, keepdim=True) / Q.shape[1]
            Q = Q / Q.sum(1, keepdim=True) / Q.shape[0]
        q = Q[: len(scores[a])] * Q.shape[0]
        for p in range(len(scores)):
            if p != a: loss = loss - (q * F.log_softmax(scores[p] / temperature, 1)).sum(1).mean() / (len(scores) - 1) / n_large
    return loss.float()


@pytest.mark.parametrize("crops, n_large, epsilon, n_iters, queue", [(8, 2, .05, 3, 0), (6, 2, .03, 10, 0), (3, 1, .05, 3, 0), (6, 2, .05, 3, 40), (4, 3, .1, 1, 0)])
def test_equals_dense_reference(crops, n_large, epsilon, n_iters, queue):
    scores = [cosines(i, 16, 30) for i in range(crops)]
    held = [cosines(100 + i, queue, 30) for i in range(n_large)] if queue else None
    here = value_and_gradients(lambda s: swav_loss(s, n_large, .1, epsilon, n_iters, held), scores)
    there = value_and_gradients(lambda s: dense(s, n_large, .1, epsilon, n_iters, held), scores)
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("queue", [0, 24])
@pytest.mark.parametrize("epsilon, n_iters", [(.05, 3), (.03, 10)])
def test_equals_lightly(epsilon, n_iters, queue):
    loss = pytest.importorskip("lightly.loss").SwaVLoss(temperature=.1, sinkhorn_iterations=n_iters, sinkhorn_epsilon=epsilon)
    scores = [cosines(i, 12, 20) for i in range(6)]
    held = [cosines(50 + i, queue, 20) for i in range(2)] if queue else None
    here = value_and_gradients(lambda s: swav_loss(s, 2, .1, epsilon, n_iters, held), scores)
    there = value_and_gradients(lambda s: loss(s[:2], s[2:], held), scores)
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("epsilon", [.03, .05])
def test_codes_survive_saturated_scores(dtype, epsilon):
    scores = torch.full((64, 16), -1.0)
    scores[torch.arange(64), torch.arange(64) % 15] = 1.0        # prototype 15 is far from everything
    codes = sinkhorn(scores.to(dtype), epsilon, 10)
    assert codes.dtype == torch.float32 and codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(64))


def test_codes_are_fp32_under_autocast():
    scores = cosines(0, 32, 10)
    with torch.autocast("cpu", torch.bfloat16): inside, loss = sinkhorn(scores), swav_loss([scores, scores])
    torch.testing.assert_close(inside, sinkhorn(scores), rtol=0, atol=0)
    assert loss.dtype == torch.float32


def test_more_iterations_balance_better():
    scores = cosines(1, 128, 32)
    error = [(sinkhorn(scores, .05, n).sum(0) - 4).abs().max() for n in (1, 3, 10, 100)]
    assert all(a > b for a, b in zip(error, error[1:])) and error[-1] < .01


def test_codes_have_no_gradient():
    scores = [cosines(i, 8, 5).requires_grad_() for i in range(3)]
    assert not swav_codes(scores[:2]).requires_grad
    loss = swapped_prediction(scores, swav_codes(scores[:1]))     # crop 0 is only a target
    assert torch.autograd.grad(loss, scores, allow_unused=True)[0].abs().max() == 0


@pytest.mark.parametrize("kw, word", [(dict(epsilon=0), "epsilon"), (dict(n_iters=0), "n_iters")])
def test_bad_sinkhorn_arguments(kw, word):
    with pytest.raises(ValueError, match=word): sinkhorn(cosines(0, 4, 4), **kw)


@pytest.mark.parametrize("crops, n_large", [(1, 1), (2, 0), (2, 3)])
def test_bad_number_of_crops(crops, n_large):
    with pytest.raises(ValueError, match="two crops"): swav_loss([cosines(i, 4, 4) for i in range(crops)], n_large)


def test_untrained_loss_is_near_ln_k():
    torch.manual_seed(0)
    head = SwAVHead(64, (64,), 128, 500)
    _, scores = zip(*(head(torch.randn(256, 64)) for _ in range(4)))
    assert abs(swav_loss(list(scores)).item() / math.log(500) - 1) < .1


def test_model_groups_crops_of_one_size():
    calls = []
    class Count(torch.nn.Module):
        def forward(self, x): calls.append(tuple(x.shape)); return x.mean((2, 3))
    model = SwAV(Count(), SwAVHead(3, (), 8, 4, batch_norm=False))
    model([torch.randn(2, 3, s, s) for s in (16, 16, 8, 8, 8)])
    assert calls == [(4, 3, 16, 16), (6, 3, 8, 8)]


def test_queue_is_first_in_first_out_and_in_the_state_dict():
    queue = Queue(5, 2)
    for step in range(4): queue.push([torch.full((2, 2), step + .1 * v) for v in range(2)])
    assert queue.embeddings[1, :, 0].tolist() == pytest.approx([3.1, 3.1, 2.1, 2.1, 1.1])
    again = Queue(5, 2)
    again.load_state_dict(queue.state_dict())
    assert again.full and torch.equal(again.embeddings, queue.embeddings)
