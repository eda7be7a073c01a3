"""The two most frequent complaints about contrastive training, reproduced and cured: tables in Markdown.

    python tests/bench/clip_complaints.py                # both; some minutes of one core
    python tests/bench/clip_complaints.py gradients      # "are --gather modes equivalent?"
    python tests/bench/clip_complaints.py captions       # "the loss does not fall on my own data"

gradients: the gradient that two and four ranks (gloo, averaged as DDP does) give a small pair of towers in each
--cross_embedding mode, against one process with the whole batch. captions: the sample pictures with nothing but their
colour as caption, eight texts for all pictures, trained with and without --mask_duplicates.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "chinese_clip_ddp"
sys.path[:0] = [str(ROOT), str(RECIPE)]
PAIRS = 32  # of the whole batch
STEPS = 100


# ---- gradients -----------------------------------------------------------------------------------


def gradient(mode: str, rank: int, world: int):
    """Of two linear towers and the scale, for this rank's share of the batch: one flat tensor each."""
    import contrastive
    import torch
    from torch.nn import functional as F

    torch.manual_seed(0)
    towers = [torch.randn(24, 16, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(2.66, dtype=torch.float64, requires_grad=True)
    inputs = [torch.randn(PAIRS, 24, dtype=torch.float64) for _ in range(2)]
    inputs[1] = 0.6 * inputs[0] + 0.8 * inputs[1]
    own = slice(rank * PAIRS // world, (rank + 1) * PAIRS // world)
    images, texts = (F.normalize(x[own] @ w, dim=-1) for x, w in zip(inputs, towers, strict=True))
    found = contrastive.Embeddings(images, texts, scale.exp())
    contrastive.contrastive_loss(found, mode=mode).backward()
    zero = torch.zeros_like(towers[0])
    return torch.cat([(zero if w.grad is None else w.grad).flatten() for w in towers]), scale.grad


def rank_of(rank: int, world: int, port: int, file: str) -> None:
    import contrastive
    import torch.distributed as dist

    expected, of_scale = gradient("exact", 0, 1)  # no group yet: one process
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    lines = []
    for mode in contrastive.MODES:
        mine, mine_of_scale = gradient(mode, rank, world)
        dist.all_reduce(mine)
        dist.all_reduce(mine_of_scale)
        mine /= world
        norm = float(mine.norm() / expected.norm())
        cosine = float(mine @ expected / (mine.norm() * expected.norm())) if norm else 0.0
        lines.append([mode, norm, cosine, float(mine_of_scale / world / of_scale)])
    if rank == 0:
        Path(file).write_text(json.dumps(lines))
    dist.destroy_process_group()


def gradients() -> None:
    import torch.multiprocessing as processes

    found = {}
    for world in (2, 4):
        with socket.socket() as free, tempfile.NamedTemporaryFile() as file:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            processes.spawn(rank_of, (world, port, file.name), nprocs=world)
            for mode, *numbers in json.loads(Path(file.name).read_text()):
                found.setdefault(mode, []).append(numbers)
    print("| --cross_embedding | 2 ranks: norm | cosine | scale | 4 ranks: norm | cosine | scale |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for mode, rows in found.items():
        cells = " | ".join(f"{number:.3f}" for numbers in rows for number in numbers)
        print(f"| {mode} | {cells} |")


# ---- captions ------------------------------------------------------------------------------------


def captions(steps: int) -> None:
    import make_data
    from rows import load_pairs

    from common.data.pictures import Place

    rows = load_pairs(str(RECIPE / "data"))[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pictures = folder / "pictures"
        pictures.mkdir()
        lines = []
        for i, row in enumerate(rows):
            if row["held_out"]:
                continue
            (pictures / f"{i}.png").write_bytes(Place(**row["place"]).read())
            colour = next(colour for colour in make_data.COLORS if colour in row["text"])
            lines.append({"text": f"{colour}的东西", "image": f"pictures/{i}.png"})
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (folder / "colours.jsonl").write_text(text, encoding="utf-8")
        print(
            "\n| --mask_duplicates | first loss | last loss | floor | R@1 picture→text | seconds |"
        )
        print("|---|---:|---:|---:|---:|---:|")
        for mask in ("false", "true"):
            output = folder / mask
            command = [sys.executable, str(RECIPE / "train.py"), "--mask_duplicates", mask]
            command += ["--data_path", str(folder / "colours.jsonl"), "--output_dir", str(output)]
            command += ["--max_steps", str(steps), "--report_to", "none", "--save_strategy", "no"]
            run = subprocess.run(command, text=True, capture_output=True)
            if run.returncode:
                raise SystemExit(run.stdout[-1000:] + run.stderr[-1000:])
            facts = json.loads((output / "report.json").read_text())
            floor = facts["rows"]["captions_of_a_batch"]["loss_floor_if_negatives"]
            recall = facts["metrics"]["after"]["image_to_text_R@1"]
            loss = facts["loss"]
            cells = (
                f"{loss['first']:.2f} | {loss['last']:.2f} | {floor if mask == 'false' else 0:.2f}"
            )
            print(f"| {mask} | {cells} | {recall:.3f} | {facts['seconds']:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["gradients", "captions"])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if "gradients" in args.what:
        gradients()
    if "captions" in args.what:
        captions(args.steps)


if __name__ == "__main__":
    main()
