"A real Slurm on this machine: two nodes, two ranks each; preempted, put back into the queue, and at the end the same bits."
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from seer_nb.core import MetricLog
from seer_nb.launch import attempts, submit

TOP = Path(__file__).resolve().parent.parent
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
MISSING = [name for name in NEEDED if not shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin")]
MUST = bool(os.environ.get("CI") or os.environ.get("SEER_NB_NEED_SLURM"))

pytestmark = pytest.mark.skipif(bool(MISSING) and not MUST, reason=f"no Slurm here ({', '.join(MISSING)} missing): apt-get install slurm-wlm munge")

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=2
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool_%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
SlurmdTimeout=10
KillWait=20
ReturnToService=2
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 RealMemory=500 State=UNKNOWN
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def neighbouring_ports(n):
    "Return n free ports in a row."
    for first in range(20000 + os.getpid() % 10000, 60000, n):
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + n): stack.enter_context(contextlib.closing(socket.create_server(("127.0.0.1", port))))
            except OSError: continue
            return list(range(first, first + n))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    "A controller and two nodes with their own key, ports and state; stopped by pid."
    assert not MISSING, f"this machine must have Slurm: {MISSING} missing"
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    for name in ("state", "spool_n1", "spool_n2"): (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    user = __import__("getpass").getuser()
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, user=user, ports=neighbouring_ports(3)))
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": path, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOP)}
    munge = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key", f"--pid-file={folder}/munged.pid",
             f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed", "--num-threads=2"]
    daemons = []
    def start(*words):
        with open(folder / f"{words[0]}.txt", "a") as out:
            daemons.append(subprocess.Popen([shutil.which(words[0], path=path), *words[1:]], env=env, stdout=out, stderr=out))
            return daemons[-1]
    try:
        start(*munge)
        wait_until(lambda: (folder / "munge.socket").exists(), 10)
        start("slurmctld", "-D", "-i")
        nodes = {name: start("slurmd", "-D", "-N", name) for name in ("n1", "n2")}
        def idle(): return call(env, "sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"]
        wait_until(idle, 60)
        yield env, folder, nodes, start
    finally:
        for process in reversed(daemons):
            process.terminate()
            try: process.wait(20)
            except subprocess.TimeoutExpired: process.kill()


def call(env, *words): return subprocess.run(words, env=env, capture_output=True, text=True).stdout


def wait_until(true, seconds=120):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "too late"
        time.sleep(0.1)



# ── a pretraining that is stopped ────────────────────────────────────────────────────────────────────────────────────────────

RESOURCES = {"nodes": 2, "ranks_per_node": 2, "cpus_per_rank": 1, "time": "1:00", "grace": 60}


@pytest.fixture
def here(slurm, monkeypatch):
    "The environment in which sbatch finds the cluster."
    env, *rest = slurm
    for name, value in env.items(): monkeypatch.setenv(name, value)
    return rest


def lean(folder):
    "The page on pretraining without its figures: four kernels on few cores start sooner."
    page = nbformat.read(TOP / "nbs/33_pretrain.ipynb", 4)
    kept = [c for c in page.cells if "parameters" in c.metadata.get("tags", []) or c.source.startswith(("config = ", "# papermill_description=pretrain"))]
    assert len(kept) == 3
    page.cells = [nbformat.v4.new_code_cell("import dataclasses\nfrom seer_nb.core import make_config\nfrom seer_nb.trainer import PretrainConfig, pretrain"), *kept]
    nbformat.write(page, folder / "33_pretrain.ipynb")
    return folder / "33_pretrain.ipynb"


def pretrain_on_two_nodes(folder, **params):
    run_dir = folder / "run é 1"
    return submit(lean(folder), {"run_dir": str(run_dir), "device": "cpu", "log_every": 1, "checkpoint_every": 5, "timeout": 60.0, **params}, RESOURCES)


def result(run_dir):
    return (run_dir / "backbone.safetensors").read_bytes(), [row["loss"] for row in MetricLog(run_dir / "metrics.jsonl").rows()]


def at_step(job, step):
    "Say whether a job has come so far."
    assert job.queued, job
    return any(row["step"] >= step for row in MetricLog(job.run_dir / "metrics.jsonl").rows())


@pytest.fixture(scope="module")
def straight(slurm, tmp_path_factory):
    "The run that nobody disturbs."
    with pytest.MonkeyPatch.context() as patch:
        for name, value in slurm[0].items(): patch.setenv(name, value)
        job = pretrain_on_two_nodes(tmp_path_factory.mktemp("straight"))
        assert job.wait(300) == "done", job
    return job


def test_two_nodes(straight):
    assert {p.name for p in (straight.run_dir / "ranks").glob("*.ipynb")} == {"rank_1.ipynb", "rank_2.ipynb", "rank_3.ipynb"}
    assert len(attempts(straight.run_dir)) == 1 and (straight.run_dir / "report.html").exists()


def attempt_of(job):
    "Return the number of the attempt, and do not let Slurm wait two minutes before it starts a requeued job."
    if job.queued == "pending": subprocess.run(["scontrol", "update", f"jobid={job.id}", "StartTime=now"], capture_output=True)
    return len(attempts(job.run_dir))


def test_stopped_twice(here, straight, tmp_path):
    "Warned as at a time limit, later requeued as for a job of higher priority: all ranks save, the job comes back, and ends with the same bits."
    job = pretrain_on_two_nodes(tmp_path)
    wait_until(lambda: at_step(job, 4))
    subprocess.run(["scancel", "--signal=USR2", "--full", job.id], check=True)
    wait_until(lambda: attempt_of(job) == 2 and at_step(job, 12))
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    wait_until(lambda: attempt_of(job) == 3)
    assert job.wait(200) == "done", job
    first, second, third = attempts(job.run_dir)
    for attempt in (first, second): assert attempt["outcome"] == "stopped" and attempt["reason"].startswith("Preempted: told to stop"), attempt
    assert "continuing at step" in (job.run_dir / "report.ipynb").read_text()
    for n in (1, 2): assert "Preempted" in (job.run_dir / f"attempts/report_{n}.ipynb").read_text()
    assert result(job.run_dir) == result(straight.run_dir)
