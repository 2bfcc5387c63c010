"""Kill processes while they save, and look at what is left. `python tests/checkpoint_kills.py` runs the campaign of the notebook.

Children are forked by a server that has imported torch once, so that a kill costs milliseconds.
"""
import argparse
import functools
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist

from seer_nb import checkpoints
from seer_nb.checkpoints import CheckpointError, CheckpointManager, Piece, load_newest

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["seer_nb.checkpoints", "torch.distributed.fsdp", "torch.distributed.checkpoint.planner_helpers", "torch._dynamo", "pytest"])
TRACED = {checkpoints.__file__, shutil.__file__}


def spawn(function, *arguments):
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def killed(process): return process.exitcode == -signal.SIGKILL


# ── many ranks ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _rank(function, rank, world_size, store, answer, arguments):
    torch.set_num_threads(1)
    if world_size > 1: dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    answer.send(function(rank, *arguments))
    answer.close()
    if world_size > 1: dist.destroy_process_group()


@functools.cache
def stores(): return tempfile.TemporaryDirectory(prefix="stores")          # where ranks meet; removed when this process ends


def start_ranks(function, world_size, *arguments):
    "Start `function(rank, *arguments)` on every rank; return the processes and where their answers come from."
    store, started = Path(stores().name) / uuid.uuid4().hex, []
    for rank in range(world_size):
        here, there = CONTEXT.Pipe(duplex=False)
        started.append((spawn(_rank, function, rank, world_size, store, there, arguments), here))
        there.close()
    return started


def on_ranks(function, world_size, *arguments):
    "Return the answers of all ranks."
    started = start_ranks(function, world_size, *arguments)
    answers = []
    for process, here in started:
        try: answers.append(here.recv())
        except EOFError: answers.append(None)
        process.join()
    assert [process.exitcode for process, _ in started] == [0] * world_size
    return answers


# ── death at a chosen line ───────────────────────────────────────────────────────────────────────────────────────────────────

PHASES = {"begin", "write_shard", "publish", "prune"}


def phase_of(frame):
    "The part of a save that a line belongs to."
    while frame and not (frame.f_code.co_filename == checkpoints.__file__ and frame.f_code.co_name in PHASES): frame = frame.f_back
    return frame.f_code.co_name if frame else "between"


def die_at(line):
    "Kill this process before the n-th line that it runs of checkpoints.py and shutil.py, in any thread. Return a list that grows with the phase of each line."
    phases, lock = [], threading.Lock()

    def trace(frame, event, argument):
        if frame.f_code.co_filename not in TRACED: return None
        if event == "line":
            with lock:
                phases.append(phase_of(frame))
                if len(phases) == line: os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)
    return phases


# ── a training whose state is known at every step ────────────────────────────────────────────────────────────────────────────

def state_at(step, rank=0, world_size=1, size=64):
    "Tensors that tell the step: one that every rank has, and this rank's rows of a queue."
    rows = size // world_size
    return {"model.w": torch.full((size, 8), float(step)), "model.n": torch.tensor(step),
            "queue": Piece(torch.full((rows, 4), float(step)), (rows * world_size, 4), (rank * rows, 0))}


def whole_at(step, found):
    "Whether everything in a checkpoint is of one step."
    return found.step == step == found.numbers["step"] and all((found.tensors[name] == step).all() for name in found.tensors) and len(found.tensors) == 3


def save_once(rank, root, step, line=0, victim=0):
    "Save a step and be killed at a line of it; answer with the phases of the lines of a save that survives."
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    with CheckpointManager(root, timeout=20) as manager:
        phases = die_at(line) if rank == victim else []
        manager.save(step, state_at(step, rank, world_size), {"step": step})
        try: manager.wait()
        except CheckpointError as error: return str(error)
        finally: sys.settrace(None), threading.settrace(None)
        return phases


def update(w, step):
    "A step that depends on every bit of the one before."
    return torch.sin(w * 3 + step).mul_(1.01).add_(w, alpha=0.1)


def train(rank, root, steps, every, started=None, size=200_000):
    "Train, save every few steps, and answer with the final weights; continue whatever is in the folder."
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    rows = size // world_size
    w, step = torch.arange(rows * rank, rows * (rank + 1), dtype=torch.float64) / size, 0

    def state(): return {"w": Piece(w, (rows * world_size,), (rank * rows,)), "step": torch.tensor(step)}
    with CheckpointManager(root, timeout=20) as manager:
        if found := manager.load():
            w = found.tensors.read("w", (rank * rows,), (rows,)).clone()
            step = int(found.tensors["step"])
            assert step == found.step == found.numbers["step"]
        if started: started.send(step)
        while step < steps:
            w = update(w, step)
            step += 1
            if step % every == 0: manager.save(step, state(), {"step": step})
    return w.numpy().tobytes()


def train_killed(rank, root, steps, every, line, victim, started=None):
    "`train`, killed at a line that it runs (0: never); answer with the final weights, or the error of a rank that is left alone."
    if rank == victim and line: die_at(line)
    try: return train(rank, root, steps, every, started)
    except CheckpointError as error: return str(error)


# ── what the kills are aimed at ──────────────────────────────────────────────────────────────────────────────────────────────

def kill_every_line(root, world_size=1, victim=0, stride=1):
    """Kill the save of step 3, in a folder that holds steps 1 and 2, at every `stride`-th line of one rank.

    Return the number of kills, how many left anything but a whole checkpoint, for each one whether the new checkpoint was found (1) or the old one (0), and the phases of the save
    as [name, lines].
    """
    root, kills, lost, outcomes = Path(root), 0, 0, ""
    for step in (1, 2): on_ranks(save_once, world_size, root / "before", step)
    for line in itertools.count(1, stride):
        folder = shutil.copytree(root / "before", root / str(line))
        started = start_ranks(save_once, world_size, folder, 3, line, victim)
        for process, _ in started: process.join()
        survived = not killed(started[victim][0])
        assert all(process.exitcode == 0 for rank, (process, _) in enumerate(started) if rank != victim or survived)
        if survived: return kills, lost, outcomes, [[name, len(list(lines))] for name, lines in itertools.groupby(started[victim][1].recv())]
        found = load_newest(folder)
        kills += 1
        lost += not (found.step in (2, 3) and whole_at(found.step, found))
        outcomes += str(found.step - 2)
        if line % 5 == 1:                                               # the folder can still be used, and is clean then
            on_ranks(save_once, world_size, folder, 4)
            assert whole_at(4, load_newest(folder)) and not any(folder.glob(".*"))
        shutil.rmtree(folder)


def kill_training(root, world_size, kills, seconds=0.25, seed=0):
    "Kill a random rank of a training at random moments and start it again, then let it end. Return a row of the table."
    draw, steps, every, inside, steps_lost, longest, damaged = random.Random(seed), 2000, 5, 0, 0, 0.0, 0
    wanted = b"".join(on_ranks(train, 1, Path(root) / "straight", steps, every))
    root, done = Path(root) / "killed", 0
    while done < kills:
        here, there = CONTEXT.Pipe(duplex=False)
        victim = draw.randrange(world_size)
        started = start_ranks(train_killed, world_size, root, steps, every, 0, 0, there)
        for _ in started: here.recv()                                   # all are in their loops
        time.sleep(draw.uniform(0, seconds))
        started[victim][0].kill()
        begun = time.monotonic()
        for process, _ in started: process.join()
        longest = max(longest, time.monotonic() - begun)
        if not killed(started[victim][0]): break                        # it had got through
        done += 1
        inside += any(root.glob(".tmp-*"))
        found = load_newest(root)
        damaged += found is not None and found.step != int(found.tensors["step"])
    final = b"".join(on_ranks(train, world_size, root, steps, every))
    return {"kills": done, "inside": inside, "lost": damaged, "seconds_until_all_ended": round(longest, 2), "bit_identical": final == wanted}


def overwrite(folder, writer, started):
    "Save in a loop over the checkpoint before."
    torch.set_num_threads(1)
    w = torch.zeros(4_000_000)
    save = save_with_torch if writer == "torch.save" else save_with_dcp
    save(folder, w.fill_(0))
    started.send(0)
    for n in itertools.count(1): save(folder, w.fill_(n))


def save_with_torch(folder, w): torch.save({"w": w}, folder / "state.pt")


def save_with_dcp(folder, w):
    import logging
    import warnings

    import torch.distributed.checkpoint as dcp
    warnings.simplefilter("ignore")
    logging.disable()
    dcp.save({"w": w}, checkpoint_id=folder, no_dist=True)


def can_load(folder, writer):
    import logging
    import warnings

    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    warnings.simplefilter("ignore")
    logging.disable()
    try:
        if writer == "torch.save": w = torch.load(folder / "state.pt", weights_only=True)["w"]
        else: dcp.load({"w": (w := torch.full((4_000_000,), -1.0))}, checkpoint_id=folder, no_dist=True)
    except (Exception, CheckpointException): return False   # the second is no Exception
    return bool((w == w[0]).all() and w[0] >= 0)


def kill_overwriting(folder, writer, kills, seed=0):
    "Kill a process that overwrites one checkpoint; return how often nothing could be loaded."
    draw, lost = random.Random(seed), 0
    for n in range(kills):
        here, there = CONTEXT.Pipe(duplex=False)
        process = spawn(overwrite, Path(folder), writer, there)
        here.recv()
        time.sleep(draw.uniform(0, 0.2))
        process.kill()
        process.join()
        lost += not can_load(Path(folder), writer)
    return lost


def campaign(kills):
    "Yield the rows of the table."
    def fresh(): return Path(tempfile.mkdtemp())
    for writer in ("torch.save", "dcp.save"):
        yield {"what": f"{writer} over the checkpoint before", "ranks": 1, "where": "random moment", "kills": kills, "lost": kill_overwriting(fresh(), writer, kills)}
    for world_size, victim in ((1, 0), (2, 0), (2, 1)):
        n, lost, outcomes, phases = kill_every_line(fresh(), world_size, victim)
        yield {"what": "CheckpointManager", "ranks": world_size, "where": f"every line of rank {victim}'s save", "kills": n, "lost": lost, "outcomes": outcomes, "phases": phases}
    for world_size in (1, 2):
        yield {"what": "training with CheckpointManager", "ranks": world_size, "where": "random rank and moment", **kill_training(fresh(), world_size, kills)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="at random moments, per row")
    parser.add_argument("--out", default="nbs/results/checkpoint_kills.jsonl", help="file to write")
    options = parser.parse_args()
    with open(options.out, "w") as out:
        for row in campaign(options.kills):
            print(row, flush=True)
            out.write(json.dumps(row) + "\n")
