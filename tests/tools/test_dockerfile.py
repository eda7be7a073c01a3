"""Dockerfile.ascend without Docker: linted, its commands run with stand-ins, its entry point with a stand-in CANN."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness import ROOT
from packaging.requirements import Requirement

DOCKERFILE = ROOT / "Dockerfile.ascend"
ENTRY = ROOT / "tools/ascend_entrypoint.sh"
HOME_IN_IMAGE = "/opt/danpu"


def instructions() -> list[tuple[str, str]]:
    """[(RUN, its text on one line), ...] in order, comments left out."""
    lines = [
        line
        for line in DOCKERFILE.read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in whole.splitlines()]


def of(kind: str) -> list[str]:
    return [text for name, text in instructions() if name == kind]


def arguments() -> dict[str, str]:
    return dict(text.split("=", 1) for text in of("ARG"))


def tracked() -> list[str]:
    return subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")[:-1]


# ---- lint ---------------------------------------------------------------------------------------------------


def hadolint(path: Path) -> subprocess.CompletedProcess:
    path_with_ours = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["hadolint", "--no-color", path]
    return subprocess.run(
        command, env=os.environ | {"PATH": path_with_ours}, capture_output=True, text=True
    )


def test_lint_finds_nothing():
    """hadolint, which runs shellcheck over the RUN lines too."""
    result = hadolint(DOCKERFILE)
    assert result.returncode == 0 and not result.stdout, result.stdout + result.stderr


WORSE = {
    "DL3013": ("--no-cache-dir -r requirements-npu.txt", "--no-cache-dir torch-npu"),
    "DL3002": ("USER ${USER_ID}:${GROUP_ID}", "USER root"),
    "SC2086": ("mkdir -p output", "mkdir -p $elsewhere"),
}


@pytest.mark.parametrize("rule", WORSE)
def test_lint_would_find_it(tmp_path, rule):
    text = DOCKERFILE.read_text()
    assert text.count(WORSE[rule][0]) == 1
    (tmp_path / "Dockerfile").write_text(text.replace(*WORSE[rule]))
    result = hadolint(tmp_path / "Dockerfile")
    assert result.returncode != 0 and rule in result.stdout


# ---- what it takes from the repository ----------------------------------------------------------------------


def test_copied_and_started_files_are_in_the_repository():
    files = tracked()
    for text in of("COPY"):
        *sources, _ = [word for word in text.split() if not word.startswith("--")]
        assert all(source == "." or source in files for source in sources), text
    started = [
        word
        for kind in ("ENTRYPOINT", "CMD")
        for text in of(kind)
        for word in json.loads(text)
        if "/" in word
    ]
    assert started == [f"{HOME_IN_IMAGE}/tools/ascend_entrypoint.sh", "tools/check_env.sh"]
    assert all(word.removeprefix(f"{HOME_IN_IMAGE}/") in files for word in started)
    assert of("WORKDIR") == [HOME_IN_IMAGE]


def pins(name: str) -> list[Requirement]:
    """The requirements of a file and of those it names with -r."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    nested = [pin for line in lines if line.startswith("-r ") for pin in pins(line[3:].strip())]
    return nested + [Requirement(line) for line in lines if line and not line.startswith("-r ")]


def test_requirements_are_exact_and_agree():
    named = re.findall(r"-r (\S+)", " ".join(of("RUN")))
    copied = " ".join(of("COPY"))
    found: dict[str, set] = {}
    assert named
    for name in named:
        assert name in copied
        for pin in pins(name):
            assert [spec.operator for spec in pin.specifier] == ["=="], str(pin)
            if pin.marker is None or pin.marker.evaluate({"python_version": "3.11"}):
                found.setdefault(pin.name.lower(), set()).add(str(pin.specifier))
    assert all(len(versions) == 1 for versions in found.values()), found
    assert found["torch"] == found["torch-npu"], "torch and torch-npu come in pairs"
    assert re.fullmatch(r"9\.1\.\d+-910b-ubuntu22\.04-py3\.1[012]", arguments()["CANN_TAG"])


IGNORED = """.git/config .venv/bin/python output/train_qwen/final/model.safetensors models/Qwen3-8B/config.json .ci/run
    runs/x common/__pycache__/cli.cpython-311.pyc a/b.safetensors train_qwen/merged/pytorch_model.bin .venv.lock"""


def test_dockerignore_keeps_history_environments_and_weights_out_and_the_rest_in():
    lines = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]

    def expression(pattern: str) -> str:
        """As docker matches: from the root, **/ for any depth, * within a name; what is in a folder goes with it."""
        return re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*") + "(/.*)?"

    def ignored(path: str) -> bool:
        """The last line that matches decides; one with ! in front takes the file back in."""
        matching = [
            line for line in lines if re.fullmatch(expression(line.removeprefix("!")), path)
        ]
        return bool(matching) and not matching[-1].startswith("!")

    assert [path for path in IGNORED.split() if not ignored(path)] == []
    wanted = [path for path in tracked() if not path.startswith((".git", ".ci"))]
    assert [path for path in wanted if ignored(path)] == [] and len(wanted) > 50


# ---- its commands, with stand-ins ---------------------------------------------------------------------------

STAND_IN = """#!{shell}
echo "$(basename "$0") $*" >>"{log}"
case "$(basename "$0") $*" in
    "python -c"*) exec "{python}" "$@" ;;
    getent*) exit {getent} ;;
esac
"""


def run_commands(tmp_path: Path, torch_requires: str = "filelock", getent: int = 2, **args):
    """The RUN lines as `docker build` runs them, with an /etc of their own: (results, calls of the stand-ins)."""
    shell = json.loads(of("SHELL")[0])
    log, bin_folder, etc, work = (tmp_path / name for name in ("log", "bin", "etc", "work"))
    metadata = tmp_path / "site/torch-2.13.0.dist-info/METADATA"
    for folder in (bin_folder, etc / "profile.d", metadata.parent, work):
        folder.mkdir(parents=True)
    metadata.write_text(
        f"Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\nRequires-Dist: {torch_requires}\n"
    )
    (etc / "bash.bashrc").write_text("# what the image had\n")
    for name in of("COPY")[0].split()[:-1]:
        shutil.copy(ROOT / name, work)
    for name in ("python", "getent", "groupadd", "useradd", "chown"):
        text = STAND_IN.format(shell=shell[0], log=log, python=sys.executable, getent=getent)
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    env = (
        {"PATH": f"{bin_folder}:/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "site")}
        | arguments()
        | args
    )
    commands = [[*shell, text.replace("/etc/", f"{etc}/")] for text in of("RUN")]
    return [
        subprocess.run(c, cwd=work, env=env, capture_output=True, text=True) for c in commands
    ], log.read_text()


def test_commands_install_torch_from_the_cpu_index_first_and_make_the_user(tmp_path):
    results, log = run_commands(tmp_path, TORCH_INDEX="https://mirror/cpu", USER_ID="1234")
    assert [result.returncode for result in results] == [0, 0], [
        result.stderr for result in results
    ]
    first, second = [
        shlex.split(line) for line in log.splitlines() if line.startswith("python -m pip install")
    ]
    assert first[first.index("--index-url") + 1] == "https://mirror/cpu" and "--no-deps" in first
    torch = [pin for pin in pins("requirements-npu.txt") if pin.name == "torch"]
    assert first[-1] == str(torch[-1]) and second[-2:] == ["-r", "requirements-npu.txt"]
    assert "groupadd --gid 1000 HwHiAiUser" in log
    assert "useradd --non-unique --uid 1234 --gid 1000 --create-home --shell /bin/bash danpu" in log
    assert "chown 1234:1000 . output state" in log and (tmp_path / "work/output").is_dir()
    line = f". {HOME_IN_IMAGE}/tools/ascend_entrypoint.sh\n"
    assert (tmp_path / "etc/profile.d/danpu.sh").read_text() == line
    assert (tmp_path / "etc/bash.bashrc").read_text() == "# what the image had\n" + line


def test_commands_keep_a_group_that_exists(tmp_path):
    results, log = run_commands(tmp_path, getent=0)
    assert (
        [result.returncode for result in results] == [0, 0]
        and "groupadd" not in log
        and "useradd" in log
    )


def test_commands_refuse_the_cuda_build_of_torch(tmp_path):
    results, _ = run_commands(tmp_path, torch_requires="nvidia-cudnn-cu13==9.20.0.48")
    assert (
        results[0].returncode == 1
        and results[0].stderr == "torch is the CUDA build: check TORCH_INDEX\n"
    )


# ---- the entry point ----------------------------------------------------------------------------------------

SET_ENV = """export ASCEND_HOME_PATH="{root}/cann"
export LD_LIBRARY_PATH="$ASCEND_HOME_PATH/lib64:$LD_LIBRARY_PATH"
if [ -n "$NEVER_SET_ANYWHERE" ]; then :; fi
false
"""


@pytest.fixture(params=["cann", "ascend-toolkit"])
def root(request, tmp_path):
    """A stand-in for /usr/local/Ascend, of CANN 9 and of CANN 8."""
    (tmp_path / request.param).mkdir()
    (tmp_path / request.param / "set_env.sh").write_text(SET_ENV.format(root=tmp_path))
    return tmp_path


def clean(root: Path) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "ASCEND_ROOT": str(root)}


def entry(root: Path, *command) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", ENTRY, *command], env=clean(root), capture_output=True, text=True
    )


def test_entry_point_gives_the_environment_and_passes_words_and_exit_code(root):
    result = entry(
        root,
        "bash",
        "-c",
        'echo "$ASCEND_HOME_PATH|$LD_LIBRARY_PATH|$1|$#"; exit 75',
        "x",
        "two words",
        "*",
    )
    assert result.returncode == 75 and result.stderr == ""
    assert result.stdout == f"{root}/cann|{root}/cann/lib64:|two words|2\n"


def test_entry_point_becomes_the_command_and_signals_reach_it(root):
    script = 'trap "exit 7" TERM; echo $$; while :; do sleep 0.05; done'
    process = subprocess.Popen(
        ["bash", ENTRY, "bash", "-c", script], env=clean(root), stdout=subprocess.PIPE, text=True
    )
    assert int(process.stdout.readline()) == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 7


def test_shells_of_the_image_source_it_once_and_go_on_as_they_were(root, tmp_path):
    (tmp_path / "line.sh").write_text(f". {ENTRY}\n")
    script = '. "$0"; . "$0"; echo "$LD_LIBRARY_PATH $-"; bash -c \'. "$0"; echo "$LD_LIBRARY_PATH"\' "$0"; false; echo on'
    result = subprocess.run(
        ["bash", "-euc", script, tmp_path / "line.sh"],
        env=clean(root),
        capture_output=True,
        text=True,
    )
    first, second = result.stdout.splitlines()
    paths, options = first.split()
    assert paths == second == f"{root}/cann/lib64:" and {"e", "u"} <= set(options)
    assert result.returncode == 1, "set -e is on again"
    plain = subprocess.run(
        ["sh", "-c", '. "$0"; echo fine', tmp_path / "line.sh"],
        env=clean(root),
        capture_output=True,
        text=True,
    )
    assert plain.stdout == "fine\n" and plain.stderr == ""


def test_without_cann_it_says_so_and_runs_the_command(tmp_path):
    result = entry(tmp_path, "echo", "still")
    assert result.stdout == "still\n" and result.returncode == 0
    assert (
        result.stderr
        == f"no set_env.sh in {tmp_path}/cann or {tmp_path}/ascend-toolkit: there is no CANN in this image\n"
    )


# ---- documentation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_readme_shows_the_same_docker_commands_as_the_file(name):
    def flags(text: str) -> set[str]:
        return set(re.findall(r"--device \S+|-v \S+|--\w[\w-]+ \d+g|docker build -f \S+", text))

    comment = "\n".join(
        line for line in DOCKERFILE.read_text().splitlines() if line.startswith("#   ")
    )
    shown = "\n".join(
        re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.S)
    )
    assert len(flags(comment)) >= 12 and flags(comment) <= flags(shown)
