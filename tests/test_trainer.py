"""The trainer under kill -9, damaged files and other settings: the same weights, bit for bit, or a clear error."""
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from seer_nb import trainer
from seer_nb.core import MetricLog
from seer_nb.checkpoints import load_newest
from seer_nb.larc import LARC
from seer_nb.trainer import NotFinite, Preempted, PretrainConfig, build_loader, pretrain
from seer_nb.images import open_images

SMALL = PretrainConfig(images="toyworld:64", batch_size=8, steps=12, n_small=1, large_size=32, small_size=32, n_prototypes=10, queue_length=16, queue_start=3,
                       warmup_steps=2, freeze_prototypes=2, log_every=2, checkpoint_every=2, device="cpu")


def weights(run): return (run / "backbone.safetensors").read_bytes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    pretrain(dataclasses.replace(SMALL, run_dir=str(folder)))
    return folder


SCRIPT = """
import json, sys, torch
torch.set_num_threads(1)
from seer_nb.trainer import PretrainConfig, pretrain
print("ready", flush=True)
pretrain(PretrainConfig(**json.loads(sys.argv[1])))
"""


def start(run_dir):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(dataclasses.asdict(dataclasses.replace(SMALL, run_dir=str(run_dir))))],
                               stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "ready\n"
    return process


def test_kill_9_at_random_moments(tmp_path, uninterrupted):
    draw, kills = random.Random(0), 0
    one, begun = start(tmp_path / "timing"), time.monotonic()
    one.communicate()
    seconds = time.monotonic() - begun
    while kills < 5:
        process = start(tmp_path / "run")
        try: process.wait(draw.uniform(0.02, 0.5) * seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        else: break                                      # it got through; what follows still compares
    assert kills >= 1
    process = start(tmp_path / "run")
    process.communicate()
    assert process.returncode == 0
    assert weights(tmp_path / "run") == weights(uninterrupted) == weights(tmp_path / "timing")
    rows = [[(r["step"], r["loss"]) for r in MetricLog(folder / "metrics.jsonl").rows()] for folder in (tmp_path / "run", uninterrupted)]
    assert rows[0] == rows[1]


def test_a_warning_to_the_whole_job_is_heard_by_the_main_process_alone(tmp_path):
    "Slurm signals every process of a job, loader workers too."
    config = dataclasses.replace(SMALL, run_dir=str(tmp_path), steps=10**6, workers=2, log_every=1, checkpoint_every=10**6)
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, json.dumps(dataclasses.asdict(config))], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    rows = lambda: (tmp_path / "metrics.jsonl").read_text().count("\n") if (tmp_path / "metrics.jsonl").exists() else 0
    while rows() < 4 and process.poll() is None: time.sleep(0.05)               # the workers take turns: both have started
    os.killpg(process.pid, signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "Preempted: told to stop; step " in said and "LoaderFault" not in said, said
    assert f"step {load_newest(tmp_path / 'checkpoints').step} of 1000000 is saved" in said


def test_number_of_workers_changes_nothing(tmp_path, uninterrupted):
    pretrain(dataclasses.replace(SMALL, run_dir=str(tmp_path), workers=2))
    assert weights(tmp_path) == weights(uninterrupted)


def test_damaged_checkpoint_falls_back(tmp_path, uninterrupted, capsys):
    pretrain(dataclasses.replace(SMALL, run_dir=str(tmp_path)))
    (tmp_path / "backbone.safetensors").unlink()
    newest = sorted((tmp_path / "checkpoints").glob("step_*"))[-1]
    with open(newest / "shard_00000.safetensors", "r+b") as file: file.truncate(1000)
    result = pretrain(dataclasses.replace(SMALL, run_dir=str(tmp_path)))
    assert "trying the one before" in capsys.readouterr().out and result.step == 12
    assert weights(tmp_path) == weights(uninterrupted)


def test_finished_run_returns_at_once(uninterrupted):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*") if p.is_file() and p.name != "metrics.jsonl"}
    assert pretrain(dataclasses.replace(SMALL, run_dir=str(uninterrupted))).step == 12
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    config = dataclasses.replace(SMALL, run_dir=str(tmp_path), temperature=1e-42)      # 1 / temperature overflows
    with pytest.raises(NotFinite, match="last good checkpoint is none yet"): pretrain(config)
    assert list(tmp_path.glob("not_finite_step_0.safetensors")) and not (tmp_path / "backbone.safetensors").exists()


def test_nan_in_a_gradient_never_reaches_a_checkpoint(tmp_path, monkeypatch):
    plain, calls = LARC.step, []

    def poisoned(self, closure=None):
        calls.append(1)
        if len(calls) == 6: self.param_groups[0]["params"][0].grad[0] = float("nan")
        return plain(self, closure)

    monkeypatch.setattr(LARC, "step", poisoned)
    with pytest.raises(NotFinite, match="gradient is not finite at step 5 or before.*last good checkpoint is step_00000004"):
        pretrain(dataclasses.replace(SMALL, run_dir=str(tmp_path)))
    found = load_newest(tmp_path / "checkpoints")
    assert found.step == 4 and all(found.tensors[name].isfinite().all() for name in found.tensors)


@pytest.mark.parametrize("images", ["nowhere", "empty"])
def test_no_images_is_an_error_before_anything_is_written(tmp_path, images):
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match=images):
        pretrain(dataclasses.replace(SMALL, images=str(tmp_path / images), run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_bad_images_are_counted_and_skipped(tmp_path):
    from PIL import Image
    for i in range(12): Image.new("RGB", (40 + i, 50), (20 * i, 0, 99)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(50))
    (tmp_path / "none.png").write_bytes(b"")
    result = pretrain(dataclasses.replace(SMALL, images=str(tmp_path), run_dir=str(tmp_path / "run"), steps=4))
    assert result.bad_images == {"corrupt": 1, "empty": 1}


def test_tensorboard_shows_the_rows(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    config = dataclasses.replace(SMALL, run_dir=str(tmp_path), steps=4, tensorboard=True)
    pretrain(config)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    rows = MetricLog(tmp_path / "metrics.jsonl").rows()
    for name in ("loss", "learning_rate", "prototype_usage", "images_per_s", "data_wait"):
        shown = events.Scalars(name)
        assert [e.step for e in shown] == [row["step"] for row in rows] == [2, 4]
        torch.testing.assert_close(torch.tensor([e.value for e in shown]), torch.tensor([row[name] for row in rows]))


def test_tensorboard_is_missed_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="pip install tensorboard"): pretrain(dataclasses.replace(SMALL, run_dir=str(tmp_path / "run"), tensorboard=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [dict(sharded=True), dict(offload=True), dict(sharded=True, precision="fp16")], ids=str)
def test_one_process_that_splits_its_weights(tmp_path, changes, uninterrupted):
    "The same arithmetic; stopped after six of twelve steps it goes on with the same bits."
    pretrain(dataclasses.replace(SMALL, run_dir=str(tmp_path / "run"), **changes))
    assert not torch.distributed.is_initialized()
    first, whole = (MetricLog(folder / "metrics.jsonl").rows()[0] for folder in (tmp_path / "run", uninterrupted))
    if "precision" not in changes: assert first["loss"] == pytest.approx(whole["loss"], abs=1e-4)      # fp16 skips steps until the loss scale fits
    part = dataclasses.replace(SMALL, run_dir=str(tmp_path / "part"), **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", told_after(6))
        with pytest.raises(Preempted): pretrain(part)
    pretrain(dataclasses.replace(part, workers=1, checkpoint_every=5, keep=3))   # where and how may change; what is computed may not
    with pytest.raises(ValueError, match="holds a run with other parameters: peak_rate"): pretrain(dataclasses.replace(part, peak_rate=1.0))
    assert weights(tmp_path / "part") == weights(tmp_path / "run")


def told_after(step):
    plain = trainer.train_step
    def told(training, *args):
        if training.step == step: os.kill(os.getpid(), signal.SIGTERM)
        return plain(training, *args)
    return told


@pytest.mark.parametrize("changes", [dict(precision="bf16"), dict(channels_last=False), dict(accumulate=2), dict(n_large=1, n_small=1), dict(head_depth=0)])
def test_settings_train(tmp_path, changes):
    result = pretrain(dataclasses.replace(SMALL, run_dir=str(tmp_path), steps=3, **changes))
    assert result.step == 3 and result.loss < 4


def test_loader_starts_anywhere():
    source = open_images("toyworld:20")                  # 2.5 batches an epoch: batches cross epochs
    config = dataclasses.replace(SMALL, images="toyworld:20")
    straight = iter(build_loader(config, source))
    for step in range(5):
        batch, resumed = next(straight), next(iter(build_loader(config, source, step)))
        assert all(torch.equal(a, b) for a, b in zip(batch, resumed))
