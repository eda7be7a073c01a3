"""minimind_npu/train_rl.py as a user runs it: two processes are one, exact after kills, refusals, what it leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import (
    ROOT,
    error_line,
    expect,
    history,
    largest_difference,
    own_modules,
    report,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, NanoChatForCausalLM

sys.path.insert(0, str(ROOT / "tests/support/faults"))
from loops import Loop, newest_step, outcome

flags, nanochat = own_modules("minimind_npu", "rl.flags", "nanochat")
SUMS = "minimind_npu/data/rl/sums.jsonl"
SIZE = ["--size", "tiny", "--hidden_size", 32, "--num_hidden_layers", 2]
SHORT = [
    "--max_steps", 3, "--save_steps", 1,
    "--report_to", "none", "--eval_ratio", 0.02, "--max_eval_samples", 6, "--bf16", "false", "--eval_steps", 2,
    "--model_max_length", 64, "--max_new_tokens", 12, "--learning_rate", 1e-3, "--clip_high", 0.01, "--kl_coef", 0.1, "--target_kl", 0,
    "--max_grad_norm", 0, "--lr_scheduler_type", "constant",
]  # fmt: skip
HOW = {
    "grpo": ["--prompts_per_step", 4, "--group_size", 4, "--slots", 5],
    "ppo": ["--prompts_per_step", 12, "--num_iterations", 2, "--vf_coef", 0.5],
    "spo": ["--prompts_per_step", 12, "--num_train_epochs", 3],
}
REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return sum(solution_str.encode()) % 11 / 10
"""


@pytest.fixture(scope="module")
def loop(tmp_path_factory):
    """Algorithm -> its run of three steps; what a random model says is rewarded by its bytes."""
    reward = tmp_path_factory.mktemp("reward") / "bytes.py"
    reward.write_text(REWARD)

    def make(algorithm, start=SIZE):
        more = ["--algorithm", algorithm, "--rewards", f"{reward}:1 length:0.1", *HOW[algorithm]]
        return Loop("minimind_npu/train_rl.py", (*start, *SHORT, *more), SUMS)

    return make


@pytest.fixture(scope="module")
def whole(loop, tmp_path_factory):
    """(algorithm, processes) -> folder of the run that nothing happens to."""
    made = {}

    def run(algorithm, nproc=1):
        if (algorithm, nproc) not in made:
            made[algorithm, nproc] = tmp_path_factory.mktemp("whole") / "out"
            expect(loop(algorithm).run(made[algorithm, nproc], nproc=nproc))
        return made[algorithm, nproc]

    return run


def told(out):
    """What each step told of itself."""
    state = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry for entry in state if "reward" in entry}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", HOW)
def test_two_processes_are_one(whole, algorithm):
    """Answers, rewards, advantages and updates; without the mean of the gradients the weights are others."""
    one, two = whole(algorithm), whole(algorithm, 2)
    assert told(one).keys() == told(two).keys() == {1, 2, 3}
    for step, expected in told(one).items():
        for name, value in expected.items():
            # of 300 tokens some lie at the border, to the last bit
            bound = 0.02 if name.endswith("share") else 2e-4
            assert told(two)[step][name] == pytest.approx(value, abs=bound), (step, name)
    assert largest_difference(weights(two / "final"), weights(one / "final")) < 1e-4
    assert report(one)["metrics"]["after"] == pytest.approx(report(two)["metrics"]["after"])


KILLS = {  # in the rollout, at the rewards, in an update, in a save
    "grpo": ["kill-call@rl.rollout:Sampler.play:3", "kill-in-file@training.pt:2"],
    "ppo": ["kill-call@loop.parallel:update:7"],
    "spo": ["kill-call@rl.rewards:Rewards.__call__:3"],
}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", KILLS)
def test_killed_anywhere_it_ends_as_if_nothing_had_been(loop, whole, tmp_path, algorithm):
    """Bit for bit: random numbers, the value head of ppo, the tracker of spo."""
    for fault in KILLS[algorithm]:
        expect(loop(algorithm).run(tmp_path, fault=fault), -signal.SIGKILL)
        assert newest_step(tmp_path) >= 1, fault
    again = expect(loop(algorithm).run(tmp_path))
    assert "continuing from" in again.stdout and "sampler and policy differ" in again.stdout
    assert outcome(tmp_path) == outcome(whole(algorithm))
    assert told(tmp_path) == told(whole(algorithm))


@pytest.mark.slow
def test_nanochats_network_too_and_transformers_opens_what_it_has_learned(loop, tmp_path):
    """Of a capped head no product can be cooled before it: toys are sampled at 1.5."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "minimind_npu/tokenizer")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = nanochat.build(nanochat.config_of(len(tokenizer), **sizes))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    own = loop("grpo", ["--from_weight", tmp_path / "sft"])
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    expect(own.run(killed, fault="kill-in-file@training.pt:2"), -signal.SIGKILL)
    for out in (killed, whole):
        said = expect(own.run(out)).stdout
        assert "sampler and policy differ by" in said
    assert outcome(killed) == outcome(whole)
    learned = AutoModelForCausalLM.from_pretrained(whole / "final")
    assert type(learned) is NanoChatForCausalLM and learned.config.final_logit_softcapping == 15
    for name, before in model.state_dict().items():
        assert not torch.equal(before, learned.state_dict()[name]), name


@pytest.mark.slow
def test_a_rank_killed_in_an_update_ends_both_and_the_run_goes_on(loop, whole, tmp_path):
    killed = loop("grpo").run(tmp_path, nproc=2, fault="kill-call@loop.parallel:update:3")
    assert "rank 1 was killed by SIGKILL" in expect(killed, 1).stderr
    assert newest_step(tmp_path) == 1
    expect(loop("grpo").run(tmp_path, nproc=2))
    assert outcome(tmp_path) == outcome(whole("grpo", 2))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(loop, whole, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], check=True)
    try:
        line = error_line(loop("spo").run(disk / "out", fault="full-disk@checkpoint-2"), 1)
        assert "no space left" in line and newest_step(disk / "out") == 1
        (disk / "filler").unlink()
        expect(loop("spo").run(disk / "out"))
        assert outcome(disk / "out") == outcome(whole("spo"))
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_what_a_run_leaves_and_tells(whole):
    out = whole("grpo")
    assert {p.name for p in out.iterdir()} >= {
        "final", "grpo_32.safetensors", "report.md", "loss.png", "reward.png", "exact_match.png", "clip_share.png",
        "kl.png", "entropy.png", "ratio.png", "no_signal.png", "answer_tokens.png",
        "reward_bytes.png", "reward_length.png", "cut.png",
    }  # fmt: skip
    steps = told(out)
    names = (
        "reward reward_bytes reward_length answer_tokens cut entropy no_signal ratio clip_share kl"
    )
    assert set(names.split()) <= steps[1].keys()
    assert steps[3]["clip_share"] > 0, "a second update meets older answers, which are clipped"
    assert steps[3]["kl"] > steps[1]["kl"] > 0
    assert {"value_loss", "value_clip_share"} <= told(whole("ppo"))[1].keys()
    assert not (whole("ppo") / "no_signal.png").exists(), "it has no groups"
    facts = report(out)
    assert facts["stage"] == "grpo" and facts["metrics"]["before"].keys() == {
        "exact_match",
        "answer_tokens",
    }
    assert set(history(out)) == {1, 2, 3}


@pytest.mark.slow
def test_a_run_without_any_reward_ends_and_says_why(loop, tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("def compute_score(**_): return 'good'")
    done = loop("grpo").run(tmp_path / "out", "--rewards", f"{bad}:1")
    assert "step 1: no answer has a reward" in error_line(done, 1)
    assert "16 answer(s) without a reward" in done.stdout and "returned 'good'" in done.stdout
    assert not list((tmp_path / "out").glob("checkpoint-*"))


# ---- mistakes: before anything is loaded ----------------------------------------------------------------------------


def parsed(monkeypatch, *more):
    start = ["--size", "tiny", "--output_dir", "never", "--report_to", "none"]
    monkeypatch.setattr(sys, "argv", ["train_rl.py", *start, *map(str, more)])
    return flags.parse_args()


@pytest.mark.parametrize("more, words", [
    (["--algorithm", "dapo"], "--algorithm dapo: grpo, ppo"), (["--group_size", 1], "so 2 or more"),
    (["--prompts_per_step", 15], "a multiple of 2, 1 process(es)"), (["--temperature", 0], "above 0"),
    (["--algorithm", "spo", "--group_size", 4], "so 1"), (["--max_new_tokens", 128], "holds the prompt too"),
    (["--algorithm", "reinforce", "--num_iterations", 2], "one update for a rollout"), (["--beta", 1], "unknown flag"),
    (["--gradient_accumulation_steps", 2], "not for reinforcement learning"), (["--clip_low", 1.5], "below 1"),
    (["--gae_lambda", 1.5, "--algorithm", "ppo"], "from 0 to 1"), (["--mini_batches", 0], "1 or more"),
    (["--lr_scheduler_type", "polynomial"], "cosine, linear"), (["--optim", "adafactor"], "the loop has adamw_torch"),
    (["--eval_generate", 8], "unknown flag"),
])  # fmt: skip
def test_usage_mistakes(monkeypatch, capsys, more, words):
    with pytest.raises(SystemExit) as stop:
        parsed(monkeypatch, *more)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and words in lines[0]


def test_defaults_follow_the_algorithm(monkeypatch, capsys):
    args, training, base = parsed(monkeypatch, "--clip_high", 0.3)
    assert args.group_size > 1 and base == "tiny" and training.learning_rate > 1e-5
    answers = args.prompts_per_step * args.group_size
    for algorithm in ("ppo", "spo"):
        args, _, _ = parsed(monkeypatch, "--algorithm", algorithm)
        assert (args.group_size, args.prompts_per_step) == (1, answers), "as many answers a step"
    args, _, _ = parsed(monkeypatch, "--algorithm", "reinforce", "--clip_high", 0.3)
    assert args.mini_batches == 1 and "--clip_high: no effect" in capsys.readouterr().out
    unused = [
        "--length_range",
        "1,9",
        "--reward_model",
        "x",
        "--judge_url",
        "y",
        "--judge_model",
        "z",
    ]
    parsed(monkeypatch, *unused, "--reward_timeout", 5, "--rewards", "exact:1 repetition:0.1")
    said = capsys.readouterr().out
    for name in (*unused[::2], "--reward_timeout"):
        assert f"{name}: no effect" in said, name
    parsed(monkeypatch, *unused, "--reward_timeout", 5, "--rewards", "length model judge")
    assert "no effect" not in capsys.readouterr().out
    args, training, _ = parsed(monkeypatch, "--hidden_size", 256)
    assert (args.model_max_length, training.max_steps, training.learning_rate) == (1024, -1, 1e-6)


def test_nothing_to_go_on_from_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(flags, "OUTPUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_rl.py"])
    with pytest.raises(SystemExit, match="train_rl.sh trains it first"):
        flags.parse_args()


def test_the_shell_trains_a_model_to_go_on_from_only_where_there_is_none(tmp_path):
    """With stand-ins for run_all.sh and the launcher."""
    recipe = tmp_path / "mine"
    (tmp_path / "common").mkdir()
    recipe.mkdir()
    (recipe / "train_rl.sh").write_text((ROOT / "minimind_npu/train_rl.sh").read_text())
    (tmp_path / "common/launch.sh").write_text('launch() { echo "launch $*"; }\n')
    (recipe / "run_all.sh").write_text('echo "run_all $STAGES"\n')

    def said(*words, **env):
        command = ["bash", recipe / "train_rl.sh", *words]
        done = subprocess.run(
            command, env={**os.environ, **env}, capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    first, second, third = said("--algorithm", "ppo")
    assert "--check_flags true --algorithm ppo" in first, "mistakes come before any training"
    assert second == "run_all tokenizer pretrain sft" and third.endswith(
        "train_rl.py --algorithm ppo"
    )
    assert said("--help") == [f"launch {recipe}/train_rl.py --help"]
    (tmp_path / "common/launch.sh").write_text('launch() { echo "launch $*"; exit 2; }\n')
    command = ["bash", recipe / "train_rl.sh", "--algorithm", "dapo"]
    wrong = subprocess.run(command, capture_output=True, text=True)
    assert wrong.returncode == 2 and len(wrong.stdout.splitlines()) == 1
    (tmp_path / "common/launch.sh").write_text('launch() { echo "launch $*"; }\n')
    for words, env in ((["--from_weight", "x"], {}), (["--size", "26m"], {}), ([], {"MODEL": "x"})):
        assert len(said(*words, **env)) == 1, (words, env)
    final = Path(tmp_path, "output/mine/sft/final")
    final.mkdir(parents=True)
    (final / "model.safetensors").touch()
    assert said("--seed", "1") == [f"launch {recipe}/train_rl.py --seed 1"]
