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
import psutil
import pytest

from seer_nb.core import MetricLog, time_account
from seer_nb.distributed import run_ranks
from seer_nb.launch import Resources, _take_back_board, attempts, collect_results, draw_board, sbatch_script, submit, submit_suite

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


def wait_until(true, seconds=300):
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


SETTINGS = {"device": "cpu", "log_every": 1, "checkpoint_every": 5, "timeout": 60.0}


def train(settings):
    from seer_nb.trainer import PretrainConfig, pretrain
    pretrain(PretrainConfig(**settings))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "The run that nobody disturbs, without a notebook or a cluster."
    folder = tmp_path_factory.mktemp("straight")
    run_ranks(train, 4, {**SETTINGS, "run_dir": str(folder)}, timeout=300)
    return folder


def result(run_dir):
    return (run_dir / "backbone.safetensors").read_bytes(), [row["loss"] for row in MetricLog(run_dir / "metrics.jsonl").rows()]


def at_step(job, step):
    "Say whether a job has come so far."
    assert job.queued, job
    return any(row["step"] >= step for row in MetricLog(job.run_dir / "metrics.jsonl").rows())


def attempt_of(job):
    "Return the number of the attempt, and do not let Slurm wait two minutes before it starts a requeued job."
    if job.queued == "pending": subprocess.run(["scontrol", "update", f"jobid={job.id}", "StartTime=now"], capture_output=True)
    return len(attempts(job.run_dir))


def lose(slurmd, node, job):
    "Kill the daemon of a node and all that it has started for a job, as when its machine fails."
    slurmd.kill()
    slurmd.wait()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if (environment.get("SLURMD_NODENAME"), environment.get("SLURM_JOB_ID")) != (node, job.id): continue
            for victim in [*(p for p in process.parents() if p.name().startswith("slurmstepd")), process]: victim.kill()


def test_stopped_three_times(here, straight, tmp_path):
    """Warned as at a time limit; requeued as for a job of higher priority; a machine fails. The job comes back each time, and ends with the same bits."""
    folder, nodes, start = here
    job = submit(lean(tmp_path), {**SETTINGS, "run_dir": str(tmp_path / "run é 1")}, RESOURCES)
    wait_until(lambda: at_step(job, 3))
    subprocess.run(["scancel", "--signal=USR2", "--full", job.id], check=True)
    wait_until(lambda: attempt_of(job) == 2 and at_step(job, 8))
    subprocess.run(["scontrol", "requeue", job.id], check=True)
    wait_until(lambda: attempt_of(job) == 3 and at_step(job, 15))
    lose(nodes["n2"], "n2", job)
    wait_until(lambda: job.queued != "running")
    nodes["n2"] = start("slurmd", "-D", "-N", "n2")
    wait_until(lambda: attempt_of(job) == 4)
    assert job.wait(300) == "done", job
    told = attempts(job.run_dir)[:2]
    for n in (1, 2): assert "Preempted" in (job.run_dir / f"attempts/report_{n}.ipynb").read_text()
    for attempt in told:
        assert attempt["outcome"] == "stopped" and attempt["reason"].startswith("Preempted: told to stop"), attempt
        assert attempt["last_step"] == attempts(job.run_dir)[attempt["attempt"]]["first_step"]      # it goes on where it was stopped
    account = time_account(job.run_dir)
    assert account["attempts"] == 4 and 0 < account["goodput"] < 1 and account["hours_between"] > 0 and account["gpu_hours"] == 0
    assert "continuing at step" in (job.run_dir / "report.ipynb").read_text()
    assert {p.name for p in (job.run_dir / "ranks").glob("*.ipynb")} == {"rank_1.ipynb", "rank_2.ipynb", "rank_3.ipynb"}
    assert result(job.run_dir) == result(straight)


# ── jobs that must not come back ─────────────────────────────────────────────────────────────────────────────────────────────

def quick(folder, code):
    parameters = nbformat.v4.new_code_cell("run_dir: str = ''", metadata={"tags": ["parameters"]})
    head = nbformat.v4.new_code_cell("import os, time\nrank = int(os.environ['SLURM_PROCID'])\nopen(f'{run_dir}/pid_{rank}', 'w').write(str(os.getpid()))")
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, head, nbformat.v4.new_code_cell(code)], metadata={"kernelspec": kernel}), folder / "05_x.ipynb")
    return folder / "05_x.ipynb"


def alive(file):
    "Say whether the process whose number a file holds runs (a zombie does not)."
    try: return Path(f"/proc/{file.read_text()}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


def test_cancelled(here, tmp_path):
    "scancel ends every kernel on every node, and the job stays away. What was sent is what a dry run shows."
    resources = {**RESOURCES, "ranks_per_node": 1}
    job = submit(quick(tmp_path, "time.sleep(600)"), {"run_dir": str(tmp_path / "run")}, resources)
    wait_until(lambda: all((job.run_dir / f"pid_{r}").exists() for r in (0, 1)))
    assert job.state == "running" and (job.run_dir / f"job/{job.id}_submission.sh").read_text() == sbatch_script(job.run_dir, Resources(**resources), "x")
    job.cancel()
    job.wait(60)
    wait_until(lambda: not any(alive(job.run_dir / f"pid_{r}") for r in (0, 1)), 30)
    assert len(attempts(job.run_dir)) == 1 and job.state in ("stopped", "lost")


def test_failed(here, tmp_path):
    "An error in a cell of one rank ends the job, though another rank was only lost."
    job = submit(quick(tmp_path, "if rank: raise ZeroDivisionError('no luck')\nos._exit(75)"), {"run_dir": str(tmp_path / "run")}, {**RESOURCES, "ranks_per_node": 1})
    assert job.wait(300) == "failed"
    attempt, = attempts(job.run_dir)
    assert attempt["reason"] == "rank 1: ZeroDivisionError: no luck"


def test_an_array_with_a_run_that_fails(here, tmp_path):
    "Six runs, three at once: five results, and one failure that can be read. The board waits for all of them."
    notebook = quick(tmp_path, "import json\nif 'run_4' in run_dir: raise ZeroDivisionError('no luck')\n"
                               "open(run_dir + '/results.jsonl', 'w').write(json.dumps({'task': 'x', 'value': int(run_dir[-1])}) + '\\n')")
    jobs = submit_suite(notebook, {f"run_{n}": {} for n in range(6)}, tmp_path / "suite", {"cpus_per_rank": 1, "time": "1:00"}, at_once=3)
    assert "#SBATCH --array=0-5%3" in next((tmp_path / "suite/job").glob("*_submission.sh")).read_text()
    parameters = nbformat.v4.new_code_cell("run_dir: str = ''\nsuite: str = ''\npaper_model: str = ''", metadata={"tags": ["parameters"]})
    draw = nbformat.v4.new_code_cell("from seer_nb.core import attempts\nfrom pathlib import Path\nprint([attempts(f)[-1]['outcome'] for f in sorted(Path(suite).glob('run_*'))])")
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, draw], metadata=nbformat.read(notebook, 4).metadata), tmp_path / "99_scoreboard.ipynb")
    board = draw_board(tmp_path / "suite")
    assert board.queued == "pending" and board.run_dir == tmp_path / "suite" and draw_board(tmp_path / "suite").id == board.id         # sent once
    assert f"--dependency=afterany:{jobs['run_0'].id.partition('_')[0]}\n" in (tmp_path / f"suite/job/{board.id}_submission.sh").read_text()
    _take_back_board(tmp_path / "suite")                                           # as a second array does
    assert not board.queued
    board = draw_board(tmp_path / "suite")
    states = [job.wait(300) for job in jobs.values()]
    assert states == ["done"] * 4 + ["failed", "done"]
    assert collect_results(tmp_path / "suite") == {"run_4": "failed: ZeroDivisionError: no luck"}
    assert [row["value"] for row in MetricLog(tmp_path / "suite/results.jsonl").rows()] == [0, 1, 2, 3, 5]
    assert "no luck" in jobs["run_4"].log()
    assert board.wait(300) == "done" and str(states) in board.log().replace("\n", "")
