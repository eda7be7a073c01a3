"""How minimind_npu computes a step: compiled layers, casts of weights, micro-batches that fit a card."""

import json
import signal
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Features, List, Value
from harness import (
    ROOT,
    expect,
    finish,
    history,
    make_rows,
    own_modules,
    report,
    start,
    weights_sha,
)
from torch.utils._python_dispatch import TorchDispatchMode

from common.fast import attention, losses
from common.runs import memory_plan

NAMES = "model train weights settings loop.batches loop.compiled loop.parallel stages.pretrain"
models, train, weights, settings, batches, compiled, parallel, pretrain = own_modules(
    "minimind_npu", *NAMES.split()
)
RECIPE = ROOT / "minimind_npu"
WIDTH = 64  # tokens of a window
DOCUMENTS = [5, 9, 30, 7, 64, 20, 20, 20, 3, 50, 33, 31, 64, 12, 12, 12, 12, 40, 24, 60, 8, 8, 8, 8]


def small(layers=2, **changes):
    torch.manual_seed(0)
    model = models.build("tiny", 97, hidden_size=64, num_hidden_layers=layers, **changes)
    model.config._attn_implementation = attention.register()
    model.config.use_cache = False
    return losses.use_chunked_loss(model)


def loader(windows=1):
    columns = ("input_ids", "labels")
    rows = [{name: row[name] for name in columns} for row in make_rows(DOCUMENTS, prompt=0)]
    features = Features({name: List(Value("int32")) for name in columns})
    found = batches.TokenRows(Dataset.from_list(rows, features=features), columns)
    order = batches.Order(found, WIDTH, 0)
    return batches.Loader(found, order, windows, WIDTH, 0, torch.device("cpu"))


def take_steps(model, found, count: int, accumulation=1, half=False, on_gradients=lambda: None):
    """-> losses of `count` updates of train.train_step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    training = SimpleNamespace(
        gradient_accumulation_steps=accumulation, bf16=half, fp16=False, world_size=1,
        device=torch.device("cpu"), max_grad_norm=1.0,
    )  # fmt: skip
    objective = train.Objective(model, pretrain.loss).train()
    scaler = train.device.grad_scaler(torch.float32)
    gradients = parallel.Gradients(torch.float32)
    per_step = found.windows * accumulation
    done = []
    for step in range(count):
        bins = found.order.take(step, 0, per_step)
        loss = train.train_step(
            objective, None, found, bins, optimizer, scaler, training, gradients, step
        )
        done.append(loss)
        on_gradients()
    return done


# ---- compiled layers ------------------------------------------------------------------------------------------


class Counter:
    """A back end that counts the graphs it is given and runs them as they are."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


def compile_counted(monkeypatch, model) -> Counter:
    counter = Counter()
    stock = torch.compile

    def counted(function, dynamic, options):
        return stock(function, dynamic=dynamic, backend=counter)

    monkeypatch.setattr(compiled.torch, "compile", counted)
    monkeypatch.setattr(compiled.Compiled, "has_failed", False)
    torch._dynamo.reset()
    compiled.compile_methods(model.model.layers, ["before", "after"])
    return counter


def test_what_is_compiled_does_not_follow_from_what_the_process_has_seen(monkeypatch):
    """12 layers, batches of other documents, generation and evaluation before: each of the two
    functions is compiled once, in the first step, for all layers and steps."""
    model = small(layers=12)
    counter = compile_counted(monkeypatch, model)
    found = loader()
    model.eval()
    model.generate(torch.ones(2, 5, dtype=torch.long), max_new_tokens=12, use_cache=True)
    with torch.no_grad():
        for bins in ([[4]], [[0, 1], [2]]):
            found.windows = len(bins)
            pretrain.loss(model, found.batch(bins), 3.0)
    assert counter.graphs == 0
    found.windows = 1
    bins = found.order.take(0, 0, 10)
    assert len({len(one) for one in bins}) > 2, "windows of the same number of documents"
    take_steps(model, found, 1)
    assert counter.graphs == 2
    take_steps(model, found, 10)
    assert counter.graphs == 2 and not compiled.Compiled.has_failed


def test_a_compiler_that_fails_is_told_and_done_without(monkeypatch, capsys):
    expected = take_steps(small(), loader(), 3)

    def broken(*args, **kwargs):
        raise compiled.TorchDynamoException("no C++ compiler\nand much more")

    model = small()
    monkeypatch.setattr(compiled.Compiled, "has_failed", False)
    monkeypatch.setattr(compiled.torch, "compile", lambda function, **how: broken)
    compiled.compile_methods(model.model.layers, ["before", "after"])
    assert take_steps(model, loader(), 3) == expected
    said = capsys.readouterr().out.strip().splitlines()
    assert said == ["warning: --torch_compile: the layers run uncompiled, since no C++ compiler"]


RUN = [
    "--max_steps", 8, "--save_steps", 4, "--logging_steps", 1, "--eval_generate", 3, "--max_new_tokens", 8,
    "--report_to", "none", "--eval_ratio", 0.01, "--model_max_length", 128, "--hidden_size", 64,
    "--num_hidden_layers", 2, "--optimizer", "adamw", "--torch_compile", "true", "--eval_steps", 3,
    "--max_eval_samples", 8, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2,
    "--bf16", "true", "--gradient_checkpointing", "true",
]  # fmt: skip


@pytest.mark.slow
def test_a_compiled_run_that_goes_on_is_the_same_run(tmp_path):
    """Bit for bit, although the process that goes on has answered no questions before its first
    step; with casts kept over micro-batches and activations that are computed again."""
    faulty = ROOT / "tests/support/faults/faulty_loop.py"
    kernels = tmp_path / "kernels"

    def run(name, fault=""):
        script = [faulty, RECIPE / "train.py", fault] if fault else [RECIPE / "train.py"]
        command = ["python", *script, *RUN, "--output_dir", tmp_path / name]
        return finish(start(command, TORCHINDUCTOR_CACHE_DIR=kernels, PYTHONWARNINGS="ignore"))

    whole = expect(run("whole"))
    assert "uncompiled" not in whole.stdout and list(kernels.rglob("*.cpp"))
    expect(run("cut", "kill@checkpoint-8"), -signal.SIGKILL)
    done = expect(run("cut"))
    assert "checkpoint-4" in done.stdout and "uncompiled" not in done.stdout
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert weights_sha(tmp_path / "cut/final") == weights_sha(tmp_path / "whole/final")
    assert report(tmp_path / "cut")["metrics"] == report(tmp_path / "whole")["metrics"]


# ---- casts ----------------------------------------------------------------------------------------------------


class Casts(TorchDispatchMode):
    """Counts casts from float32 to bfloat16 by what is cast."""

    def __init__(self):
        super().__init__()
        self.of = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            key = args[0].data_ptr()
            self.of[key] = self.of.get(key, 0) + 1
        return op(*args, **kwargs)


@pytest.mark.parametrize("recomputed", [False, True])
def test_each_weight_is_cast_once_a_step(recomputed):
    """Whatever the number of micro-batches, and with activations that are computed again."""
    model = small()
    if recomputed:
        model.gradient_checkpointing_enable()
    names = {p.data_ptr(): name for name, p in model.named_parameters() if p.ndim == 2}
    counts = []
    casts = Casts()

    def step_is_done():
        found = {names[key]: count for key, count in casts.of.items() if key in names}
        counts.append(found)
        casts.of.clear()

    with casts:
        take_steps(model, loader(), 2, accumulation=3, half=True, on_gradients=step_is_done)
    inner = {name: 1 for name in names.values() if "proj" in name}
    assert len(inner) == 14
    for found in counts:
        assert {name: found.get(name) for name in inner} == inner


@pytest.mark.parametrize("experts", [False, True])
def test_casts_once_change_no_more_than_rounding(monkeypatch, experts):
    """Against autocast as it is: every micro-batch casts every weight, every product its input."""
    found = loader()
    ours = take_steps(small(use_moe=experts), found, 6, accumulation=2, half=True)
    monkeypatch.setattr(models, "to_autocast", lambda x: x)
    shared = take_steps(small(use_moe=experts), found, 6, accumulation=2, half=True)
    stock = train.device.autocast

    def plain(dtype):
        """No context around the micro-batches keeps casts: each forward has its own."""
        return nullcontext()

    def forward(self, batch, denominator):
        with stock(torch.bfloat16):
            return self.loss(self.model, batch, denominator)

    monkeypatch.setattr(train.device, "autocast", plain)
    monkeypatch.setattr(train.Objective, "forward", forward)
    theirs = take_steps(small(use_moe=experts), found, 6, accumulation=2, half=True)
    assert shared == theirs, "the same casts, only fewer times"
    assert ours == pytest.approx(theirs, rel=2e-3) and ours != theirs
    assert theirs[-1] < theirs[0]


@pytest.mark.slow
def test_ranks_that_keep_casts_take_the_steps_of_one_process(tmp_path):
    """Two ranks of one window against one process of two, two micro-batches each, in bf16: gradients
    of all micro-batches are exchanged."""
    few = [*RUN, "--torch_compile", "false", "--max_steps", 4, "--eval_generate", 0]
    one = ["python", RECIPE / "train.py", *few, "--output_dir", tmp_path / "one"]
    two = ["python", ROOT / "common/launch.py", 2, RECIPE / "train.py", *few]
    two += ["--per_device_train_batch_size", 1, "--output_dir", tmp_path / "two"]
    for command in (one, two):
        expect(finish(start(command, PYTHONWARNINGS="ignore")))
    expected = history(tmp_path / "one")
    assert history(tmp_path / "two") == pytest.approx(expected, rel=1e-3) and len(expected) == 4


# ---- micro-batches --------------------------------------------------------------------------------------------

GIB = 2**30


@pytest.fixture
def card(monkeypatch, tmp_path):
    """fit(GiB free, flags given, ...) -> (windows of a micro-batch, micro-batches) on a pretended card."""

    def fit(free, given=(), windows=32, name="104m", stage="pretrain", **changes):
        args = dict(stage=stage, use_moe=None, hidden_size=0, num_hidden_layers=0, model_max_length=512,
                    arch="minimind", depth=0, use_lora=False, lora_r=16, target_modules="all-linear")  # fmt: skip
        training = dict(
            per_device_train_batch_size=windows, gradient_accumulation_steps=1, world_size=1,
            bf16=True, fp16=False, optim="adamw_torch_fused", gradient_checkpointing=False,
            hf_deepspeed_config=None, output_dir=str(tmp_path), device=torch.device("cpu"),
            torch_compile=False,
        )  # fmt: skip
        training = SimpleNamespace(**training | changes)
        monkeypatch.setattr(weights.device, "kind", lambda: "npu")
        monkeypatch.setattr(weights.cli, "given_by_user", lambda flag: flag in given)
        monkeypatch.setattr(weights.memory_check.memory, "free_bytes", lambda: free * GIB)
        weights.fit_batch(name, SimpleNamespace(**args), training, range(6400))
        return training.per_device_train_batch_size, training.gradient_accumulation_steps

    return fit


def test_a_card_takes_the_largest_micro_batches_that_fit(card):
    """The windows of a step stay 32, so that what is learned does not depend on the card."""
    found = [card(free) for free in (80, 10, 6, 2)]
    assert all(batch * steps == 32 for batch, steps in found)
    assert found[0] == (32, 1) and found == sorted(found, reverse=True) and len({*found}) == 4
    assert card(0.1) == (1, 32), "the check of memory says that it does not fit"
    assert card(4, gradient_checkpointing=True) > card(4)
    assert card(2, given={"per_device_train_batch_size"}) == (32, 1)
    assert card(2, given={"gradient_accumulation_steps"}) == (32, 1)
    assert card(80, windows=7) == (7, 1) and card(2, windows=7) == (1, 7)


def test_a_run_that_goes_on_keeps_its_micro_batches(card, tmp_path):
    """Another process may have taken memory since, and other micro-batches round otherwise."""
    past = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4, "base": "104m"}
    past |= {"stage": "pretrain", "hidden_size": 0, "num_hidden_layers": 0, "use_moe": None}
    past |= {"model_max_length": 512, "use_lora": False}
    (tmp_path / "run.json").write_text(json.dumps({"settings": past}))
    assert card(80) == (8, 4) and card(2) == (8, 4)
    assert card(80, name="26m") == (32, 1), "another model begins anew in this folder"
    past["gradient_accumulation_steps"] = 2  # of a run with other steps
    (tmp_path / "run.json").write_text(json.dumps({"settings": past}))
    assert card(80) == (32, 1)
    (tmp_path / "run.json").write_text("[")
    assert card(80) == (32, 1)


def saved_bytes(model, batch) -> int:
    """What autograd keeps in a forward pass in bf16, weights and their copies left out."""
    weight_shapes = {weight.shape for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.shape not in weight_shapes:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        pretrain.loss(model, batch, 1.0)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("changes", [{}, {"generation": 2}, {"use_moe": True}])
def test_the_estimate_counts_what_a_layer_keeps(changes):
    found = loader(windows=9)
    batch = found.batch(found.order.take(0, 0, 9))
    sizes = []
    for layers in (1, 3):
        model = small(layers=layers, **changes).train()
        shapes = {name: p.shape for name, p in model.named_parameters()}
        facts = memory_plan.config_facts(model.config) | memory_plan.weight_facts(shapes, True)
        how = memory_plan.Setup(tokens=9 * WIDTH, casts_once=True)
        sizes.append((saved_bytes(model, batch), memory_plan.kept(facts, how)))
    (counted, estimate), (more_counted, more_estimate) = sizes
    assert more_estimate - estimate == pytest.approx(more_counted - counted, rel=0.15)


def test_the_plan_says_how_a_step_is_cut():
    found = loader()
    training = SimpleNamespace(
        max_steps=8, num_train_epochs=1, per_device_train_batch_size=4,
        gradient_accumulation_steps=2, world_size=3,
    )  # fmt: skip
    said = batches.Plan(found, training, {}).describe()
    assert said.endswith(" windows of 64 tokens, 24 a step (2 x 4 on each of 3), 8 steps")
    training.world_size = 1
    assert " 8 a step (2 x 4), 8 steps" in batches.Plan(found, training, {}).describe()
