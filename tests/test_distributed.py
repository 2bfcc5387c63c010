"""Many real processes on one machine (gloo): the arithmetic of one process, and a name for the rank that is lost."""
import copy
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from seer_nb.core import seed_all
from seer_nb.distributed import (RANK_LOST, GroupBatchNorm, Place, Traffic, Watchdog, all_reduce_max, all_reduce_mean, barrier, find_place,
                                 first_host, gather_json, is_main, local_rank, norm_group, rank, run_ranks, setup, shutdown, start_ranks,
                                 sync_batch_norm, world_group, world_size)
from seer_nb.images import StatelessSampler
from seer_nb.larc import LARC
from seer_nb.regnet import regnety
from seer_nb.swav import Queue, SwAV, SwAVHead, sinkhorn, swav_codes, swav_loss
from seer_nb.sharding import fixed_running_statistics


def deal(batch, n): return [batch[r::n] for r in range(n)]
def collect(parts): return torch.stack(list(parts), 1).flatten(0, 1)
def unit(*shape): return F.normalize(torch.randn(*shape), dim=-1)


# ── BatchNorm ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def norm_cases():
    "name -> layer, whole batch, its split over the ranks is in `shares`"
    torch.manual_seed(0)
    image, flat = torch.randn(12, 4, 5, 5) * 3 + 7, torch.randn(12, 4) * 0.1 - 40
    return {
        "images": (nn.BatchNorm2d(4), image), "rows": (nn.BatchNorm1d(4), flat),
        "sequence": (nn.BatchNorm1d(4), image.flatten(2)), "channels last": (nn.BatchNorm2d(4), image.to(memory_format=torch.channels_last)),
        "eps, momentum": (nn.BatchNorm2d(4, eps=0.3, momentum=0.7), image), "cumulative": (nn.BatchNorm2d(4, momentum=None), image),
        "not affine": (nn.BatchNorm2d(4, affine=False), image), "untracked": (nn.BatchNorm2d(4, track_running_stats=False), image),
        "far from zero": (nn.BatchNorm2d(4), image * 0.01 + 300), "double": (nn.BatchNorm2d(4).double(), image.double()),
        "bf16": (nn.BatchNorm2d(4), image.bfloat16()), "fp16": (nn.BatchNorm2d(4), image.half()),
    }


def twice(norm, x):
    "Two training steps: outputs, gradients, running statistics."
    if norm.affine: nn.init.constant_(norm.weight, 1.5); nn.init.constant_(norm.bias, 0.5)
    out = []
    for step in range(2):
        leaf = (x * (1 + step)).detach().requires_grad_()
        y = norm(leaf)
        (y.to(torch.promote_types(y.dtype, torch.float32)) ** 3).sum().backward()
        out += [y.detach(), leaf.grad]
    return out, [p.grad for p in norm.parameters()], list(norm.buffers())


def shares(n): return {1: [12], 2: [9, 3], 3: [5, 1, 6], 4: [2, 4, 5, 1]}[n]


def ranks_normalise():
    return {name: twice(sync_batch_norm(norm), x.split(shares(world_size()))[rank()]) for name, (norm, x) in norm_cases().items()}


def ranks_compute(cases, crops_of):
    "All that two or three ranks have to show, in one start."
    setup("cpu", 60)
    return ranks_normalise(), ranks_lose(cases), one_step(crops_of[rank()])


@pytest.fixture(scope="module", params=[2, 3])
def many(request):
    "n, and what n ranks computed on their shares."
    n = request.param
    cases = [([deal(s, n) for s in scores], [deal(q, n) for q in queue], [n * len(part) / len(scores[0]) for part in deal(scores[0], n)])
             for scores, queue in loss_cases(n)]                  # uneven shares: weigh by images
    return n, run_ranks(ranks_compute, n, cases, [[c[r::n] for c in step_crops(n)] for r in range(n)], timeout=90)


def test_batch_norm_is_that_of_one_process(many):
    n, there = many
    there = [norms for norms, _, _ in there]
    for name, (norm, x) in norm_cases().items():
        plain, exact = twice(copy.deepcopy(norm), x), twice(norm.double(), x.double())
        def near(kind, k, mine):
            "As near to float64 as PyTorch's own BatchNorm, give or take."
            truth, theirs = exact[kind][k].double(), plain[kind][k].double()
            limit = 4 * (theirs - truth).abs().max() + 1e-5 * truth.abs().max()
            assert (mine.double() - truth).abs().max() <= limit, (name, kind, k, mine, truth)
        for k, whole in enumerate(plain[0]):                      # outputs, gradients of the input
            mine = torch.cat([there[r][name][0][k] for r in range(n)])
            assert mine.dtype == whole.dtype
            near(0, k, mine)
        for k in range(len(plain[1])): near(1, k, sum(there[r][name][1][k] for r in range(n)))     # weight and bias: DDP or FSDP adds these up
        for k in range(len(plain[2])):
            for r in range(n): near(2, k, there[r][name][2][k])   # running statistics


class Checkpointed(nn.Module):
    "A part that runs twice, its running averages taken away the second time."

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        from contextlib import nullcontext
        from torch.utils.checkpoint import checkpoint
        return checkpoint(self.part, x, use_reentrant=False, context_fn=lambda: (nullcontext(), fixed_running_statistics(self.part)))


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))


def batch():
    torch.manual_seed(1)
    return torch.randn(8, 3, 8, 8)


def gradients(model, x, scale=1.0):
    (model(x).pow(2).mean() * scale).backward()
    found = {name.replace("part.", "").replace("_orig_mod.", ""): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in model.named_parameters()}
    buffers = {name.replace("part.", "").replace("_orig_mod.", ""): b for name, b in model.named_buffers()}
    return found, buffers


def ranks_in_company():
    "Four ranks: groups of two, and whatever else may be wrapped around a layer."
    setup("cpu", 60)
    out, x = {}, batch().split(2)[rank()]
    assert norm_group(2).size() == 2 and norm_group(2) is norm_group(2) and norm_group(0) is norm_group(99) is norm_group(-1) is dist.group.WORLD
    assert norm_group(1) is None and type(sync_batch_norm(nn.BatchNorm1d(2), 1)) is nn.BatchNorm1d
    for wrong in (3, -2):
        with pytest.raises(ValueError, match="group"): norm_group(wrong)
    plain = network()
    names = list(plain.state_dict())
    model = sync_batch_norm(plain, 2)
    assert model is plain and list(model.state_dict()) == names and isinstance(model[1], GroupBatchNorm)
    out["groups of two"] = gradients(model, x)
    reference = network(1)
    reference.load_state_dict(model.state_dict())
    out["eval"] = torch.equal(model.eval()(x), reference.eval()(x)) and torch.equal(model[1].running_mean, reference[1].running_mean)
    twin = copy.deepcopy(model).train()
    with Traffic() as traffic: twin(x)
    out["twin talks"] = dict(traffic.collectives)
    out["all"] = gradients(sync_batch_norm(network()), x)
    out["checkpointed"] = gradients(nn.Sequential(Checkpointed(sync_batch_norm(network()))), x)
    with torch.autocast("cpu", torch.bfloat16): out["autocast"] = gradients(sync_batch_norm(network()), x)
    if rank() < 2:                                               # two are enough, and importing FSDP takes its time
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard
        sharded = sync_batch_norm(network(), 2)
        for part in (sharded[0], sharded[1], sharded): fully_shard(part, mesh=DeviceMesh.from_group(norm_group(2), "cpu"))
        out["fsdp"] = gradients(sharded, x)
    stopped = sync_batch_norm(network())
    with Traffic() as traffic: stopped[1](stopped[0](x)).sum().backward()
    out["collectives"], out["reads"] = dict(traffic.collectives), dict(traffic.host_reads)
    out["gathered"], out["max"], out["mean"] = gather_json({"ü": rank()}), all_reduce_max(torch.tensor([rank(), -rank()])), all_reduce_mean(torch.tensor(rank() / 1.0))
    os.environ["LOCAL_RANK"] = str(rank() % 2)                   # two machines
    assert norm_group(-1) is norm_group(2)
    os.environ["LOCAL_RANK"] = str(rank())
    x = torch.tensor(1.0 * rank())
    all_reduce_mean(x)
    assert x == rank() and setup("cpu") == torch.device("cpu") and is_main() == (rank() == 0) and local_rank() == rank()
    barrier()
    return out


@pytest.fixture(scope="module")
def company(): return run_ranks(ranks_in_company, 4, timeout=90)


def assert_mean_gradient(parts, whole, **tolerance):
    for name, g in whole.items(): torch.testing.assert_close(sum(p[name] for p in parts) / len(parts), g, msg=lambda m: f"{name}: {m}", **tolerance)


@pytest.mark.parametrize("kind, n", [("all", 4), ("checkpointed", 4), ("fsdp", 2)])
def test_batch_norm_in_a_network(company, kind, n):
    company = company[:n]
    found, buffers = gradients(network(), batch()[: 2 * n])
    def renamed(d): return {name.removeprefix("0.") if kind == "checkpointed" else name: t for name, t in d.items()}
    parts = [renamed(out[kind][0]) for out in company]
    assert_mean_gradient(parts, found, rtol=1e-4, atol=1e-6)
    for out in company:
        for name, b in renamed(out[kind][1]).items(): torch.testing.assert_close(b, buffers[name], msg=lambda m: f"{name}: {m}")   # moved once


def test_batch_norm_under_autocast(company):
    with torch.autocast("cpu", torch.bfloat16): found, buffers = gradients(network(), batch())
    assert_mean_gradient([out["autocast"][0] for out in company], found, rtol=0.1, atol=2e-3)
    for name, b in company[0]["autocast"][1].items(): torch.testing.assert_close(b, buffers[name], rtol=1e-2, atol=1e-3)
    assert company[0]["autocast"][1]["1.running_var"].dtype == torch.float32


def test_batch_norm_groups_are_apart(company):
    halves = [gradients(network(), half) for half in batch().split(4)]
    for h, (found, buffers) in enumerate(halves):
        pair = company[2 * h: 2 * h + 2]
        assert_mean_gradient([out["groups of two"][0] for out in pair], found, rtol=1e-4, atol=1e-6)
        for out in pair:
            for name, b in out["groups of two"][1].items(): torch.testing.assert_close(b, buffers[name])
            assert out["eval"]                                     # eval() moves nothing
    assert not torch.equal(company[0]["groups of two"][1]["1.running_mean"], company[2]["groups of two"][1]["1.running_mean"])


def test_batch_norm_costs_one_collective_each_way(company):
    assert company[0]["collectives"] == {"allreduce": 2} and company[0]["reads"] == {}
    assert company[0]["twin talks"] == {"allreduce": 2}            # a copy of the model still knows its group


def test_small_talk(company):
    for out in company:
        assert out["gathered"] == [{"ü": r} for r in range(4)] and out["max"].tolist() == [3, 0] and out["mean"] == 1.5


def test_alone_nothing_changes():
    model = network()
    assert setup("cpu") == torch.device("cpu") and (rank(), world_size(), local_rank(), is_main(), world_group()) == (0, 1, 0, True, None)
    assert type(sync_batch_norm(model, 8)[1]) is nn.BatchNorm2d and norm_group(-1) is None
    assert gather_json([1, None]) == [[1, None]] and all_reduce_mean(torch.tensor(3.0)) == 3
    barrier(); shutdown()


def test_a_converted_layer_works_alone():
    "A model that was trained by many and is used by one, in training mode."
    norm = nn.BatchNorm2d(4)
    norm.__class__ = GroupBatchNorm
    x = torch.randn(4, 4, 3, 3)
    torch.testing.assert_close(norm(x), nn.BatchNorm2d(4)(x), rtol=0, atol=0)


# ── codes, queue, sampler ────────────────────────────────────────────────────────────────────────────────────────────────────

LOSS = dict(epsilon=0.03, n_iters=10)


def loss_cases(n):
    torch.manual_seed(n)
    for B, K, L in ((4 * n, 13, 0), (4 * n, 30, 5 * n), (11, 7, 0), (11, 64, 10)):
        C = unit(K, 16)
        yield [unit(B, 16) @ C.T for _ in range(4)], [unit(L, 16) @ C.T for _ in range(2 if L else 0)]


def ranks_lose(cases):
    out = []
    for scores_of, queue_of, weight in cases:
        leaves = [s[rank()].clone().requires_grad_() for s in scores_of]
        queue = [q[rank()] for q in queue_of] or None
        with Traffic() as traffic: codes = swav_codes(leaves[:2], queue_scores=queue, group=world_group(), **LOSS)
        loss = swav_loss(leaves, queue_scores=queue, group=world_group(), **LOSS) * weight[rank()]
        out.append((codes, all_reduce_mean(loss.detach()), torch.autograd.grad(loss, leaves), dict(traffic.collectives), dict(traffic.host_reads)))
    return out


def test_loss_is_that_of_one_process(many):
    n, there = many
    for c, (scores, queue) in enumerate(loss_cases(n)):
        leaves = [s.clone().requires_grad_() for s in scores]
        codes, loss = (f(x, queue_scores=queue or None, **LOSS) for f, x in ((swav_codes, leaves[:2]), (swav_loss, leaves)))
        whole = torch.autograd.grad(loss, leaves)
        for r in range(n):
            mine, mean, grads, collectives, reads = there[r][1][c]
            torch.testing.assert_close(mine, codes[:, r::n], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(mean, loss.detach())
            for g, w in zip(grads, whole): torch.testing.assert_close(g / n, w[r::n], rtol=1e-4, atol=1e-7)
            assert collectives == {"allreduce": 10} and reads == {}


def test_sinkhorn_never_waits_for_the_host():
    with Traffic() as traffic: sinkhorn(unit(2, 16, 8) @ unit(30, 8).T, 0.05), sinkhorn(unit(2, 16, 8) @ unit(30, 8).T, 0.01)
    assert traffic.host_reads == {}


@pytest.mark.parametrize("epsilon", [0.025, 0.03, 0.05])
def test_the_constant_maximum_is_exact_enough(epsilon):
    "Against float64 in the logarithm, where cosines are as extreme as they can be."
    hard = torch.full((64, 16), -1.0)
    hard[torch.arange(64), torch.arange(64) % 15] = 1.0
    for scores in (hard, torch.rand(64, 40) * 2 - 1, unit(64, 32) @ unit(40, 32).T, (unit(64, 32) * 0.01 + unit(1, 32)) @ unit(40, 32).T):
        L, v = scores.double() / epsilon, 0.0
        for _ in range(10):
            u = -torch.logsumexp(L + v, 0, keepdim=True)
            v = -torch.logsumexp(L + u, 1, keepdim=True)
        torch.testing.assert_close(sinkhorn(scores, epsilon, 10), (L + u + v).exp().float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_sampler_and_queue_are_dealt(n):
    "Every rank's share, step by step, is every n-th row of what one process has."
    def order(**place): return iter(StatelessSampler(50, seed=1, **place))
    whole, parts = order(), [order(rank=r, world_size=n) for r in range(n)]
    single, shards = Queue(6 * n, 2), [Queue(6, 2) for _ in range(n)]
    for step in range(8):
        rows = [next(whole) for _ in range(4 * n)]
        assert [[next(p) for _ in range(4)] for p in parts] == deal(rows, n)
        embeddings = [torch.randn(4 * n, 2) for _ in range(2)]
        single.push(embeddings)
        for r, shard in enumerate(shards): shard.push([e[r::n] for e in embeddings])
        for r, shard in enumerate(shards):
            assert shard.full == single.full and torch.equal(shard.embeddings, single.embeddings[:, r::n])


# ── one whole step ───────────────────────────────────────────────────────────────────────────────────────────────────────────

def one_step(crops):
    from torch.nn.parallel import DistributedDataParallel
    seed_all(0)
    model = sync_batch_norm(SwAV(regnety("regnety_toy"), SwAVHead(352, (32,), 16, 30)).double())   # LARC makes a step even of the rounding in a zero gradient
    forward = DistributedDataParallel(model, broadcast_buffers=False) if world_size() > 1 else model
    optimizer, queue = LARC(model.parameters(), lr=1.0), unit(12, 16)
    losses = []
    for step in range(2):
        _, scores = forward([c.double() for c in crops])
        held = [queue[rank()::world_size()] @ model.head.prototypes.weight.detach().float().T] * 2
        loss = swav_loss(scores, queue_scores=held, group=world_group(), **LOSS)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); model.head.normalize_prototypes()
        losses.append(all_reduce_mean(loss.detach()))
    return losses, model.state_dict()


def step_crops(n):
    torch.manual_seed(5)
    return [torch.randn(4 * n, 3, s, s) for s in (32, 32, 24)]


def test_a_step_is_that_of_one_process(many):
    n, there = many
    there = [step for _, _, step in there]
    losses, state = one_step(step_crops(n))
    for mine, theirs in there:
        torch.testing.assert_close(mine, losses)
        for name in state:
            assert torch.equal(theirs[name], there[0][1][name])
            torch.testing.assert_close(theirs[name], state[name], rtol=1e-4, atol=1e-7, msg=lambda m: f"{name}: {m}")


# ── finding each other ───────────────────────────────────────────────────────────────────────────────────────────────────────

def test_places():
    torchrun = dict(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="m", MASTER_PORT="29500")
    slurm = dict(SLURM_JOB_ID="70001", SLURM_STEP_ID="2", SLURM_JOB_NODELIST="n[03,5-6],m", SLURM_NTASKS="8", SLURM_PROCID="5", SLURM_LOCALID="1")
    assert find_place(torchrun) == find_place(slurm | torchrun) == Place(3, 4, 1, "m", 29500)
    place = find_place(slurm)
    assert place[:4] == (5, 8, 1, "n03") and 10000 <= place.port < 30000 and place.port != find_place(slurm | {"SLURM_STEP_ID": "3"}).port
    assert find_place(slurm | dict(MASTER_ADDR="a", MASTER_PORT="7"))[3:] == ("a", 7)
    assert find_place(slurm | {"SLURM_NTASKS": "1"}) == find_place({k: v for k, v in slurm.items() if k != "SLURM_STEP_ID"}) == find_place({}) == Place()
    with pytest.raises(ValueError, match="MASTER_ADDR, MASTER_PORT is not"): find_place(dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0"))
    with pytest.raises(ValueError, match="no machine"): first_host("")


def test_bad_devices(monkeypatch):
    with pytest.raises(ValueError, match="auto, cpu or cuda"): setup("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="no GPU"): setup("cuda")


def ranks_meet(timeout): setup("cpu", timeout)


@pytest.mark.parametrize("absent", [0, 2])
def test_an_absent_rank_is_named(absent):
    ranks = start_ranks(ranks_meet, 3, 2.0, absent=[absent])
    status = ranks.wait(40)
    for r in {0, 1, 2} - {absent}:
        last = ranks.printed(r).strip().splitlines()[-1]
        assert status[r] == 1 and "TimeoutError" in last and (f"rank {absent} " in last), ranks.printed(r)


def test_under_torchrun(tmp_path):
    (tmp_path / "job.py").write_text("from seer_nb.distributed import *\n"
                                     "setup('cpu', 60)\nwith Watchdog() as w: w.beat(0)\nprint(gather_json([rank(), local_rank(), world_size()]), flush=True)\nshutdown()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "job.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[[0, 0, 2], [1, 1, 2]]") == 2


# ── losing each other ────────────────────────────────────────────────────────────────────────────────────────────────────────

def ranks_walk(folder, fault, victim):
    setup("cpu", 600)                                            # the collective's own timeout is no help
    with Watchdog(folder, silence=4.0, stall=4.0 if fault == "hang" else 60.0) as watchdog:
        for step in range(10**6):
            if rank() == victim and step == 20:
                print("here", flush=True)
                if fault == "raise": raise KeyError("no such image")
                if fault == "hang": time.sleep(3600)
            time.sleep(0.005)
            all_reduce_mean(torch.ones(1))
            watchdog.beat(step)


def wait_for(condition, seconds=40):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("fault, victim", [("raise", 0), ("hang", 1), ("stop", 1), ("stop", 0), ("kill", 1), ("kill", 0)])
def test_a_lost_rank_is_named(tmp_path, fault, victim):
    n = 3 if (fault, victim) in (("stop", 1), ("hang", 1)) else 2
    ranks = start_ranks(ranks_walk, n, str(tmp_path), fault, victim)
    wait_for(lambda: "here" in ranks.printed(victim))
    if fault in ("stop", "kill"): ranks.processes[victim].send_signal(signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
    others = sorted({*range(n)} - {victim})
    try: wait_for(lambda: all(ranks.processes[r].poll() is not None for r in others))
    finally: status = ranks.wait(0)
    for r in others:
        assert status[r] in ((1, RANK_LOST, -signal.SIGABRT) if fault in ("raise", "kill") or n == 3 else (RANK_LOST,))   # 1: its collective failed first (of three, the first to end does that to the second), and it heard why; SIGABRT: a thread of gloo noticed first
        text = ranks.printed(r)
        assert f"rank {victim} (" in text, text
        word = {"raise": "raised KeyError: 'no such image', at step 19", "hang": "test_distributed.py", "stop": "Its last report: step ", "kill": "sign of life" if victim else "cannot be reached"}[fault]
        assert word in text, text
        if status[r] == RANK_LOST: assert "in ranks_walk" in (tmp_path / f"rank_{r}.txt").read_text()     # the stack
    if fault == "hang": assert "Late: rank 1" in text and "ranks_walk" in text
    if fault == "raise": assert "KeyError" in ranks.printed(victim)


class StoreThatGoes:
    "A store that is gone as soon as this rank has said that it has read the verdict: rank 0, which keeps it, has ended."

    def __init__(self, store): self.store, self.gone = store, False

    def __getattr__(self, name):
        if self.gone: raise dist.DistNetworkError("connection closed")
        return getattr(self.store, name)

    def add(self, *args):
        self.gone = True
        self.store.add(*args)
        raise dist.DistNetworkError("connection closed")


def ranks_part():
    setup("cpu", 60)
    with Watchdog() as watchdog:
        if rank(): watchdog.store = StoreThatGoes(watchdog.store)
        watchdog.beat(0)
    return watchdog.verdict


def test_the_first_rank_may_leave_before_the_last_has_left():
    assert run_ranks(ranks_part, 2, timeout=60) == ["", ""]


def test_watchdog_alone(tmp_path):
    with Watchdog() as watchdog: watchdog.beat(3)
    with pytest.raises(KeyError), Watchdog(): raise KeyError
    script = "import time\nfrom seer_nb.distributed import Watchdog\nwith Watchdog(silence=2, stall=1): time.sleep(3600)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=40, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == RANK_LOST and "no step for 1 s. Late: rank 0" in done.stderr


# ── a GPU, where there is one ────────────────────────────────────────────────────────────────────────────────────────────────

def ranks_normalise_on_gpu():
    setup("cpu", 60)                                             # gloo carries CUDA tensors too, and two ranks may share a GPU
    gpu = {name: twice(sync_batch_norm(norm.cuda()), x.split(shares(world_size()))[rank()].cuda()) for name, (norm, x) in norm_cases().items()}
    return {name: [[t.cpu() for t in part] for part in parts] for name, parts in gpu.items()}, ranks_normalise()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batch_norm_on_gpu_equals_cpu():
    for here, there in run_ranks(ranks_normalise_on_gpu, 2):
        for name in here:
            low = name in ("bf16", "fp16")
            for a, b in zip(sum(here[name], []), sum(there[name], [])):
                torch.testing.assert_close(a, b, rtol=2e-2 if low else 1e-3, atol=(2e-2 if low else 1e-3) * max(1.0, float(b.abs().max())), msg=lambda m: f"{name}: {m}")
