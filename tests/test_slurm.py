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

import pytest

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


def wait_until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "too late"
        time.sleep(0.1)


def test_alive(slurm):
    env = slurm[0]
    print(call(env, "srun", "-N2", "--ntasks-per-node=2", "sh", "-c", "echo $SLURM_PROCID $SLURM_STEP_NODELIST $SLURMD_NODENAME"))
    print(call(env, "squeue"))
