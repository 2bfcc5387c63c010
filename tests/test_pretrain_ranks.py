"pretrain on many ranks: the run of one process, resumed on another number of ranks, ended in time when a rank is lost."
import dataclasses
import os
import shutil
import signal

import pytest
import torch

from seer_nb.checkpoints import load_newest
from seer_nb.core import MetricLog
from seer_nb.distributed import run_ranks, start_ranks
from seer_nb.trainer import PretrainConfig, pretrain

RUN = PretrainConfig(images="toyworld:64", batch_size=12, steps=8, n_small=1, large_size=32, small_size=32, n_prototypes=10, queue_length=12, queue_start=3,
                     start_rate=0.05, peak_rate=0.05, end_rate=0.05, warmup_steps=0, freeze_prototypes=2, log_every=1, checkpoint_every=4, device="cpu", timeout=30.0)


def run(settings):
    from seer_nb.trainer import PretrainConfig, pretrain
    result = pretrain(PretrainConfig(**settings))
    return {"step": result.step, "loss": result.loss}


def ranks(n, config): return run_ranks(run, n, dataclasses.asdict(config), timeout=200)


def losses(folder): return torch.tensor([row["loss"] for row in MetricLog(folder / "metrics.jsonl").rows()])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    pretrain(dataclasses.replace(RUN, run_dir=str(folder)))
    return folder


def close(folder, alone):
    "The same curve. The first loss tells of batch, codes and weights; later ones too, but BatchNorm on a few tiny crops magnifies rounding a thousandfold at every step."
    got, want = losses(folder), losses(alone)
    torch.testing.assert_close(got[0], want[0], atol=2e-4, rtol=0)
    torch.testing.assert_close(got, want, atol=0.05, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"cuts": "[[1],[1],[],[]]", "reshard": False}, {"device_colour": True}], ids=str)
def test_two_ranks_train_as_one_process(tmp_path, alone, changes):
    if "accumulate" in changes or "device_colour" in changes:                   # other batch statistics, other rounding of colours: their own single process
        alone = tmp_path / "alone"
        pretrain(dataclasses.replace(RUN, run_dir=str(alone), steps=3, **changes))
        changes = {**changes, "steps": 3}
    results = ranks(2, dataclasses.replace(RUN, run_dir=str(tmp_path / "two"), **changes))
    assert results[0] == results[1]
    close(tmp_path / "two", alone)


def test_resumed_after_a_kill(tmp_path, alone):
    "Two ranks are killed in step 6: continued on two ranks the run ends with the same bits, on three with the same curve."
    folder, other = tmp_path / "run", tmp_path / "other"
    ranks(2, dataclasses.replace(RUN, run_dir=str(tmp_path / "straight")))
    stopped = start_ranks(killed_at, 2, dataclasses.asdict(dataclasses.replace(RUN, run_dir=str(folder))), 6)
    assert set(stopped.wait(120)) == {-9}
    assert load_newest(folder / "checkpoints").step == 4
    shutil.copytree(folder, other)
    ranks(2, dataclasses.replace(RUN, run_dir=str(folder)))
    assert (folder / "backbone.safetensors").read_bytes() == (tmp_path / "straight/backbone.safetensors").read_bytes()
    assert losses(folder).tolist() == losses(tmp_path / "straight").tolist()
    ranks(3, dataclasses.replace(RUN, run_dir=str(other)))
    close(other, alone)


def killed_at(settings, step):
    import os
    import signal
    import seer_nb.trainer as trainer
    plain = trainer.train_step
    def stopping(training, *args):
        if training.step == step: os.kill(os.getpid(), signal.SIGKILL)
        return plain(training, *args)
    trainer.train_step = stopping
    trainer.pretrain(trainer.PretrainConfig(**settings))


def told_at(settings, step, name):
    import os
    import signal
    import seer_nb.trainer as trainer
    from seer_nb.distributed import rank
    plain = trainer.train_step
    def told(training, *args):
        if training.step == step and rank() == 1: os.kill(os.getpid(), getattr(signal, name))
        return plain(training, *args)
    trainer.train_step = told
    try: trainer.pretrain(trainer.PretrainConfig(**settings))
    except trainer.Preempted as error: return str(error)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_all_ranks_stop_at_the_same_step_and_go_on_with_the_same_bits(tmp_path, name):
    "One rank is told in step 1 (from 0): both leave at the same step, saved; then the run ends as if nothing had been."
    straight, config = dataclasses.replace(RUN, run_dir=str(tmp_path / "straight"), steps=6), dataclasses.replace(RUN, run_dir=str(tmp_path / "run"), steps=6)
    ranks(2, straight)
    said = run_ranks(told_at, 2, dataclasses.asdict(config), 1, name, timeout=120)
    assert said[0] == said[1] and "step 3 of 6 is saved" in said[0]
    assert load_newest(tmp_path / "run/checkpoints").step == 3 and not (tmp_path / "run/backbone.safetensors").exists()
    ranks(2, config)
    assert (tmp_path / "run/backbone.safetensors").read_bytes() == (tmp_path / "straight/backbone.safetensors").read_bytes()
    assert losses(tmp_path / "run").tolist() == losses(tmp_path / "straight").tolist()


def one_rank(settings, step, how):
    import os
    import signal
    import seer_nb.trainer as trainer
    from seer_nb.distributed import rank
    plain = trainer.train_step
    def failing(training, *args):
        if training.step == step and rank() == 1:
            if how == "raises": raise MemoryError("no memory on this rank")
            os.kill(os.getpid(), {"dies": signal.SIGKILL, "stands still": signal.SIGSTOP}[how])
        return plain(training, *args)
    trainer.train_step = failing
    trainer.pretrain(trainer.PretrainConfig(**settings))


@pytest.mark.parametrize("how", ["raises", "dies", "stands still"])
def test_a_lost_rank_ends_the_run_and_is_named(tmp_path, how):
    config = dataclasses.replace(RUN, run_dir=str(tmp_path / "run"), timeout=6.0, checkpoint_every=2)
    started = start_ranks(one_rank, 2, dataclasses.asdict(config), 7, how)
    try: status = started.processes[0].wait(90)
    finally: started.processes[1].kill()                                        # a stopped process can be killed, but ends nothing by itself
    said = started.printed(0)
    assert status not in (0, -9), said
    assert "rank 1" in said, said
    assert load_newest(tmp_path / "run" / "checkpoints").step >= 4              # the save of step 6 waited for it


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="batch_size 12 does not divide among 5 ranks|queue_length 12 does not divide among 5 ranks"):
        ranks(5, dataclasses.replace(RUN, run_dir=str(tmp_path / "run")))
