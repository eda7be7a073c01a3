"""The simulated Ascend NPU (tests/npu/npu_sim) itself: what it computes, what it refuses, how it is built.

The checks on a device stand in npu_sim/checks; each module runs in a process of its own, since starting torch_npu is
what takes the time, and each check is a test here.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

import pytest
from harness import expect, finish, start
from npu_sim import simulator

CHECKS = simulator.HERE / "checks"
EXPANDABLE = "expandable_segments:True"
RUNS = {  # name: (module, soc, devices, further variables)
    "operators": ("operators", "Ascend910B2", 2, {}),
    "second generation": (
        "second_generation",
        "Ascend910B2",
        3,
        {"ASCEND_RT_VISIBLE_DEVICES": "0,2"},
    ),
    "910A": ("first_generation", "Ascend910A", 1, {}),
    "910B without a digit": ("first_generation", "Ascend910B", 1, {}),
    "memory": ("memory", "Ascend910B2", 2, {"NPU_SIM_MEM_GB": 0.5}),
    "expandable segments": (
        "memory",
        "Ascend910B2",
        2,
        {"NPU_SIM_MEM_GB": 0.5, "PYTORCH_NPU_ALLOC_CONF": EXPANDABLE},
    ),
    "counting": ("counting", "Ascend910B2", 4, {}),
}
RANKS = {"ranks": "Ascend910B2", "first_generation_ranks": "Ascend910A"}  # module: soc


def checks_of(module):
    return re.findall(r"^def (check_\w+)", (CHECKS / f"{module}.py").read_text(), re.MULTILINE)


def results_of(process):
    done = expect(finish(process))
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


@cache
def results(run):
    """{check: what went wrong or None} of one process."""
    module, soc, devices, extra = RUNS[run]
    env = simulator.environment(soc, devices, **extra)
    fork = False if run == "counting" else None  # it counts before anything was imported
    return results_of(start([sys.executable, CHECKS / "run.py", module], fork=fork, **env))


@cache
def results_of_two_ranks(module):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {
        "NPU_SIM_HCCL_TIMEOUT": 3,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    env = simulator.environment(RANKS[module], 2, **variables)
    command = [sys.executable, CHECKS / "run.py", module]
    return [
        results_of(process) for process in [start(command, **env, RANK=rank) for rank in range(2)]
    ]


@pytest.mark.parametrize(
    "run, check", [(run, check) for run in RUNS for check in checks_of(RUNS[run][0])]
)
def test_device(run, check):
    wrong = results(run)[check]
    assert wrong is None, wrong


@pytest.mark.parametrize(
    "module, check", [(module, check) for module in RANKS for check in checks_of(module)]
)
def test_two_ranks(module, check):
    for rank, found in enumerate(results_of_two_ranks(module)):
        assert found[check] is None, f"rank {rank}: {found[check]}"


@pytest.mark.parametrize("run", [run for run in RUNS if run != "counting"])
def test_every_process_says_once_that_it_is_simulated(run):
    _, soc, devices, extra = RUNS[run]
    visible = len(extra.get("ASCEND_RT_VISIBLE_DEVICES", "," * (devices - 1)).split(","))
    said = [line for line in results(run)["stderr"].splitlines() if simulator.BANNER in line]
    assert (
        len(said) == 1
        and f"{simulator.BANNER} {soc} x {visible}" in said[0]
        and "Not a hardware result" in said[0]
    )


def test_counting_touches_no_device():
    assert simulator.BANNER not in results("counting")["stderr"]


# ---- the command, npu-smi, chips


def command(*words, **env):
    script = [sys.executable, simulator.HERE / "simulator.py"]
    return finish(start([*script, *words], **env))


def test_command_line():
    done = expect(command())
    assert "simulated CANN" in done.stdout and "-- npu-smi info" in done.stdout
    done = expect(command("--soc", "Ascend910A", "--devices", 3, "--", "npu-smi", "info"))
    assert (
        done.stdout.count("SIMULATED") == 2
        and done.stdout.count("910A ") == 3
        and "0 / 32768" in done.stdout
    )
    widths = {len(line) for line in done.stdout.splitlines()}
    assert len(widths) == 1, "a table has straight edges"
    code = "import os, sys; print(os.environ['NPU_SIM_SOC'], sys.argv[1:]); raise SystemExit(5)"
    done = expect(command("--", "python", "-c", code, "--flag", "--", "x"), code=5)
    assert done.stdout.split("\n")[0] == "Ascend910B2 ['--flag', '--', 'x']"


@pytest.mark.parametrize("words", [["--devices", "65"], ["--", "no-such-command"]])
def test_command_line_mistakes_are_one_line(words):
    done = expect(command(*words), code=1)
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_npu_smi_does_nothing_else():
    env = simulator.environment(devices=2)
    done = finish(start(["npu-smi", "info", "-l"], **env))
    assert done.returncode == 0 and "SIMULATED" in done.stdout and done.stdout.count("NPU ID") == 2
    done = finish(start(["npu-smi", "set", "-t", "reset"], **env))
    assert done.returncode == 1 and "SIMULATED" in done.stderr


def test_a_chip_that_is_not_simulated():
    env = simulator.environment("Ascend310B1")
    done = finish(start([sys.executable, "-c", "import torch; torch.ones(1, device='npu')"], **env))
    assert (
        done.returncode == 1
        and "NPU_SIM_SOC=Ascend310B1 is not a chip that is simulated" in done.stderr
    )
    assert simulator.BANNER not in done.stderr


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_readme(name):
    """Both languages have the same commands; the first ones are run as they stand."""
    blocks = re.findall(
        r"```bash\n(.*?)```", (simulator.HERE / name).read_text(encoding="utf-8"), re.DOTALL
    )
    other = re.findall(
        r"```bash\n(.*?)```", (simulator.HERE / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert blocks == other and len(blocks) == 3
    if name == "README.md":
        done = expect(finish(start(["bash", "-ec", blocks[0]])))
        assert "910A" in done.stdout and "tensor([2., 2.], device='npu:0')" in done.stdout


# ---- the environment


def test_environment_lies_over_the_users(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/of/the/user")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/libraries/of/the/user")
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/extensions")
    env = simulator.environment("Ascend910A", 4, HCCL_BUFFSIZE=10, OMP_NUM_THREADS=2)
    first, *rest = env["PYTHONPATH"].split(":")
    assert (Path(first) / "torch_npu").is_dir() and rest == ["/of/the/user"]
    first, *rest = env["LD_LIBRARY_PATH"].split(":")
    assert (Path(first) / "libhccl.so").is_file() and rest == ["/libraries/of/the/user"]
    first, second, *rest = env["PATH"].split(":")
    assert os.access(f"{first}/npu-smi", os.X_OK) and second == str(Path(sys.executable).parent)
    assert rest == os.environ["PATH"].split(":")
    assert (
        env["ASCEND_HOME_PATH"] == env["ASCEND_TOOLKIT_HOME"]
        and Path(env["ASCEND_OPP_PATH"]).is_dir()
    )
    expected = {
        "NPU_SIM_SOC": "Ascend910A", "NPU_SIM_DEVICES": "4", "TORCH_NPU_FALLBACK_CPU_DISABLE": "1",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1", "OMP_NUM_THREADS": "2", "HCCL_BUFFSIZE": "10",
        "TORCH_EXTENSIONS_DIR": "/extensions/npu_sim",
    }  # fmt: skip
    assert {key: env[key] for key in expected} == expected
    assert all(isinstance(value, str) for value in env.values())


def test_without_a_home(tmp_path):
    code = "import simulator; print(simulator.cache())"
    env = {
        "HOME": "/nonexistent",
        "TMPDIR": tmp_path,
        "NPU_SIM_CACHE": "",
        "cwd": simulator.HERE,
        "fork": False,
    }
    folder = Path(expect(finish(start([sys.executable, "-c", code], **env))).stdout.strip())
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o777 == 0o700
    done = expect(finish(start([sys.executable, "-c", code], **env)))
    assert done.stdout.strip() == str(folder)
    folder.rmdir()
    folder.symlink_to("/tmp")
    done = finish(start([sys.executable, "-c", code], **env))
    assert done.returncode == 1 and "belongs to somebody else" in done.stderr


# ---- building; the compiler and pip are stand-ins that write down that they were called


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """A source tree, an empty cache that has the wheel, and a compiler that takes a moment and counts its calls."""
    monkeypatch.setattr(simulator, "HERE", tmp_path / "sources")
    simulator.HERE.mkdir()
    for source in Path(simulator.__file__).parent.glob("*.*"):
        (simulator.HERE / source.name).write_bytes(source.read_bytes())
    wheel = simulator._torch_npu_folder()
    simulator.build()
    monkeypatch.setenv("NPU_SIM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    simulator._torch_npu_folder().symlink_to(wheel)
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/calls\nsleep 0.1\n'
        'while [ "$1" != -o ]; do shift; done\ntouch "$2"\n'
    )  # fmt: skip
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    return tmp_path


def test_two_builds_at_once_are_one(workshop, capfd):
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(simulator.build())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1 and (folders[0] / "ascend-toolkit/set_env.sh").is_file()
    sources = [path for path in simulator.HERE.iterdir() if path.suffix == ".cpp"]
    calls = (workshop / "calls").read_text().splitlines()
    assert len(calls) == len(sources) + 1, "every file is compiled once, then they are linked"
    assert capfd.readouterr().err.count("compiling the simulated CANN (once") == 1
    simulator.build()
    assert len((workshop / "calls").read_text().splitlines()) == len(calls)


def test_a_changed_source_is_built_anew_and_nothing_is_written_beside_it(workshop):
    first, before = simulator.build(), sorted(simulator.HERE.rglob("*"))
    (simulator.HERE / "hccl.cpp").write_text("// changed\n")
    second = simulator.build()
    assert first != second and first.is_dir() and sorted(simulator.HERE.rglob("*")) == before


def test_a_build_that_was_killed_leaves_nothing(workshop):
    folder = simulator.build()
    half = folder.with_name(folder.name + ".abcd")
    folder.rename(half)
    assert simulator.build() == folder and not half.exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted(
        ["lock", folder.name, simulator._torch_npu_folder().name]
    )


def test_a_compiler_that_fails_or_is_missing(workshop, monkeypatch):
    compiler = workshop / "compiler"
    compiler.write_text(
        "#!/bin/sh\necho 'In file included' >&2\necho 'hccl.cpp:7: error: no such thing' >&2\nexit 1\n"
    )
    with pytest.raises(
        RuntimeError, match="compiling the simulated CANN failed: hccl.cpp:7: error: no such thing"
    ):
        simulator.build()
    assert not [path for path in (workshop / "cache").iterdir() if path.name.startswith("cann")]
    monkeypatch.setenv("CXX", str(workshop / "nowhere"))
    with pytest.raises(RuntimeError, match="nowhere.*(not found|No such file)"):
        simulator.build()


def test_a_wheel_that_cannot_be_had(workshop, monkeypatch):
    simulator._torch_npu_folder().unlink()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    nowhere = {
        "INDEX_URL": "http://127.0.0.1:9/",
        "RETRIES": "0",
        "FIND_LINKS": "",
        "EXTRA_INDEX_URL": "",
    }
    for name, value in nowhere.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(RuntimeError, match="fetching torch-npu .* failed: .*torch-npu"):
        simulator.build()
    assert not simulator._torch_npu_folder().exists()


def test_a_cache_that_cannot_be_written(workshop, monkeypatch):
    monkeypatch.setenv("NPU_SIM_CACHE", "/proc/nothing")
    with pytest.raises(RuntimeError, match="NPU_SIM_CACHE"):
        simulator.build()


def test_scripts_are_clean():
    scripts = sorted(simulator.HERE.glob("*.sh"))
    assert len(scripts) == 3
    subprocess.run(["shellcheck", *scripts], check=True)
