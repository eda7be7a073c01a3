"""minimind_npu's reinforcement learning beside what others have: rows of verl and GSM8K, TRL's losses, code that is
run against tests; and that a model becomes better by it."""

import json
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT, error_line, expect, finish, own_modules, report, start

from common.data.labels import encode_chat
from common.data.load import load_rows
from common.data.spelling import IGNORE

RECIPE = ROOT / "minimind_npu"
names = "model rl.prompts rl.rewards rl.rollout rl.user_function rl.losses.grpo rl.losses.cispo rl.losses.kl"
names += " toolcall.own_tools"
found = own_modules(RECIPE.name, *names.split())
models, prompts, rewards, rollout, user_function, grpo, cispo, kl, own_tools = found


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(RECIPE / "tokenizer")


def asked(path, tokenizer) -> list:
    """The prompts of all rows of a file."""
    rows, stats = load_rows(str(path), "reward")
    made = [
        {"source": row["source"], **prompts.encode(json.loads(row["row"]), tokenizer, 500, None)}
        for row in rows
    ]
    return prompts.Prompts(made, rows, None).take(range(len(made)))


def said(prompt, text: str):
    return rollout.Answer(prompt, [5, 2], [-1.0, -1.0], "stop", text)


def write(path, rows) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def made(spec: str, **changes):
    args = SimpleNamespace(rewards=spec, length_range="1,9", reward_timeout=5.0)
    args.__dict__.update(changes)
    return rewards.Rewards.of(args)


# ---- rows -----------------------------------------------------------------------------------------------------------

VERL = [
    {
        "data_source": "shop/sums",
        "prompt": [
            {"role": "system", "content": "先想再答。"},
            {"role": "user", "content": f"{price}元一份，买{count}份多少钱？答案写在####后面。"},
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(price * count)},
        "extra_info": {"split": "train", "index": count},
    }
    for price, count in ((12, 3), (7, 8), (30, 4))
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_of_verl_are_asked_and_rewarded(kind, tokenizer, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / f"rows.{kind}"
    rows = [*VERL, VERL[0] | {"reward_model": {"style": "rule", "ground_truth": ""}}]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write(path, rows)
    _, stats = load_rows(str(path), "reward")
    assert stats["dropped"] == {"no ground truth": 1} and stats["shapes"] == {str(path): "verl"}
    with pytest.raises(SystemExit, match="rows of kind reward, not chat"):
        load_rows(str(path), "chat")
    one, *_ = some = asked(path, tokenizer)
    assert [prompt.ground_truth for prompt in some] == ["36", "56", "120"]
    assert one.data_source == "shop/sums" and one.extra_info == {"split": "train", "index": 3}
    assert "先想再答。" in tokenizer.decode(one.ids) and "36" not in tokenizer.decode(one.ids)
    right, wrong = (said(one, f"12乘3。\n#### {number}") for number in (36, 35))
    assert rewards.exact(right, None) == 1 and rewards.exact(wrong, None) == 0

    file = tmp_path / "mine.py"
    file.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    assert data_source == 'shop/sums' and extra_info['split'] == 'train'\n"
        "    return float(ground_truth in solution_str) + extra_info['index']\n"
    )
    part = made(f"{file}:1")
    assert part([right, wrong])[0].tolist() == [4.0, 3.0] and not part.problems
    part.close()


def test_a_ground_truth_may_be_a_list(tokenizer, tmp_path):
    truth = {"style": "rule", "ground_truth": ["三十六", "36"]}
    write(tmp_path / "a.jsonl", [VERL[0] | {"reward_model": truth, "extra_info": None}])
    (one,) = asked(tmp_path / "a.jsonl", tokenizer)
    assert one.ground_truth == ["三十六", "36"] and one.extra_info == {}
    assert rewards.exact(said(one, "36"), None) == 0, "a list is for a function of one's own"


def test_reference_answers_in_gsm8ks_layout_are_right_and_those_of_others_wrong(
    tokenizer, tmp_path
):
    """Sums between <<>>, thousands, money, the result behind ####."""
    rows = []
    for i in range(40):
        boxes = 3 + i
        each = 40 + 7 * i
        total = boxes * each
        asked_for = f"A farm packs {boxes} boxes with {each} eggs each at ${i}.50 a box. How many eggs are there?"
        sums = f"There are {boxes}*{each}=<<{boxes}*{each}={total}>>{total:,} eggs.\n#### {total:,}"
        rows.append({"question": asked_for, "answer": sums})
    write(tmp_path / "gsm.jsonl", rows)
    some = asked(tmp_path / "gsm.jsonl", tokenizer)
    exact = made("exact:1")
    assert exact([said(one, one.reference) for one in some])[0].tolist() == [1.0] * 40
    others = [*some[1:], some[0]]
    given = [said(one, other.reference) for one, other in zip(some, others, strict=True)]
    assert exact(given)[0].tolist() == [0.0] * 40


# ---- TRL's losses ---------------------------------------------------------------------------------------------------


def of_trl(kind: str, new, old, reference, advantages, mask, beta: float, args):
    """What TRL's GRPOTrainer computes of these log-probs, without a model."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new, torch.zeros_like(new), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=beta,
        loss_type=kind,
        epsilon_low=args.clip_low,
        epsilon_high=args.ratio_cap if kind == "cispo" else args.clip_high,
        use_vllm=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=True, steps_per_generation=1),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.ones_like(new, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1],
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("kind", ["dapo", "cispo"])
def test_losses_are_those_of_trl_on_the_same_tensors(kind):
    """Its defaults: dapo is a mean over all tokens, the KL is weighted by the ratio."""
    args = SimpleNamespace(clip_low=0.2, clip_high=0.3, ratio_cap=1.5)
    generator = torch.Generator().manual_seed(0)
    old, reference, moved = (torch.randn(6, 9, generator=generator) for _ in range(3))
    mask = torch.arange(9) < torch.tensor([9, 3, 1, 7, 9, 5])[:, None]
    given = torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 0.0]])
    by_hand = (given - given.mean(1, keepdim=True)) / (given.std(1, keepdim=True) + 1e-4)
    advantages = grpo.advantages(given, by_deviation=True).flatten()
    assert torch.allclose(advantages, by_hand.flatten(), atol=1e-6)
    theirs = (old + 0.4 * moved).requires_grad_()
    ours = theirs.detach().clone().requires_grad_()

    expected = of_trl(kind, theirs, old, reference, advantages, mask, 0.1, args)
    expected.backward()
    token_losses = cispo.token_losses if kind == "cispo" else grpo.token_losses
    gained = advantages[:, None].expand(6, 9)[mask]
    each, clipped = token_losses(ours[mask], old[mask], gained, args)
    loss = (each + 0.1 * kl.penalty(ours[mask], old[mask], reference[mask])).sum() / mask.sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6) and 0 < clipped.sum() < mask.sum()


# ---- code -----------------------------------------------------------------------------------------------------------

TESTED = "assert double(2) == 4\nassert double(-1) == -2"
READS = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]})


def code(text: str) -> str:
    return f"这样写：\n```python\n{text}\n```\n好了。"


def test_code_is_run_against_the_tests_of_its_row(tokenizer, tmp_path):
    rows = [
        {"question": f"写{name}。", "answer": tests}
        for name, tests in (("一", TESTED), ("二", READS))
    ]
    write(tmp_path / "code.jsonl", rows)
    doubled, added = asked(tmp_path / "code.jsonl", tokenizer)
    right = "def double(x):\n    return 2 * x"
    some = made("code:1", reward_timeout=2.0)
    answers = [
        said(doubled, code(right)),
        said(doubled, right),
        said(doubled, code("def double(x):\n    return x * x")),
        said(doubled, code(f"{right}\nraise SystemExit(0)")),
        said(doubled, code(f"{right}\nimport os\nos._exit(0)")),
        said(doubled, code("while True: pass")),
        said(doubled, f"<think>{code(right)}</think>不会。"),
        said(added, code("a, b = map(int, input().split())\nprint(a + b)")),
        said(added, code("print(3)")),
        said(doubled, code("x = 1\n" * 60_000)),
    ]
    total, _ = some(answers)
    assert total[:-1].tolist() == [1, 1, 0, 0, 0, 0, 0, 1, 0] and total[-1].isnan()
    assert list(some.problems) == [
        "code: code has to be below 100,000 bytes and without zero bytes"
    ]


def test_tools_of_the_users_and_the_sandbox_stand_beside_the_built_in_ones(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def add_tools(registry):\n"
        "    registry.add(lambda city: '晴', {'type': 'object', 'properties': {'city': {}}, 'required': ['city']}, name='sky')\n"
    )
    registry = own_tools.registry_of(["python", str(file)])
    assert {"calculator", "python", "sky"} <= registry.tools.keys()
    assert json.loads(registry.call("python", {"code": "print(6 * 7)"})) == {"output": "42"}
    assert "ZeroDivisionError" in registry.call("python", {"code": "1 / 0"})
    assert registry.call("sky", {"city": "北京"}) == "晴"
    with pytest.raises(SystemExit, match="no such file"):
        own_tools.registry_of([str(tmp_path / "none.py")])


# ---- a run ----------------------------------------------------------------------------------------------------------


def test_flags_are_looked_at_before_anything_is_trained(tmp_path):
    script = ["python", RECIPE / "train_rl.py", "--size", "tiny", "--check_flags", "true"]
    expect(finish(start(script)))
    wrong = finish(start([*script, "--rewards", "exat:1"]))
    assert "--rewards exat:1: exact, format" in error_line(wrong, 2)


def taught(folder, tokenizer, pairs) -> None:
    """A model that has been shown some answers a few times."""
    torch.manual_seed(0)
    model = models.build("tiny", len(tokenizer), hidden_size=64, num_hidden_layers=2)
    rows = []
    for question, answer in pairs:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        rows.append(encode_chat(tokenizer, turns, 64))
    width = max(len(row["input_ids"]) for row in rows)
    ids, labels = (
        torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
        for name, fill in (("input_ids", 0), ("labels", IGNORE))
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(30):
        loss = model(ids, labels=labels, attention_mask=(ids != 0).long()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.slow
def test_grpo_raises_the_share_of_right_answers(tokenizer, tmp_path):
    """A small picture of the default run (README): a model that was shown two wrong answers for each right one."""
    rows = [
        {"question": f"{word}{digit}？", "answer": "是的。"}
        for word in "天地人花木"
        for digit in range(8)
    ]
    shown = [(row["question"], said) for row in rows for said in ("是的。", "不知道。", "不会。")]
    taught(tmp_path / "model/final", tokenizer, shown)
    write(tmp_path / "rows.jsonl", rows)
    flags = [
        "--model_name_or_path", tmp_path / "model", "--data_path", tmp_path / "rows.jsonl", "--bf16", "false",
        "--output_dir", tmp_path / "out", "--report_to", "none", "--max_steps", 12, "--save_strategy", "no",
        "--prompts_per_step", 8, "--group_size", 8, "--max_new_tokens", 6, "--eval_ratio", 0.2, "--eval_steps", 12,
        "--learning_rate", 1e-3, "--temperature", 1,
    ]  # fmt: skip
    expect(finish(start(["python", RECIPE / "train_rl.py", *flags])))
    measured = report(tmp_path / "out")["metrics"]
    assert measured["before"]["exact_match"] <= 0.6 and measured["after"]["exact_match"] >= 0.85
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    given = [entry["reward"] for entry in state if "reward" in entry]
    assert given[0] <= 0.6 and sum(given[-4:]) / 4 >= 0.75, given
