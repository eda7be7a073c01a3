"""The training manager's jobs: started, stopped, queued, continued; what outlives the manager, and what it survives."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import managing
import psutil
import pytest
import serving
from harness import ROOT, environment

from tools.manager import jobs as module
from tools.manager import logs, processes


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    with managing.managing(tmp_path_factory.mktemp("root")) as started:
        yield started


def words_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has just ended
        return ""


def jobs_in(folder: Path, devices=("cpu",)) -> module.Jobs:
    return module.Jobs(folder / "state", folder, lambda: list(devices))


def add(jobs: module.Jobs, code: str, **more) -> module.Job:
    """A job that runs Python code."""
    output = str(jobs.root / f"out{jobs.number}")
    fixed = dict(name="", recipe="stub", script="train.py", args={}, dataset=[], model=None, env={})
    return jobs.add(**fixed, argv=[sys.executable, "-c", code], **{"output": output} | more)


def look_until(jobs: module.Jobs, job: module.Job, *states: str) -> module.Job:
    def looked():
        jobs.look()
        return job.state in states

    serving.until(looked, 60)
    return job


# ---- a job's life --------------------------------------------------------------------------------


def test_a_job_runs_to_its_end_and_its_log_curves_and_report_are_there(manager):
    data = next(one for one in manager.get("/api/datasets")["datasets"] if one["rows"] == 7)
    job = manager.train(args={"--steps": 3, "names": ["x", "y"]}, dataset=[data["id"]], name="第一")
    assert job["name"] == "第一" and job["id"] == "0001"
    found = manager.log(job["id"])
    assert [event for _, event, _ in found][-1] == "end" and found[-1][2]["state"] == "done"
    text = managing.text_of(found)
    assert "stub/data/rows.jsonl names: ['x', 'y']" in text and "训练" in text
    job = manager.job(job["id"])
    assert job["state"] == "done" and job["exit_code"] == 0 and job["progress"]["step"] == 3
    assert job["progress"]["eta_seconds"] == 120
    series = manager.get("/api/train/metrics", job=job["id"], after=1)["series"]
    assert series["loss"] == [[2, 2.0], [3, 1.3333]] and series["tokens_per_second"][0][1] == 12345
    report = manager.get("/api/report", job=job["id"])
    assert report["markdown"] == "# stub" and report["pictures"][0]["name"] == "loss.png"
    assert manager.client.get(report["pictures"][0]["url"]).content == b"\x89PNG"
    weights = {one["id"]: one for one in manager.get("/api/weights")["weights"]}
    assert weights[job["output_id"]]["finished"] and weights[job["output_id"]]["metrics"] == {
        "loss": 1
    }
    row = next(
        r for r in manager.get("/api/evaluations")["table"] if r["weights"] == job["output_id"]
    )
    assert (row["metric"], row["before"], row["after"]) == ("loss", 2.0, 1.0)


def test_a_launcher_gets_the_folder_of_the_run_and_only_the_devices_of_the_job(manager):
    job = manager.train(launcher="train_both.sh", args={"--steps": 1})
    assert manager.until(job["id"], "done")["script"] == "train_both.sh"
    assert manager.get("/api/report", job=job["id"])["markdown"] == "# stub"
    of = dict(
        name="",
        recipe="",
        script="",
        args={},
        dataset=[],
        model=None,
        output="",
        env={},
        held=["1", "3"],
    )
    shell = module.Job(id="1", argv=["bash", "x.sh"], **of)
    assert module.device_variables(shell) == {"DEVICES": "1,3", "NPROC": "2"}
    python = module.Job(id="1", argv=["python", "x.py"], **of)
    assert module.device_variables(python)["ASCEND_RT_VISIBLE_DEVICES"] == "1,3"


def test_a_manager_that_sees_some_devices_only_gives_those(monkeypatch):
    of = dict(
        name="",
        recipe="",
        script="",
        args={},
        dataset=[],
        model=None,
        output="",
        env={},
        held=["1"],
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    found = module.device_variables(module.Job(id="1", argv=["bash", "x.sh"], **of))
    assert found == {"CUDA_VISIBLE_DEVICES": "6", "ASCEND_RT_VISIBLE_DEVICES": "6", "NPROC": "1"}


def test_a_log_goes_on_where_its_reader_was_cut_off(manager):
    job = manager.train(args={"--steps": 2})
    manager.until(job["id"], "done")
    whole = managing.text_of(manager.log(job["id"]))
    here = len(whole.encode()) // 2
    rest = managing.text_of(manager.log(job["id"], **{"last-event-id": str(here)}))
    assert rest.encode() == whole.encode()[here:] or "\ufffd" in rest
    assert not managing.text_of(
        manager.log(job["id"], **{"last-event-id": str(len(whole.encode()))})
    )


def test_a_failed_job_says_why(manager):
    job = manager.train(args={"--steps": 1, "--code": 1})
    job = manager.until(job["id"], "failed")
    assert job["exit_code"] == 1 and job["error"] == "error: --code says so" and job["resumable"]
    job = manager.train(args={"--steps": 1, "--code": 2})
    assert not manager.until(job["id"], "failed")["resumable"]  # a wrong flag stays wrong


def test_stop_saves_ends_the_job_and_never_the_manager_and_the_queue_moves_on(manager):
    first = manager.train(args={"--steps": 500})
    second = manager.train(args={"--steps": 1})
    third = manager.train(args={"--steps": 1})
    status = serving.until(lambda: (s := manager.get("/api/status"))["jobs"][2]["progress"] and s)
    assert status["queue"] == [second["id"], third["id"]]
    assert manager.get("/api/npu")["devices"][0]["job"] == first["id"]
    assert manager.post("/api/train/stop", job=third["id"])["job"]["state"] == "stopped"
    assert (
        manager.ask("POST", "/api/train/remove", 409, json={"job": first["id"]})["error"]["param"]
        == "job"
    )
    serving.until(lambda: manager.step(first["id"]))
    manager.post("/api/train/stop", job=first["id"])
    stopped = manager.until(first["id"], "stopped")
    assert stopped["exit_code"] == 75 and stopped["resumable"]
    assert manager.until(second["id"], "done") and manager.process.poll() is None
    manager.post("/api/train/stop", job=first["id"])  # once more: nothing happens
    # it goes on where it was, on the same output
    again = manager.ask("POST", "/api/train/start", 201, json={"resume": first["id"]})["job"]
    assert again["continues"] == first["id"] and again["output_id"] == first["output_id"]
    assert not manager.job(first["id"])["resumable"]
    step = serving.until(lambda: manager.step(again["id"]))
    assert step > stopped["progress"]["step"]
    refused = manager.post("/api/train/start", 400, resume=again["id"], args={"--steps": 3})
    assert refused["error"]["param"] == "args"
    manager.post("/api/train/stop", job=again["id"], force=True)
    manager.until(again["id"], "stopped")
    manager.post("/api/train/remove", job=again["id"])
    assert manager.get("/api/train/metrics", 404, job=again["id"])["error"]["param"] == "job"


def test_force_ends_what_the_job_has_started_in_other_sessions_too(manager):
    job = manager.train(args={"--steps": 5000, "--deaf": 1})
    serving.until(lambda: manager.step(job["id"]))
    output = next((manager.root / "output/manager/runs").glob(f"{job['id']}_*"))
    child = int((output / "child").read_text())
    manager.post("/api/train/stop", job=job["id"])
    time.sleep(0.3)
    assert manager.job(job["id"])["state"] == "stopping" and managing.alive(child)
    manager.post("/api/train/stop", job=job["id"], force=True)
    stopped = manager.until(job["id"], "stopped")
    assert stopped["exit_code"] == -signal.SIGKILL and not managing.alive(child)


def test_a_job_that_is_removed_while_its_log_is_read_ends_the_log(tmp_path):
    jobs = jobs_in(tmp_path)
    job = look_until(jobs, add(jobs, "print(1)"), "done")
    jobs.remove(job.id)

    async def read():
        return [event async for event in logs.Streams(jobs).events(job, 0)]

    told = asyncio.run(read())
    assert (
        len(told) == 2 and told[0].startswith("event: state") and told[1].startswith("event: end")
    )
    assert jobs.series(job) == {}


# ---- the manager ends ----------------------------------------------------------------------------


@pytest.fixture
def killed(tmp_path):
    with managing.managing(tmp_path) as started:
        yield started


def test_jobs_outlive_a_killed_manager(killed, tmp_path):
    manager = killed
    short = manager.train(args={"--steps": 1, "--code": 3})
    manager.until(short["id"], "failed")
    ends_alone = manager.train(args={"--steps": 6, "--code": 3})
    serving.until(lambda: manager.step(ends_alone["id"]))
    waits = manager.train(args={"--steps": 100_000})
    assert manager.job(waits["id"])["state"] == "queued"
    manager.post("/api/chat/servers", 201, weights="tiny")
    (server,) = (
        one
        for one in psutil.Process(manager.process.pid).children()
        if "serve_openai_api" in words_of(one)
    )
    manager.kill()
    serving.until(lambda: not managing.alive(server.pid))  # unlike a job it ends with its manager
    exit_file = tmp_path / f"output/manager/jobs/{ends_alone['id']}/exit.json"
    serving.until(lambda: exit_file.read_text().strip())  # no manager looks
    manager.start()
    ended = manager.until(ends_alone["id"], "failed")
    assert ended["exit_code"] == 3 and ended["error"] == "error: --code says so"
    assert managing.text_of(manager.log(ends_alone["id"])).count("step ") == 6
    assert manager.job(short["id"])["exit_code"] == 3 and manager.step(short["id"]) == 1
    assert manager.get("/api/train/metrics", job=short["id"])["series"]["loss"] == [[1, 4.0]]
    assert manager.get("/api/status")["manager"]["restarts"] == 1
    # the queue was kept too; now killed while it runs, and adopted
    serving.until(lambda: manager.step(waits["id"]))
    manager.kill()
    manager.start()
    step = serving.until(lambda: manager.step(waits["id"]))
    serving.until(lambda: manager.step(waits["id"]) > step)
    manager.post("/api/train/stop", job=waits["id"])
    assert manager.until(waits["id"], "stopped")["exit_code"] == 75


def test_a_second_manager_of_one_folder_is_refused_by_one_line(manager):
    command = [
        sys.executable,
        ROOT / "tools/manager/serve.py",
        "--root",
        manager.root,
        "--port",
        "0",
    ]
    done = subprocess.run(
        [str(w) for w in command], env=environment(), capture_output=True, text=True, timeout=60
    )
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) == 1 and "has a manager already" in lines[0]
    assert manager.get("/api/status")["manager"]["pid"] == manager.process.pid


def test_a_manager_killed_between_a_start_and_the_note_of_it_finds_the_job(tmp_path):
    jobs = jobs_in(tmp_path)
    job = add(jobs, "import time; print('here', flush=True); time.sleep(1)")
    jobs.look()
    found = job.pid
    job.pid = job.known = None  # as on disk before Popen returned
    jobs.save(job)
    other = jobs_in(tmp_path)
    adopted = other.jobs[job.id]
    look_until(other, adopted, "done")
    assert adopted.pid == found and adopted.exit_code == 0
    jobs.children[job.id].wait()


def test_a_number_that_another_process_has_by_now_is_never_signalled(tmp_path):
    jobs = jobs_in(tmp_path)
    job = add(jobs, "import time; time.sleep(600)")
    look_until(jobs, job, "running")
    time.sleep(0.05)  # two processes of one tick and one number there cannot be
    stranger = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    )
    own = job.pid
    job.pid = stranger.pid  # the identity is still the job's
    jobs.stop(job.id, force=True)
    look_until(jobs, job, "stopped")
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()
    managing.end_group(own)
    processes.kill_below(own)
    assert not module.is_runner(os.getpid(), tmp_path)


def test_a_killed_runner_is_a_lost_job_and_its_training_ends(tmp_path):
    jobs = jobs_in(tmp_path)
    job = add(jobs, "import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    look_until(jobs, job, "running")
    pid = int(serving.until(lambda: jobs.log(job).exists() and jobs.log(job).read_text().strip()))
    os.kill(job.pid, signal.SIGKILL)
    look_until(jobs, job, "lost")
    assert "without an exit code" in job.error
    serving.until(lambda: not managing.alive(pid))


def test_the_clock_decides_nothing(tmp_path, monkeypatch):
    """Each look at it gives an earlier time than the one before."""
    now = [2e9]

    def backwards():
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(module.time, "time", backwards)
    jobs = jobs_in(tmp_path)
    first = add(jobs, "import time; time.sleep(0.3)")
    second = add(jobs, "print(2)")
    assert [job.id for job in jobs.all()] == ["0002", "0001"] and second.created < first.created
    assert [job.id for job in jobs.queue()] == ["0002"] and first.state == "running"
    again = jobs_in(tmp_path)  # adopts by the tick of the boot
    look_until(again, again.jobs["0001"], "done")
    look_until(again, again.jobs["0002"], "done")
    assert again.jobs["0002"].started < again.jobs["0001"].started
    assert add(again, "print(3)").id == "0003"


def test_a_job_that_cannot_be_read_is_told(tmp_path):
    jobs = jobs_in(tmp_path)
    job = add(jobs, "print(1)")
    look_until(jobs, job, "done")
    file = jobs.folder / job.id / "job.json"
    file.write_text(file.read_text().replace('"stop_asked"', '"of_a_newer_version"'))
    assert jobs_in(tmp_path).jobs[job.id].state == "done"
    file.write_text("{")
    again = jobs_in(tmp_path)
    assert not again.jobs and f"{job.id} cannot be read" in again.problem()
    assert add(again, "print(1)").id == "0002"  # its folder and number stay its own


# ---- devices, disk -------------------------------------------------------------------------------


def test_one_job_on_a_device_and_no_job_overtakes_one_that_wants_its_device(tmp_path):
    jobs = jobs_in(tmp_path, devices=["0", "1", "2"])
    show = "import os, time; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(600)"
    first = add(jobs, show, devices=["0"])
    both = add(jobs, show, devices=["0", "1"])
    late = add(jobs, show, devices=["1"])
    other = add(jobs, show, devices=["2"])
    jobs.look()
    states = [job.state for job in (first, both, late, other)]
    assert states == ["running", "queued", "queued", "running"]
    assert jobs.busy() == {"0": first.id, "2": other.id}
    jobs.stop(first.id, force=True)
    look_until(jobs, both, "running")
    assert late.state == "queued" and first.state == "stopped"
    text = serving.until(lambda: jobs.log(both).exists() and jobs.log(both).read_text())
    assert text == "0,1\n"
    for job in (both, late, other):
        jobs.stop(job.id, force=True)
        look_until(jobs, job, "stopped")


def test_a_full_disk_loses_lines_of_a_log_and_no_job(tmp_path):
    disk = tmp_path / "state"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    assert not mounted.returncode, (
        f"a small tmpfs cannot be mounted; run the tests as root: {mounted.stderr.strip()}"
    )
    try:
        jobs = jobs_in(tmp_path)
        code = "import time\nfor i in range(30): print(i, 'x' * 9000, flush=True); time.sleep(0.02)\nexit(5)"
        job = add(jobs, code)
        look_until(jobs, job, "running")
        (disk / "filler").write_bytes(b"0" * (shutil.disk_usage(disk).free - 8192))
        look_until(jobs, job, "failed")
        assert job.exit_code == 5 and jobs.unsaved == {job.id}
        with pytest.raises(module.Problem) as refused:
            add(jobs, "print(1)")
        assert refused.value.status == 409 and "No space left" in refused.value.message
        assert [one.id for one in jobs.all()] == [job.id]
        (disk / "filler").unlink()
        jobs.look()
        assert not jobs.unsaved
        again = jobs_in(tmp_path).jobs[job.id]
        assert again.state == "failed" and again.exit_code == 5
        look_until(jobs, add(jobs, "print(1)"), "done")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
