"""Checkpoints under kill -9, full disks, damaged and hostile files, other numbers of ranks: real processes, real folders."""
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from checkpoint_kills import CONTEXT, killed, kill_every_line, on_ranks, save_once, spawn, start_ranks, state_at, train, train_killed, whole_at
from seer_nb import checkpoints
from seer_nb.checkpoints import (CheckpointError, CheckpointManager, Piece, SavedTensors, export_backbone, load_newest, lock_folder, open_checkpoint, saved_steps, unlock,
                                 write_manifest)
from seer_nb.core import seed_all
from seer_nb.regnet import regnety
from seer_nb.weights import load_backbone, save_backbone

CHECKPOINTS = Path(checkpoints.__file__)


def leftovers(root): return [p.name for p in root.iterdir() if not re.fullmatch(r"step_\d{8}|lock\.json", p.name)]


@pytest.fixture
def root(tmp_path):
    "Two good checkpoints, steps 1 and 2."
    with CheckpointManager(tmp_path / "checkpoints") as manager:
        for step in (1, 2): manager.save(step, state_at(step), {"step": step})
    return tmp_path / "checkpoints"


# ── kill -9 ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("world_size, victim, stride", [(1, 0, 11), (2, 0, 29), (2, 1, 19)])
def test_killed_at_lines_of_a_save(tmp_path, world_size, victim, stride):
    "After each kill there is the old checkpoint or the new one, and the folder can be used. `python tests/checkpoint_kills.py` takes every line."
    kills, lost, outcomes, _ = kill_every_line(tmp_path, world_size, victim, stride)
    assert lost == 0 and kills >= 5
    assert re.fullmatch("0+1*", outcomes)                                  # first the old one, then the new one


def test_killed_while_a_step_is_saved_once_more(root):
    "Two renames; a reader with the lock completes them."
    for line in range(1, 400, 9):
        (process, _), = start_ranks(save_once, 1, root, 2, line)
        process.join()
        with CheckpointManager(root) as manager: found = manager.load()
        assert whole_at(2, found) and saved_steps(root) == [1, 2]
        if not killed(process): break
    assert line > 200 and leftovers(root) == []


@pytest.mark.parametrize("world_size", [1, 2])
def test_training_killed_again_and_again_ends_the_same(tmp_path, world_size):
    draw, steps, kills = random.Random(world_size), 40, 0
    wanted = b"".join(on_ranks(train, 1, tmp_path / "straight", steps, 2))
    while kills < 50:
        victim = draw.randrange(world_size)
        started = start_ranks(train_killed, world_size, tmp_path / "killed", steps, 2, draw.randrange(1, 1200), victim)
        answers = []
        for process, here in started:
            try: answers.append(here.recv())
            except EOFError: answers.append(None)
            process.join()
        if not killed(started[victim][0]): break
        kills += 1
        assert all("was not saved: another rank is dead" in a for a in answers if isinstance(a, str))      # who is left alone ends, with a word
    assert kills >= 5
    assert b"".join(answers) == wanted


def test_flushed_before_it_is_named(tmp_path, monkeypatch):
    "What a power cut needs: every file, then the folder, then the name, then the folder above."
    seen, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (seen.append("rename"), rename(a, b))[1])
    with CheckpointManager(tmp_path / "root") as manager: manager.save(3, state_at(3), {})
    temporary = next(name for name in seen if name.startswith(".tmp-"))
    assert seen == ["shard_00000.safetensors", "numbers.json", "manifest.json", temporary, "rename", "root"]


# ── disks ────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def in_mount(script, folder):
    "Run a script in which `folder` is a file system of 8 MiB, and return what it prints."
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    inside = [*unshare, "sh", "-c", 'mount -t tmpfs -o size=8m tmpfs "$0" && exec "$@"', folder]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode: pytest.skip("no right to mount a small file system")
    done = subprocess.run([*inside, sys.executable, "-c", script, folder], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(CHECKPOINTS.parent.parent)})
    assert done.returncode == 0, done.stderr
    return done.stdout


FULL = """
import contextlib, sys, torch
from pathlib import Path
from unittest import mock
from seer_nb.checkpoints import CheckpointManager, CheckpointError, load_newest
root = Path(sys.argv[1]) / "checkpoints"
def tensors(n, value): return {"w": torch.full((n,), float(value))}
with CheckpointManager(root) as manager:
    manager.save(1, tensors(500_000, 1), {})
    for blind in (False, True):
        unlimited = mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1 << 40)) if blind else contextlib.nullcontext()
        with unlimited:
            manager.save(2, tensors(3_000_000, 2), {})
            try: manager.wait()
            except CheckpointError as error: print(error)
        assert sorted(p.name for p in root.iterdir()) == ["lock.json", "step_00000001"]
    assert (load_newest(root).tensors["w"] == 1).all()
    manager.save(3, tensors(500_000, 3), {})                       # a smaller one still fits
assert load_newest(root).step == 3
"""


def test_disk_full(tmp_path):
    known, tried = in_mount(FULL, tmp_path).splitlines()
    assert re.fullmatch(r"step 2 was not saved: the disk of .* is full: 11\.5 MiB needed, 6\.\d MiB free; the newest checkpoint is still step_00000001", known)
    assert "is full: 11.5 MiB needed" in tried


READ_ONLY = """
import subprocess, sys, torch
from pathlib import Path
from seer_nb.checkpoints import CheckpointManager, CheckpointError, load_newest
root = Path(sys.argv[1]) / "checkpoints"
manager = CheckpointManager(root)
manager.save(1, {"w": torch.ones(3)}, {})
manager.wait()
manager._lock = None                                               # else the open lock file forbids the change
import os; from seer_nb import checkpoints; [os.close(lock) for lock in checkpoints._locks]
subprocess.run(["mount", "-o", "remount,ro", sys.argv[1]], check=True)
manager.save(2, {"w": torch.ones(3)}, {})
for fails in (manager.wait, lambda: CheckpointManager(root)):
    try: fails()
    except CheckpointError as error: print(error)
assert load_newest(root).step == 1                                 # reading needs no lock
"""


def test_read_only_folder(tmp_path):
    at_save, at_start = in_mount(READ_ONLY, tmp_path).splitlines()
    assert re.fullmatch(r"step 2 was not saved: .* cannot be written \(Read-only file system\); the newest checkpoint is still step_00000001", at_save)
    assert re.fullmatch(r".*checkpoints cannot be written: Read-only file system", at_start)


def fail_on_rank_1(rank, root):
    original = checkpoints.write_shard
    def full(path, pieces):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")
    with CheckpointManager(root, timeout=20) as manager:
        manager.save(1, state_at(1, rank, 2), {"step": 1})
        manager.wait()
        if rank == 1: checkpoints.write_shard = full
        manager.save(2, state_at(2, rank, 2), {"step": 2})
        try: manager.save(3, state_at(3, rank, 2), {"step": 3})
        except CheckpointError as error: message = str(error)
        checkpoints.write_shard = original
        manager.save(4, state_at(4, rank, 2), {"step": 4})
    return message


def test_one_rank_cannot_write(tmp_path):
    "All ranks hear of it at the next save, nothing of it stays, and the save after it works."
    messages = on_ranks(fail_on_rank_1, 2, tmp_path)
    assert messages[0] == messages[1] and messages[0].startswith("step 2 was not saved: the disk of ")
    assert saved_steps(tmp_path) == [1, 4] and leftovers(tmp_path) == [] and whole_at(4, load_newest(tmp_path))


def freeze_rank_1(rank, root):
    with CheckpointManager(root, timeout=2) as manager:
        manager.save(1, state_at(1, rank, 2), {"step": 1})
        manager.wait()
        if rank == 1: checkpoints.write_shard = lambda *what: os.kill(os.getpid(), signal.SIGSTOP)
        manager.save(2, state_at(2, rank, 2), {"step": 2})
        try: manager.wait()
        except CheckpointError as error: return str(error)


def test_a_frozen_rank_is_noticed(tmp_path):
    "The others go on after the timeout, and the run that is started next finds the checkpoint before."
    (first, here), (frozen, _) = start_ranks(freeze_rank_1, 2, tmp_path)
    assert here.recv().startswith("step 2 was not saved: another rank is dead or does not answer")
    frozen.kill()
    for process in (first, frozen): process.join()
    with CheckpointManager(tmp_path) as manager: assert whole_at(1, manager.load())
    assert leftovers(tmp_path) == []


def disagree(rank, root):
    with CheckpointManager(root, timeout=20) as manager:
        manager.save(1 + rank, state_at(1, rank, 2), {})
        try: manager.wait()
        except CheckpointError as error: return str(error)


def test_ranks_that_save_different_steps(tmp_path):
    assert all("the ranks save different steps: (1, 2)" in m for m in on_ranks(disagree, 2, tmp_path))
    assert saved_steps(tmp_path) == []


# ── the thread ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_what_was_saved_is_what_it_was(tmp_path, monkeypatch):
    "`save` returns before anything is written, the tensors change, the old values are written; the next save waits."
    go, order, original = threading.Event(), [], checkpoints.write_shard
    monkeypatch.setattr(checkpoints, "write_shard", lambda path, pieces: (go.wait(), order.append(path.parent.name[:13]), original(path, pieces))[2])
    w = torch.ones(4, 3, 5, 5).to(memory_format=torch.channels_last)
    with CheckpointManager(tmp_path) as manager:
        manager.save(1, {"w": w, "alias": w, "transposed": w.transpose(0, 1), "part": w[1:, :, ::2]}, {})
        assert saved_steps(tmp_path) == []
        w.fill_(2)
        threading.Timer(0, go.set).start()
        manager.save(2, {"w": w}, {})
    assert order == [".tmp-00000001", ".tmp-00000002"]
    one, two = open_checkpoint(tmp_path / "step_00000001").tensors, open_checkpoint(tmp_path / "step_00000002").tensors
    assert all((one[name] == 1).all() for name in one) and (two["w"] == 2).all()
    two["w"].fill_(3)                                                      # mapped, but not into the file
    assert (open_checkpoint(tmp_path / "step_00000002").tensors["w"] == 2).all()
    assert one["transposed"].shape == (3, 4, 5, 5) and one["part"].shape == (3, 3, 3, 5)


def test_error_in_the_thread_is_raised_by_the_next_call(root, monkeypatch):
    def broken(*what): raise RuntimeError("the reason")
    with CheckpointManager(root) as manager:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "write_manifest", broken)
            manager.save(3, state_at(3), {})
            with pytest.raises(CheckpointError, match="step 3 was not saved: RuntimeError: the reason"): manager.save(4, state_at(4), {})
        manager.wait()                                                     # said once
        assert saved_steps(root) == [1, 2] and leftovers(root) == []
        manager.save(4, state_at(4), {})
    assert saved_steps(root) == [2, 4]


def test_error_of_the_body_is_not_hidden(root, monkeypatch, capsys):
    with pytest.raises(KeyError, match="mine"), monkeypatch.context() as patch, CheckpointManager(root) as manager:
        patch.setattr(checkpoints, "write_manifest", lambda *what: 1 / 0)
        manager.save(3, state_at(3), {})
        raise KeyError("mine")
    assert "step 3 was not saved" in capsys.readouterr().out
    unlock(lock_folder(root))


def test_bad_arguments_are_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 2"): CheckpointManager(tmp_path, keep=1)
    for keep in (1, 0):
        with pytest.raises(ValueError, match="keep must be at least 2"): checkpoints.outdated([10, 20, 30], keep, 0)
    with CheckpointManager(tmp_path) as manager:
        with pytest.raises(TypeError, match="JSON"): manager.save(1, {}, {"x": torch.ones(1)})
        with pytest.raises(ValueError, match="does not lie in"): manager.save(1, {"q": Piece(torch.ones(3), (4,), (2,))}, {})
        manager.save(1, {"x": torch.zeros(2, dtype=torch.complex64)}, {})
        with pytest.raises(CheckpointError, match="x is torch.complex64"): manager.wait()


def test_what_is_kept(tmp_path):
    with CheckpointManager(tmp_path, keep=3, keep_every=4) as manager:
        for step in range(1, 13): manager.save(step, {"w": torch.ones(1)}, {})
    assert saved_steps(tmp_path) == [4, 8, 10, 11, 12] and leftovers(tmp_path) == []


# ── the lock ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def hold(folder, ready):
    lock_folder(folder)
    if os.fork() == 0:                                                     # as a loader worker does, which may live on for seconds
        ready.send(os.getpid())
        threading.Event().wait()
    threading.Event().wait()


def test_a_second_run_is_refused_until_the_first_is_dead(root):
    here, there = CONTEXT.Pipe(duplex=False)
    holder = spawn(hold, root, there)
    worker = here.recv()
    try:
        with pytest.raises(CheckpointError, match=f"belongs to a run that is still going: .*{holder.pid}"): CheckpointManager(root)
        assert load_newest(root).step == 2                                 # reading is free
        holder.kill()
        holder.join()
        with CheckpointManager(root) as manager: assert manager.load().step == 2
    finally: os.kill(worker, 9)


def refused(rank, root):
    try: CheckpointManager(root, timeout=20)
    except CheckpointError as error: return str(error)


def test_all_ranks_are_refused(root):
    lock = lock_folder(root)
    first, second = on_ranks(refused, 2, root)
    unlock(lock)
    assert first == second and "belongs to a run" in first


# ── damage and malice ────────────────────────────────────────────────────────────────────────────────────────────────────────

def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def link_away(path):
    "The same bytes, but through a link out of the folder."
    path.rename(path.parent.parent / "outside")
    path.symlink_to(path.parent.parent / "outside")


DAMAGE = {"cut": lambda p: os.truncate(p, p.stat().st_size // 2), "empty": lambda p: os.truncate(p, 0), "longer": lambda p: p.write_bytes(p.read_bytes() + b" "),
          "bit": flip, "gone": os.unlink, "folder": lambda p: (p.unlink(), p.mkdir()), "link": link_away}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["manifest.json", "numbers.json", "shard_00000.safetensors"])
def test_damage_falls_back(root, capsys, name, damage):
    if (name, damage) in (("manifest.json", "longer"), ("manifest.json", "link")): pytest.skip("harmless")
    DAMAGE[damage](root / "step_00000002" / name)
    with pytest.raises(ValueError, match=f"step_00000002 is damaged or unreadable: .*{name}"): open_checkpoint(root / "step_00000002")
    with CheckpointManager(root) as manager: assert whole_at(1, manager.load())
    assert "step_00000002 is damaged" in capsys.readouterr().out
    assert saved_steps(root) == [1] and any(name.startswith("damaged_step_00000002_") for name in leftovers(root))


def test_every_bit_of_the_manifest_counts(root):
    "A flipped bit anywhere in it is noticed, or changes nothing that is read."
    path = root / "step_00000001" / "manifest.json"
    data, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        bit = draw.randrange(8 * len(data))
        path.write_bytes(bytes(byte ^ (1 << bit % 8) if n == bit // 8 else byte for n, byte in enumerate(data)))
        try: assert whole_at(1, open_checkpoint(path.parent))
        except ValueError: pass


def test_nothing_good_is_left(root):
    "Neither a silent new start nor a renaming: a person decides."
    for step in (1, 2): flip(root / f"step_0000000{step}" / "shard_00000.safetensors")
    for _ in range(2):
        with CheckpointManager(root) as manager, pytest.raises(CheckpointError, match="none of the 2 checkpoints in"): manager.load()
    assert saved_steps(root) == [1, 2]


def open_on_ranks(rank, root):
    with CheckpointManager(root, timeout=20) as manager: return manager.load().step


def test_ranks_agree_on_the_one_before(tmp_path):
    "Each rank checks half of the files; damage that one of them sees counts for all."
    for step in (1, 2): on_ranks(save_once, 2, tmp_path, step)
    flip(tmp_path / "step_00000002" / "shard_00001.safetensors")
    assert on_ranks(open_on_ranks, 2, tmp_path) == [1, 1]


def test_a_checkpoint_under_another_name(root):
    (root / "step_00000002").rename(root / "step_00000009")
    with pytest.raises(ValueError, match="the manifest is that of step 2"): open_checkpoint(root / "step_00000009")


def test_a_later_format_is_no_damage(root):
    manifest = json.loads((root / "step_00000002/manifest.json").read_text())["manifest"] | {"version": 2}
    (root / "step_00000002/manifest.json").write_text(json.dumps({"sha256": checkpoints._seal(manifest), "manifest": manifest}))
    with CheckpointManager(root) as manager, pytest.raises(CheckpointError, match="version 2"): manager.load()
    assert saved_steps(root) == [1, 2]


def sealed(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())["manifest"] | changes
    (folder / "manifest.json").write_text(json.dumps({"sha256": checkpoints._seal(manifest), "manifest": manifest}))


SECRET = {"bytes": 6, "sha256": "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"}
W = {"model.w": {"dtype": "F32", "shape": [64, 8]}, "model.n": {"dtype": "I64", "shape": []}, "queue": {"dtype": "F32", "shape": [64, 4]}}


@pytest.mark.parametrize("changes", [
    {"files": {"../secret.json": SECRET}}, {"files": {"/etc/passwd": SECRET}}, {"files": {"a/../../secret.json": SECRET}}, {"files": {"..": SECRET}}, {"files": {"": SECRET}},
    {"files": {"numbers.json\n": SECRET}}, {"files": ["numbers.json"]}, {"files": "x"}, {"files": {"numbers.json": None}}, {"files": {}}, {"files": {"numbers.json": {"bytes": -1, "sha256": 3}}},
    {"step": "1"}, {"step": None}, {"step": 10**400}, {"step": [1]},
    {"tensors": {}}, {"tensors": []}, {"tensors": {"w": 3}}, {"tensors": W | {"queue": {"dtype": "F32", "shape": [10**15, 10**15]}}},
    {"tensors": W | {"queue": {"dtype": "F32", "shape": [-64, -4]}}}, {"tensors": W | {"queue": {"dtype": "OBJECT", "shape": [64, 4]}}},
    {"tensors": W | {"queue": {"dtype": "I32", "shape": [64, 4]}}}, {"tensors": W | {"queue": {"dtype": "F32", "shape": "64"}}}, {"tensors": W | {"queue": {"dtype": "F32", "shape": [256]}}},
    {"tensors": W | {"more": {"dtype": "F32", "shape": [4]}}}])
def test_hostile_manifest(root, changes):
    "Sealed by somebody who knows how: an error, no file outside the folder, no memory, no code."
    (root.parent / "secret.json").write_text("secret")
    (root / "secret.json").write_text("secret")
    sealed(root / "step_00000001", **changes)
    with pytest.raises(ValueError, match="step_00000001 is damaged or unreadable"): open_checkpoint(root / "step_00000001")


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "[]", "null", "3", '{"sha256": 1, "manifest": []}', '{"sha256": 1, "manifest": {"a": NaN}}', "\ud800".encode("utf-8", "surrogatepass").decode("latin1")])
def test_no_manifest_at_all(root, text):
    (root / "step_00000001/manifest.json").write_text(text)
    with pytest.raises(ValueError, match="step_00000001 is damaged or unreadable: manifest.json"): open_checkpoint(root / "step_00000001")


@pytest.mark.parametrize("offsets", ['{"model.w": {"saved_offsets": [-1, 0]}}', '{"model.w": {"saved_offsets": [1, 0]}}', '{"model.w": {"saved_offsets": "00"}}', '{"model.w": {}}', "{}", "[]",
                                     "[" * 100_000, '{"model.w": {"saved_offsets": [0]}}', '{"model.w": {"saved_offsets": [0.0, 0]}}'])
def test_hostile_shard(tmp_path, offsets):
    "Offsets outside of the tensor, or none."
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    file = checkpoints.write_safetensors(folder / "shard_00000.safetensors", {"model.w": (torch.float32, (2, 2))}, lambda name: torch.ones(2, 2), {"DCP_SHARDING_INFO": offsets})
    numbers = checkpoints._write_text(folder / "numbers.json", "{}")
    write_manifest(folder, 1, {"model.w": (torch.float32, (2, 2))}, {"shard_00000.safetensors": file, "numbers.json": numbers})
    with pytest.raises(ValueError, match="is damaged or unreadable"): open_checkpoint(folder)


# ── other numbers of ranks ───────────────────────────────────────────────────────────────────────────────────────────────────

class Net(nn.Module):
    "Rows that no number of ranks divides, one that only the first rank gets, and running averages."

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.linear, self.scale = nn.Conv2d(3, 7, 3, bias=False), nn.BatchNorm2d(7), nn.Linear(7, 5), nn.Parameter(torch.ones(1))
        with torch.no_grad():
            for n, p in enumerate(self.parameters()): p.copy_(torch.arange(p.numel()).view(p.shape) * 0.01 + n)

    def forward(self, x): return self.linear(self.norm(self.conv(x)).mean((2, 3))) * self.scale


def sharded(rank, world_size):
    "The network, cut by FSDP2 if there are several ranks, after one step of SGD with momentum on the same images, and its state."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    model = Net().train()
    if world_size > 1: fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer


def step_of(model, optimizer, seed):
    model(torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def state_of(model, optimizer, rank, world_size):
    share = 12 // world_size
    momentum = {f"momentum.{name}": optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters() if p in optimizer.state}
    queue = Piece(torch.arange(24.0).view(2, 12)[:, rank * share:(rank + 1) * share].clone(), (2, 12), (0, rank * share))
    return {f"model.{name}": t for name, t in model.state_dict().items()} | momentum | {"queue": queue}


def save_sharded(rank, root, world_size):
    model, optimizer = sharded(rank, world_size)
    step_of(model, optimizer, 0)
    with CheckpointManager(root, timeout=60) as manager: manager.save(1, state_of(model, optimizer, rank, world_size), {})


def continue_sharded(rank, root, world_size, to):
    "Load on any number of ranks; save what was loaded, and what it is one step later."
    model, optimizer = sharded(rank, world_size)
    with CheckpointManager(root, timeout=60) as manager: found = manager.load()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.zero_()
            if f"momentum.{name}" in found.tensors: optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    targets = state_of(model, optimizer, rank, world_size)
    targets["queue"].local.zero_()
    found.tensors.fill(targets)
    with CheckpointManager(to, timeout=60) as manager:
        manager.save(1, targets, {})
        step_of(model, optimizer, 1)
        manager.save(2, state_of(model, optimizer, rank, world_size), {})


@pytest.fixture(scope="module")
def saved_on_2(tmp_path_factory):
    root = tmp_path_factory.mktemp("saved_on_2")
    on_ranks(save_sharded, 2, root, 2)
    return root


@pytest.fixture(scope="module")
def saved_on_1(tmp_path_factory):
    "The same, and where one more step leads, on one rank."
    root, to = tmp_path_factory.mktemp("saved_on_1"), tmp_path_factory.mktemp("continued_on_1")
    on_ranks(save_sharded, 1, root, 1)
    on_ranks(continue_sharded, 1, root, 1, to)
    return root, to


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_saved_on_two_ranks_loaded_on(tmp_path, saved_on_2, saved_on_1, world_size):
    "Parameters, momentum, running averages and queue, and the next step leads to the same place."
    on_ranks(continue_sharded, world_size, saved_on_2, world_size, tmp_path)
    saved, again, later = (open_checkpoint(folder / name).tensors for folder, name in ((saved_on_2, "step_00000001"), (tmp_path, "step_00000001"), (tmp_path, "step_00000002")))
    assert sorted(saved) == sorted(again) and len(saved) == 16
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    wanted = open_checkpoint(saved_on_1[1] / "step_00000002").tensors
    for name in wanted: torch.testing.assert_close(later[name], wanted[name])


def test_saved_on_three_ranks_loaded_on_two(tmp_path, saved_on_2):
    three, two = tmp_path / "three", tmp_path / "two"
    on_ranks(continue_sharded, 3, saved_on_2, 3, three)
    shutil.rmtree(three / "step_00000002")
    on_ranks(continue_sharded, 2, three, 2, two)
    first, last = open_checkpoint(saved_on_2 / "step_00000001").tensors, open_checkpoint(two / "step_00000001").tensors
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_each_box_is_written_once(saved_on_2):
    "Two shards of about half the bytes; the whole is no larger than what one rank writes."
    shards = [load_file(p) for p in sorted((saved_on_2 / "step_00000001").glob("shard_*"))]
    assert len(shards) == 2
    assert sum(t.numel() for shard in shards for t in shard.values()) == sum(t.numel() for t in open_checkpoint(saved_on_2 / "step_00000001").tensors.values())


def save_hybrid(rank, root):
    "Two groups that hold the same, each cut in two."
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    mesh = init_device_mesh("cpu", (2, 2))
    with CheckpointManager(root, timeout=60) as manager: manager.save(1, {"w": distribute_tensor(torch.arange(10.0), mesh, [Replicate(), Shard(0)])}, {})


def test_hybrid_sharding_writes_one_copy(tmp_path):
    on_ranks(save_hybrid, 4, tmp_path)
    assert torch.equal(load_newest(tmp_path).tensors["w"], torch.arange(10.0))
    assert [sum(t.numel() for t in load_file(p).values()) for p in sorted((tmp_path / "step_00000001").glob("shard_*"))] == [5, 5, 0, 0]


def test_torch_reads_our_checkpoints(saved_on_2):
    "A checkpoint is also one of torch.distributed.checkpoint."
    import torch.distributed.checkpoint as dcp
    ours = open_checkpoint(saved_on_2 / "step_00000001").tensors
    theirs = {name: torch.zeros(ours.shapes[name], dtype=ours.dtypes[name]) for name in ours}
    with pytest.warns(UserWarning): dcp.load(theirs, storage_reader=dcp.HuggingFaceStorageReader(saved_on_2 / "step_00000001"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def anonymous(): return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


def peak_of_load(rank, root, world_size):
    "MiB of memory of its own that a rank needs beside its tensors while it loads."
    rows, peak = 100 // world_size, [0]
    targets = {f"w{n}": Piece(torch.ones(rows, 26_000), (rows * world_size, 26_000), (rank * rows, 0)) for n in range(10)}      # 100 MB in all
    with CheckpointManager(root, timeout=60) as manager:
        if not saved_steps(root): return manager.save(1, targets, {})
        original, before = SavedTensors._copy, anonymous()
        def watched(*what):
            original(*what)
            peak[0] = max(peak[0], anonymous() - before)
        SavedTensors._copy = watched
        manager.load().tensors.fill(targets)
        return peak[0]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_loading_takes_no_second_copy(tmp_path, world_size):
    "The files are mapped: nobody holds the state twice, and N ranks do not hold it N times."
    on_ranks(peak_of_load, 2, tmp_path, 2)
    assert sum(on_ranks(peak_of_load, world_size, tmp_path, world_size)) < 25


# ── the exported backbone ────────────────────────────────────────────────────────────────────────────────────────────────────

def save_model(rank, root):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    seed_all(0)
    model = nn.ModuleDict({"backbone": regnety("regnety_400mf"), "head": nn.Linear(3, 3)})
    for part in model.values(): fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    numbers = {"backbone": dataclasses.asdict(model["backbone"].config)}
    with CheckpointManager(root, timeout=60) as manager: manager.save(1, {f"model.{k}": t for k, t in model.state_dict().items()}, numbers)


def test_exported_backbone_is_the_saved_one(tmp_path, monkeypatch):
    on_ranks(save_model, 2, tmp_path / "run")
    seed_all(0)
    model = regnety("regnety_400mf")
    save_backbone(model, tmp_path / "saved.safetensors")
    original, before, peak = SavedTensors.read, anonymous(), []
    monkeypatch.setattr(SavedTensors, "read", lambda *what: (original(*what), peak.append(anonymous() - before))[0])
    exported = export_backbone(tmp_path / "run", tmp_path / "new" / "backbone.safetensors")
    ours, theirs = load_file(exported), load_file(tmp_path / "saved.safetensors")
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert load_backbone(exported).config == model.config
    assert len(peak) == len(ours) and max(peak) - peak[0] < exported.stat().st_size / 2**20 / 3
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["backbone.safetensors"]


def test_export_says_what_is_missing(tmp_path, root):
    with pytest.raises(FileNotFoundError, match="no checkpoint"): export_backbone(tmp_path / "nothing", tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="does not say which backbone"): export_backbone(root, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="does not fit"): export_backbone(root / "step_00000002", tmp_path / "b.safetensors", regnety("regnety_toy").config)
    assert not (tmp_path / "b.safetensors").exists()
