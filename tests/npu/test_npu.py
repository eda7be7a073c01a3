"""Recipes on Ascend NPUs: the published torch_npu on a simulated CANN (tests/npu/npu_sim), every process in its own.

It proves which calls are made, in which dtype, over which backend, and what is saved; nothing about a chip's speed.
A new recipe adds a line to FLAGS.
"""

import json
import subprocess
import sys

import pytest
from harness import (
    RECIPES,
    ROOT,
    error_line,
    expect,
    finish,
    history,
    largest_difference,
    report,
    shell,
    start,
    weights,
    weights_sha,
)
from npu_sim.simulator import BANNER

from common.runs import checkpoint

# with bf16; fp16 only. Most tests see two of a chip, also those that use one: processes with equal
# variables come from one fork server
A2, FIRST = "Ascend910B2", "Ascend910A"
CHECKS = ROOT / "tests/npu/npu_checks.py"
SAMPLES = [
    "--data_path",
    ROOT / "chatglm_lora/data",
]  # given as a path: without teaching the built-in base first
PAIRS = ["--data_path", ROOT / "baichuan2_dpo/data"]
GENERAL = ["--data_path", ROOT / "internlm_sft/data"]
FLAGS = {  # recipe: what makes a short full run, and a short LoRA run
    "train_qwen": {"full": [], "lora": ["--use_lora", "true"]},
    "chinese_bloom": {"full": [], "lora": ["--use_lora", "true"]},
    "chatglm_lora": {"full": ["--use_lora", "false", *SAMPLES], "lora": SAMPLES},
    "baichuan2_dpo": {"full": ["--use_lora", "false", *PAIRS], "lora": PAIRS},
    "internlm_sft": {"full": ["--use_lora", "false", *GENERAL], "lora": GENERAL},
    "chinese_clip_ddp": {"full": [], "lora": ["--use_lora", "true"]},
    "minimind_npu": {"full": [], "lora": ["--stage", "lora"]},
    "train_llava": {"full": ["--train_type", "full"], "lora": ["--train_type", "lora"]},
}
ANSWERS = ["--eval_generate", 2, "--max_new_tokens", 8]
GENERATES_NOTHING = {"chinese_clip_ddp"}
SHORT = [
    "--max_steps",
    6,
    "--logging_steps",
    1,
    "--report_to",
    "none",
    "--save_strategy",
    "no",
    "--model_max_length",
    128,
    "--max_eval_samples",
    16,
]
PLAIN = 'source common/launch.sh; launch "$0" "$@"'


def check(name, *arguments, env, nproc=0) -> dict:
    """Run one function of npu_checks.py in a process of its own and read the JSON it prints last."""
    launcher = [ROOT / "common/launch.py", nproc] if nproc else []
    done = expect(finish(start([sys.executable, *launcher, CHECKS, name, *arguments], **env)))
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


# ---- devices ----------------------------------------------------------------------------------------------------

CHIPS = {  # name: (half dtype, saturates, variable-length attention)
    "Ascend910B2": ("torch.bfloat16", False, "torch_npu"),
    "Ascend910A": ("torch.float16", True, None),
}


@pytest.mark.parametrize("chip", CHIPS)
def test_a_chip_gets_the_precision_it_has(npu, chip):
    half, saturates, varlen = CHIPS[chip]
    said = check("facts", env=npu(chip, 2))
    assert BANNER in said["stderr"]
    assert (said["kind"], said["count"], said["name"], said["backend"]) == ("npu", 2, chip, "hccl")
    assert (said["half"], said["saturates"], said["varlen"]) == (half, saturates, varlen)
    assert (said["bf16"], said["fp16"]) == (half == "torch.bfloat16", half == "torch.float16")
    assert said["trainer"] == "npu:0" and said["deepspeed"] == "npu"
    assert said["optim"] == "adamw_torch"
    refused = said["refused"]
    assert refused["defaults"] is None
    assert "--optim adamw_torch" in refused["fp16 fused"] or saturates
    assert "--optim adamw_torch" in refused["npu fused"] and "--torch_compile" in refused["compile"]
    if saturates:
        assert (
            "no bf16" in refused["bf16"]
            and chip in refused["bf16"]
            and "no bf16" in said["autocast"]
        )
    else:
        assert (
            refused["bf16"] is None
            and refused["bf16 fused"] is None
            and said["autocast"] == "works"
        )


def test_visible_devices(npu):
    assert check("facts", env=npu(A2, 4, ASCEND_RT_VISIBLE_DEVICES="1,3"))["count"] == 2


def test_no_npu_is_a_cpu_run_for_every_library(npu):
    """torch_npu with no card: DeepSpeed would choose npu all the same."""
    said = check("facts", env=npu(A2, 0))
    assert {said[k] for k in ("kind", "trainer", "accelerate", "deepspeed")} == {"cpu"} and said[
        "count"
    ] == 0
    done = expect(finish(start([sys.executable, "-m", "common.device"], **npu(A2, 0))))
    assert done.stdout.split() == ["cpu", "0"] and "sees no NPU" in done.stderr


def test_cpu_by_choice_leaves_torch_npu_alone(npu):
    said = check("facts", env=npu(A2, 2, DANPU_DEVICE="cpu"))
    assert BANNER not in said["stderr"] and not said["loaded"]
    assert {said[k] for k in ("kind", "trainer", "accelerate", "deepspeed")} == {"cpu"}


# ---- installations that cannot work -----------------------------------------------------------------------------


def without_cann(npu) -> dict:
    env = {
        k: v for k, v in npu(A2, 2).items() if not k.startswith("ASCEND") and k != "LD_LIBRARY_PATH"
    }
    return env | {"HOME": "/nonexistent", "LD_LIBRARY_PATH": ""}


def test_the_wheel_without_cann_is_one_line(npu):
    done = expect(finish(start([sys.executable, "-m", "common.device"], **without_cann(npu))))
    assert done.stdout.split() == ["cpu", "0"] and len(done.stderr.splitlines()) == 1, done.stderr
    assert (
        "CANN is missing" in done.stderr
        and "set_env.sh" in done.stderr
        and "libhccl" in done.stderr
    )


@pytest.mark.parametrize("wanted, code", [("", 1), ("cpu", 0)])
def test_cards_that_cannot_be_used_are_not_a_silent_cpu_run(npu, wanted, code):
    program = "from common import device; device.npu_hardware = lambda: True; raise SystemExit(device.main())"
    done = finish(start([sys.executable, "-c", program], **without_cann(npu), DANPU_DEVICE=wanted))
    assert done.returncode == code
    if code:
        assert error_line(done, 1).startswith(
            "launch: this machine has an NPU, but CANN is missing"
        )
        assert "set_env.sh" in done.stderr and "DANPU_DEVICE=cpu" in done.stderr
    else:
        assert done.stdout.split() == ["cpu", "0"] and done.stderr == ""


def test_versions_that_do_not_belong_together(npu, tmp_path):
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu/__init__.py").write_text(
        "raise RuntimeError('an unknown symbol somewhere deep')"
    )
    (tmp_path / "torch_npu-2.7.1.post8.dist-info").mkdir()
    (tmp_path / "torch_npu-2.7.1.post8.dist-info/METADATA").write_text(
        "Name: torch-npu\nVersion: 2.7.1.post8\n"
    )
    done = expect(finish(start([sys.executable, "-m", "common.device"], PYTHONPATH=tmp_path)))
    assert (
        "torch-npu 2.7.1.post8 belongs to torch 2.7.1" in done.stderr
        and "requirements-npu.txt" in done.stderr
    )
    assert len(done.stderr.splitlines()) == 1 and "unknown symbol" not in done.stderr


# ---- launch.sh --------------------------------------------------------------------------------------------------


def test_cann_is_sourced_from_its_usual_place(npu, tmp_path):
    """No ASCEND variable and no library path of CANN: launch.sh finds set_env.sh under the home folder."""
    toolkit = npu(A2, 2)["ASCEND_HOME_PATH"].rsplit("/", 1)[0]
    (tmp_path / "Ascend").mkdir()
    (tmp_path / "Ascend/ascend-toolkit").symlink_to(toolkit)
    program = (
        "set -euo pipefail; source common/launch.sh; source_cann; npu_settings; "
        'echo "$ASCEND_HOME_PATH $HCCL_CONNECT_TIMEOUT $HCCL_EXEC_TIMEOUT $-"; python -m common.device'
    )
    env = without_cann(npu) | {"HOME": tmp_path, "NPU_SIM_QUIET": 1, "HCCL_EXEC_TIMEOUT": 99}
    done = expect(finish(start(["bash", "-c", program], **env)))
    first, second = done.stdout.splitlines()
    assert first.split()[0].startswith(str(tmp_path))
    assert first.split()[1:3] == ["1800", "99"], "what the user set stays"
    assert {"e", "u"} <= set(first.split()[3]), "set_env.sh must not change the shell's options"
    assert second.split() == ["npu", "2"]


def test_devices_are_given_in_the_order_that_the_driver_reads(npu):
    program = "source common/launch.sh; choose_devices; echo $ASCEND_RT_VISIBLE_DEVICES; python -m common.device"
    done = expect(finish(start(["bash", "-c", program], **npu(A2, 4), DEVICES="3,1")))
    assert done.stdout.split() == ["1,3", "npu", "2"]
    line = error_line(shell(ROOT / "train_qwen/train_lora.sh", **npu(A2, 2), DEVICES="all"), 2)
    assert "DEVICES=all" in line


def test_more_processes_than_cards(npu):
    line = error_line(shell(ROOT / "train_qwen/train_lora.sh", **npu(A2, 2), NPROC=3), 2)
    assert "NPROC=3" in line and "2 npu" in line


def test_a_flag_that_this_chip_gets_wrong_is_one_line(npu):
    line = error_line(
        shell(ROOT / "train_qwen/train_lora.sh", "--bf16", "true", **npu(FIRST, 2)), 2
    )
    assert "--bf16 true: Ascend910A has no bf16" in line


def test_deepspeed_without_ascend_home_path(npu):
    unset = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
    env = {k: v for k, v in npu(A2, 2).items() if k not in unset} | {"HOME": "/nonexistent"}
    command = [
        sys.executable,
        ROOT / "train_qwen/train.py",
        "--deepspeed",
        ROOT / "train_qwen/ds_zero2.json",
    ]
    assert "ASCEND_HOME_PATH" in error_line(finish(start(command, **env)), 2)


CHECKED = {  # name: (chip, variables, exit code, {line: (status, words)})
    "bf16": (
        A2,
        {},
        0,
        {"device": ("ok", "2 x Ascend910B2 over hccl"), "dtype": ("ok", "bf16: Ascend910B2")},
    ),
    "fp16, order": (
        FIRST,
        {"ASCEND_RT_VISIBLE_DEVICES": "1,0"},
        0,
        {"dtype": ("warn", "fp16: Ascend910A has no bf16"), "settings": ("warn", "1,0")},
    ),
    "too many": (A2, {"NPROC": 9}, 1, {"settings": ("MISSING", "NPROC=9")}),
    "no operators": (
        A2,
        {"ASCEND_OPP_PATH": "/nowhere"},
        0,
        {"torch_npu": ("warn", ""), "device": ("ok", "CPU")},
    ),
}


@pytest.mark.parametrize("case", CHECKED)
def test_check_env(npu, case):
    chip, variables, code, expected = CHECKED[case]
    command = [sys.executable, "-m", "tools.check_env", "--json", "--offline"]
    done = finish(start(command, **npu(chip, 2, **variables)))
    assert done.returncode == code, done.stdout + done.stderr
    page = json.loads(done.stdout)
    assert page["ready"] == (code == 0)
    for name, (status, words) in expected.items():
        line = page["checks"][name]
        assert line["status"] == status and words in line["fact"] + line["remedy"], (name, line)
    if case == "bf16":
        assert "2 processes on Ascend910B2 in bf16" in page["verdict"]


# ---- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chip", [A2, FIRST])
def test_packed_equals_unpacked(npu, chip):
    said = check("packing", env=npu(chip, 2))
    assert BANNER in said.pop("stderr")
    assert len(said) == 2
    for dtype, found in said.items():
        assert found["loss"] < 1e-6 and found["grads"] < (
            1e-5 if dtype == "torch.float32" else 2e-2
        ), (dtype, found)
        assert found["paths"] == (["_npu_varlen"] if dtype == "torch.bfloat16" else [])


@pytest.mark.parametrize("chip", [A2, FIRST])
def test_packed_equals_unpacked_with_alibi(npu, chip):
    """Bloom: the fused kernel with its bias in columns where there is one, one document after the other elsewhere."""
    said = check("packing_alibi", env=npu(chip, 2))
    assert BANNER in said.pop("stderr") and len(said) == 2
    for dtype, found in said.items():
        fused, exact = dtype == "torch.bfloat16", dtype == "torch.float32"
        assert found["paths"] == (
            ["_npu_varlen", "add_columns"] if fused else ["document_by_document"]
        ), (
            dtype,
            found,
        )
        assert found["loss"] < 1e-6 and found["grads"] < (1e-5 if exact else 2e-2), (dtype, found)
        assert found["of_cpu_loss"] < (1e-5 if exact else 5e-3), (dtype, found)
        assert found["of_cpu_grads"] < (1e-4 if exact else 5e-2), (dtype, found)


@pytest.mark.parametrize("chip", [A2, FIRST])
def test_packed_equals_unpacked_with_prefixes(npu, chip):
    """ChatGLM: two calls of the fused kernel, prefixes among themselves and the rest; one mask where there is none."""
    said = check("packing_prefix", env=npu(chip, 2))
    assert BANNER in said.pop("stderr") and len(said) == 2
    for dtype, found in said.items():
        exact = dtype == "torch.float32"
        assert found["paths"] == (["_npu_varlen"] if dtype == "torch.bfloat16" else []), (
            dtype,
            found,
        )
        assert found["loss"] < 1e-5 and found["grads"] < (1e-5 if exact else 5e-2), (dtype, found)
        assert found["of_cpu_loss"] < (1e-5 if exact else 5e-3), (dtype, found)
        assert found["of_cpu_grads"] < (1e-4 if exact else 1e-1), (dtype, found)


TRAINERS = ("qwen", "bloom", "chatglm", "dpo", "padded")


def test_the_host_does_not_wait_for_the_device_in_a_micro_batch(npu, tmp_path):
    """Once in an optimizer step, for the norm of the gradients. transformers looks whether padded
    rows need a mask."""
    said = check("host_reads", tmp_path, *TRAINERS, env=npu(A2, 2))
    assert BANNER in said.pop("stderr")
    for name in TRAINERS:
        assert said[name]["steps"] == 2 and said[name]["step"] == {"_to_copy in finite.py:read": 2}
        ours = [where for where in said[name]["micro"] if "_ignore_causal_mask_sdpa" not in where]
        assert not ours and (name == "padded" or not said[name]["micro"]), (name, said[name])


def test_an_overflow_on_one_rank_parts_nobody(npu):
    """910A saturates: torch's own scaler sees the overflow on that rank alone."""
    said = {
        which: check("scaler", which, env=npu(FIRST, 2), nproc=2) for which in ("ours", "torch")
    }
    assert said["ours"]["equal"] and said["ours"]["scales"][2] < said["ours"]["scales"][1]
    assert not said["torch"]["equal"], (
        "torch's scaler keeps the ranks together now: device.grad_scaler may be simpler"
    )


def test_a_teachers_vectors_are_exchanged_on_the_device(npu, tmp_path):
    """They come from the CPU, and HCCL takes nothing from there."""
    said = check("features", tmp_path, env=npu(A2, 2), nproc=2)
    assert said["values"] == [[i + 1, 1] for i in range(7)]


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_sees_an_overflow_of_a_chip_that_saturates(npu, stage):
    config = ROOT / f"train_qwen/ds_zero{stage}.json"
    said = check("deepspeed_overflow", "guarded", config, env=npu(FIRST, 2), nproc=2)
    assert said["skipped"] == [0, 0, 1, 1] and said["scale"] == 128
    if stage == 2:
        said = check("deepspeed_overflow", "stock", config, env=npu(FIRST, 2), nproc=2)
        assert said["skipped"][-1] == 0, (
            "DeepSpeed sees it by itself now: engine.patch_overflow_check may go"
        )


def test_what_is_steered_around_is_still_broken(npu):
    """When this fails, a release mended something: the refusal in common/device.py can go."""
    said = check(
        "known_defects", env=npu(A2, 1)
    )  # in a process of its own: as a user's imports are
    assert said["scaler"].startswith("torch_npu.")
    assert said["found"] == {
        "npu fused trains on stale gradients": True,
        "fused AdamW takes no grad_scaler": True,
    }


@pytest.mark.slow
def test_generation_equals_that_on_the_cpu(npu, tiny_run):
    model = tiny_run[0] / "final"
    here, there = check("answers", model, env={}), check("answers", model, env=npu(A2, 2))
    assert there["device"] == "npu:0" and here["device"] == "cpu"
    assert there["answers"] == here["answers"] and "小丹" in here["answers"][0]


# ---- recipes ----------------------------------------------------------------------------------------------------

CASES = {  # name: (chip, cards, DeepSpeed, kind of run)
    "910B ZeRO-2 x2 full": (A2, 2, True, "full"),
    "910B hccl x2 LoRA": (A2, 2, False, "lora"),
    "910A ZeRO-2 x2 LoRA": (FIRST, 2, True, "lora"),
}


def test_every_recipe_is_here():
    assert set(FLAGS) == set(RECIPES)


# train_qwen in every way; the others, whose trainer is the same, on one chip; minimind_npu, which has
# a loop of its own, also in test_minimind_turns_one_dial
EVERY_WAY = "train_qwen"
RUNS = [(case, EVERY_WAY) for case in CASES]
RUNS += [("910B ZeRO-2 x2 full", recipe) for recipe in RECIPES if recipe != EVERY_WAY]


@pytest.mark.slow
@pytest.mark.parametrize("case, recipe", RUNS)
def test_recipe_trains(npu, tmp_path, recipe, case):
    chip, cards, deepspeed, kind = CASES[case]
    answers = [] if recipe in GENERATES_NOTHING else ANSWERS
    flags = [*SHORT, *answers, *FLAGS[recipe][kind]]
    if (
        recipe != EVERY_WAY
    ):  # without the shells' choice of a Python, which takes as long as the run
        config = ["--deepspeed", ROOT / recipe / "ds_zero2.json"] if deepspeed else []
        command = [
            "python",
            ROOT / "common/launch.py",
            cards,
            ROOT / recipe / "train.py",
            "--output_dir",
            tmp_path,
        ]
        done = finish(start([*command, *config, *flags], **npu(chip, 2)))
    elif deepspeed:
        done = shell(ROOT / recipe / "train_zero2.sh", *flags, OUTPUT=tmp_path, **npu(chip, 2))
    else:
        done = finish(
            start(
                ["bash", "-c", PLAIN, ROOT / recipe / "train.py", *flags],
                OUTPUT=tmp_path,
                NPROC=cards,
                **npu(chip, 2),
            )
        )
    expect(done)
    assert BANNER in done.stderr and "fall back to run on the CPU" not in done.stderr
    facts, losses = report(tmp_path), history(tmp_path)
    assert facts["device"] == chip and facts["world_size"] == cards
    assert facts["dtype"] == ("bfloat16" if chip == A2 else "float16")
    assert facts["engine"] == ("zero-2" if deepspeed else "ddp" if cards > 1 else "single")
    assert (
        losses[6] < losses[1]
        and facts["metrics"]["after"]["loss"] < facts["metrics"]["before"]["loss"]
    )
    assert all("lora_" in name for name in weights(tmp_path / "final")) == (kind == "lora")


QUICK = ["--model_name", "tiny", "--epochs", 2]


@pytest.mark.slow
def test_quickstart_killed_in_a_save_continues_bit_exactly(npu, tmp_path):
    """In fp16: the scaler and the device's random state go on, too."""
    flags = [*QUICK, "--num_samples", 120, "--max_length", 64, "--batch_size", 4]
    flags += ["--warmup_steps", 2]
    quickstart = ROOT / "minimind_npu/quickstart/quickstart.py"
    fault = [ROOT / "tests/support/faults/faulty_loop.py", quickstart, "kill-in-save@2"]
    for name, script, code in (
        ("whole", [quickstart], 0),
        ("killed", fault, 1),
        ("killed", [quickstart], 0),
    ):
        launch = [sys.executable, ROOT / "common/launch.py", 1, *script]
        command = [*launch, *flags, "--output_dir", tmp_path / name]
        expect(finish(start(command, **npu(FIRST, 2))), code)
    assert weights_sha(tmp_path / "whole/final") == weights_sha(tmp_path / "killed/final")
    whole, killed = report(tmp_path / "whole"), report(tmp_path / "killed")
    assert whole["dtype"] == "float16" and whole["metrics"] == killed["metrics"]
    assert whole["device"] == FIRST
    assert whole["metrics"]["after"]["loss"] < 0.9 * whole["metrics"]["before"]["loss"]


# ---- the numbers of a whole run ---------------------------------------------------------------------------------

RECIPE = ROOT / "train_qwen"
NUMBERS = [
    "--max_steps", 8, "--save_steps", 4, "--logging_steps", 1, "--eval_generate", 0, "--report_to", "none",
    "--eval_ratio", 0.02, "--learning_rate", 1e-3, "--model_max_length", 64,
]  # fmt: skip
ZERO2 = ["--deepspeed", RECIPE / "ds_zero2.json"]


def train(output, *flags, nproc=1, fault=None, code=0, env):
    script = (
        [ROOT / "tests/support/faults/faulty.py", RECIPE / "train.py", fault]
        if fault
        else [RECIPE / "train.py"]
    )
    command = [
        "python",
        ROOT / "common/launch.py",
        nproc,
        *script,
        *NUMBERS,
        "--output_dir",
        output,
        *flags,
    ]
    env = env | {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error"}
    return expect(finish(start(command, **env)), code)


@pytest.mark.slow
def test_losses_are_those_of_the_cpu(npu, tmp_path):
    """float32: one CPU process, two NPUs over hccl, two under ZeRO-2; 910A in fp16 stays close."""
    fp32, one, two = ["--bf16", "false"], [], ["--per_device_train_batch_size", 1]
    cpu = {"DANPU_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}
    runs = {
        "cpu": (one + fp32, 1, cpu),
        "npu x2": (two + fp32, 2, npu(A2, 2)),
        "npu ZeRO-2 x2": (two + fp32 + ZERO2, 2, npu(A2, 2)),
        "fp16": (one, 1, npu(FIRST, 2)),
    }
    for name, (flags, nproc, env) in runs.items():
        train(tmp_path / name, *flags, "--save_strategy", "no", nproc=nproc, env=env)
    facts = report(tmp_path / "fp16")
    assert (facts["device"], facts["dtype"], facts["engine"]) == (FIRST, "float16", "single")
    expected = history(tmp_path / "cpu")
    assert len(expected) == 8 and expected[8] < 0.9 * expected[1]
    for name in list(runs)[1:]:
        losses, bound = history(tmp_path / name), 0.02 if name == "fp16" else 1e-4
        worst = max(abs(losses[step] - expected[step]) / expected[step] for step in expected)
        assert worst < bound, f"{name}: {worst:.1e}"
        if name != "fp16":
            assert (
                largest_difference(
                    weights(tmp_path / "cpu/final"), weights(tmp_path / name / "final")
                )
                < 1e-4
            )


@pytest.mark.slow
def test_killed_run_continues_bit_exactly(npu, tmp_path):
    """fp16 with the scaler over hccl; what the chip adds to a checkpoint are scaler and generator."""
    env = npu(FIRST, 2)
    train(tmp_path / "whole", nproc=2, env=env)
    train(tmp_path / "killed", nproc=2, fault="kill-in-optimizer@2", code=1, env=env)
    again = train(tmp_path / "killed", nproc=2, env=env)
    assert "continuing from" in again.stdout and BANNER in again.stderr
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    assert weights_sha(tmp_path / "killed/final") == weights_sha(tmp_path / "whole/final")


@pytest.mark.slow
def test_the_trainer_lets_deepspeed_see_an_overflow(npu, tmp_path):
    flags = [*ZERO2, "--save_strategy", "no"]
    done = train(tmp_path, *flags, nproc=2, fault="overflow-on-rank-0@5", env=npu(FIRST, 2))
    assert "overflow noticed: True" in done.stdout
    losses = history(tmp_path)
    assert losses[8] < losses[1]


@pytest.mark.slow
def test_fp16_that_overflows_twenty_times_in_a_row_stops(npu, tmp_path):
    """The scaler skips every step from the third on; a 910A has nothing but fp16."""
    flags = ["--max_steps", 30, "--save_steps", 2, "--eval_strategy", "no"]
    done = train(tmp_path, *flags, fault="inf-grads@3", code=1, env=npu(FIRST, 2))
    assert "step 22: a batch overflowed fp16 for the 20th step in a row" in done.stderr
    for folder in checkpoint.all_checkpoints(tmp_path):
        assert all(tensor.isfinite().all() for tensor in weights(folder).values())


@pytest.mark.slow
def test_demo(npu, tiny_run):
    """The chat page in Chromium, and its stream equal to generate(), with the model on an NPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-qs",
        "-p",
        "no:cacheprovider",
        ROOT / "tests/recipes/train_qwen/test_app.py",
    ]
    select = ["-k", "test_stream_ends_with or test_chat_in_chromium or test_an_answer_ends"]
    done = expect(finish(start([*command, *select], **npu(A2, 2), DANPU_TEST_RUN=tiny_run[0])))
    assert (
        BANNER in done.stdout + done.stderr
        and " passed" in done.stdout
        and "skipped" not in done.stdout
    )


def test_only_the_tests_know_the_simulator():
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    for name in files:
        if not name.startswith("tests/") and name.endswith(
            (".py", ".sh", ".json", ".txt", ".md", ".ipynb", ".toml")
        ):
            text = (ROOT / name).read_text(encoding="utf-8").lower()
            assert "npu_sim" not in text and "npu-sim" not in text and "simulator.py" not in text, (
                name
            )


@pytest.mark.slow
def test_minimind_cuts_a_step_into_what_the_card_holds(npu, tmp_path):
    """The same four windows a step, and the same losses, on a card of 1 GiB and one of 60 MiB."""
    flags = ["--stage", "dpo", "--hidden_size", 64, "--max_steps", 3, "--eval_generate", 0]
    flags += ["--max_eval_samples", 4, "--report_to", "none", "--save_strategy", "no"]
    found = {}
    for name, memory, cut in (("large", 1, "1 x 4"), ("small", 0.06, "2 x 2")):
        command = [
            "python",
            ROOT / "minimind_npu/train.py",
            *flags,
            "--output_dir",
            tmp_path / name,
        ]
        done = expect(finish(start(command, **npu(A2, 1, NPU_SIM_MEM_GB=memory))))
        assert f" 4 a step ({cut}), 3 steps" in done.stdout
        found[name] = history(tmp_path / name)
    assert found["small"] == pytest.approx(found["large"], rel=1e-3) and len(found["large"]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("chip, cards", [(A2, 2), (FIRST, 1)])
def test_minimind_turns_one_dial(npu, tmp_path, chip, cards):
    """nanochat's network: Muon in bf16, its matrices shared by two cards; AdamW where there is no bf16, and why."""
    flags = [*SHORT, "--depth", 1, "--arch", "nanochat", "--eval_generate", 0]
    launch = ["python", ROOT / "common/launch.py", cards, ROOT / "minimind_npu/train.py"]
    rows = ["--data_path", ROOT / "minimind_npu/data/pretrain/sums_1.jsonl"]
    size = ["--per_device_train_batch_size", 4 // cards, "--muon_lr", 0.02]
    done = expect(
        finish(start([*launch, *flags, *rows, *size, "--output_dir", tmp_path], **npu(chip, 2)))
    )
    assert BANNER in done.stderr and "fall back to run on the CPU" not in done.stderr
    facts, losses = report(tmp_path), history(tmp_path)
    assert (facts["device"], facts["world_size"]) == (chip, cards)
    assert facts["dtype"] == ("bfloat16" if chip == A2 else "float16")
    assert ("rates    Muon 0.02, AdamW" in done.stdout) == (chip == A2)
    assert (f"(Muon computes in bfloat16, which {FIRST} lacks)" in done.stdout) == (chip == FIRST)
    assert losses[6] < losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("chip, cards, algorithm", [(A2, 2, "ppo"), (FIRST, 1, "grpo")])
def test_minimind_learns_from_rewards(npu, tmp_path, chip, cards, algorithm):
    """bf16 on two cards over HCCL, fp16 with its scaler on one; what is sampled there is what is trained."""
    flags = [
        "--size",
        "tiny",
        "--hidden_size",
        32,
        "--num_hidden_layers",
        2,
        "--max_steps",
        2,
        "--algorithm",
        algorithm,
    ]
    flags += [
        "--prompts_per_step",
        4,
        "--max_new_tokens",
        8,
        "--rewards",
        "repetition:1 length:1",
        "--report_to",
        "none",
    ]
    flags += [
        "--length_range",
        "3,5",
        "--max_eval_samples",
        4,
        "--save_steps",
        1,
        "--output_dir",
        tmp_path,
    ]
    launch = ["python", ROOT / "common/launch.py", cards, ROOT / "minimind_npu/train_rl.py"]
    done = expect(finish(start([*launch, *flags], **npu(chip, 2))))
    assert BANNER in done.stderr and "fall back to run on the CPU" not in done.stderr
    assert "sampler and policy differ by" in done.stdout and set(history(tmp_path)) == {1, 2}
    facts = report(tmp_path)
    assert (facts["device"], facts["world_size"]) == (chip, cards)
    assert facts["dtype"] == ("bfloat16" if chip == A2 else "float16")
