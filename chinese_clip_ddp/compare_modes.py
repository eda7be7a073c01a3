"""What each way of sharing negatives over ranks costs: a picture of the losses and a table.

    python chinese_clip_ddp/compare_modes.py --runs output/chinese_clip_ddp_modes

--runs      folder with a run for each mode, as train_ddp_ti_all.sh leaves them
It writes modes.png and modes.md there. The gradients are measured here, on a small model: those of
two ranks against one process with the whole batch.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
import torch
import torch.distributed as dist
from contrastive import MODES, Embeddings, contrastive_loss
from torch import Tensor, nn
from torch.nn import functional as F

from common import cli
from common.data.files import atomic_file

WORLD = 2
PAIRS = 32


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.towers = nn.ModuleList([nn.Linear(12, 8), nn.Linear(12, 8)])
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Embeddings:
        """[n, 2, 12] -> embeddings of n pairs."""
        found = [F.normalize(tower(x[:, i]), dim=-1) for i, tower in enumerate(self.towers)]
        return Embeddings(*found, self.log_scale.exp())


def pairs() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(PAIRS, 2, 12, generator=generator)


def gradients(model: Towers) -> tuple[Tensor, Tensor]:
    """-> of the towers, flattened, and of the scale."""
    of_towers = torch.cat([p.grad.flatten() for p in model.towers.parameters()])
    return of_towers, model.log_scale.grad


def one_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    found = {}
    own = pairs().chunk(WORLD)[rank]
    for mode in MODES:
        model = Towers()
        wrapped = nn.parallel.DistributedDataParallel(model)
        contrastive_loss(wrapped(own), mode=mode).backward()
        found[mode] = gradients(model)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def factors() -> dict[str, dict[str, float]]:
    """mode -> of the towers' gradient: its length and cosine with the true one; of the scale's:
    its ratio."""
    model = Towers()
    contrastive_loss(model(pairs())).backward()
    true_towers, true_scale = gradients(model)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_rank, (folder,), WORLD)
        found = torch.load(f"{folder}/found.pt", weights_only=True)
    return {
        mode: {
            "length": float(of_towers.norm() / true_towers.norm()),
            "cosine": float(F.cosine_similarity(of_towers, true_towers, 0)),
            "scale": float(of_scale / true_scale),
        }
        for mode, (of_towers, of_scale) in found.items()
    }


def read_runs(folder: Path) -> dict[str, tuple[list[dict], dict]]:
    """mode -> (history, report) of each run that is there and finished."""
    found = {}
    for mode in MODES:
        run = folder / mode
        if (run / "report.json").is_file():
            state = json.loads((run / "trainer_state.json").read_text(encoding="utf-8"))
            told = json.loads((run / "report.json").read_text(encoding="utf-8"))
            found[mode] = state["log_history"], told
    if not found:
        raise SystemExit(f"--runs {folder}: no finished run of {', '.join(MODES)} in it")
    return found


def plot(runs: dict, path: Path) -> None:
    """Losses of the whole batch over steps, whatever a mode trains with."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), dpi=120, layout="constrained")
    for mode, (history, _) in runs.items():
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, label=mode, linestyle="--" if mode == "gather_nn" else "-")
    axes.set(xlabel="step", ylabel="loss per pair of the whole batch", title="--cross_embedding")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    with atomic_file(path) as part:
        figure.savefig(part, format="png")
    plt.close(figure)


def table(runs: dict, measured: dict) -> str:
    lines = [
        f"| mode | gradient of {WORLD} ranks | cosine | of the scale | loss | R@1 T→I | R@1 I→T |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for mode, (_, told) in runs.items():
        after = told["metrics"]["after"]
        recall = [after.get(f"{way}_R@1", 0.0) for way in ("text_to_image", "image_to_text")]
        is_of = measured[mode]
        cells = [f"{is_of['length']:.3f}", f"{is_of['cosine']:.3f}", f"{is_of['scale']:.3f}"]
        cells += [f"{told['loss']['last']:.3f}", *(f"{value:.3f}" for value in recall)]
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    alone = [mode for mode, (_, told) in runs.items() if told["world_size"] == 1]
    if alone:
        lines.append(
            f"\nOne process trained {', '.join(alone)}: it has the whole batch, so the gradients "
            f"of {WORLD} ranks say nothing of these losses (NPROC=2 trains with two)."
        )
    return "\n".join(lines)


def main() -> None:
    parser = cli.Parser(__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="folder with a run for each mode")
    folder = parser.parse_args().runs
    runs = read_runs(folder)
    plot(runs, folder / "modes.png")
    text = table(runs, factors())
    with atomic_file(folder / "modes.md") as part:
        part.write_text(f"![losses](modes.png)\n\n{text}\n", encoding="utf-8")
    print(f"{text}\n\n{folder / 'modes.md'}, {folder / 'modes.png'}")


if __name__ == "__main__":
    cli.run(main)
