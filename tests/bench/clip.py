"""Training, loading and searching of the text-image recipe beside a plain re-statement of the upstream way: JSON lines,
ratios within one run.

    python tests/bench/clip.py                                # all parts; about 40 minutes of one core
    python tests/bench/clip.py --parts search loss            # some of them
    python tests/bench/clip.py --parts train --only upstream_image ours_image_cached --rounds 1
    python tests/bench/clip.py --parts cached --libraries FOLDER
                  # beside sentence-transformers, from `pip install --no-deps --target FOLDER sentence-transformers==5.1.2`

train: samples per CPU second of one thread. Text tower BERT 6 x 384 (vocabulary 21,128), image tower ViT 6 x 384 (224/16),
batch 16 (projections alone: 48), captions of 21 to 77 tokens, JPEGs of 1,024 x 768; random weights, the same for all. The upstream way: the frozen
text tower in train mode inside the loop, captions padded to 256, every picture opened twice, a projection on the image side.
Ours is train.py itself, with its flags. Variants run in processes of their own, the rounds interleave them, the best counts.
picture: one JPEG of 1,600 x 1,200 from its file to pixels. loss: loss and gradient of one rank of 16, b 512 of B 8,192.
grad_cache, cached: batch 1,024 of the built-in model. search: a million vectors of 512 dimensions.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from measured import forget_peak, memory_mb, say

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "chinese_clip_ddp"
sys.path[:0] = [str(ROOT), str(RECIPE)]
PARTS = ("train", "picture", "loss", "grad_cache", "cached", "search")
BATCH = 16
PADDED = 256  # tokens, in the upstream way
VARIANTS = {  # name -> flags of train.py, or none for the upstream way; what trains; half precision
    "upstream_image": None,
    "upstream_image_bf16": None,
    "upstream_both": None,
    "upstream_text": None,
    "upstream_projection": None,
    "ours_image": ["--train", "image", "--cache_features", "false"],
    "ours_image_cached": ["--train", "image"],
    "ours_image_cached_bf16": ["--train", "image", "--bf16", "true"],
    "ours_image_flip": ["--train", "image", "--image_mask_ratio", "0.5"],
    "ours_image_flip_bf16": ["--train", "image", "--image_mask_ratio", "0.5", "--bf16", "true"],
    "ours_both": ["--train", "both"],
    "ours_both_bf16": ["--train", "both", "--bf16", "true"],
    "ours_text_cached": ["--train", "text"],
    "ours_text_cached_bf16": ["--train", "text", "--bf16", "true"],
    "ours_projection": ["--train", "projection", "--projection", "linear"],
}
BARS = {  # (variant, against): the least ratio
    ("ours_image_cached", "upstream_image"): 1.6,
    ("ours_image_cached_bf16", "upstream_image"): 2.5,
    ("ours_image_flip", "upstream_image"): 3.0,
    ("ours_image_flip_bf16", "upstream_image"): 4.3,
    ("ours_both", "upstream_both"): 1.6,
    ("ours_both_bf16", "upstream_both"): 2.5,
    ("ours_text_cached", "upstream_both"): 6.0,
    ("ours_text_cached", "upstream_text"): 6.0,
    ("ours_projection", "upstream_both"): 1000.0,
    ("ours_projection", "upstream_projection"): 1000.0,
}


def best_of(call, times: int = 3) -> float:
    """CPU seconds."""
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found)


# ---- data and models of the training part --------------------------------------------------------


def make_data(folder: Path, count: int) -> None:
    """JPEGs of 1,024 x 768, half noise and half lines, and captions of 21 to 77 tokens."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    random_words = random.Random(0)
    rows = []
    for i in range(count):
        small = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        picture = Image.fromarray(small).resize((1024, 768), Image.Resampling.BICUBIC)
        noise = rng.normal(0, 12, (768, 1024, 1))
        pixels = np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg", quality=85)
        length = random_words.randint(19, 75)  # and [CLS], [SEP]
        text = "".join(chr(0x4E00 + random_words.randrange(20_000)) for _ in range(length))
        rows.append({"text": text, "image": f"{i:03d}.jpg"})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "pairs.jsonl").write_text(lines, encoding="utf-8")


def make_towers(folder: Path) -> None:
    """A text and an image tower as folders, with random weights."""
    import torch
    from transformers import (
        BertConfig,
        BertModel,
        BertTokenizer,
        CLIPImageProcessorPil,
        ViTConfig,
        ViTModel,
    )

    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += [chr(0x4E00 + i) for i in range(21_128 - len(words))]
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=512)
    size = dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536)
    text = BertModel(BertConfig(vocab_size=len(words), **size), add_pooling_layer=False)
    text.save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    image = ViTModel(ViTConfig(**size), add_pooling_layer=False)
    image.save_pretrained(folder / "image")
    CLIPImageProcessorPil().save_pretrained(folder / "image")


# ---- the upstream way ----------------------------------------------------------------------------


def upstream(folder: Path, what: str, bf16: bool, steps: int) -> dict:
    """Its step, re-stated. what: image (text frozen), both, text (image frozen) or projection."""
    import torch
    from PIL import Image
    from torch import nn
    from torch.nn import functional as F
    from transformers import AutoTokenizer, BertModel, CLIPImageProcessorPil, ViTModel

    text = BertModel.from_pretrained(folder / "text", add_pooling_layer=False)
    image = ViTModel.from_pretrained(folder / "image", add_pooling_layer=False)
    tokenizer = AutoTokenizer.from_pretrained(folder / "text")
    processor = CLIPImageProcessorPil.from_pretrained(folder / "image")
    projection = nn.Linear(384, 384)
    scale = nn.Parameter(torch.tensor(2.6592))
    text.requires_grad_(what in ("both", "text"))
    image.requires_grad_(what in ("both", "image"))
    whole = nn.ModuleList([text, image, projection]).train()  # dropout in the frozen tower too
    moving = [p for p in whole.parameters() if p.requires_grad] + [scale]
    optimizer = torch.optim.AdamW(moving, lr=1e-4)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").open(encoding="utf-8")]

    def is_picture(row) -> bool:
        try:
            Image.open(folder / row["image"]).convert("RGB")
            return True
        except OSError:
            return False

    def step(rows) -> float:
        rows = [row for row in rows if is_picture(row)]
        pictures = [Image.open(folder / row["image"]).convert("RGB") for row in rows]
        pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
        texts = [row["text"] for row in rows]
        batch = tokenizer(
            texts, padding="max_length", max_length=PADDED, truncation=True, return_tensors="pt"
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            text_vectors = text(**batch).last_hidden_state[:, 0]
            hidden = image(pixel_values=pixels).last_hidden_state[:, 0]
            image_vectors = projection(hidden) + hidden
        text_vectors = F.normalize(text_vectors.float(), dim=-1)
        image_vectors = F.normalize(image_vectors.float(), dim=-1)
        logits = scale.exp() * image_vectors @ text_vectors.T
        target = torch.arange(len(rows))
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    marks = []
    for number in range(steps + 1):
        step([rows[(number * BATCH + i) % len(rows)] for i in range(BATCH)])
        marks.append(time.process_time())
    return {"samples": BATCH * steps, "cpu_s": marks[-1] - marks[0]}


# ---- ours ----------------------------------------------------------------------------------------


def ours(folder: Path, flags: list[str], steps: int) -> dict:
    """train.py with these flags; the steps after those that warm up are timed."""
    import transformers
    from transformers.trainer import DEFAULT_CALLBACKS

    marks = []

    class Meter(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            marks.append(time.process_time())

    DEFAULT_CALLBACKS.append(Meter)
    is_fast = "projection" in flags
    batch = 3 * BATCH if is_fast else BATCH
    steps = 400 if is_fast else steps + 1
    words = ["--text_model_name_or_path", str(folder / "text"), "--pooling", "cls"]
    words += ["--image_model_name_or_path", str(folder / "image"), "--model_max_length", "128"]
    words += [
        "--data_path",
        str(folder / "pairs.jsonl"),
        "--eval_ratio",
        "0",
        "--max_steps",
        str(steps),
    ]
    words += ["--output_dir", str(folder / f"output-{os.getpid()}"), "--report_to", "none"]
    words += ["--save_strategy", "no", "--per_device_train_batch_size", str(batch)]
    words += ["--learning_rate", "1e-4", "--logging_steps", "1000", *flags]
    if "--bf16" not in flags:
        words += ["--bf16", "false"]
    if "--projection" not in flags:
        words += ["--projection", "none"]
    sys.argv = [str(RECIPE / "train.py"), *words]
    import train

    try:
        train.main()
    finally:
        shutil.rmtree(folder / f"output-{os.getpid()}", ignore_errors=True)
    warm = 50 if is_fast else 1
    return {"samples": batch * (len(marks) - warm), "cpu_s": marks[-1] - marks[warm - 1]}


def child(args) -> None:
    """One variant in this process."""
    import torch

    torch.set_num_threads(1)
    folder = Path(args.folder)
    flags = VARIANTS[args.variant]
    if flags is None:
        what = args.variant.split("_")[1]
        found = upstream(folder, what, args.variant.endswith("bf16"), args.steps)
    else:
        found = ours(folder, flags, args.steps)
    say(variant=args.variant, samples_per_cpu_s=found["samples"] / found["cpu_s"])


def train_part(args) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, BATCH * (args.steps + 1))
        make_towers(folder)
        env = os.environ | {"OMP_NUM_THREADS": "1", "DANPU_CACHE": str(folder / "cache")}
        env["TRANSFORMERS_VERBOSITY"] = "error"
        found: dict[str, float] = {}
        for number in range(args.rounds):
            for variant in args.only:
                command = [sys.executable, __file__, "--variant", variant, "--folder", name]
                command += ["--steps", str(args.steps)]
                run = subprocess.run(command, env=env, text=True, capture_output=True)
                if run.returncode:
                    say(variant=variant, failed=run.stderr.strip()[-400:])
                    continue
                speed = json.loads(run.stdout.strip().splitlines()[-1])["samples_per_cpu_s"]
                print(f"round {number}: {variant} {speed:.3g}", file=sys.stderr, flush=True)
                found[variant] = max(speed, found.get(variant, 0.0))
    for variant, speed in found.items():
        say(part="train", variant=variant, samples_per_cpu_s=speed)
    for (variant, against), bar in BARS.items():
        if variant in found and against in found:
            ratio = found[variant] / found[against]
            say(part="train", variant=variant, against=against, times=ratio, bar=bar)


# ---- one picture ---------------------------------------------------------------------------------


def picture_part(args) -> None:
    import numpy as np
    from PIL import Image
    from transformers import CLIPImageProcessorPil

    from common.data.pictures import pixels

    processor = CLIPImageProcessorPil()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.jpg"
        small = Image.fromarray(rng.integers(0, 255, (30, 40, 3), dtype=np.uint8))
        noise = rng.normal(0, 12, (1200, 1600, 1))
        large = np.asarray(small.resize((1600, 1200), Image.Resampling.BICUBIC)) + noise
        Image.fromarray(np.clip(large, 0, 255).astype(np.uint8)).save(path, quality=85)

        def once():
            image = Image.open(path).convert("RGB")
            return processor(images=image, return_tensors="pt")["pixel_values"][0]

        def twice():
            Image.open(path).convert("RGB")
            return once()

        ways = {"upstream": twice, "decoded once": once, "ours": lambda: pixels(path, processor)}
        found = {how: best_of(way, 20) * 1000 for how, way in ways.items()}
        a, b = (way().flatten().double() for way in (once, ways["ours"]))
    say(
        part="picture",
        upstream_ms=found["upstream"],
        once_ms=found["decoded once"],
        ours_ms=found["ours"],
        times=found["upstream"] / found["ours"],
        times_once=found["decoded once"] / found["ours"],
        bar=4.0,
        pixel_cosine=float((a @ b) / (a.norm() * b.norm())),
    )


# ---- the loss ------------------------------------------------------------------------------------


def loss_part(args, rows: int = 512, ranks: int = 16, width: int = 512) -> None:
    """Loss and gradient of one rank; what the others send is there already. Each way in a process
    of its own, for its peak."""
    found = {}
    for way in ("full", "exact"):
        command = [
            sys.executable,
            __file__,
            "--loss",
            way,
            "--rows",
            str(rows),
            "--ranks",
            str(ranks),
        ]
        run = subprocess.run(command, text=True, capture_output=True, check=True)
        found[way] = json.loads(run.stdout.strip().splitlines()[-1])
    full, exact = found["full"], found["exact"]
    say(
        part="loss",
        full_ms=full["ms"],
        ours_ms=exact["ms"],
        times=full["ms"] / exact["ms"],
        bar=10.0,
        full_mb=full["mb"],
        ours_mb=exact["mb"],
        memory=exact["mb"] / full["mb"],
        memory_bar=1 / 8,
        full_logits_mb=(rows * ranks) ** 2 * 4 / 2**20,
        gradient_times=exact["gradient"] / full["gradient"],  # the other way's is 1/W
    )


def loss_child(args) -> None:
    import contrastive
    import torch
    from torch.nn import functional as F

    torch.set_num_threads(1)
    torch.manual_seed(0)
    every = [F.normalize(torch.randn(args.rows * args.ranks, 512), dim=-1) for _ in range(2)]
    scale = torch.tensor(20.0, requires_grad=True)
    own = [x[: args.rows].clone().requires_grad_() for x in every]

    def full():
        """Both sides gathered, the own chunk put back, all logits on every rank."""
        images, texts = (torch.cat([a, b[args.rows :]]) for a, b in zip(own, every, strict=True))
        logits = scale * images @ texts.T
        target = torch.arange(len(logits))
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

    with torch.no_grad():  # what the other ranks' log-sums would be
        blocks = [slice(i, i + 1024) for i in range(0, len(every[0]), 1024)]
        a, b = every
        sums = torch.stack(
            [
                torch.cat([(20.0 * x[part] @ y.T).logsumexp(1) for part in blocks])
                for x, y in ((a, b), (b, a))
            ],
            1,
        )

    def gather(x):
        rest = torch.cat(every, 1) if x.shape[1] > 2 else sums
        return torch.cat([x.detach(), rest[len(x) :]])

    contrastive.world = lambda: args.ranks
    contrastive.gather = gather
    embeddings = contrastive.Embeddings(own[0], own[1], scale)
    ways = {"full": full, "exact": lambda: contrastive.contrastive_loss(embeddings)}

    def step():
        loss = ways[args.loss]()
        loss.backward()
        return loss

    start = forget_peak()
    step()
    peak = memory_mb("VmHWM") - start
    gradient = float(own[0].grad.norm())
    say(ms=best_of(step) * 1000, mb=peak, gradient=gradient)


# ---- GradCache -----------------------------------------------------------------------------------


def built_in():
    """The built-in model, and a batch of 1,024 pairs of pixels and captions."""
    import torch
    import towers
    from model import open_model
    from tiny_base import tiny_model

    path = tiny_model([chr(0x4E00 + i) for i in range(500)])
    torch.manual_seed(0)
    network = open_model(path, dtype=torch.float32).train()
    generator = torch.Generator().manual_seed(1)
    batch = {
        "input_ids": torch.randint(50, 400, (1024, 16), generator=generator),
        "attention_mask": torch.ones(1024, 16, dtype=torch.long),
        "pixel_values": torch.randn(1024, 3, 48, 48, generator=generator),
    }
    return towers.for_training(network), batch


def embeddings_of(network, batch):
    import contrastive

    found = network(**batch)
    return contrastive.Embeddings(
        found["image_embeds"], found["text_embeds"], found["scale"], found["bias"]
    )


def cached_child(args) -> None:
    """One way to take a batch of 1,024: plain, ours (GradCache), hf (its own forward) or
    sentence_transformers (its Cached loss)."""
    import torch
    from contrastive import contrastive_loss, grad_cache, split_batch

    torch.set_num_threads(1)
    network, batch = built_in()

    def plain():
        contrastive_loss(embeddings_of(network, batch)).backward()

    def ours_cached():
        def forward(chunk):
            return embeddings_of(network, chunk)

        chunks = split_batch(batch, args.chunk)
        loss = grad_cache(forward, chunks, contrastive_loss, lambda part: part.backward())
        loss.backward()

    def hf():
        from transformers import ChineseCLIPModel

        ChineseCLIPModel.forward(network, **batch, return_loss=True).loss.backward()

    ways = {"plain": plain, "ours": ours_cached, "hf": hf}
    if args.way == "sentence_transformers":
        ways[args.way] = sentence_transformers_step(network, batch, args.chunk)
    step = ways[args.way]
    start = forget_peak()
    step()  # the first one: what it frees may stay with the process
    peak = memory_mb("VmHWM") - start
    say(ms=best_of(step, 2) * 1000, mb=peak)


def sentence_transformers_step(network, batch, chunk: int):
    """CachedMultipleNegativesSymmetricRankingLoss around the same towers."""
    from model import image_features, text_features
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.losses import CachedMultipleNegativesSymmetricRankingLoss
    from torch import nn

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, features):
            # the library slices rows of what is called input_ids, so pixels come as such
            values = features["input_ids"]
            if values.is_floating_point():
                pixels = values.view(len(values), 3, 48, 48)
                found = image_features(self.network, {"pixel_values": pixels})
            else:
                found = text_features(self.network, features)
            return features | {"sentence_embedding": found}

    model = SentenceTransformer(modules=[Towers()], device="cpu")
    loss = CachedMultipleNegativesSymmetricRankingLoss(model, scale=14.3, mini_batch_size=chunk)
    images = {"input_ids": batch["pixel_values"].flatten(1)}
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def step():
        loss([dict(images), dict(texts)], None).backward()

    return step


def cached_part(args, ways=("plain", "ours", "hf", "sentence_transformers")) -> None:
    found = {}
    sys.path += [args.libraries] if args.libraries else []
    for way in ways:
        if way == "sentence_transformers" and importlib.util.find_spec(way) is None:
            how = "pip install --no-deps --target FOLDER sentence-transformers, then --libraries"
            say(skipped=way, reason=f"not installed: {how}")
            continue
        command = [sys.executable, __file__, "--way", way, "--chunk", str(args.chunk)]
        paths = os.pathsep.join(filter(None, [args.libraries, os.environ.get("PYTHONPATH")]))
        env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        results = []
        for _ in range(args.rounds):
            run = subprocess.run(command, env=env, text=True, capture_output=True)
            if run.returncode:
                say(part="cached", way=way, failed=run.stderr.strip()[-300:])
                break
            results.append(json.loads(run.stdout.strip().splitlines()[-1]))
        if results:
            found[way] = {key: min(one[key] for one in results) for key in ("ms", "mb")}
            say(part="cached", way=way, batch=1024, chunk=args.chunk, **found[way])
    if {"plain", "ours"} <= found.keys():
        time_ratio = found["ours"]["ms"] / found["plain"]["ms"]
        memory = found["ours"]["mb"] / found["plain"]["mb"]
        say(part="grad_cache", time=time_ratio, bar=1.45, memory=memory, memory_bar=0.3)
    for rival, mine in (("hf", "plain"), ("sentence_transformers", "ours")):
        if {rival, mine} <= found.keys():
            times = found[rival]["ms"] / found[mine]["ms"]
            memory = found[mine]["mb"] / found[rival]["mb"]
            say(part="cached", variant=mine, against=rival, times=times, memory=memory)


# ---- searching -----------------------------------------------------------------------------------


def spread(count: int, width: int, decay: float, seed: int):
    """Normalised vectors whose dimension d has a standard deviation of d ** -decay; 0.5 leaves
    78 % of the variance to the first 128 of 512."""
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, width + 1) ** -decay
    parts = []
    for start in range(0, count, 100_000):
        some = torch.randn(min(100_000, count - start), width, generator=generator) * scale
        parts.append(F.normalize(some, dim=-1).half())
    return torch.cat(parts)


def search_part(args, rows: int = 1_000_000, width: int = 512) -> None:
    import torch

    torch.set_num_threads(args.threads)
    for decay in (0.5, 0.0):
        search_line(args, decay, rows, width)


def search_line(args, decay: float, rows: int, width: int) -> None:
    import index
    import torch

    vectors = spread(rows, width, decay, seed=0)
    queries = spread(200, width, decay, seed=1).float()
    opened = index.Index(tempfile.mkdtemp())
    # what _append does with shards of a folder
    segments = [index.Segment([vectors.numpy()], 0, opened.dtype)]
    opened.view = opened.view._replace(segments=segments, entries=range(rows))
    exact = {}
    for batch in (1, 8):
        asked = queries[:batch]
        opened.search(asked)
        exact[batch] = wall_and_cpu(partial(opened.search, asked))
    right = opened.search(queries)[1]
    scores = (queries[:8] @ vectors.float().T).topk(10).indices
    assert torch.equal(scores.sort().values, right[:8].sort().values)
    start = time.perf_counter()
    opened.two_stage = True
    opened.view = opened.view._replace(axes=opened.reduce(segments, None))
    prepared = time.perf_counter() - start
    found = opened.search(queries)[1]
    kept = [len(set(a) & set(b)) for a, b in zip(right.tolist(), found.tolist(), strict=True)]
    quick = wall_and_cpu(partial(opened.search, queries[:1]))
    say(
        part="search",
        rows=rows,
        width=width,
        threads=args.threads,
        spectrum=decay,
        exact_single_ms=exact[1][0],
        exact_of_8_ms=exact[8][0] / 8,
        exact_of_8_cpu_ms=exact[8][1] / 8,
        bar_of_8=25,
        two_stage_single_ms=quick[0],
        two_stage_single_cpu_ms=quick[1],
        bar_two_stage=50,
        two_stage_recall_at_10=sum(kept) / (10 * len(kept)),
        bar_recall=0.99,
        two_stage_prepared_s=prepared,
    )
    if importlib.util.find_spec("faiss") or args.libraries:
        faiss_line(args, vectors, queries, right)


def faiss_line(args, vectors, queries, right) -> None:
    """faiss' exact search of the same float16 vectors."""
    sys.path += [args.libraries] if args.libraries not in ("", *sys.path) else []
    try:
        import faiss
    except ImportError:
        return
    faiss.omp_set_num_threads(args.threads)
    flat = faiss.IndexScalarQuantizer(
        vectors.shape[1], faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    flat.train(vectors[:1000].float().numpy())
    for start in range(0, len(vectors), 100_000):
        flat.add(vectors[start : start + 100_000].float().numpy())
    asked = queries.numpy()
    single = wall_and_cpu(lambda: flat.search(asked[:1], 10))
    eight = wall_and_cpu(lambda: flat.search(asked[:8], 10))
    found = flat.search(asked[:50], 10)[1]
    same = sum(
        len(set(a) & set(b)) for a, b in zip(right[:50].tolist(), found.tolist(), strict=True)
    )
    say(
        part="search",
        engine="faiss flat",
        single_ms=single[0],
        of_8_ms=eight[0] / 8,
        recall=same / 500,
    )


def wall_and_cpu(call, times: int = 5) -> tuple[float, float]:
    """The best of each, in ms."""
    walls, cpus = [], []
    for _ in range(times):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return 1000 * min(walls), 1000 * min(cpus)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed ones, after one that warms up")
    parser.add_argument("--threads", type=int, default=1, help="of the search")
    parser.add_argument("--chunk", type=int, default=64, help="of GradCache")
    parser.add_argument("--libraries", default="", help="folder with packages to compare with")
    for name in ("variant", "folder", "loss", "way"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    for name in ("rows", "ranks"):
        parser.add_argument(f"--{name}", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        return child(args)
    if args.loss:
        return loss_child(args)
    if args.way:
        return cached_child(args)
    if "grad_cache" in args.parts and "cached" not in args.parts:
        cached_part(args, ("plain", "ours"))
    parts = {
        "train": train_part,
        "picture": picture_part,
        "loss": loss_part,
        "cached": cached_part,
        "search": search_part,
    }
    for name, part in parts.items():
        if name in args.parts:
            part(args)


if __name__ == "__main__":
    main()
