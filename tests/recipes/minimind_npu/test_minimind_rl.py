"""minimind_npu's reinforcement learning, part by part: losses against plain loops, rollouts with the prompt of a
group computed once, rewards and what breaks in them."""

import copy
import json
import math
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
import torch
from harness import ROOT, own_modules

from common.fast import losses as token_losses

RECIPE = ROOT / "minimind_npu"
NAMES = """
model nanochat engine.generation engine.groups engine.weight_first rl.policy rl.rollout rl.rewards rl.user_function rl.prompts rl.advantages rl.figures
toolcall.tools rl.losses.ppo rl.losses.grpo rl.losses.cispo rl.losses.spo rl.losses.reinforce
"""
found = own_modules("minimind_npu", *NAMES.split())
(
    models,
    nanochat,
    generation,
    grouped,
    weights,
    policies,
    rollout,
    rewards,
    user_function,
    prompts,
    advantages,
    figures,
    tools,
    *of_losses,
) = found
ppo, grpo, cispo, spo, reinforce = of_losses
ARGS = SimpleNamespace(clip_low=0.2, clip_high=0.3, ratio_cap=1.5, length_range="2,4")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def policy(seed=0, values=False, temperature=1.0, arch="minimind", **changes):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    if arch == "nanochat":
        model = nanochat.cap_in_head(nanochat.build(nanochat.config_of(60, **sizes)).eval())
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.4)
    else:
        model = models.build("tiny", 60, **sizes | changes).eval()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(6.0) if p.ndim > 1 else p.copy_(torch.rand_like(p) + 0.5)
    model.generation_config.eos_token_id = list(range(2, 12))
    token_losses.use_chunked_loss(model)
    made = policies.Policy(model, temperature, values)
    if values:
        torch.nn.init.normal_(made.value_head.weight)
    return made.eval()


def prompt(ids, row=0, ground_truth="", **extra):
    return prompts.Prompt(
        row, ids, "", ground_truth, ground_truth, "data", {"messages": []} | extra
    )


def answer(text="", tokens=(5, 6, 2), ground_truth="", finished="stop"):
    asked = prompt([1, 4], ground_truth=ground_truth, line="7")
    return rollout.Answer(asked, list(tokens), [-1.0] * len(tokens), finished, text)


# ---- losses ---------------------------------------------------------------------------------------------------------


def by_hand(name, new, old, advantage):
    """The loss of one token, and whether it is clipped."""
    ratio = math.exp(new - old)
    if name == "cispo":
        return -min(ratio, 1.5) * advantage * new, ratio > 1.5
    if name == "reinforce":
        return -advantage * new, False
    held = min(max(ratio, 0.8), 1.3)
    return -min(ratio * advantage, held * advantage), held * advantage < ratio * advantage


@pytest.mark.parametrize("name", ["ppo", "grpo", "spo", "cispo", "reinforce"])
def test_losses_and_gradients_are_those_of_a_loop_over_tokens(name):
    module = {"ppo": ppo, "grpo": grpo, "spo": spo, "cispo": cispo, "reinforce": reinforce}[name]
    old = randn(40) - 2
    new = (old + 0.4 * randn(40, seed=1)).requires_grad_()
    advantage = randn(40, seed=2)
    each, clipped = module.token_losses(new, old, advantage, ARGS)
    tokens = list(zip(new.tolist(), old.tolist(), advantage.tolist(), strict=True))
    expected = [by_hand(name, *token) for token in tokens]
    assert torch.allclose(each, torch.tensor([loss for loss, _ in expected]), atol=1e-5)
    assert clipped.tolist() == [is_clipped for _, is_clipped in expected]
    assert name == "reinforce" or 4 < clipped.sum() < 36
    each.sum().backward()
    for slope, (now, before, gain), (_, is_clipped) in zip(new.grad, tokens, expected, strict=True):
        ratio = math.exp(now - before)
        factor = {"cispo": min(ratio, 1.5), "reinforce": 1.0}.get(
            name, 0.0 if is_clipped else ratio
        )
        assert slope.item() == pytest.approx(-factor * gain, abs=1e-5)


def test_groups_without_some_rewards_are_those_of_the_others():
    nan = float("nan")
    groups = torch.tensor([[1.0, 0.0, nan, 0.0], [0.5, 0.5, 0.5, nan], [nan, nan, nan, nan]])
    for by_deviation in (True, False):
        found = grpo.advantages(groups, by_deviation)
        assert torch.equal(
            found[0, [0, 1, 3]], grpo.advantages(groups[:1, [0, 1, 3]], by_deviation)[0]
        )
        assert found[0, 2] == 0 and not found[1:].any()
    assert torch.allclose(grpo.advantages(groups, False)[0, :2], torch.tensor([2 / 3, -1 / 3]))
    assert grpo.without_signal(groups).tolist() == [False, True, True]


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_of_a_value_head_are_those_of_a_loop_over_time(gamma, lam):
    values, given, lengths = randn(5, 13), randn(5, seed=1), [13, 1, 8, 0, 5]
    found, returns = ppo.estimate_advantages(values, given, torch.tensor(lengths), gamma, lam)
    for i, length in enumerate(lengths):
        later = 0.0
        for t in reversed(range(length)):
            after = values[i, t + 1].item() if t + 1 < length else 0.0
            reward = given[i].item() if t + 1 == length else 0.0
            later = reward + gamma * after - values[i, t].item() + gamma * lam * later
            assert found[i, t].item() == pytest.approx(later, abs=1e-5)
            assert returns[i, t].item() == pytest.approx(later + values[i, t].item(), abs=1e-5)
        assert not found[i, length:].any()


def test_the_value_head_is_held_where_it_moves_far():
    values = torch.tensor([0.5, 0.05, -0.5, 0.9], requires_grad=True)
    each, held = ppo.value_losses(values, torch.zeros(4), torch.tensor([1.0, 1.0, 1.0, 0.0]), 0.2)
    # towards the return it may go 0.2 and no further; away from it nothing holds it
    assert each.tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.95**2, 0.5 * 1.5**2, 0.5 * 0.9**2])
    assert held.tolist() == [True, False, False, False]
    each.sum().backward()
    assert values.grad[0] == 0 and values.grad[1] != 0


def test_the_tracker_is_a_beta_distribution_whose_counts_fade():
    tracker, alpha, beta, last = spo.Tracker(3), 1.0, 1.0, None
    tracker.total += torch.tensor([1.0, 2.0])  # half of all answers so far were right
    for step, (reward, log_prob) in enumerate(
        [(1, -1.0), (0, -0.98), (1, -0.9), (1, -2.0), (0, -2.0)]
    ):
        expected = alpha / (alpha + beta)
        found = tracker.baselines(torch.tensor([1]), torch.tensor([float(reward)]))
        assert found.item() == pytest.approx(expected, abs=1e-6), step
        rho = 1.0 if last is None else min(0.96, max(0.5, 2 ** (-abs(log_prob - last) / 0.06)))
        alpha, beta, last = rho * alpha + reward, rho * beta + 1 - reward, log_prob
        tracker.update(torch.tensor([1]), torch.tensor([float(reward)]), torch.tensor([log_prob]))
    assert tracker.weight.tolist() == pytest.approx([0.0, alpha + beta, 0.0])
    again = spo.Tracker(3)
    again.load_state_dict(tracker.state_dict())
    both = torch.tensor([0, 1]), torch.tensor([0.0, float("nan")])
    assert torch.equal(again.baselines(*both), tracker.baselines(*both))
    tracker.update(torch.tensor([2]), torch.tensor([float("nan")]), torch.tensor([-1.0]))
    assert tracker.weight[2] == 0, "an answer without a reward says nothing"
    spread = spo.advantages(torch.tensor([1.0, 0.0, float("nan")]), torch.tensor([0.5, 0.5, 0.5]))
    assert spread.tolist() == pytest.approx([1.0, -1.0, 0.0], abs=1e-3)


def test_a_cut_answer_tells_the_tracker_its_reward_but_not_how_far_the_policy_has_moved():
    tracker = spo.Tracker(1)
    args = SimpleNamespace(prompts_per_step=1)
    training = SimpleNamespace(world_size=1, process_index=0)
    weights = []
    for is_cut in (False, True, False):
        one = answer()
        one.trained = [not is_cut] * 3  # --mask_cut
        experiences = [policies.Experience.of(one)]
        advantages.tracked_advantages(args, training, experiences, torch.ones(1), tracker)
        weights.append(tracker.weight.item())
        assert tracker.log_prob.item() == -1
    assert weights == pytest.approx([3.0, 0.96 * 3 + 1, 0.96 * (0.96 * 3 + 1) + 1])


# ---- rollouts -------------------------------------------------------------------------------------------------------

SAMPLING = dict(group_size=4, max_new_tokens=12, temperature=0.7, slots=3, model_max_length=64)
DRAWN = torch.Generator().manual_seed(3)
ASKED = [torch.randint(12, 60, (n,), generator=DRAWN).tolist() for n in (7, 1, 19, 12)]


def play(made, step=1, **changes):
    args = SimpleNamespace(**SAMPLING | changes)
    tokenizer = SimpleNamespace(
        eos_token_id=2, chat_template=None, decode=lambda ids, **_: str(ids)
    )
    sampler = rollout.Sampler(made.model, tokenizer, args, torch.float32, seed=1)
    return sampler.play({place: prompt(ids) for place, ids in enumerate(ASKED)}, step)


def computed(made, answers, tokens=10_000):
    experiences = [policies.Experience.of(one) for one in answers]
    log_probs, values = policies.look_at(made, experiences, tokens, 0, torch.device("cpu"))
    return log_probs, values, experiences


@pytest.mark.parametrize("how", [{}, {"use_moe": True}, {"arch": "nanochat"}])
def test_log_probs_of_sampling_are_those_of_the_policy(how):
    """Also where a cap stands between head and temperature."""
    made = policy(temperature=0.7, **how)
    answers = play(made)
    assert len({len(one.tokens) for one in answers}) > 2, "slots are refilled"
    for tokens in (10_000, 40, 1):  # all in one row; in several, groups cut apart; one at a time
        found, _, experiences = computed(made, answers, tokens)
        sampled = torch.cat([one.log_probs for one in experiences])
        assert torch.allclose(torch.cat(found), sampled, atol=1e-4)
    rollout.refuse_disagreement(sampled, torch.cat(found), torch.float32)
    colder = policy(temperature=1.0, **how)
    with pytest.raises(SystemExit, match="differ from the policy's by"):
        rollout.refuse_disagreement(sampled, torch.cat(computed(colder, answers)[0]), torch.float32)


def test_log_probs_are_those_of_what_top_k_and_top_p_leave():
    logits = randn(24, seed=3).repeat(200, 1) * 2
    how = generation.Sampling(temperature=0.8, top_k=7, top_p=0.8, log_probs=True)
    asked = [generation.Request([5], generation.replace(how, seed=i)) for i in range(200)]
    tokens, log_probs = generation.choose(logits, asked)
    chances = (logits[0] / 0.8).softmax(-1)
    left = chances.topk(7).values / chances.topk(7).values.sum()
    kept = (left.cumsum(0) - left < 0.8).sum()
    expected = chances / chances.topk(int(kept)).values.sum()
    assert torch.allclose(log_probs, expected[tokens].log(), atol=1e-5)
    assert set(tokens.tolist()) <= set(chances.topk(int(kept)).indices.tolist())


def test_the_prompt_of_a_group_is_computed_once():
    made, widths = policy(), []
    made.model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for slots in (3, 8, 64):
        widths.clear()
        shared = play(made, slots=slots)
        tokens = sum(len(one.tokens) for one in shared)
        assert sum(widths) == tokens + sum(len(ids) - 1 for ids in ASKED), slots
        assert [one.tokens for one in shared] == [one.tokens for one in play(made, slots=2)]
    alone = generation.Engine(made.model, slots=1)
    for one, i in zip(shared, range(16), strict=True):
        how = generation.Sampling(
            12, 0.7, seed=f"1:1:{i // 4}:{i % 4}", ends=frozenset(range(2, 12))
        )
        request = alone.submit(one.prompt.ids, how)
        alone.running.clear()  # nothing of an earlier request is there to be copied
        while alone.step():
            pass
        assert request.tokens == one.tokens


def test_answers_of_a_slot_see_their_prompt_and_their_own_tokens_alone(monkeypatch):
    """Also where the cache grows, slots move, and a prompt has more answers than there are rows."""
    made = policy()
    monkeypatch.setattr(grouped, "FIRST", 8)
    monkeypatch.setattr(grouped, "STEP", 4)
    ends = frozenset(range(2, 12))
    how = [generation.Sampling(20, 0.7, seed=i, ends=ends, log_probs=True) for i in range(5)]
    together = [[generation.Request(ids, one) for one in how] for ids in ASKED]
    grouped.Groups(made.model, rows=3, max_length=64).answer(together)
    alone = generation.Engine(made.model, slots=4, share_beginnings=False)
    for group in together:
        for request in group:
            other = alone.submit(request.prompt, request.sampling)
            while alone.step():
                pass
            assert (request.tokens, request.finished) == (other.tokens, other.finished)
            assert request.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    with pytest.raises(ValueError, match="a prompt of 64 tokens in a window of 64"):
        grouped.Groups(made.model, 3, 64).answer([[generation.Request([5] * 64, how[0])]])


def test_layers_with_the_weight_first_compute_the_same_with_the_weights_as_they_are():
    made = policy().model
    other = weights.weight_first(made)
    ids = torch.tensor([ASKED[2]])
    assert any(isinstance(module, weights.WeightFirst) for module in other.modules())
    for _ in range(2):
        assert torch.allclose(other(ids).logits, made(ids).logits, atol=1e-4)
        with torch.no_grad():
            made.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    linear = torch.nn.Linear(5, 7)
    x = randn(2, 3, 5)
    assert torch.allclose(weights.WeightFirst(linear)(x), linear(x), atol=1e-6)


def test_an_answer_depends_on_its_place_and_step_alone():
    made = policy()
    first = [one.tokens for one in play(made)]
    assert len({tuple(tokens) for tokens in first[:4]}) > 1, "answers of a group differ"
    assert first == [one.tokens for one in play(made, slots=64)]
    assert first != [one.tokens for one in play(made, step=2)]


def test_half_precision_samples_from_weights_as_they_are_now():
    made = policy()
    args = SimpleNamespace(**SAMPLING)
    tokenizer = SimpleNamespace(eos_token_id=2, chat_template=None, decode=lambda ids, **_: "")
    sampler = rollout.Sampler(made.model, tokenizer, args, torch.bfloat16, seed=1)
    with torch.no_grad():
        made.model.model.norm.weight.mul_(3)
    sampler.play({0: prompt(ASKED[0])}, 1)
    assert torch.equal(sampler.copy.model.norm.weight, made.model.model.norm.weight.bfloat16())
    assert made.model.model.norm.weight.dtype is torch.float32


def test_gradients_are_those_of_each_answer_alone_and_left_out_tokens_have_none():
    made = policy(values=True).train()
    answers = play(made)
    answers[1].trained = [False] * len(answers[1].tokens)
    answers[2].trained[1:3] = [False] * len(answers[2].trained[1:3])
    experiences = [policies.Experience.of(one) for one in answers]
    factors = [randn(len(one), seed=i) for i, one in enumerate(experiences)]

    def gradients(loss):
        loss.backward()
        kept = {name: p.grad.clone() for name, p in made.named_parameters()}
        made.zero_grad()
        return kept

    where = torch.device("cpu")
    for one, factor in zip(experiences, factors, strict=True):
        one.advantages = factor
    batch = policies.pack(experiences, 0, where)
    log_probs, values, _ = made(batch)
    together = gradients(((log_probs + values) * batch["advantages"]).sum())
    total = 0.0
    for one, factor in zip(experiences, factors, strict=True):
        ids = torch.tensor([one.answer.prompt.ids + one.answer.tokens])
        size = len(one.answer.tokens)
        hidden = made.model.model(input_ids=ids).last_hidden_state[0, -size - 1 : -1]
        every = made.model.lm_head(hidden).log_softmax(-1).gather(1, ids[0, -size:, None])[:, 0]
        kept = torch.tensor(one.answer.trained)
        total = total + ((every + made.value_head(hidden)[:, 0])[kept] * factor).sum()
    alone = gradients(total)
    for name in alone:
        scale = max(1.0, alone[name].abs().max().item())
        assert torch.allclose(together[name], alone[name], atol=2e-4 * scale), name


# ---- tools in the loop ----------------------------------------------------------------------------------------------


def test_conversations_with_tools_are_played_together_and_observations_are_not_trained(monkeypatch):
    """A policy that is made to call: its log-probs in training are those of the context that it was in."""
    from transformers import AutoTokenizer

    from common.data.labels import encode_prompt

    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
    torch.manual_seed(0)
    model = models.build("tiny", len(tokenizer), hidden_size=48, num_hidden_layers=2).eval()
    token_losses.use_chunked_loss(model)
    made = policies.Policy(model, 0.9, has_values=False).eval()
    registry = tools.built_in()
    spelled = lambda text: tokenizer(text, add_special_tokens=False).input_ids
    call = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "%s"}}\n</tool_call><|im_end|>'
    asked = []
    for i, question in enumerate(("3乘4等于几？", "你好。")):
        messages = [{"role": "user", "content": question}]
        ids = encode_prompt(tokenizer, messages, registry.schemas)
        extra = {"messages": messages, "tools": registry.schemas}
        asked.append(prompts.Prompt(i, ids, question, "12", "12", "data", extra))
    started = {tuple(one.ids): one for one in asked}

    def said(request):
        begun = started.get(tuple(request.prompt))
        if begun is None:
            return spelled("是12。<|im_end|>")
        return spelled(call % "3*4") if begun.row == 0 else spelled("好<|im_end|>")

    def choose(logits, requests):
        forced = [said(request)[len(request.tokens)] for request in requests]
        log_probs = (logits / 0.9).log_softmax(-1)
        return torch.tensor(forced), log_probs[range(len(forced)), forced]

    monkeypatch.setattr(generation, "choose", choose)
    args = SimpleNamespace(
        group_size=2,
        max_new_tokens=60,
        temperature=0.9,
        slots=3,
        model_max_length=1024,
        max_turns=3,
    )
    sampler = rollout.Sampler(model, tokenizer, args, torch.float32, 1, registry)
    answers = sampler.play(dict(enumerate(asked)), 1)
    assert [one.text for one in answers] == ["是12。"] * 2 + ["好"] * 2
    assert [one.calls for one in answers] == [1, 1, 0, 0] and {one.finished for one in answers} == {
        "stop"
    }
    first = answers[0]
    seen = [token for token, own in zip(first.tokens, first.trained, strict=True) if not own]
    own = [token for token, own in zip(first.tokens, first.trained, strict=True) if own]
    assert "12" in tokenizer.decode(seen) and "<tool_response>" in tokenizer.decode(seen)
    assert own == spelled(call % "3*4") + spelled("是12。<|im_end|>"), "end tokens are trained"
    found, _, experiences = computed(made, answers)
    assert [len(one) for one in experiences] == [sum(one.trained) for one in answers]
    sampled = torch.cat([one.log_probs for one in experiences])
    assert torch.allclose(torch.cat(found), sampled, atol=1e-4)


def test_what_a_row_did_with_tools_is_left_to_the_policy():
    shown = [{"type": "function", "function": {"name": "f"}}]
    turns = [
        ("system", "s"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", ""),
        ("tool", "1"),
    ]
    messages = [{"role": role, "content": text} for role, text in [*turns, ("assistant", "d")]]
    assert prompts.asked_of({"messages": messages}, shown) == (messages[:4], shown)
    assert prompts.asked_of({"messages": messages, "tools": [1]}, shown)[1] == [1]
    assert prompts.asked_of({"messages": messages}, None) == (messages[:6], None)


def test_rows_that_cannot_be_asked_or_compared_are_left_out():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
    known = tools.built_in().schemas
    spoken = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    other = copy.deepcopy(known[0])
    other["function"]["parameters"]["required"] = []
    for unknown in (other, {"type": "function", "function": {"name": "weather"}}, {"function": 1}):
        with pytest.raises(ValueError, match="nobody would run them"):
            prompts.encode(
                {"messages": spoken, "tools": [known[1], unknown]}, tokenizer, 999, known
            )
    for row in ({"messages": spoken, "tools": known[1:]}, {"messages": spoken}):
        assert prompts.encode(row, tokenizer, 999, known)["input_ids"]
    function = {"name": "date", "arguments": {"date": "2024-2-28"}}
    calls = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
    with pytest.raises(ValueError, match="without words"):
        prompts.encode({"messages": [spoken[0], calls]}, tokenizer, 999, known)


# ---- rewards --------------------------------------------------------------------------------------------------------


def test_rules_say_what_an_answer_is_worth():
    assert rewards.exact(answer("3加5等于8。", ground_truth="8"), ARGS) == 1
    assert rewards.exact(answer("先算3加5等于9。\n#### 9", ground_truth="8"), ARGS) == 0
    assert rewards.in_form(answer("<think>\n一\n</think>\n<answer>\n2\n</answer>"), ARGS) == 1
    assert rewards.in_form(answer("<think>\n一\n2"), ARGS) == 0
    assert rewards.length(answer(tokens=[5] * 3), ARGS) == 1
    assert (
        rewards.length(answer(tokens=[5] * 8), ARGS)
        == rewards.length(answer(tokens=[5]), ARGS)
        == 0.5
    )
    with_a_tool = answer(tokens=[5] * 8)
    with_a_tool.trained = [True] * 3 + [False] * 5
    assert rewards.length(with_a_tool, ARGS) == 1, "what the tool said is none of its length"
    assert rewards.repetition(answer("今天天气很好，我们去公园。"), ARGS) == 1
    assert rewards.repetition(answer("共舞" * 50), ARGS) < 0.05
    assert rewards.repetition(answer("好"), ARGS) == 1


def made(spec, **changes):
    args = SimpleNamespace(
        rewards=spec,
        length_range="2,4",
        reward_model="",
        judge_url="",
        judge_model="",
        reward_timeout=1.0,
    )
    args.__dict__.update(changes)
    return rewards.Rewards.of(args)


def test_parts_are_weighted_and_what_is_missing_leaves_its_answer_out():
    some = made("exact:2 length:0.5")
    total, parts = some(
        [answer("8", ground_truth="8"), answer("9", tokens=[5] * 8, ground_truth="8")]
    )
    assert total.tolist() == [2.5, 0.25] and parts["length"].tolist() == [1.0, 0.5]
    some.parts["other"] = (1.0, lambda answers: [float("inf"), 1.0])
    total, _ = some([answer("8", ground_truth="8")] * 2)
    assert total.isnan().tolist() == [True, False]


def test_means_of_parts_are_of_the_answers_that_have_a_reward():
    sums = {"answers": 4, "rewarded": 2, "reward": 1.0, "reward_my": 1.0, "tokens": 8, "cut": 1}
    found = figures.of_rollout(sums | {"surprise": 4.0, "calls": 0})
    assert found["reward"] == found["reward_my"] == found["without_reward"] == 0.5


def test_parts_are_called_by_file_and_function():
    assert [rewards.label_of(name) for name in ("exact", "a/my.py", "a/my.py::f")] == [
        "exact", "my", "my_f"
    ]  # fmt: skip


@pytest.mark.parametrize("spec, words", [
    ("exact:1 exact:2", "another part is called exact"), ("a/my.py b/my.py:2", "another part is called my"),
    ("exat:1", "--rewards exat:1: exact, format"), ("exact:0", "at least one with a weight"), ("exact:nan", "finite"),
    ("model:1", "needs --reward_model"), ("judge", "needs --judge_url"), ("", "at least one"),
])  # fmt: skip
def test_what_is_no_reward_is_a_usage_error(spec, words, capsys):
    with pytest.raises(SystemExit) as stop:
        made(spec)
    assert stop.value.code == 2 and words in capsys.readouterr().err


USER = """
import os, time
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    print("to be seen beside the training")
    assert (data_source, ground_truth, extra_info["line"]) == ("data", "8", "7")
    if solution_str == "raise":
        raise RuntimeError("no idea")
    if solution_str == "hang":
        time.sleep(60)
    if solution_str == "die":
        os._exit(3)
    return {"nan": float("nan"), "text": "1.0", "none": None, "dict": {"score": 0.5, "acc": 1}}.get(solution_str, 0.25)
"""


def test_a_function_of_the_users_is_scored_and_its_faults_are_counted(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(USER)
    some = made(f"{file}:2 exact:0", reward_timeout=2)
    pipes = len(os.listdir("/proc/self/fd"))
    said = ["good", "raise", "dict", "nan", "text", "hang", "none", "die", "good"]
    total, parts = some([answer(text, ground_truth="8") for text in said])
    assert [None if math.isnan(x) else x for x in total.tolist()] == [
        0.5, None, 1.0, None, None, None, None, None, 0.5
    ]  # fmt: skip
    assert set(parts) == {"mine", "exact"}
    reasons = " | ".join(some.problems)
    for words in (
        "RuntimeError: no idea (line 7)", "returned nan", "returned '1.0', which is no number",
        "took longer than 2 s", "returned None", "ended with code 3",
    ):  # fmt: skip
        assert words in reasons, words
    assert len(os.listdir("/proc/self/fd")) == pipes, "those of processes that ended are closed"
    assert sum(some.problems.values()) == 6 and set(some.examples.values()) == {"data:7"}
    worker = some.parts["mine"][1]
    with pytest.raises(
        SystemExit, match="5 answers in a row took longer than --reward_timeout 0.05 s"
    ):
        worker.timeout = 0.05
        worker([answer("hang", ground_truth="8")] * 6)
    with pytest.raises(OSError):
        os.kill(worker.process.pid, 0)


@pytest.mark.parametrize("text, name, words", [
    ("def other(): pass", "", "has no function compute_score"), ("import nothing_like_it", "", "ModuleNotFoundError"),
    ("1 +", "", "SyntaxError"), ("raise SystemExit('bye')", "", "bye"), (None, "", "no such file"),
    ("def other(**_): pass", "::others", "has no function others"),
])  # fmt: skip
def test_a_file_without_a_reward_is_refused_before_anything_is_loaded(tmp_path, text, name, words):
    file = tmp_path / "mine.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit, match=words):
        made(f"{file}{name}:1")


class Endpoint(BaseHTTPRequestHandler):
    said = {"好": "8", "差": "评分：2.5/10", "怪": "不知道", "多": "11", "断": None, "转": "9"}

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        asked = body["messages"][0]["content"]
        reply = self.said[asked[-1]]
        assert body["model"] == "judge-1" and "Reference:\n8" in asked
        is_moved = asked.endswith("转") and self.path.startswith("/v1")
        self.send_response(307 if is_moved else 200 if reply else 500)
        if is_moved:
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        if is_moved:
            return
        self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

    def log_message(self, *_):
        pass


def test_a_judge_is_asked_and_what_it_does_not_say_is_counted():
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/v1/"
    some = made("judge:1", judge_url=url, judge_model="judge-1", reward_timeout=20)
    answers = [answer(text, ground_truth="8") for text in Endpoint.said]
    total, _ = some(answers)
    server.shutdown()
    server.server_close()
    assert total[:2].tolist() == pytest.approx([0.8, 0.25]) and total[2:].isnan().all()
    assert some.problems == {
        "the judge said no number from 0 to 10": 2,
        "the judge cannot be asked": 2,
    }
    assert some(answers[:1])[0].isnan().all(), "a judge that is gone ends no process"


def test_a_reward_model_scores_conversations_in_batches(tmp_path):
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(RECIPE / "tokenizer")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=1, pad_token_id=0,
    )  # fmt: skip
    model = Qwen2ForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    some = made("model:1", reward_model=str(tmp_path))
    some.load_models(SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False))
    asked = [{"role": "user", "content": "5加2等于几？"}]
    answers = [answer(text) for text in ("7", "5加2等于7。", "不知道，也许是很大的一个数吧。")]
    for one in answers:
        one.prompt.extra["messages"] = asked
    total, _ = some(answers)
    for one, score in zip(answers, total.tolist(), strict=True):
        turns = [*asked, {"role": "assistant", "content": one.text}]
        ids = tokenizer(
            tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False
        ).input_ids
        assert score == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit, match="has no chat template"):
        made("model:1", reward_model=str(tmp_path))
    two = copy.deepcopy(config)
    two.num_labels = 2
    two.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="has 2 outputs"):
        made("model:1", reward_model=str(tmp_path))
