"""The softmax of the head as torch compiles it, here for the CPU, against the plain one."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from harness import ROOT, environment
from test_losses import build, make_batch, small_chunks  # noqa: F401
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from common import device
from common.fast import losses, softmax

ROWS = 24
VOCAB = 301


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """The compiled way on a CPU, in the state of a process that has just started; gives the number
    of graphs that were compiled since."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(losses, "CPU_ROWS", ROWS)
    monkeypatch.setattr(softmax, "is_compiled", lambda kind, vocabulary: not softmax._failed)
    monkeypatch.setattr(softmax, "_failed", [])
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def chunk(rows, dtype, seed=0):
    """A buffer with `rows` of its rows in use, the others as bad as memory can be."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((ROWS, VOCAB), torch.nan, dtype=dtype)
    buffer[:rows] = 4 * torch.randn(rows, VOCAB, generator=generator)
    targets = torch.randint(VOCAB, (rows,), generator=generator)
    targets[::2] = buffer[:rows:2].argmax(-1)
    return buffer, targets


def computed(way, buffer, targets, wants_gradient=True, cap=0.0):
    """log_probs, correct and what became of the logits in use."""
    buffer = buffer.clone()
    log_probs = torch.zeros(len(targets))
    correct = torch.zeros(len(targets), dtype=torch.bool)
    way(buffer, targets, log_probs, correct, wants_gradient, cap)
    return log_probs, correct, buffer[: len(targets)]


def plain(buffer, targets, *rest):
    softmax._eager(buffer[: len(targets)], targets, *rest)


@pytest.mark.parametrize("cap", [0.0, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_plain_and_is_compiled_once(compiled, dtype, cap):
    """Whatever the number of labels: a chunk of another size would be another kernel."""
    for seed, rows in enumerate((ROWS, 1, 7, 23, 2, ROWS)):
        buffer, targets = chunk(rows, dtype, seed)
        found = computed(softmax.loss_of_chunk_, buffer, targets, cap=cap)
        wanted = computed(plain, buffer, targets, cap=cap)
        torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(found[1], wanted[1]) and found[1].sum() > 0
        tolerance = 1e-6 if dtype is torch.float32 else 1e-2
        torch.testing.assert_close(found[2], wanted[2], atol=1e-6, rtol=tolerance)
    assert compiled() == 1 and not softmax._failed


def test_without_a_gradient_the_logits_stay(compiled):
    buffer, targets = chunk(9, torch.float32)
    for way in (softmax.loss_of_chunk_, plain):
        log_probs, correct, logits = computed(way, buffer, targets, False)
        assert torch.equal(logits, buffer[:9])
        expected = buffer[:9].log_softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(log_probs, expected)
    assert compiled() == 1


def gradients_of(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


def test_a_model_trains_and_is_measured_with_two_graphs(compiled, monkeypatch):
    """Loss, gradients and counts over batches of many numbers of labels, as with plain torch."""
    model = losses.use_chunked_loss(build())
    batches = [make_batch(seed, (2, 40), share) for seed, share in enumerate((0.9, 0.1, 0.5, 0.3))]

    def all_of_it():
        found = []
        for batch in batches:
            loss, gradients = gradients_of(model.train(), batch)
            with torch.no_grad():
                counts = losses.loss_counts(model.eval()(**batch))
            found += [loss, *gradients, counts]
        return found

    ours = all_of_it()
    assert compiled() == 2, "one with gradients, one that counts what is right"
    monkeypatch.setattr(softmax, "is_compiled", lambda *_: False)
    for a, b in zip(ours, all_of_it(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_each_log_probability_has_its_gradient_in_another_thread_too(compiled, monkeypatch):
    """On cards autograd runs the backward pass, and so the compiled function, in its own thread."""
    model = losses.use_chunked_loss(build())
    batch = make_batch()

    def gradient():
        model.zero_grad()
        log_probs, *_ = losses.answer_logprobs(model, **batch)
        weights = torch.linspace(-1, 1, len(log_probs))
        thread = threading.Thread(target=(log_probs * weights).sum().backward)
        thread.start()
        thread.join()
        return model.lm_head.weight.grad.clone()

    ours = gradient()
    assert compiled() == 2 and not softmax._failed
    monkeypatch.setattr(softmax, "is_compiled", lambda *_: False)
    torch.testing.assert_close(ours, gradient(), atol=1e-5, rtol=1e-5)


def test_a_run_that_goes_on_is_bit_equal(compiled):
    """The second process begins with another number of labels than the first did."""
    batches = [make_batch(seed, (2, 40), share) for seed, share in enumerate((0.9, 0.1, 0.5, 0.3))]

    def train(model, some):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch in some:
            gradients_of(model, batch)
            optimizer.step()
        return model

    start = losses.use_chunked_loss(build())
    whole = train(copy.deepcopy(start), batches)
    half = train(copy.deepcopy(start), batches[:3])
    torch._dynamo.reset()
    torch._inductor.codecache.PyCodeCache.cache_clear()
    resumed = train(half, batches[3:])
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_without_a_compiler_there_is_one_line_and_plain_torch(compiled, monkeypatch, capsys):
    """A slim image has no C compiler."""
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    for seed in (0, 1):
        buffer, targets = chunk(7, torch.float32, seed)
        found = computed(softmax.loss_of_chunk_, buffer, targets)
        for a, b in zip(found, computed(plain, buffer, targets), strict=True):
            assert torch.equal(a, b)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("the softmax of the head is not compiled")
    assert "compiler" in said[0].lower().partition(": ")[2]


class Watching(TorchDispatchMode):
    """Does nothing; torch compiles nothing while such a mode is on."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_where_torch_does_not_compile_the_gradients_are_right_all_the_same(compiled):
    buffer, targets = chunk(7, torch.float32)
    with Watching():
        found = computed(softmax.loss_of_chunk_, buffer, targets)
    for a, b in zip(found, computed(plain, buffer, targets), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=1e-6)


def test_compiling_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(device, "kind", lambda: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert device.compile_pays()
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert not device.compile_pays()


@pytest.mark.parametrize(
    "kind, capability, pays",
    [
        ("cuda", (9, 0), True),
        ("cuda", (8, 0), True),
        ("cuda", (7, 5), False),
        ("cpu", None, False),
        ("npu", None, False),
    ],
)
def test_where_compiling_pays(monkeypatch, kind, capability, pays):
    monkeypatch.setattr(device, "kind", lambda: kind)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert device.compile_pays() is pays
    monkeypatch.setattr(softmax, "_pays", device.compile_pays)
    assert softmax.is_compiled(kind, 151_936) is pays
    assert not softmax.is_compiled(kind, 500), "a toy is over before its kernel is compiled"
    assert not softmax.is_compiled("cpu", 151_936), "a model that stays on the CPU"
    monkeypatch.setattr(torch.version, "hip", "7.2")
    assert not device.compile_pays()


def test_compiled_code_is_kept_where_others_cannot_put_some(tmp_path):
    """torch's default is a folder in /tmp, and what is found there is run."""
    code = "from common import device; from torch._inductor.runtime import cache_dir_utils as c; print(c.cache_dir())"
    command = [sys.executable, "-c", code]
    variables = environment(DANPU_CACHE=tmp_path)
    variables.pop("TORCHINDUCTOR_CACHE_DIR", None)
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(tmp_path / "compiled")
