"""A recipe's train.py with something counted or pretended from outside.

    python tests/gpu/watched.py --count-syncs FILE --steps 26 28 train_qwen/train.py [flags]
    python tests/gpu/watched.py --hide-cards [--driver FILE] train_qwen/train.py [flags]
    python tests/gpu/watched.py --log-recompiles [--no-compile] minimind_npu/train.py [flags]

--count-syncs: the calls in which the host waits for the card, by line of code, of the optimizer steps from the first
number to the second; as JSON into FILE.
--hide-cards: CUDA_VISIBLE_DEVICES is empty. --driver: FILE stands for /proc/driver/nvidia/version.
--log-recompiles: torch says on stderr what it compiles again. --no-compile: torch.compile does nothing.
"""

import argparse
import collections
import json
import os
import runpy
import sys
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
if "--hide-cards" in sys.argv:  # before torch looks
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
from common import device  # before torch and transformers

# isort: split
import torch
from transformers import TrainerCallback

from common.runs import card_install
from common.trainer import RecipeTrainer

SAID = "synchronizing CUDA operation"  # in torch's warning


class CountSyncs(TrainerCallback):
    def __init__(self, file: Path, first: int, last: int):
        self.file = file
        self.first = first
        self.last = last
        self.places: collections.Counter = collections.Counter()
        self.usual = warnings.showwarning

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            warnings.simplefilter("always")
            warnings.showwarning = self.count
            warn_of_syncs("warn")

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.last:
            warn_of_syncs("default")
            warnings.showwarning = self.usual
            warnings.simplefilter("ignore")
            places = dict(self.places.most_common())
            self.file.write_text(json.dumps({"steps": self.last - self.first, "places": places}))

    def count(self, message, category, filename, lineno, file=None, line=None):
        if SAID in str(message):
            self.places[f"{Path(filename).name}:{lineno}"] += 1


def warn_of_syncs(mode: str) -> None:
    if device.kind() == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


def watch(callback: TrainerCallback) -> None:
    def before_measuring(trainer):
        trainer.add_callback(callback)

    RecipeTrainer.before_measuring = before_measuring


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count-syncs", type=Path)
    parser.add_argument("--steps", type=int, nargs=2, default=(2, 3))
    parser.add_argument("--driver", type=Path)
    for flag in ("--hide-cards", "--log-recompiles", "--no-compile"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("script", type=Path)
    args, flags = parser.parse_known_args()
    if args.count_syncs:
        watch(CountSyncs(args.count_syncs, *args.steps))
    if args.driver:
        card_install.DRIVER = args.driver
    if args.log_recompiles:
        torch._logging.set_logs(recompiles=True)
    if args.no_compile:
        torch._dynamo.config.disable = True
    sys.argv = [str(args.script), *flags]
    sys.path[0] = str(args.script.resolve().parent)
    runpy.run_path(str(args.script), run_name="__main__")


if __name__ == "__main__":
    main()
