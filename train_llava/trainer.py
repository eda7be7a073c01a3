"""A LLaVA through the Trainer: rates of its parts, pictures that cannot be used, checkpoints of
what trains."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from parts import parameter_groups, put_back_frozen, save_trained, table
from sight import whole_tower

from common import cli
from common.convert import adapter
from common.runs.engine import engine
from common.runs.run_folder import read_run_file, write_run_file
from common.trainer import RecipeTrainer


class LlavaTrainer(RecipeTrainer):
    """RecipeTrainer for a LLaVA under sight.for_training; batches of batches.py.

    Args (beside RecipeTrainer's):
        rates: learning rate of each part (parts.rates).
        base: folder that the run begins with; what does not train is saved from there.
        bad_picture_limit: share of pictures that may turn out torn before the run ends.
    """

    def __init__(
        self, *args, rates: dict[str, float], base: str, bad_picture_limit: float = 0.2, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.rates = rates
        self.base = base
        self.limit = bad_picture_limit
        # of this rank: "where: what" of each picture that cannot be used -> its reason
        self.faults: dict[str, str] = {}
        self.held_out_faults: dict[str, str] = {}
        self.shown = 0  # pictures of the steps so far, each as often as it stood in one
        self.shown_in_vain = 0
        self.step_has_faults = False
        self.trained = [name for name, p in self.model.named_parameters() if p.requires_grad]
        cli.say(table(self.model, rates))

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = parameter_groups(
                self.model if model is None else model, self.rates, self.args.weight_decay
            )
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def before_measuring(self) -> None:
        """Beside the run: the folder it began with, for pages that show before and after."""
        if self.args.should_save:
            run = read_run_file(self.args.output_dir)
            write_run_file(self.args.output_dir, run | {"base": self.base})

    # ---- one step ----
    def count_items(self, samples: list[dict]) -> int:
        faults = [fault for batch in samples for fault in batch.pop("faults", [])]
        self.step_has_faults = bool(faults)
        self.add_faults(faults, sum(len(batch["pictures"]) for batch in samples))
        return super().count_items(samples)

    def share_items(self, own: int, device: torch.device) -> torch.Tensor | None:
        """A step that shows torn pictures alone has no label on any rank; --bad_picture_limit is
        what ends a run for them, so its loss of 0 is divided by 1."""
        items = super().share_items(own, device)
        if own or not self.step_has_faults:
            return items
        self.shared[0].clamp_(min=1)  # where other ranks have labels nothing changes
        return items if items is None else items.clamp(min=1)

    def add_faults(self, faults: list[tuple[str, str]], shown: int) -> None:
        self.shown += shown
        self.shown_in_vain += len(faults)
        self.remember(faults, self.faults, "rows with a picture that cannot be used teach nothing")
        if self.shown >= 100 and self.shown_in_vain > self.limit * self.shown:
            raise SystemExit(
                f"{self.shown_in_vain:,} of {self.shown:,} pictures shown cannot be used, e.g. "
                f"{next(iter(self.faults))}: repair the data, or raise --bad_picture_limit"
            )

    def remember(self, faults: list[tuple[str, str]], known: dict[str, str], what: str) -> None:
        """Each picture once, however often it is shown; the first of each reason is told."""
        for reason, where in faults:
            if reason not in known.values():
                cli.say(f"{what}: {where}")
            known[where] = reason

    def eval_sums(self, model, inputs) -> torch.Tensor:
        told = "held-out rows with a picture that cannot be used are not counted"
        self.remember(inputs.pop("faults", []), self.held_out_faults, told)
        return super().eval_sums(model, inputs)

    # ---- checkpoints ----
    def save_model(self, output_dir=None, _internal_call=False):
        has_adapter = hasattr(self.model, "peft_config")
        spread = engine(self.args) not in ("single", "ddp")
        if not _internal_call or has_adapter or spread:
            super().save_model(output_dir, _internal_call)
            return
        self.checkpoints.begin(output_dir)
        cli.wait_for_all("it writes the model")
        if self.args.should_save:
            save_trained(self.model, output_dir)
            self.processing_class.save_pretrained(output_dir)
        cli.wait_for_all("it writes the model")

    def save_final(self, dtype: torch.dtype | None = None) -> Path:
        """A whole LLaVA whose frozen parts are the base's to the last bit; of a run with adapters
        these and the projector. All ranks call it."""
        has_adapter = hasattr(self.model, "peft_config")
        with nullcontext() if has_adapter else whole_tower(self.model):
            final = super().save_final(dtype)
        if self.args.should_save and has_adapter:
            adapter.remember_base(final, self.base)
        elif self.args.should_save:
            put_back_frozen(final, adapter.local_folder(self.base), self.trained)
        cli.wait_for_all("it writes the model")
        return final

    # ---- the end ----
    def unusable(self, known: dict[str, str]) -> dict[str, int]:
        """Pictures by reason, of all ranks."""
        shares = [known]
        if self.args.world_size > 1:
            shares = [None] * self.args.world_size
            dist.all_gather_object(shares, known)
        together = {where: reason for share in shares for where, reason in share.items()}
        return dict(Counter(together.values()))

    def report(self, recipe: str, model_name: str, rows: dict, after: dict) -> None:
        rows = rows | {
            "pictures_unusable": self.unusable(self.faults),
            "held_out_pictures_unusable": self.unusable(self.held_out_faults),
        }
        super().report(recipe, model_name, rows, after)
