"""LARC against timm's Lars and against torch's SGD."""
import pytest
import torch
from torch import nn

from seer_nb.larc import LARC, warmup_cosine


def twins(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    other = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    other.load_state_dict(net.state_dict())
    return net, other


def follow(net, other, a, b, steps=20, rates=None):
    for step in range(steps):
        x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        for model, optimizer in ((net, a), (other, b)):
            if rates: optimizer.param_groups[0]["lr"] = rates[step]
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(net.parameters(), other.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("clip", [False, True])
def test_follows_timm(clip, weight_decay):
    timm = pytest.importorskip("timm.optim")
    net, other = twins()
    rates = [.05 + .1 * s for s in range(20)]
    a = LARC(net.parameters(), lr=.05, weight_decay=weight_decay, clip=clip)
    b = timm.Lars(other.parameters(), lr=.05, momentum=.9, weight_decay=weight_decay, trust_coeff=.001, eps=1e-8, trust_clip=clip, always_adapt=True)
    follow(net, other, a, b, rates=rates)


def test_is_sgd_when_clipped_at_a_small_rate():
    net, other = twins()
    for p in [*net.parameters(), *other.parameters()]:
        if p.norm() == 0: p.data += .1
    follow(net, other, LARC(net.parameters(), lr=1e-6, weight_decay=.01, clip=True), torch.optim.SGD(other.parameters(), 1e-6, .9, weight_decay=.01))


def test_state_dict_resumes_exactly():
    net, other = twins()
    a, b = LARC(net.parameters(), lr=.5), LARC(other.parameters(), lr=.5)
    follow(net, other, a, b, steps=3)
    again = LARC(other.parameters(), lr=.5)
    again.load_state_dict(b.state_dict())
    follow(net, other, a, again, steps=3)


def test_bad_settings():
    with pytest.raises(ValueError, match="momentum"): LARC([nn.Parameter(torch.ones(1))], lr=1, momentum=-1)


@pytest.mark.parametrize("total, warmup", [(10, 0), (10, 10), (1, 0), (1000, 44)])
def test_schedule_starts_and_ends_right(total, warmup):
    rates = [warmup_cosine(s, total, warmup, .1, 2.0, .01) for s in range(total + 1)]
    assert rates[0] == pytest.approx(.1 if warmup else 2.0) and rates[-1] == pytest.approx(.01)
    assert max(rates) <= 2.0 + 1e-12
