"""Break training runs in every way at hand, and see that nothing is lost. `python tests/faults.py` runs the campaign of the trainer's page.

Each time a run of two ranks (or one) is spoiled at a random step, everything that still lives must end by itself, and the same call must then finish the run with the bits of an
undisturbed one. Ranks are forked by a server that has imported the package once.
"""
import argparse
import dataclasses
import functools
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from seer_nb import trainer
from seer_nb.checkpoints import saved_steps
from seer_nb.core import MetricLog
from seer_nb.images import bad_image_report, open_images
from seer_nb.larc import LARC
from seer_nb.trainer import PretrainConfig, pretrain

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["seer_nb.trainer", "torch.distributed.fsdp", "torch._dynamo"])
RUN = PretrainConfig(images="toyworld:64", batch_size=12, steps=12, n_small=1, large_size=32, small_size=32, n_prototypes=10, queue_length=12, queue_start=3, start_rate=0.05,
                     peak_rate=0.05, end_rate=0.05, warmup_steps=0, freeze_prototypes=2, log_every=1, checkpoint_every=3, device="cpu", timeout=60.0)
LIMIT = 90   # seconds after which a process that still runs counts as hanging


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def _rank(config, place, out, fault, step):
    os.environ.update(place)
    sys.stdout = sys.stderr = sys.__stderr__ = open(out, "w", buffering=1)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)     # of loader workers: what a process started by hand does
    if fault: spoil(fault, config, step)
    pretrain(config)


def start(config, n, fault=None, step=0):
    "Start a run on n ranks, with a fault at a step."
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    logs = Path(config.run_dir).with_name("logs")
    logs.mkdir(exist_ok=True)
    processes = []
    for r in range(n):
        place = {"RANK": str(r), "WORLD_SIZE": str(n), "LOCAL_RANK": str(r), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if n > 1 else {}
        processes.append(CONTEXT.Process(target=_rank, args=(config, place, logs / f"{r}.txt", fault, step)))
        processes[-1].start()
    return processes


def finish(processes, limit=LIMIT):
    "Wait for all; return their exit codes. What still runs at the limit, or is stopped while all others are gone, is killed: None."
    end, codes = time.monotonic() + limit, {}
    while len(codes) < len(processes) and time.monotonic() < end:
        for r, p in enumerate(processes):
            if r not in codes and p.exitcode is not None: codes[r] = p.exitcode
        if codes and all(_stopped(p) for r, p in enumerate(processes) if r not in codes): break
        time.sleep(0.02)
    for p in processes:
        p.kill()
        p.join()
    return [codes.get(r) for r in range(len(processes))]


def _stopped(process):
    try: return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError: return False                             # it has ended since


def whole(config, n):
    "Run to the end."
    codes = finish(start(config, n), 300)
    assert codes == [0] * n, f"{codes}\n" + "\n".join(log.read_text() for log in sorted(Path(config.run_dir).with_name("logs").glob("*.txt")))
    return weights(config)


def weights(config): return Path(config.run_dir, "backbone.safetensors").read_bytes()


def newest(config): return max(saved_steps(Path(config.run_dir, "checkpoints")), default=0)


# ── what goes wrong ──────────────────────────────────────

def _at(step, what):
    "Call `what()` before a step of the run."
    plain = trainer.train_step
    def spoiled(training, *args):
        if training.step == step: what()
        return plain(training, *args)
    trainer.train_step = spoiled


def _mark(config, step):
    "Note the moment."
    Path(config.run_dir).with_name("moment").write_text(f"{time.time()} {step}")


def spoil(name, config, step):
    "Let the function called `name` happen in rank 1, or in the only rank."
    def act():
        _mark(config, step)
        globals()[name](config)
    if int(os.environ.get("RANK", 1)) == 1: _at(step, act)


def sigterm(config): os.kill(os.getpid(), signal.SIGTERM)
def sigusr2(config): os.kill(os.getpid(), signal.SIGUSR2)
def raises(config): raise MemoryError("out of memory on this rank")
def freezes(config): os.kill(os.getpid(), signal.SIGSTOP)
def sleeps(config): time.sleep(3600)
def kills_a_worker(config): os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
def fills_the_disk(config): (Path(config.run_dir) / "filler").write_bytes(bytes(shutil.disk_usage(config.run_dir).free - 2**18))
def takes_a_shard_away(config): Path(config.run_dir).with_name("shards").joinpath("shard-2.tar").unlink()


def puts_nan_into_a_gradient(config):
    plain = LARC.step
    def poisoned(self, closure=None):
        p = self.param_groups[0]["params"][0]
        (p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad).fill_(float("nan"))
        LARC.step = plain
        return plain(self, closure)
    LARC.step = poisoned


# ── campaigns: each yields one dict per time ──────────────────────────────────────────────────────────────────────────────────

@functools.cache
def reference(n, workers=0):
    "The weights of an undisturbed run."
    with tempfile.TemporaryDirectory() as folder: return whole(dataclasses.replace(RUN, run_dir=f"{folder}/run", workers=workers), n)


def broken(act, folder, draw, n=2, workers=0, mend=None):
    "Spoil a run at a random step, let it end, mend what is broken, continue."
    config, step = dataclasses.replace(RUN, run_dir=str(folder / "run"), workers=workers), draw.randrange(1, RUN.steps - 1)
    codes = finish(start(dataclasses.replace(config, timeout=6.0) if act in ("freezes", "sleeps") else config, n, act, step))
    ended, (moment, at) = time.time(), (folder / "moment").read_text().split()
    said = "\n".join(log.read_text() for log in sorted((folder / "logs").glob("*.txt")))
    if mend is not None: mend(config)
    kept = newest(config)
    return {"seconds": ended - float(moment), "hangs": sum(c is None for c in codes) - (act == "freezes"), "lost": max(0, int(at) - kept), "said": said,
            "recovered": whole(config, n) == reference(n, workers)}


def on_small_disk(folder, draw):
    (folder / "run").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder / "run"], check=True)
    try: return broken("fills_the_disk", folder, draw, mend=lambda config: (folder / "run/filler").unlink())
    finally: subprocess.run(["umount", folder / "run"], check=True)


def read_only(folder, draw):
    "Stop a run, make its folder read-only, try to continue; then continue."
    config = dataclasses.replace(RUN, run_dir=str(folder / "run"))
    (folder / "run").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder / "run"], check=True)
    try:
        finish(start(config, 2, "sigusr2", draw.randrange(1, RUN.steps - 1)))
        subprocess.run(["mount", "-o", "remount,ro", folder / "run"], check=True)
        begun, codes = time.time(), finish(start(config, 2))
        ended, said = time.time(), (folder / "logs/0.txt").read_text()
        subprocess.run(["mount", "-o", "remount,rw", folder / "run"], check=True)
        return {"seconds": ended - begun, "hangs": sum(c is None for c in codes), "lost": 0, "said": said, "recovered": whole(config, 2) == reference(2)}
    finally: subprocess.run(["umount", folder / "run"], check=True)


def damaged(how, folder, draw):
    "Stop a run after two checkpoints, damage a file of the newest, continue."
    config = dataclasses.replace(RUN, run_dir=str(folder / "run"))
    finish(start(config, 1, "sigusr2", 7))
    *_, before, at = saved_steps(folder / "run/checkpoints")
    file = draw.choice([f for f in (folder / "run/checkpoints" / f"step_{at:08d}").iterdir() if f.stat().st_size])
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content))
    if how == "truncated": del content[place:]
    else: content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    begun, same = time.time(), whole(config, 1) == reference(1)
    return {"seconds": time.time() - begun, "hangs": 0, "lost": at - before, "recovered": same, "said": (folder / "logs/0.txt").read_text()}


def vanished(when, folder, draw):
    "Take one of six shards away, before the run or during it; the run must reach its end and count."
    source = open_images("toyworld:60")
    (folder / "shards").mkdir()
    for k in range(6):
        with tarfile.open(folder / f"shards/shard-{k}.tar", "w") as tar:
            for i in range(10):
                buffer = io.BytesIO()
                Image.fromarray(source[10 * k + i].permute(1, 2, 0).numpy()).save(buffer, "PNG")
                about = tarfile.TarInfo(f"{i}.png")
                about.size = len(buffer.getvalue())
                tar.addfile(about, io.BytesIO(buffer.getvalue()))
    config = dataclasses.replace(RUN, run_dir=str(folder / "run"), images=str(folder / "shards/shard-*.tar"), max_bad=1.0, lanes=2)
    open_images(config.images)                               # the list is made now
    config = dataclasses.replace(config, images=str(folder / "shards/shard-{0..5}.tar"))
    if when == "before": (folder / "shards/shard-2.tar").unlink()
    begun = time.time()
    codes = finish(start(config, 2, "takes_a_shard_away" if when == "during" else None, draw.randrange(1, RUN.steps - 1)))
    counted = bad_image_report(folder / "run/bad_images.jsonl")
    return {"seconds": time.time() - begun, "hangs": sum(c is None for c in codes), "lost": 0, "recovered": codes == [0, 0] and (when == "during" or "shard" in counted),
            "said": json.dumps(counted)}


def kills(folder, draw, count):
    "Kill one of two ranks at random moments until the run is through; again, until there are enough. Yields one dict per kill."
    seconds, done, rounds = 6.0, 0, 0
    while done < count:
        rounds += 1
        config = dataclasses.replace(RUN, run_dir=str(folder / f"{rounds}" / "run"), steps=40, checkpoint_every=1)
        Path(config.run_dir).parent.mkdir()
        straight, rows = dataclasses.replace(config, run_dir=str(folder / f"{rounds}" / "straight")), []
        begun = time.monotonic()
        if rounds == 1: kills.straight = whole(straight, 2); seconds = time.monotonic() - begun
        while done + len(rows) < count:
            processes, victim = start(config, 2), draw.randrange(2)
            wait = time.monotonic() + draw.uniform(0.02, 0.7) * seconds
            while time.monotonic() < wait and processes[victim].exitcode is None: time.sleep(0.002)
            if processes[victim].exitcode is not None: break
            processes[victim].kill()
            saving = any(not re.fullmatch(r"step_\d{8}|lock\.json", p.name) for p in Path(config.run_dir, "checkpoints").glob("*"))
            moment = time.time()
            codes = finish(processes)
            logged = [row["step"] for row in MetricLog(Path(config.run_dir, "metrics.jsonl")).rows()]
            rows.append({"seconds": time.time() - moment, "hangs": sum(c is None for c in codes), "lost": max(logged, default=0) - newest(config), "saving": saving, "said": ""})
        same = whole(config, 2) == kills.straight
        for row in rows: yield row | {"recovered": same}
        done += len(rows)


FAULTS = {   # name -> (how often, campaign, what every log must say; empty: not asked)
    "SIGTERM to one rank": (10, functools.partial(broken, "sigterm"), "Preempted"),
    "SIGUSR2 to one rank": (10, functools.partial(broken, "sigusr2"), "Preempted"),
    "one rank raises": (5, functools.partial(broken, "raises"), "rank 1 .*MemoryError: out of memory on this rank"),
    "one rank is stopped (SIGSTOP)": (5, functools.partial(broken, "freezes"), "rank 1 .*no sign of life"),
    "one rank waits for ever": (5, functools.partial(broken, "sleeps"), "Late: rank 1 .*sleeps"),
    "a loader worker is killed": (5, functools.partial(broken, "kills_a_worker", workers=1), "LoaderFault: .*SIGKILL"),
    "NaN in a gradient of one rank": (5, functools.partial(broken, "puts_nan_into_a_gradient"), "NotFinite: .*gradient is not finite"),
    "the disk is full": (5, on_small_disk, "No space left|is full"),
    "the run folder is read-only": (5, read_only, "Read-only file system"),
    "newest checkpoint: a file cut": (10, functools.partial(damaged, "truncated"), "trying the one before"),
    "newest checkpoint: a bit flipped": (10, functools.partial(damaged, "flipped"), "trying the one before"),
    "a shard of images is missing": (3, functools.partial(vanished, "before"), '"shard": '),
    "a shard of images vanishes": (3, functools.partial(vanished, "during"), ""),
    "kill -9 of either rank, at any moment": (50, None, ""),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", default="", help="append rows to this file")
    parser.add_argument("--only", default="", help="faults whose name contains this")
    parser.add_argument("--times", type=int, default=0, help="so often each, in place of the numbers in the table")
    args, draw, bad = parser.parse_args(), random.Random(0), 0
    for name, (times, campaign, message) in FAULTS.items():
        if args.only not in name: continue
        with tempfile.TemporaryDirectory(prefix="faults") as top:
            if campaign is None: rows = list(kills(Path(top), draw, args.times or times))
            else:
                rows = []
                for n in range(args.times or times):
                    folder = Path(top) / str(n)
                    folder.mkdir()
                    rows.append(campaign(folder, draw))
        clear = [bool(re.search(message, row["said"])) for row in rows]
        row = {"fault": name, "times": len(rows), "hangs": sum(r["hangs"] for r in rows), "longest_s": round(max(r["seconds"] for r in rows), 1), "lost_steps": max(r["lost"] for r in rows),
               "clear_message": sum(clear) if message else None, "recovered": sum(r["recovered"] for r in rows), "checkpoint_every": 1 if campaign is None else RUN.checkpoint_every}
        if campaign is None: row["while_saving"] = sum(r["saving"] for r in rows)
        print(json.dumps(row), flush=True)
        failed = [r["said"] for r, named in zip(rows, clear) if not (named and r["recovered"])]
        if failed: bad += 1; print(failed[0][-3000:])
        if args.results: MetricLog(args.results).log(**row)
    return bad


if __name__ == "__main__": sys.exit(main())
