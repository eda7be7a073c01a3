"""minimind_npu under --depth beside a plain re-statement of nanochat's training and answering: JSON lines, ratios within one run.

    python tests/bench/nanochat.py                                             # all parts, depths 4 and 6, 2 rounds
    python tests/bench/nanochat.py --only train --depths 4 --rounds 1          # a quick look
    python tests/bench/nanochat.py --only bpb --minutes 4
    python tests/bench/nanochat.py --only train --profile --sides ours         # torch's profile instead

Sides: `restated` is nanochat_restated.py as it runs on a CPU, in fp32 and compiled; `restated_eager` without the
compiler; `restated_bf16` compiled under bf16 autocast, which it picks on accelerators only. `ours` is train.py with
--arch nanochat --torch_compile true, `minimind` with --arch minimind, in each of the dtypes. All have the tokens of a step (--step_tokens)
and the learning rates that --depth gives; each cuts a step into the micro-batches that it would have on a CPU (32 rows,
ours 2,048 tokens).

train: tokens per CPU second of whole updates, tokenising among them where it is done on the way; random words of
Chinese characters in documents about as long as the rows of 512. memory_mb is what a side needs above its loaded
weights. times_restated is against the fp32 that nanochat would take, times_bf16 against bf16 (whichever of
compiled and not is faster).
bpb: bits per byte of held-out texts after --minutes of CPU time, on texts of the recipe's own maker.
generation: eight conversations that call the calculator once each, tokens that the model writes per CPU second: one
after the other against all of them as one batch. Random weights are made to write the same tokens on all sides.

Before that the sides must agree: the loss of the same tokens before the first update, the log-probability of all that
is written in conversations, and what the calculator says. Exit code 1 where they do not.

Every side runs in a process of its own with one thread; the rounds interleave them, the best round counts. CPU seconds
stay comparable when others use the machine. What the compiler takes is not counted.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import minimind as words  # its paths, texts and weights
from measured import forget_peak, memory_mb, say

HERE = words.ROOT / "tests/bench/nanochat.py"
SIDES = ("restated", "restated_eager", "restated_bf16", "ours", "minimind")
PARTS = ("train", "bpb", "generation")
COMPILED = ("train", "bpb")
SAME = {"float32": 2e-4, "bfloat16": 0.03}  # losses of two sides may be so far apart
WINDOW = 512
PROMPTS = 8
HELD_OUT = 20  # texts of each kind
POOL = 200_000  # tokens that windows are filled from: of a few documents they stay a fifth empty
SEED = 0
QUIET = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def is_restated(side: str) -> bool:
    return side.startswith("restated")


# ---- texts ----------------------------------------------------------------------------------------------------------


def random_texts(tokenizer, seed: int):
    """Documents of some 20 to 2,000 tokens, half of them above 350."""
    rng = random.Random(seed)
    write = words.Writer(tokenizer, rng)
    while True:
        yield write(max(20, min(2000, round(rng.lognormvariate(math.log(350), 0.8)))), tries=1)


def makers(seed: str) -> dict:
    """name -> texts without an end, of the recipe's pre-training samples."""
    from samples import make_data

    made = {}
    for name, (make, _) in make_data.PRETRAIN.items():
        made[name] = make(f"{seed} {name}")
    return made


def sample_texts(seed: str):
    yield from itertools.chain.from_iterable(zip(*makers(seed).values(), strict=True))


def held_out_texts() -> list[str]:
    return [
        text for made in makers("held out").values() for text in itertools.islice(made, HELD_OUT)
    ]


# ---- both sides -----------------------------------------------------------------------------------------------------


def our_settings(args, data: str):
    """-> (args, training, tokenizer, base) of train.py, as its command line and its dial give them."""
    import defaults
    import settings
    import train

    windows = args.step_tokens // WINDOW
    batch = math.gcd(windows, defaults.CPU_TOKENS // WINDOW)  # what a CPU gets by default
    sys.argv = ["train.py", "--depth", str(args.depth), "--arch", arch_of(args.side), "--data_path", data,
                "--output_dir", args.output, "--eval_ratio", "0", "--report_to", "none", "--tokenizer", args.tokenizer,
                "--model_max_length", str(WINDOW), "--bf16", str(args.dtype == "bfloat16").lower(), "--max_steps", "1000",
                "--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(windows // batch),
                "--torch_compile", str(args.part in COMPILED).lower(),
                ]  # fmt: skip
    ours, training, base = settings.parse_args()
    tokenizer = train.load_tokenizer(ours, base)
    train.dial.turn(ours, training, len(tokenizer))
    return ours, training, tokenizer, base


def arch_of(side: str) -> str:
    return "minimind" if side == "minimind" else "nanochat"


def start_weights(model):
    """As minimind.py's, with a head whose logits feel the cap."""
    import torch

    words.start_weights(model, moved=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    return model


def new_restated(depth: int, vocab: int):
    import nanochat_restated as restated

    return start_weights(restated.NanoChat(restated.Shape(vocab, depth, width_of(depth))))


def width_of(depth: int) -> int:
    import weights

    return weights.width_of_depth(depth)


def probe_ids(vocab: int):
    """Four documents that fill a row each."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(40, vocab, (4, WINDOW), generator=generator)


def restated_loss(loop, vocab: int) -> float:
    """Of probe_ids; the parts of the model as they are, uncompiled."""
    import torch

    ids = probe_ids(vocab)
    with torch.no_grad(), loop.cast:
        return loop.model(ids[:, :-1], ids[:, 1:]).item()


def our_loss(ours, training, tokenizer, objective) -> float:
    """Of probe_ids, through the recipe's loader and objective."""
    import datasets
    import torch
    import train

    from common import device

    features = datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))})
    ids = probe_ids(len(tokenizer)).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": ids}, features=features)
    loader = train.make_loader(ours, training, tokenizer, rows)
    nll = count = 0.0
    with torch.no_grad(), device.autocast(device.train_dtype(training)):
        for batch in loader.all():
            _, sums = objective(batch, 1.0)
            nll, count = nll + float(sums["nll"]), count + float(sums["count"])
    return nll / count


def rates_of(args) -> dict:
    from road import dial

    return dial.rates_of("nanochat", width_of(args.depth), args.step_tokens)


def make_restated(args, tokenizer, texts, model):
    """-> (loop, rows)."""
    import nanochat_restated as restated

    rows = min(restated.ROWS, args.step_tokens // WINDOW)
    fit = restated.BestFit(texts, tokenizer, WINDOW, rows)
    accumulation = args.step_tokens // (rows * WINDOW)
    half, compiled = args.side == "restated_bf16", args.side != "restated_eager"
    return restated.Loop(model, accumulation, rates_of(args), half, compiled), fit


class Ours:
    """train.py's own objects, and its step."""

    def __init__(self, args, texts: list[str]):
        import torch
        import train
        import weights

        from common import device
        from common.data.load import load_rows

        path = words.write_file([{"text": text} for text in texts], args.output)
        self.ours, self.training, self.tokenizer, base = our_settings(args, path)
        began = words.cpu_of_all()
        found, stats = load_rows(path, train.STAGES["pretrain"].KIND)
        data = train.read(self.ours, self.training, self.tokenizer, found, stats)
        self.loader = train.make_loader(self.ours, self.training, self.tokenizer, data.train_ids)
        self.preparing = words.cpu_of_all() - began
        torch.manual_seed(SEED)
        self.model = weights.load_model(base, self.ours, self.training, self.tokenizer)
        self.objective = train.make_objective(self.ours, self.training, self.model, self.tokenizer)
        self.optimizer = train.make_optimizer(self.ours, self.training, self.model)
        dtype = device.train_dtype(self.training)
        self.scaler, self.gradients = device.grad_scaler(dtype), train.parallel.Gradients(dtype)
        progress = train.state.new_progress({"metrics": {}, "samples": []})
        self.plan = train.Plan(self.loader, self.training, progress)
        self.train = train

    def loss(self) -> float:
        return our_loss(self.ours, self.training, self.tokenizer, self.objective)

    def step(self, progress: float) -> int:
        """An update; -> its tokens."""
        bins = self.plan.next_bins()
        self.train.lr_of(self.ours, self.training, self.optimizer, progress)
        net = self.objective.train()
        self.train.train_step(
            net,
            None,
            self.loader,
            bins,
            self.optimizer,
            self.scaler,
            self.training,
            self.gradients,
            1,
        )
        return self.loader.tokens(bins)


# ---- train ----------------------------------------------------------------------------------------------------------


def train_child(args) -> dict | None:
    import nanochat_restated as restated
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    texts = random_texts(tokenizer, args.round)
    needed = (args.steps + 1) * args.step_tokens
    if is_restated(args.side):
        # written before the clock starts, and as many as its buffer holds when a run is under way
        ready = list(itertools.islice(texts, restated.BUFFER + needed // 200))
        model = new_restated(args.depth, len(tokenizer))
        loop, rows = make_restated(args, tokenizer, iter(ready), model)
        loss, start = restated_loss(loop, len(tokenizer)), forget_peak()
        rows.refill()

        def step() -> int:
            loop.step(rows)
            return args.step_tokens
    else:
        ready, written = [], 0
        while written < max(POOL, 1.3 * needed):
            ready.append(next(texts))
            written += len(tokenizer(ready[-1], add_special_tokens=False).input_ids)
        ours = Ours(args, ready)
        start_weights(ours.model)
        loss, start = ours.loss(), forget_peak()

        def step() -> int:
            return ours.step(0.5)

    step()
    if args.profile:
        return words.profiled(step)
    forget_peak()
    best, tokens = 0.0, 0
    for _ in range(args.steps):
        began = time.process_time()
        done = step()
        best, tokens = max(best, done / (time.process_time() - began)), tokens + done
    found = {
        "loss": loss,
        "tokens": tokens,
        "tokens_per_cpu_s": best,
        "memory_mb": memory_mb("VmHWM") - start,
    }
    if is_restated(args.side):
        return found | {"dropped": rows.dropped / (rows.seen + rows.dropped)}
    # once in a run, for all its texts
    return found | {"preparing_share": ours.preparing / written * best}


# ---- bits per byte --------------------------------------------------------------------------------------------------


def bpb_child(args) -> dict:
    import nanochat_restated as restated
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    held_out = held_out_texts()
    known = set(held_out)
    texts = (text for text in sample_texts("bench") if text not in known)
    if is_restated(args.side):
        shape = restated.Shape(len(tokenizer), args.depth, width_of(args.depth))
        model = restated.NanoChat(shape)
        model.load_state_dict(first_weights(args.depth, len(tokenizer)))
        loop, rows = make_restated(args, tokenizer, texts, model)
        with loop.cast:
            loss = loop.run(*rows.batch())
        loss.backward()  # the compiler's time is not counted
        model.zero_grad(set_to_none=True)

        def logits_of(ids):
            return model(ids)

        def step(progress: float) -> int:
            loop.step(rows, progress)
            return args.step_tokens
    else:
        # bytes of 8,000 tokens a second; what is there twice is read twice
        ours = Ours(args, list(take_bytes(texts, 3 * 8_000 * 60 * args.minutes)))
        model, step = ours.model, ours.step

        def logits_of(ids):
            return model(input_ids=ids).logits

    limit, cpu, tokens, steps = 60 * args.minutes, 0.0, 0, 0
    while cpu < limit:
        began = time.process_time()
        tokens += step(cpu / limit)
        cpu, steps = cpu + time.process_time() - began, steps + 1
    model.eval().float()
    bits = restated.bits_per_byte(logits_of, tokenizer, held_out)
    return {"cpu_s": cpu, "steps": steps, "tokens": tokens, "bits_per_byte": bits}


def first_weights(depth: int, vocab: int) -> dict:
    """nanochat's initial weights, the same as those that the recipe's side begins with."""
    import nanochat
    import torch

    width = width_of(depth)
    config = nanochat.config_of(vocab, width, depth, width // 128)
    torch.manual_seed(SEED)
    return nanochat.build(config).state_dict()


def take_bytes(texts, size: float):
    written = 0
    for text in texts:
        written += len(text.encode())
        yield text
        if written > size:
            return


# ---- answers --------------------------------------------------------------------------------------------------------


class Scripted:
    """A grammar of one sentence: random weights call no tool."""

    def __init__(self, tokens: list[int], vocab: int):
        self.left, self.vocab = deque(tokens), vocab

    @property
    def done(self) -> bool:
        return not self.left

    def allowed(self):
        import torch

        mask = torch.zeros(self.vocab, dtype=torch.bool)
        mask[self.left[0]] = True
        return mask

    def take(self, token: int) -> None:
        self.left.popleft()


def conversations(tokenizer, new: int) -> tuple[list[dict], list[list[int]]]:
    """What is asked, and what each answer shall be: `new` tokens of words and a call, then `new` tokens."""
    rng = random.Random(0)
    write = words.Writer(tokenizer, rng)
    end = tokenizer.eos_token_id
    some = lambda: tokenizer(write(new, tries=1), add_special_tokens=False).input_ids[:new]
    asked, first, second = [], [], []
    for _ in range(PROMPTS):
        sum_of = f"{rng.randint(10, 99)}*{rng.randint(10, 99)}"
        call = {"name": "calculator", "arguments": {"expression": sum_of}}
        said = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
        asked.append({"messages": [{"role": "user", "content": write(40, tries=1)}]})
        first.append([*some(), *tokenizer(said, add_special_tokens=False).input_ids, end])
        second.append([*some(), end])
    return asked, first + second


class Player:
    """Plays the conversations through the recipe's engine; model: under its own class, weights as start_weights'."""

    def __init__(self, model, tokenizer, new: int):
        from engine.generation import Engine
        from toolcall.tools import built_in

        self.tokenizer, self.registry = tokenizer, built_in()
        self.asked, self.scripts = conversations(tokenizer, new)
        vocab, left = len(model.lm_head.weight), deque()

        class MadeToSay(Engine):
            def submit(self, prompt, sampling, on_token=None, constraint=None):
                script = Scripted(left.popleft(), vocab)
                return super().submit(prompt, sampling, on_token, script)

        self.engine, self.left = MadeToSay(model, slots=PROMPTS), left
        tools = [one for one in self.registry.schemas if one["function"]["name"] == "calculator"]
        self.asked = [one | {"tools": tools} for one in self.asked]

    def play(self, scored: bool = False) -> list:
        from engine.generation import Sampling
        from toolcall import play

        self.left.extend(self.scripts)
        how = Sampling(max_new_tokens=1000, top_log_probs=0 if scored else None)
        return play.play(self.engine, self.tokenizer, self.asked, self.registry, 2, how)


def generation_sides(args) -> tuple[dict, list[str]]:
    """-> ({side: (function, tokens that it writes)}, what they do not agree on)."""
    import nanochat
    import nanochat_restated as restated
    import torch
    from transformers import AutoTokenizer

    from common import device

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    vocab, width = len(tokenizer), width_of(args.depth)
    dtypes = {"float32": torch.float32}
    if device.half_dtype() is not None:
        dtypes[str(device.half_dtype()).removeprefix("torch.")] = device.half_dtype()
    sides, wrong, sums = {}, [], {}
    begin_id, end_id = tokenizer.convert_tokens_to_ids(["<tool_call>", "</tool_call>"])
    scripts = []
    for name, dtype in dtypes.items():
        config = nanochat.config_of(vocab, width, args.depth, width // 128)
        model = start_weights(nanochat.build(config)).to(dtype).eval()
        player = Player(nanochat.quicken(model), tokenizer, args.new)
        episodes = player.play(scored=True)
        wrong += [
            f"generation {name}: {one.finished} {one.problem}"
            for one in episodes
            if one.finished != "stop"
        ]
        scripts = [restated.Script(one.prompt, one.tokens, one.written) for one in episodes]
        sums[f"ours {name}"] = [log_prob_of(one) for one in episodes]
        written = sum(sum(one.written) for one in scripts)
        sides[f"ours {name}"] = (player.play, written)
    for name, dtype in dtypes.items():
        engine = restated.Engine(
            new_restated(args.depth, vocab).to(dtype), tokenizer, begin_id, end_id
        )
        found = [engine.answer(script, scored=True) for script in scripts]
        sums[f"restated {name}"] = [log_prob for log_prob, _ in found]
        for (_, results), episode in zip(found, episodes, strict=True):
            if [str(one) for one in results] != [json.loads(m["content"])["result"].__str__()
                                                 for m in episode.messages if m["role"] == "tool"]:  # fmt: skip
                wrong.append(
                    f"generation: the calculators say {results} and {episode.messages[-2:]}"
                )
        sides[f"restated {name}"] = (
            lambda e=engine: [e.answer(script) for script in scripts],
            written,
        )
    for side, found in sums.items():
        name = side.split()[1]
        for a, b in zip(found, sums["restated float32"], strict=True):
            if abs(a - b) > SAME[name] * abs(b):
                wrong.append(f"generation {side}: log-probabilities {a:.4f} and {b:.4f}")
    return sides, wrong


def log_prob_of(episode) -> float:
    return sum(own for request in episode.requests for own, _ in request.top_log_probs)


def generation_child(args) -> list[dict]:
    import torch

    sides, wrong = generation_sides(args)
    best = dict.fromkeys(sides, 0.0)
    for _ in range(args.rounds):
        for side, (action, tokens) in sides.items():
            began = time.process_time()
            action()
            best[side] = max(best[side], tokens / (time.process_time() - began))
    lines = []
    for side, rate in best.items():
        line = {"bench": "generation", "depth": args.depth, "side": side, "tokens_per_cpu_s": rate,
                "threads": torch.get_num_threads()}  # fmt: skip
        if side.startswith("ours"):
            line["times_restated"] = rate / best["restated float32"]
            line["times_same_dtype"] = rate / best[side.replace("ours", "restated")]
        lines.append(line)
    return lines + [{"differs": one} for one in wrong]


# ---- agreement ------------------------------------------------------------------------------------------------------


def check_child(args) -> list[dict]:
    """Losses of the same tokens and the conversations of both sides, nothing timed: what a test can afford."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    ours = Ours(args, list(itertools.islice(sample_texts("check"), 40)))
    start_weights(ours.model)
    model = new_restated(args.depth, len(tokenizer))
    loop, rows = make_restated(args, tokenizer, sample_texts("check"), model)
    losses = {"ours": ours.loss(), "restated": restated_loss(loop, len(tokenizer))}
    wrong = generation_sides(args)[1]
    if not abs(losses["ours"] - losses["restated"]) <= SAME[args.dtype]:
        wrong.append(f"losses {losses}")
    ours.step(0.5)
    loop.step(rows)
    after = {"ours": ours.loss(), "restated": restated_loss(loop, len(tokenizer))}
    line = {
        "losses": losses,
        "after_an_update": after,
        "dropped": rows.dropped / (rows.seen + rows.dropped),
    }
    return [line, *({"differs": one} for one in wrong)]


# ---- one side in a process ------------------------------------------------------------------------------------------


CHILDREN = {
    "train": train_child,
    "bpb": bpb_child,
    "generation": generation_child,
    "check": check_child,
}


def child(args) -> None:
    import torch

    from common import cli, device

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    cli.say = lambda text: None
    with contextlib.redirect_stdout(sys.stdout if args.profile else sys.stderr):
        found = CHILDREN[args.part](args)
    for line in found if isinstance(found, list) else [found] * bool(found):
        facts = {"bench": args.part, "depth": args.depth, "side": args.side, "dtype": args.dtype}
        print(
            json.dumps(
                line
                if "bench" in line or "differs" in line
                else facts | line | {"device": device.name()}
            )
        )


# ---- running all of it ----------------------------------------------------------------------------------------------

PASSED = ("steps", "step_tokens", "minutes", "new", "rounds")


def run_child(args, part: str, depth: int, side: str, dtype: str, number: int) -> list[dict]:
    tokenizer = args.tokenizer
    if part == "bpb":  # its texts have few characters
        tokenizer = str(words.RECIPE / "tokenizer")
    with tempfile.TemporaryDirectory() as output:
        cache = {"DANPU_CACHE": f"{output}/cache", "TORCHINDUCTOR_CACHE_DIR": args.compiled}
        env = {"OMP_NUM_THREADS": "1"} | os.environ | QUIET | cache
        flags = [f"--{name}={getattr(args, name)}" for name in PASSED]
        if part == "bpb":
            flags += [f"--step_tokens={args.bpb_tokens}"]
        flags += [
            "--part",
            part,
            "--depth",
            str(depth),
            "--side",
            side,
            "--dtype",
            dtype,
            "--round",
            str(number),
        ]
        flags += ["--output", output, "--tokenizer", tokenizer, *["--profile"] * args.profile]
        command = [sys.executable, str(HERE), *flags]
        run = subprocess.run(command, env=env, text=True, capture_output=True)
    if run.returncode:
        return [{"bench": part, "side": side, "dtype": dtype, "failed": run.stderr.strip()[-800:]}]
    if args.profile:
        print(side, dtype, run.stdout, sep="\n")
        return []
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def cases(args, dtypes: list[str]) -> list[tuple[str, int, str, str]]:
    """(part, depth, side, dtype) of every process of a round."""
    found = []
    for part, depth in itertools.product(args.only, args.depths):
        if part == "generation":
            found.append((part, depth, "all", "all"))
            continue
        for side in args.sides:
            mine = dtypes
            if is_restated(side):
                mine = ["bfloat16" if side == "restated_bf16" else "float32"]
            found += [(part, depth, side, dtype) for dtype in mine if dtype in dtypes]
    return found


def report(results: dict) -> list[str]:
    """Prints a line per case, ours with ratios; returns what the sides do not agree on."""
    wrong = []
    best = {}
    for key, lines in results.items():
        good = [line for line in lines if "tokens_per_cpu_s" in line]
        if key[0] == "train" and good:
            best[key] = max(good, key=lambda line: line["tokens_per_cpu_s"])
            best[key]["memory_mb"] = min(line["memory_mb"] for line in good)
    for (part, depth, side, dtype), lines in results.items():
        wrong += [json.dumps(line) for line in lines if "failed" in line]
        if part != "train" or (part, depth, side, dtype) not in best:
            continue
        line = dict(best[part, depth, side, dtype])
        eager = best.get((part, depth, "restated_eager", "float32"))
        own = best.get((part, depth, "restated", "float32"))
        half = best.get((part, depth, "restated_bf16", "bfloat16"))
        quickest = max((one["tokens_per_cpu_s"] for one in (own, eager) if one), default=0)
        if not is_restated(side) and quickest:
            line["times_restated"] = line["tokens_per_cpu_s"] / quickest
            line["memory_of_eager"] = eager and line["memory_mb"] / eager["memory_mb"]
            if half and dtype == "bfloat16":
                line["times_bf16"] = line["tokens_per_cpu_s"] / half["tokens_per_cpu_s"]
        reference = eager or own
        if side in ("ours", "restated_bf16") and reference:
            agree = abs(line["loss"] - reference["loss"]) <= SAME[dtype]
            if not agree:
                wrong.append(
                    f"{part} depth {depth} {side} {dtype}: losses {line['loss']} and {reference['loss']}"
                )
        say(**line)
    return wrong


def main() -> int:
    from common import device

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--depths", nargs="*", type=int, default=[4, 6])
    parser.add_argument("--sides", nargs="*", default=SIDES, choices=SIDES)
    parser.add_argument("--dtypes", nargs="*", help="default: float32 and the device's best")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--steps", type=int, default=1, help="train: updates, the best of which counts"
    )
    parser.add_argument("--step_tokens", type=int, default=16384)
    parser.add_argument("--bpb_tokens", type=int, default=8192, help="bpb: tokens of a step")
    parser.add_argument("--minutes", type=float, default=3, help="bpb: CPU minutes of a side")
    parser.add_argument(
        "--new", type=int, default=48, help="generation: words of an answer, tokens"
    )
    parser.add_argument("--tokenizer", help="folder; unset: one of 6,400 tokens is trained")
    parser.add_argument("--compiled", help="folder for what torch compiles; unset: a temporary one")
    parser.add_argument(
        "--profile", action="store_true", help="print torch's profile of each side instead"
    )
    for name in ("part", "side", "dtype", "output"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    for name in ("depth", "round"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        child(args)
        return 0
    best = str(device.half_dtype() or "torch.float32").removeprefix("torch.")
    dtypes = args.dtypes or list(dict.fromkeys(["float32", best]))
    results: dict = {case: [] for case in cases(args, dtypes)}
    with tempfile.TemporaryDirectory() as folder:
        args.tokenizer = args.tokenizer or words.train_tokenizer(f"{folder}/tokenizer")
        args.compiled = args.compiled or f"{folder}/compiled"
        wrong = interleaved(args, results) + report(results)
    for one in dict.fromkeys(wrong):
        print(json.dumps({"differs": one}), flush=True)
    return 1 if wrong else 0


def interleaved(args, results: dict) -> list[str]:
    """Fills {(part, depth, side, dtype): lines}, training in each round, the others in the first; -> disagreements."""
    wrong = []
    for number in range(args.rounds):
        for case, lines in results.items():
            if number and case[0] != "train":
                continue
            found = run_child(args, *case, number)
            lines += found
            for line in found:
                told = sys.stderr if case[0] == "train" else sys.stdout
                print(
                    json.dumps({"round": number} | line, ensure_ascii=False), file=told, flush=True
                )
            wrong += [line["differs"] for line in found if "differs" in line]
    return wrong


if __name__ == "__main__":
    sys.exit(main())
