"""Sharding, activation checkpointing, accumulation, compilation and crop batching change nothing but rounding.

Every curve is twenty steps of SwAV with LARC against plain fp32 training in one process. What needs two ranks runs once, in two real processes over gloo.
"""
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from seer_nb import sharding
from seer_nb.distributed import rank, run_ranks, setup, sync_batch_norm
from seer_nb.larc import LARC
from seer_nb.sharding import (NO_CUTS, PaddedSwAV, checkpoint_stages, cuts_of, materialize, memory_plan, meta_swav, plan_checkpoints, shard,
                              unit_sizes)
from seer_nb.swav import swapped_prediction, swav_codes

STEPS, IMAGES, FREEZE, PEAK = 20, 8, 3, 0.1
CONFIG = SimpleNamespace(backbone="regnety_toy", head_width=48, head_depth=1, head_batch_norm=False, out_features=16, n_prototypes=31,   # odd: uneven shards
                         n_large=2, n_small=2, large_size=32, small_size=24, batch_size=IMAGES, accumulate=1, precision="fp32")
LARGER = SimpleNamespace(**vars(CONFIG) | dict(large_size=96, small_size=48, batch_size=32))
CUTS = ((1,), (), (2,), ())
# Not below 17 pixels: on a CPU, PyTorch 2.15's bf16 weight gradient of a grouped 3x3 convolution with stride 2 reads memory nobody wrote if its input is one pixel.


def batch(step, rank=0, world=1):
    draw = torch.Generator().manual_seed(step)
    crops = [torch.randn(IMAGES, 3, s, s, generator=draw) for s in (32, 32, 24, 24)]
    return [crop.chunk(world)[rank] for crop in crops]


def full(t): return t.full_tensor() if hasattr(t, "full_tensor") else t


def train(model, forward=None, accumulate=1, steps=STEPS, evaluation=False, rank=0, world=1):
    "Return the loss of every step, over all ranks, and the weights at the end."
    group = dist.group.WORLD if world > 1 else None
    optimizer, losses = LARC(model.parameters(), lr=0.0), []
    model.train(not evaluation)
    for step in range(steps):
        crops, total = batch(step, rank, world), 0
        parts, codes = list(zip(*(c.chunk(accumulate) for c in crops))), None
        if accumulate > 1:
            with torch.no_grad(): scores = [model(p)[1][:2] for p in parts]
            codes = swav_codes([torch.cat(s) for s in zip(*scores)], group=group).chunk(accumulate, 1)
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] = PEAK * (step + 1) / STEPS                  # a warm-up, or the raw first step of every bias magnifies rounding
        for n, part in enumerate(parts):
            scores = (forward or model)(part)[1]
            loss = swapped_prediction(scores, codes[n] if codes else swav_codes(scores[:2], group=group)) / accumulate
            loss.backward()
            total = total + loss.detach()
        if step < FREEZE: model.head.prototypes.weight.grad = None
        optimizer.step()
        model.head.normalize_prototypes()
        if world > 1: dist.all_reduce(total)
        losses.append(total.item() / world)
    return torch.tensor(losses), {name: full(p).detach().clone() for name, p in model.named_parameters()}


def same(a, b): return torch.equal(a[0], b[0]) and all(torch.equal(a[1][name], b[1][name]) for name in a[1])


def close(a, b):
    "Compare losses of about 6 at every step, and the weights at the end: 1e-4 is a hundred times the rounding that was seen."
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=1e-4)
    for name in a[1]: torch.testing.assert_close(a[1][name], b[1][name], rtol=0, atol=1e-4, msg=lambda m: f"{name}: {m}")


def padded():
    model = meta_swav(CONFIG)
    return PaddedSwAV(model.backbone, model.head)


def fresh(): return materialize(meta_swav(CONFIG), seed=3)


@pytest.fixture(scope="module")
def plain(): return train(fresh())


@pytest.fixture(scope="module")
def plain_evaluation(): return train(fresh(), evaluation=True)           # BatchNorm as a fixed scale: the batch may be split


def test_the_curve_learns_something(plain):
    assert plain[0][-5:].mean() < plain[0][:3].mean() - 0.1


def test_activation_checkpointing_is_exact(plain):
    every = cuts_of(list(range(1, 6)), [1, 1, 3, 1])
    model = checkpoint_stages(fresh(), CUTS)
    assert same(train(model), plain)
    model, twin = checkpoint_stages(fresh(), every), fresh()
    assert same(train(model, steps=2), train(twin, steps=2))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers()))         # running averages moved once per pass


def test_crop_batching_changes_rounding_only(plain_evaluation):
    model = fresh()
    def one_by_one(crops):
        embeddings, scores = model.head(torch.cat([model.backbone(c) for c in crops]))
        return embeddings.chunk(len(crops)), scores.chunk(len(crops))
    close(train(model, one_by_one, evaluation=True), plain_evaluation)


def test_accumulation_changes_rounding_only(plain_evaluation):
    close(train(fresh(), accumulate=4, evaluation=True), plain_evaluation)


def test_compiled_blocks_change_rounding_only(plain):
    model = checkpoint_stages(fresh(), CUTS)
    for block in model.backbone.stages["res4"]: block.compile(backend="aot_eager", dynamic=False)   # traced and differentiated ahead; no C++ is built
    close(train(model), plain)


def test_padded_crops_of_one_size_change_nothing():
    model = fresh().eval()
    crops = [c for c in batch(0)[:2]]
    torch.testing.assert_close(PaddedSwAV(model.backbone, model.head)(crops)[1], model(crops)[1])


def test_a_padded_crop_is_cut_to_its_own_part():
    model = fresh().eval()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): nn.init.zeros_(m.running_mean)                      # zeros stay zeros: no border effect from the first layer on
    large, small = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)
    seen = {}
    model.head.register_forward_pre_hook(lambda module, args: seen.update(features=args[0]))
    PaddedSwAV(model.backbone, model.head)([large, small])
    expected = model.backbone.feature_maps(torch.nn.functional.pad(small, (0, 32, 0, 32)))["res5"][:, :, :1, :1].mean((2, 3))
    torch.testing.assert_close(seen["features"][2:], expected)


def test_plan_is_optimal_where_it_can_be_tried():
    weights = [5, 1, 1, 9, 2, 2, 7, 3]
    for c in range(len(weights)):
        def heaviest(cuts): return max(sum(weights[a:b]) for a, b in zip([0, *cuts], [*cuts, len(weights)]))
        assert heaviest(plan_checkpoints(weights, c)) == min(map(heaviest, itertools.combinations(range(1, len(weights)), c)))


def test_plan_is_fast_enough_for_long_networks():
    assert len(plan_checkpoints(list(range(1, 301)), 20)) == 20                               # no recursion limit


def seer_10b(**changes):
    return SimpleNamespace(**{**vars(CONFIG), **dict(backbone="regnety_10b", head_width=8192, head_depth=2, out_features=256, n_prototypes=16000, n_small=4, large_size=160,
                                                     small_size=96, batch_size=7936, precision="bf16"), **changes})


def test_advice_is_taken():
    plan = memory_plan(seer_10b(), 496, 40)
    assert not plan.fits and plan.advice.startswith("cuts=[[1,2],")
    assert memory_plan(seer_10b(), 496, 40, cuts=json.loads(plan.advice[5:])).fits            # as -p cuts reads it
    kept = memory_plan(seer_10b(batch_size=128), 8, 40, cuts=json.loads(plan.advice[5:]), reshard_after_forward=False)
    assert not kept.fits and kept.advice == plan.advice + ", reshard=True" and memory_plan(seer_10b(batch_size=128), 8, 40, cuts=json.loads(plan.advice[5:])).fits
    assert "reshard" not in memory_plan(seer_10b(), 496, 60, reshard_after_forward=False, reserve_gib=30).advice   # cuts alone do it
    tiny = memory_plan(seer_10b(batch_size=8), 8, 4)
    assert not tiny.fits and tiny.advice.startswith("more or larger GPUs")
    assert "offload" in memory_plan(seer_10b(batch_size=1), 1, 40).advice


def test_a_part_that_is_computed_again_is_gathered_as_a_whole():
    "FSDP2 leaves its blocks gathered until their backward pass, so a plan must not count two of them only."
    stage = meta_swav(seer_10b()).backbone.stages["res4"]
    weights = [sum(p.numel() for p in block.parameters()) for block in stage]
    gathered = {cuts: memory_plan(seer_10b(), 496, 40, cuts=((2,), (7,), cuts, ())).parts["gathered"] * 2**30 for cuts in ((17,), (9, 17), tuple(range(1, 18)))}
    assert gathered[17,] == 2 * sum(weights) + (2 + 4) * max(weights)
    assert gathered[17,] > gathered[9, 17] > gathered[tuple(range(1, 18))]


# ---- two ranks


def scaled_steps(model):
    "Return (loss, loss scale, whether the weights moved) of three steps; in the second the gradient of rank 1, and only that, is infinite."
    optimizer, scaler, rows = LARC(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=2.0**10), []
    for step in range(3):
        scores = model(batch(step, rank(), 2))[1]
        loss = swapped_prediction(scores, swav_codes(scores[:2], group=dist.group.WORLD))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        weight = model.head.projection[0].weight
        before = weight.full_tensor().clone()
        if rank() == 1 and step == 1: weight.grad.to_local().fill_(float("inf"))
        scaler.unscale_(optimizer); scaler.step(optimizer); scaler.update()
        rows.append([loss.item(), scaler.get_scale(), not torch.equal(weight.full_tensor(), before)])
    return rows


def peak_of_a_step(mesh):
    "Return the bytes that one rank holds at most during its second step."
    model = checkpoint_stages(shard(meta_swav(LARGER), mesh), CUTS)
    optimizer = LARC(model.parameters(), lr=0.1)
    def step():
        scores = model([torch.randn(LARGER.batch_size // 2, 3, s, s) for s in (96, 96, 48, 48)])[1]
        swapped_prediction(scores, swav_codes(scores[:2])).backward()
        optimizer.step()
        optimizer.zero_grad()
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile: step()
    events = sorted((e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(n for _, n in events)) + sum(2 * p.to_local().nbytes for p in model.parameters())


def worker():
    setup("cpu")
    mesh, ranks, out = init_device_mesh("cpu", (2,)), dict(rank=rank(), world=2), {}
    def sharded(mesh=mesh, **settings): return shard(meta_swav(CONFIG), mesh, seed=3, big=100_000, **settings)
    def joined(**settings): return shard(sync_batch_norm(meta_swav(CONFIG)), mesh, seed=3, big=100_000, **settings)

    out["first weights"] = {name: full(p).detach() for name, p in sharded().named_parameters()}
    out["fsdp"] = train(sharded(), evaluation=True, **ranks)
    out["kept"] = train(sharded(reshard_after_forward=False), evaluation=True, steps=3, **ranks)
    out["copies"] = train(sharded(init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))), evaluation=True, steps=3, **ranks)
    out["offload"] = train(sharded(offload=True), evaluation=True, steps=3, **ranks)
    out["padded"] = train(shard(padded(), mesh, seed=3), evaluation=True, steps=3, **ranks)
    out["accumulated"] = train(sharded(), accumulate=2, evaluation=True, **ranks)
    out["batch norm"] = train(joined(), **ranks)
    out["cut"] = train(checkpoint_stages(joined(), CUTS), steps=5, **ranks)

    half = checkpoint_stages(joined(dtype=torch.bfloat16), CUTS)
    types = {}
    for name, m in half.named_modules():
        if isinstance(m, (nn.Conv2d, sharding.BATCH_NORM, nn.Linear)):
            m.register_forward_hook(lambda m, args, y, name=name: types.update({name: (str(m.weight.dtype), str(y.dtype))}))
    out["half"] = train(half, **ranks)
    out["half types"] = types
    out["shards"] = sorted({str(p.dtype) for p in half.parameters()})
    sharding.PER_TENSOR = False                                                               # as PyTorch before 2.15
    out["half, own units"] = train(checkpoint_stages(joined(dtype=torch.bfloat16), CUTS), steps=5, **ranks)
    sharding.PER_TENSOR = True

    out["fp16"] = scaled_steps(joined(dtype=torch.float16))

    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode
    torch.manual_seed(5)
    tensors, grads = [torch.randn(5, 3), torch.randn(1, 4), torch.zeros(7)], [torch.randn(5, 3), torch.randn(1, 4), torch.randn(7)]   # uneven; one row; zeros
    for name, place in (("whole", lambda t: t.clone()), ("split", lambda t: distribute_tensor(t, mesh, [dist.tensor.Shard(0)]))):
        params = [nn.Parameter(place(t)) for t in tensors]
        optimizer = LARC(params, lr=0.5, weight_decay=0.1)
        for _ in range(3):
            for p, g in zip(params, grads): p.grad = place(g)
            with CommDebugMode() as traffic: optimizer.step()
        out[f"larc {name}"] = [full(p).detach() for p in params]
        out[f"larc {name} collectives"] = traffic.get_total_counts()
        out[f"larc {name} momentum"] = type(optimizer.state[params[0]]["momentum_buffer"]).__name__
    out["peak"] = peak_of_a_step(mesh)
    return out


@pytest.fixture(scope="module")
def two_ranks():
    results = run_ranks(worker, 2, timeout=300)
    return results[0] | {"fp16": [r["fp16"] for r in results]}


def test_first_weights_do_not_depend_on_the_ranks(two_ranks):
    for name, p in fresh().named_parameters(): assert torch.equal(p, two_ranks["first weights"][name]), name


def test_two_ranks_equal_one(two_ranks, plain_evaluation):
    close(two_ranks["fsdp"], plain_evaluation)


def test_two_ranks_with_joint_batch_norm_equal_one(two_ranks, plain):
    difference = (two_ranks["batch norm"][0] - plain[0]).abs()
    assert difference[:5].max() < 2e-4 and difference.max() < 1e-2                            # BatchNorm magnifies: weights changed by 1e-7 end 2e-3 apart


def test_accumulation_on_two_ranks(two_ranks, plain_evaluation):
    close(two_ranks["accumulated"], plain_evaluation)


@pytest.mark.parametrize("name", ["kept", "copies", "offload"])
def test_variants_of_sharding(two_ranks, name):
    close(two_ranks[name], train(fresh(), evaluation=True, steps=3))


def test_checkpointing_on_two_ranks_is_exact(two_ranks):
    assert torch.equal(two_ranks["cut"][0], two_ranks["batch norm"][0][:5])


def test_half_precision(two_ranks):
    types = two_ranks["half types"]
    assert two_ranks["shards"] == ["torch.float32"]
    assert types["backbone.stem.1"] == types["backbone.stages.res4.1.b.1"] == ("torch.float32", "torch.bfloat16")
    assert types["backbone.stages.res4.1.b.0"] == types["head.projection.0"] == ("torch.bfloat16", "torch.bfloat16")
    assert types["head.prototypes"] == ("torch.float32", "torch.float32")
    half, whole = two_ranks["half"][0], two_ranks["batch norm"][0]
    assert abs(half[0] - whole[0]) < 0.05 and 0 < abs(half.mean() - whole.mean()) < 0.1       # single steps differ more: codes are nearly choices


def test_fp16_skips_a_step_on_all_ranks(two_ranks):
    for rows in two_ranks["fp16"]:
        assert [row[1:] for row in rows] == [[1024, True], [512, False], [512, True]] and all(row[0] < 10 for row in rows)


def test_padded_crops_under_sharding(two_ranks):
    close(two_ranks["padded"], train(materialize(padded(), seed=3), evaluation=True, steps=3))


def test_older_pytorch_gives_the_same(two_ranks):
    torch.testing.assert_close(two_ranks["half, own units"][0], two_ranks["half"][0][:5], rtol=0, atol=1e-6)


def test_larc_is_the_same_across_shards(two_ranks):
    for a, b in zip(two_ranks["larc whole"], two_ranks["larc split"]): torch.testing.assert_close(a, b)
    assert two_ranks["larc split collectives"] == 1 and two_ranks["larc whole collectives"] == 0
    assert two_ranks["larc split momentum"] == "DTensor"



def test_memory_plan_on_two_ranks(two_ranks):
    assert 0.95 < memory_plan(LARGER, 2, 1, cuts=CUTS, reserve_gib=0).total * 2**30 / two_ranks["peak"] < 1.25


def test_a_forgotten_setup_is_noticed(monkeypatch):
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=1).items(): monkeypatch.setenv(name, str(value))
    with pytest.raises(RuntimeError, match="setup"): shard(meta_swav(CONFIG))
