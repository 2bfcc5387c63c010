"A backbone larger than memory: the same bits as in memory, under a limit that the whole network does not fit in."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from seer_nb.evaluate.tasks import weights_hash
from seer_nb.regnet import AnyNetConfig, RegNetY, init_weights, regnety
from seer_nb.streaming import StreamedBackbone, forward_parts, main, measure, write_random
from seer_nb.weights import convert_state, load_backbone, save_backbone

torch.set_num_threads(1)

NARROW = AnyNetConfig((2, 7, 17, 1), (64, 128, 352, 896), (32,) * 4)           # the 10B's depths


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = regnety("regnety_toy").eval()
    for name, buffer in model.named_buffers():                                   # statistics that a wrong order would show
        if buffer.is_floating_point(): buffer.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("layout", ["seer_nb", "timm"])
@pytest.mark.parametrize("kept", [0.0, 1e-4, 1.0])
def test_same_bits_as_in_memory(tmp_path, small, layout, kept):
    torch.save(convert_state(small.state_dict(), layout), tmp_path / "b.pth")
    images = torch.randn(3, 3, 40, 56)
    streamed = StreamedBackbone(tmp_path / "b.pth", micro_batch=2, keep_gib=kept)
    with torch.inference_mode(): want = {name: torch.cat([x, y]) for (name, x), y in zip(small.feature_maps(images[:2]).items(), small.feature_maps(images[2:]).values())}
    for _ in range(2):                                                           # a second pass too
        got = streamed.feature_maps(images)
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    assert torch.equal(streamed(images), want["res5"].mean((2, 3)))
    assert not streamed.state_dict() and streamed.num_features == small.num_features


def test_a_file_without_counters(tmp_path, small):
    "VISSL's own files and converted ones lack num_batches_tracked, which nothing needs."
    torch.save({k: v for k, v in convert_state(small.state_dict(), "vissl").items() if not k.endswith("num_batches_tracked")}, tmp_path / "b.torch")
    images = torch.randn(2, 3, 40, 56)
    with torch.inference_mode(): assert torch.equal(StreamedBackbone(tmp_path / "b.torch", keep_gib=1e-4)(images), small(images))
    in_memory = load_backbone(tmp_path / "b.torch", report=None).state_dict()
    assert all(torch.equal(tensor, in_memory.pop(name)) for name, tensor in StreamedBackbone(tmp_path / "b.torch").named_tensors()) and not in_memory


def test_fingerprint_is_that_of_the_network_in_memory(tmp_path, small):
    "A result is found again by it: two streamed networks must not have the same one."
    prints = set()
    for n, model in enumerate((small, regnety("regnety_toy"))):
        path = save_backbone(model, tmp_path / f"{n}.safetensors")
        for dtype in (None, torch.bfloat16):
            prints.add(weights_hash(StreamedBackbone(path, dtype=dtype)))
            assert weights_hash(load_backbone(path, dtype=dtype, report=None)) in prints
    assert len(prints) == 4


def test_refuses_what_loading_refuses(tmp_path, small):
    state = small.state_dict()
    del state["stages.res4.0.c.0.weight"]
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"stages\.res4\.0\.c\.0\.weight"): StreamedBackbone(tmp_path / "b.pth")
    save_backbone(small, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="micro_batch"): StreamedBackbone(tmp_path / "b.safetensors", micro_batch=0)
    with pytest.raises(ValueError, match="floating type"): StreamedBackbone(tmp_path / "b.safetensors", dtype=torch.int8)
    for wrong in (torch.zeros(3, 64, 64), torch.zeros(1, 3, 64, 64, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"): StreamedBackbone(tmp_path / "b.safetensors")(wrong)


def test_random_weights_follow_the_published_initialisation(tmp_path):
    write_random(NARROW, tmp_path / "r", torch.float32, seed=3)
    drawn, built = load_backbone(tmp_path / "r", report=None).state_dict(), RegNetY(NARROW)
    init_weights(built)
    for name, want in built.state_dict().items():
        if want.ndim == 4 and want.numel() > 1000: assert abs(drawn[name].std() / want.std() - 1) < 0.2, name
        elif want.ndim < 4 and ".se." not in name: assert torch.equal(drawn[name], want), name
    write_random(NARROW, tmp_path / "s", torch.float32, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(drawn.values(), load_backbone(tmp_path / "s", report=None).state_dict().values()))


def test_measuring_leaves_nothing_and_checks_the_disk(tmp_path, monkeypatch, capsys):
    row = measure(NARROW, tmp_path, torch.bfloat16, size=64)
    assert row["res2_difference"] == row["res5_difference"] == 0 and row["res5_std"] > 0 and row["parameters"] == sum(p.numel() for p in RegNetY(NARROW).parameters())
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 2**30})())
    with pytest.raises(SystemExit): main(["regnety_10b", "--folder", str(tmp_path)])
    assert "1.0 GiB free, the network takes 17.4" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit): main(["regnety_10bn"])
    assert "did you mean 'regnety_10b'" in capsys.readouterr().err


# The 10B's layout (VISSL consolidated, blocks grouped in parts) at a tenth of its width: 366 MB in fp32.
LIMITED = """
import resource, sys, torch
from seer_nb.regnet import regnety
from seer_nb.streaming import StreamedBackbone
from seer_nb.weights import load_backbone
torch.set_num_threads(1)
with torch.device("meta"): regnety("regnety_toy")            # torch imports the rest of itself: tens of MB that are no weights
path, action = sys.argv[1:]
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + 300 * 2**20,) * 2)
image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
if action == "whole": load_backbone(path, report=None)
if action == "half": print(load_backbone(path, dtype=torch.bfloat16, report=None).stem[0].weight.dtype)
if action == "streamed": print(StreamedBackbone(path)(image).double().sum().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit and its measure are Linux's")
def test_a_limit_that_the_whole_network_does_not_fit_in(tmp_path):
    torch.manual_seed(0)
    model, path = RegNetY(AnyNetConfig((2, 7, 17, 1), (200, 400, 1100, 2800), (100,) * 4)).eval(), tmp_path / "conso.torch"
    cuts, trunk = {2: (2,), 3: (7,), 4: (9, 17), 5: (1,)}, {}
    for name, tensor in convert_state(model.state_dict(), "vissl").items():
        name = name.removeprefix("trunk.")
        if ".block" in name:
            stage, block = name.split(".")[1:3]
            part = next(n for n, end in enumerate(cuts[int(stage[3:])]) if int(block.split("-")[1]) < end)
            name = name.replace(f".{block}.", f".{block.split('-')[0]}-part{part}.{block}.", 1)
        trunk[name] = tensor
    assert "_feature_blocks.res4.block3-part1.block3-16.f.c.weight" in trunk
    torch.save({"type": "consolidated", "classy_state_dict": {"base_model": {"model": {"trunk": trunk, "heads": {}}}}}, path)
    assert path.stat().st_size > 340 * 2**20

    def run(action):                                         # as at full size, each large tensor is a mapping of its own, given back when it is freed
        return subprocess.run([sys.executable, "-c", LIMITED, str(path), action], capture_output=True, text=True, cwd=Path(__file__).parent.parent,
                              env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)})

    whole, half, streamed = map(run, ("whole", "half", "streamed"))
    assert whole.returncode and "memory" in whole.stderr.lower(), "the limit must be one that matters"
    assert half.returncode == 0 and half.stdout.strip() == "torch.bfloat16", half.stderr
    assert streamed.returncode == 0, streamed.stderr
    with torch.inference_mode(): assert float(streamed.stdout) == model(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))).double().sum().item()


def test_units_are_the_whole_network():
    with torch.device("meta"): model = regnety("regnety_10b")
    names = [f"{unit}.{name}" for unit, module in forward_parts(model) for name in module.state_dict()]
    assert names == list(model.state_dict())
