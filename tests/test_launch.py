"A notebook as a job: told to stop, lost, failed, cancelled; many ranks; what is sent to a cluster. Slurm itself is in test_slurm.py, bad input and `make` in test_demo.py."
import csv
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import nbformat
import psutil
import pytest

from seer_nb import launch
from seer_nb.core import MetricLog, time_account, write_atomic
from seer_nb.evaluate.tasks import paper_score
from seer_nb.launch import Resources, Stopped, attempts, find_job, run_notebook, sbatch_script, submit

TOP = Path(__file__).resolve().parent.parent
PRETRAIN = TOP / "nbs/33_pretrain.ipynb"


def write_notebook(path, code):
    parameters = nbformat.v4.new_code_cell("run_dir: str = ''\nseed: int = 0", metadata={"tags": ["parameters"]})
    head = "import os, signal, time\nfrom pathlib import Path\nrank, here = int(os.environ.get('RANK', 0)), Path(run_dir)\n(here / f'pid_{rank}').write_text(str(os.getpid()))"
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=[parameters, nbformat.v4.new_code_cell(head), nbformat.v4.new_code_cell(code)], metadata={"kernelspec": kernel}), path)
    return path


def wait_until(true, seconds=300):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "too late"
        time.sleep(0.1)


def pid(run_dir, rank=0):
    "Return the number of a kernel's process, once its first cell has run."
    file = Path(run_dir) / f"pid_{rank}"
    wait_until(lambda: file.exists() and file.read_text())
    return int(file.read_text())


def alive(pid):
    "Say whether a process runs (a zombie does not)."
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


def command(*words): return [sys.executable, "-m", "seer_nb.launch", *map(str, words)]


# ── signals ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_sigterm_ends_a_run_with_its_own_status(tmp_path):
    run = tmp_path / "run {x}"                                                   # papermill would fill in what stands in braces
    job = subprocess.Popen(command(write_notebook(tmp_path / "05_x.ipynb", "time.sleep(600)"), "-p", "run_dir", run), cwd=TOP, stderr=subprocess.PIPE, text=True)
    kernel = pid(run)
    job.terminate()
    error = job.communicate(timeout=300)[1]
    assert job.returncode == 75 and f"the same command with run_dir {run} goes on" in error and "Traceback" not in error
    assert not alive(kernel) and "KeyboardInterrupt" in (run / "report.html").read_text()


def test_a_kernel_outlives_a_signal_that_comes_before_it_listens(tmp_path, monkeypatch):
    start = launch._start_kernel
    def told_at_birth(km):
        kernel = start(km)
        os.kill(kernel.pid, signal.SIGUSR2)
        return kernel
    monkeypatch.setattr(launch, "_start_kernel", told_at_birth)
    run_notebook(write_notebook(tmp_path / "05_x.ipynb", "(here / 'done').touch()"), {"run_dir": str(tmp_path)}, show=False)
    assert (tmp_path / "done").exists()


def test_a_launcher_told_before_the_kernel_listens_tells_it_later(tmp_path, monkeypatch):
    start = launch._start_kernel
    def told_at_birth(km):
        os.kill(os.getpid(), signal.SIGUSR2)
        return start(km)
    monkeypatch.setattr(launch, "_start_kernel", told_at_birth)
    with pytest.raises(Stopped) as error: run_notebook(write_notebook(tmp_path / "05_x.ipynb", "time.sleep(600)"), {"run_dir": str(tmp_path)}, show=False)
    assert error.value.heard == {signal.SIGUSR2} and not alive(pid(tmp_path))
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL


@pytest.mark.parametrize("code, reason", [("os._exit(75)", "another rank was lost"), ("os.kill(os.getpid(), signal.SIGKILL)", r"ended by SIGKILL \(out of memory\?\)")])
def test_a_lost_kernel_is_worth_another_attempt(tmp_path, code, reason):
    with pytest.raises(Stopped, match=reason): run_notebook(write_notebook(tmp_path / "05_x.ipynb", code), {"run_dir": str(tmp_path)}, show=False)
    assert (tmp_path / "report.ipynb").exists()


def test_no_kernel_outlives_a_killed_launcher(tmp_path):
    job = subprocess.Popen(command(write_notebook(tmp_path / "05_x.ipynb", "time.sleep(600)"), "-p", "run_dir", tmp_path), cwd=TOP, stderr=subprocess.DEVNULL)
    kernel = pid(tmp_path)
    job.kill()
    job.wait()
    wait_until(lambda: not alive(kernel), 30)


# ── jobs of this machine ─────────────────────────────────────────────────────────────────────────────────────────────────────

TWO = {"ranks_per_node": 2, "cpus_per_rank": 1}


@pytest.fixture(autouse=True)
def importable(monkeypatch): monkeypatch.setenv("PYTHONPATH", str(TOP))


def test_a_lost_job_comes_back_and_ends(tmp_path):
    "Rank 0 loses its kernel in the first attempt: both ranks start again; both reports are kept."
    code = "first = len((here / 'attempts.jsonl').read_text().splitlines()) == 1\nif first and rank == 0: os.kill(os.getpid(), signal.SIGKILL)"
    job = submit(write_notebook(tmp_path / "05_x.ipynb", code), {"run_dir": str(tmp_path / "run é 1")}, TWO, cluster="local")
    assert b"seer_nb.launch" in next((job.run_dir / "job").glob("*.pkl")).read_bytes()
    with pytest.raises(ValueError, match="has a job that is running"): submit(tmp_path / "05_x.ipynb", {"run_dir": str(job.run_dir)}, cluster="local")
    assert job.wait(300) == "done" and find_job(job.run_dir).state == "done"
    first, second = attempts(job.run_dir)
    assert first["outcome"] == "stopped" and "SIGKILL" in first["reason"] and second["outcome"] == "done" and second["ranks"] == 2
    for name in ("report.ipynb", "attempts/report_1.ipynb", "ranks/rank_1.ipynb", "source.ipynb", "environment.txt"): assert (job.run_dir / name).exists()
    assert "| state | done |" in job._repr_markdown_()


def test_a_job_warned_of_its_time_limit_comes_back(tmp_path):
    code = "if len((here / 'attempts.jsonl').read_text().splitlines()) == 1: time.sleep(600)"
    job = submit(write_notebook(tmp_path / "05_x.ipynb", code), {"run_dir": str(tmp_path / "run")}, cluster="local")
    psutil.Process(pid(job.run_dir)).parent().send_signal(signal.SIGUSR2)
    assert job.wait(300) == "done"
    assert [(a["outcome"], a["reason"]) for a in attempts(job.run_dir)] == [("stopped", "KeyboardInterrupt: "), ("done", "")]


def test_an_error_on_any_rank_ends_the_job(tmp_path):
    "Rank 1 raises, so rank 0 is told that a rank was lost: not worth another attempt."
    code = "if rank: raise ZeroDivisionError('no luck')\nos._exit(75)"
    job = submit(write_notebook(tmp_path / "05_x.ipynb", code), {"run_dir": str(tmp_path / "run")}, TWO, cluster="local")
    assert job.wait(300) == "failed"
    attempt, = attempts(job.run_dir)
    assert attempt["reason"] == "rank 1: ZeroDivisionError: no luck"
    assert "no luck" in (job.run_dir / "ranks/rank_1.ipynb").read_text()


def test_a_job_does_not_come_back_for_ever(tmp_path):
    job = submit(write_notebook(tmp_path / "05_x.ipynb", "os._exit(75)"), {"run_dir": str(tmp_path / "run")}, {"requeues": 1}, cluster="local")
    assert job.wait(300) == "stopped" and len(attempts(job.run_dir)) == 2


def test_a_cancelled_job_leaves_nothing_behind(tmp_path):
    job = submit(write_notebook(tmp_path / "05_x.ipynb", "time.sleep(600)"), {"run_dir": str(tmp_path / "run")}, TWO, cluster="local")
    kernels = [pid(job.run_dir, rank) for rank in (0, 1)]
    job.cancel()
    assert job.wait(300) == "stopped" and len(attempts(job.run_dir)) == 1
    assert not any(map(alive, kernels))


def test_torchrun(tmp_path):
    notebook = write_notebook(tmp_path / "05_x.ipynb", "(here / f'ran_{rank}').touch()")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command(notebook)[1:]]
    done = subprocess.run([*words, "-p", "run_dir", str(tmp_path / "run")], cwd=TOP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"ran_0", "ran_1", "report.ipynb", "report.html"} <= {p.name for p in (tmp_path / "run").iterdir()} and (tmp_path / "run/ranks/rank_1.ipynb").exists()


# ── what is sent ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

SEER_10B = f"""\
#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=10
#SBATCH --gpus-per-node=8
#SBATCH --job-name=pretrain
#SBATCH --mem=0
#SBATCH --nodes=62
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/seer/job/%j_0_log.out
#SBATCH --partition=p
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=4320
#SBATCH --wckey=submitit

# setup
trap '' USR2

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/seer/job/%j_%t_log.out sh -c 'trap "" USR2; exec "$0" "$@"' {shlex.quote(sys.executable)} -u -m submitit.core._submit /shared/seer/job
"""


def test_the_script_of_seer_10b(tmp_path, capsys, monkeypatch):
    "62 machines of 8 GPUs, word for word, and the memory plan; nothing is written."
    monkeypatch.chdir(tmp_path)
    status = launch.main([str(PRETRAIN), "-f", str(TOP / "nbs/params/pretrain/seer_10b.yaml"), "-p", "run_dir", "/shared/seer", "-p", "images", "toyworld:8", "--nodes", "62",
                          "--gpus-per-node", "8", "--partition", "p", "--memory", "0", "--time", "3-00:00", "--gpu-gib", "40", "--dry-run"])
    printed = capsys.readouterr().out
    assert status == 0 and printed.startswith(SEER_10B)
    assert "496 GPUs of 40 GiB" in printed and printed.endswith("fits\n") and not list(tmp_path.iterdir())


def test_paths_with_spaces_and_quotes_stay_one_word():
    script = sbatch_script("/data/it's é 1", Resources())
    assert shlex.split(script.splitlines()[-1])[-1] == "/data/it's é 1/job"


@pytest.mark.parametrize("params, resources, cluster, problem", [
    ({"sed": 1}, {}, "local", "did you mean 'seed'"),
    ({"x=0;import os": 1}, {}, "local", "no parameter 'x=0;import os'"),
    ({"seed": "one"}, {}, "local", "must be int"),
    ({"images": "nowhere"}, {}, "local", "no such folder"),
    ({"backbone": "regnety_9tf"}, {}, "local", "no backbone"),
    ({"batch_size": 7}, {"ranks_per_node": 2}, "local", "does not divide among 2 ranks"),
    ({}, {"gpus_per_nod": 8}, "local", "did you mean 'gpus_per_node'"),
    ({}, {"nodes": 2}, "local", "need cluster='slurm'"),
    ({}, {"time": "3 days"}, "local", "days-hours:minutes"),
    ({}, {"time": "0:01"}, "local", "not longer than the grace"),
    ({}, {}, "cloud", "cluster must be"),
])
def test_mistakes_are_found_before_anything_is_written(tmp_path, params, resources, cluster, problem):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=re.escape(problem)):
        submit(PRETRAIN, {"run_dir": str(tmp_path / "run"), **params}, resources, cluster)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_another_run_is_refused(tmp_path):
    (tmp_path / "params.yaml").write_text("seed: 5\n")
    with pytest.raises(ValueError, match="holds a run with other parameters"): submit(PRETRAIN, {"run_dir": str(tmp_path)}, cluster="local")
    assert [p.name for p in tmp_path.iterdir()] == ["params.yaml"]


def test_a_notebook_without_parameters_is_refused(tmp_path):
    nbformat.write(nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), tmp_path / "05_x.ipynb")
    with pytest.raises(ValueError, match="no parameter run_dir"): submit(tmp_path / "05_x.ipynb", cluster="local")


def test_the_command_sends_a_job_that_another_process_can_load(tmp_path):
    "Under `python -m` the module is called __main__, which no job could import."
    notebook = write_notebook(tmp_path / "05_x.ipynb", "pass")
    done = subprocess.run(command(notebook, "-p", "run_dir", tmp_path / "run", "--cluster", "local"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "cancel   kill" in done.stdout, done.stderr
    sent = pickle.loads(next((tmp_path / "run/job").glob("*_submitted.pkl")).read_bytes())
    assert type(sent.function) is launch.NotebookJob and sent.function.run_dir == str(tmp_path / "run")
    assert find_job(tmp_path / "run").wait(300) == "done"


# ── arrays ───────────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_an_array_on_the_command_line(tmp_path, capsys):
    words = [str(PRETRAIN), "--array", "peak_rate", "0.5,1e-1,2", "-p", "run_dir", str(tmp_path / "sweep"), "--gpus-per-node", "1", "--at-once", "2", "--dry-run"]
    assert launch.main(words) == 0
    out = capsys.readouterr().out
    assert "#SBATCH --array=0-2%2\n" in out and f"{tmp_path}/sweep/1e-1  " in out and "'peak_rate': 0.1}" in out
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("array, problem", [(("peak_rat", "1"), "did you mean 'peak_rate'"), (("seed", "1,one"), "must be int"), (("seed", "1,1"), "a folder of its own"), (("images", ""), "a folder of its own")])
def test_mistakes_in_an_array(tmp_path, capsys, array, problem):
    assert launch.main([str(PRETRAIN), "--array", *array, "-p", "run_dir", str(tmp_path / "sweep"), "--cluster", "debug"]) == 2
    assert problem in capsys.readouterr().err and not (tmp_path / "sweep").exists()


def test_a_suite_is_an_array_of_tasks(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(TOP)
    words = ["suite", "--model", "random:regnety_toy", "--tasks", "toy_digits,toy_scenes", "--protocol", "knn", "-p", "run_dir", str(tmp_path), "--gpus-per-node", "1", "--dry-run"]
    assert launch.main(words) == 0
    out = capsys.readouterr().out
    assert "--array=0-1%2" in out and "'task': 'toy_scenes'" in out and "#SBATCH --job-name=knn" in out and "when all have ended: 69_scoreboard.ipynb" in out
    assert launch.main([*words, "--gpus-per-node", "8"]) == 2 and "runs on one process, not on 8" in capsys.readouterr().err
    spaced = [word.replace(",", ", ") for word in words]
    assert launch.main([*spaced, "--file=nbs/params/knn/smoke.yaml"]) == 0 and f"{tmp_path / 'toy_scenes'}  {{" in capsys.readouterr().out
    assert launch.main(["suite", "--model", "m", "--tasks", "toy_digits", "--protocol", "knm"]) == 2 and "no page nbs/evaluate/*_knm.ipynb" in capsys.readouterr().err
    assert launch.main(["suite", "--model", "m", "--tasks", "toy_digits,dtd"]) == 2 and "give a preset" in capsys.readouterr().err
    for tasks, protocol, problem in [("toy_cont,toy_scenes", "knn", "did you mean 'toy_count'"), ("toy_digits,", "knn", "no task ''"), ("toy_people", "linear", "60_fairness_labels.ipynb does"),
                                     ("toy_people", "fairness_geography", "61_fairness_geography.ipynb cannot read toy_people")]:
        assert launch.main(["suite", "--model", "m", "--tasks", tasks, "--protocol", protocol, "--dry-run"]) == 2 and problem in capsys.readouterr().err
    assert launch.main(["suite", "--model", "m", "--tasks", "toy_people", "--protocol", "fairness_labels", "-p", "run_dir", str(tmp_path), "--dry-run"]) == 0
    assert launch.main(["suite", "--model", "m", "--tasks", "dtd", "--file=nbs/params/linear/seer_128gf.yaml", "-p", "run_dir", str(tmp_path), "--dry-run"]) == 0
    monkeypatch.chdir(tmp_path)
    assert launch.main(words) == 2 and "top folder" in capsys.readouterr().err
    assert launch.main(["collect", str(tmp_path)]) == 2 and "holds no runs" in capsys.readouterr().err


def test_a_suite_leaves_the_root_to_the_preset(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(TOP)
    words = ["suite", "--model", "m", "--tasks", "dtd", "--file=nbs/params/linear/seer_128gf.yaml", "-p", "run_dir", str(tmp_path), "--dry-run"]
    assert launch.main(words) == 0 and "'root': 'data'" in capsys.readouterr().out
    assert launch.main([*words, "--root", "/data"]) == 0 and "'root': '/data'" in capsys.readouterr().out


def test_collect_has_help_and_hears_a_signal(tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as end: launch.main(["collect", "--help"])
    assert end.value.code == 0 and "of a suite" in capsys.readouterr().out
    def told(folder): raise Stopped("told to stop", {signal.SIGTERM})
    monkeypatch.setattr(launch, "collect_results", told)
    assert launch.main(["collect", str(tmp_path)]) == 75 and "stopped: told to stop" in capsys.readouterr().err


def test_the_end_of_a_suite_is_a_board(tmp_path, capsys):
    "Two tasks measured, one failed, one that never started: page 69 in the suite's folder, with what is printed of the network that the model's name speaks of."
    from seer_nb.evaluate.tasks import Result, append_result
    folder, page = tmp_path / "a suite [1] {x}", str(TOP / "nbs/evaluate/52_linear.ipynb")
    told = json.dumps({"notebook": page, "resources": asdict(Resources()), "cluster": "debug", "id": "here", "logs": ""})
    for task, record in (("toy_digits", {"outcome": "done"}), ("dtd", {"outcome": "done"}), ("food101", {"outcome": "failed", "reason": "no luck | at all"}), ("svhn", {})):
        write_atomic(folder / task / "job.json", told)
        if record: MetricLog(folder / task / "attempts.jsonl").log(attempt=1, **record)
        if record.get("outcome") == "done": append_result(folder / task / "results.jsonl", Result(task, "seer:x/seer_10b", "linear", {}, "top-1", 0.5, 0.4, 0.6, 100, 1.0, 0.1, None, "", 0, {}))
    assert launch.main(["collect", str(folder)]) == 1                              # not all is done
    out = capsys.readouterr().out
    assert re.search(r"^food101 +failed: no luck", out, re.M) and re.search(r"^svhn +lost", out, re.M)
    paths = [Path(line) for line in out.splitlines() if line.startswith(str(folder))]
    assert [path.name for path in paths] == ["results.jsonl", "report.html", "scoreboard.html", "scoreboard.png"] and all(path.stat().st_size > 100 for path in paths)
    board, = attempts(folder)
    assert board["outcome"] == "done" and find_job(folder).state == "done"
    page, report = (folder / "scoreboard.html").read_text(), (folder / "report.html").read_text()
    assert "Sent, but not done" in page and "failed: no luck | at all" in page and "never started" in page
    assert "not done: food101, failed: no luck" in report and "not done: svhn, never started" in report
    with open(folder / "scoreboard.csv") as f: papers = {row["task"]: float(row["paper"] or "nan") for row in csv.DictReader(f)}
    assert papers["dtd"] == pytest.approx(100 * paper_score("dtd", "SEER 10B", "linear")[0]) and papers["toy_digits"] != papers["toy_digits"]


def test_an_array_without_a_board(tmp_path, capsys):
    "The page has no scoreboard beside it; a scoreboard that fails is told of; a name that the suite's folder needs is refused."
    notebook = write_notebook(tmp_path / "05_x.ipynb", "(here / 'results.jsonl').write_text('{\"task\": \"t\", \"model\": \"m\", \"value\": 1.0}\\n')")
    words = [str(notebook), "--array", "seed", "1", "-p", "run_dir", str(tmp_path / "sweep")]
    assert launch.board_page(notebook) is None and launch.main(words) == 0 and not (tmp_path / "sweep/report.html").exists()
    code = "raise ZeroDivisionError('no board')"
    write_notebook(tmp_path / "99_scoreboard.ipynb", code)
    page = nbformat.read(tmp_path / "99_scoreboard.ipynb", 4)
    page.cells[0].source += "\nsuite: str = ''\npaper_model: str = ''"
    nbformat.write(page, tmp_path / "99_scoreboard.ipynb")
    capsys.readouterr()
    assert launch.main(["collect", str(tmp_path / "sweep")]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^scoreboard +failed: ZeroDivisionError: no board$", out, re.M) and out.splitlines()[-1] == str(tmp_path / "sweep/report.html")
    with pytest.raises(ValueError, match="not job, attempts"): launch.submit_suite(notebook, {"attempts": {}}, tmp_path / "other", cluster="debug")
    (tmp_path / "sweep/1/results.jsonl").unlink()                                  # all done, and no result: nothing to draw
    assert launch.draw_board(tmp_path / "sweep") is None and launch.main(["collect", str(tmp_path / "sweep")]) == 0
    notebook.unlink()
    assert launch.main(["collect", str(tmp_path / "sweep")]) == 2 and f"{notebook} is not there any more" in capsys.readouterr().err


FAKE_SLURM = {"sbatch": 'grep -q scoreboard "$1" && [ -e refuse ] && { echo no boards today >&2; exit 1; }\nn=$(( $(ls queue | wc -l) + 7 ))\n'
                        'cp "$1" queue/$n; echo Submitted batch job $n',
              "squeue": '[ -s queue/"${3%%_*}" ] && echo PENDING; exit 0', "scancel": ': > queue/"$1"', "srun": "exit 0"}


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch):
    "Four scripts in place of Slurm: a job waits until somebody cancels it."
    for name, code in FAKE_SLURM.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\ncd {tmp_path}\n{code}\n")
        path.chmod(0o755)
    (tmp_path / "queue").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    notebook = write_notebook(tmp_path / "05_x.ipynb", "pass")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("run_dir: str = ''\nsuite: str = ''\npaper_model: str = ''", metadata={"tags": ["parameters"]})],
                                            metadata=nbformat.read(notebook, 4).metadata), tmp_path / "99_scoreboard.ipynb")
    return notebook


def test_a_board_waits_for_both_arrays_of_a_folder(fake_slurm, tmp_path):
    words = [str(fake_slurm), "--cluster", "slurm", "-p", "run_dir", str(tmp_path / "suite"), "--array", "seed"]
    assert launch.main([*words, "1,2"]) == 0
    first = find_job(tmp_path / "suite")
    assert first.queued == "pending" and "afterany:7\n" in (tmp_path / "queue" / first.id).read_text()
    assert launch.main([*words, "3"]) == 0
    second = find_job(tmp_path / "suite")
    assert not first.queued and second.queued and "afterany:7:9\n" in (tmp_path / "queue" / second.id).read_text()
    (tmp_path / "suite/job.json").write_text(json.dumps({**json.loads((tmp_path / "suite/job.json").read_text()), "notebook": str(fake_slurm)}))
    assert launch.main([*words, "4"]) == 2 and second.queued                       # somebody else's run is not cancelled


def test_a_board_that_slurm_refuses_does_not_hide_that_the_runs_are_sent(fake_slurm, tmp_path, capsys):
    (tmp_path / "refuse").touch()
    assert launch.main([str(fake_slurm), "--cluster", "slurm", "-p", "run_dir", str(tmp_path / "suite"), "--array", "seed", "1"]) == 1
    out, err = capsys.readouterr()
    assert "the runs are sent, the board is not: slurm refused" in err and "no boards today" in err and out.splitlines()[-1].startswith("by hand: ") and find_job(tmp_path / "suite/1").queued


def test_a_folder_that_slurm_would_rename_is_refused(fake_slurm, tmp_path):
    folder = str(tmp_path / "100%j")
    with pytest.raises(ValueError, match="follows the %"): submit(fake_slurm, {"run_dir": folder}, cluster="slurm")
    with pytest.raises(ValueError, match="follows the %"): launch.submit_suite(fake_slurm, {"a": {}}, folder, cluster="slurm")
    with pytest.raises(ValueError, match="follows the %"): sbatch_script(folder, Resources())
    assert not Path(folder).exists() and submit(fake_slurm, {"run_dir": folder}, cluster="debug").state == "done"


def test_a_job_of_slurm_seen_from_a_machine_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    MetricLog(tmp_path / "run/attempts.jsonl").log(attempt=1, outcome="done")
    write_atomic(tmp_path / "run/job.json", json.dumps({"cluster": "slurm", "id": "7", "logs": ""}))
    assert find_job(tmp_path / "run").state == "done"


# ── the record ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

def test_an_attempt_whose_end_nobody_wrote_is_closed_by_the_next(tmp_path):
    notebook, run = write_notebook(tmp_path / "05_x.ipynb", "first = not (here / 'old').exists()\n(here / 'old').touch()\nif first: time.sleep(600)"), tmp_path / "run"
    job = subprocess.Popen(command(notebook, "-p", "run_dir", run), cwd=TOP, stderr=subprocess.PIPE)
    kernel = pid(run)
    wait_until((run / "old").exists)
    job.kill()                                                                    # as when the machine fails: nothing is recorded
    job.wait()
    psutil.Process(kernel).kill()
    assert "end" not in attempts(run)[0]
    run_notebook(notebook, {"run_dir": str(run)}, show=False)
    lost, done = attempts(run)
    assert (lost["outcome"], done["outcome"], done["reason"]) == ("lost", "done", "") and lost["begin"] <= lost["end"] <= done["begin"] <= done["end"]


def test_runs_that_differ_in_a_setting_alone_have_lines_of_their_own(tmp_path, capsys):
    notebook = write_notebook(tmp_path / "05_x.ipynb", "import json\n(here / 'results.jsonl').write_text(json.dumps({'task': 't', 'model': 'm', 'metric': 'top-1', 'value': seed / 10}) + '\\n')")
    assert launch.main([str(notebook), "--array", "seed", "1,9", "-p", "run_dir", str(tmp_path / "sweep")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ *1 +t +top-1 +0\.100$", out, re.M) and re.search(r"^ *9 +t +top-1 +0\.900$", out, re.M)


def test_a_record_that_is_not_whole_does_not_spoil_the_report(tmp_path):
    "An older record without steps, an attempt still running, a torn line, clocks that disagree."
    (tmp_path / "attempts.jsonl").write_text('{"attempt": 1, "job": "7", "ranks": 1, "begin": 100.0}\n{"attempt": 1, "end": 90.0, "outcome": "stopped", "reason": ""}\n'
                                             '{"attempt": 2, "job": "7", "ranks": 1, "begin": 95.0}\n{"attempt": 2, "en')
    before = (tmp_path / "attempts.jsonl").read_bytes()
    account = time_account(tmp_path)
    assert account["attempts"] == 2 and account["hours"] > 0 and account["hours_between"] == 5 / 3600 and account["gpu_hours"] == account["goodput"] == 0
    assert (tmp_path / "attempts.jsonl").read_bytes() == before                    # reading repairs nothing: another process may be writing


def test_a_second_start_in_a_folder_that_is_in_use_touches_nothing(tmp_path):
    notebook, run = write_notebook(tmp_path / "05_x.ipynb", "time.sleep(600)"), tmp_path / "run"
    job = subprocess.Popen(command(notebook, "-p", "run_dir", run), cwd=TOP, stderr=subprocess.PIPE)
    pid(run)
    wait_until((run / "report.ipynb").exists)
    record = (run / "attempts.jsonl").read_bytes()
    second = subprocess.run(command(notebook, "-p", "run_dir", run), cwd=TOP, capture_output=True, text=True)
    assert second.returncode == 2 and "belongs to a run that is still going" in second.stderr and "Traceback" not in second.stderr
    assert (run / "attempts.jsonl").read_bytes() == record and not list((run / "attempts").glob("report_*")) and job.poll() is None
    job.terminate()
    job.wait()
    assert [attempt["outcome"] for attempt in attempts(run)] == ["stopped"]
