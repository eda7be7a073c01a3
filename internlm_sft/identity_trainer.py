"""The trainer of this recipe: a KL term that holds general rows to the base model, and a stop when
the identity is learned and other answers begin to suffer.

N positions, V vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F
from transformers import TrainerCallback

from common import cli
from common.fast import losses
from common.trainer import RecipeTrainer

POSITIONS = 512  # of a micro-batch that the KL term looks at: their logits are built
LEARNED = 0.95  # of the questions of each language carry the name: the identity is learned
LOOKS = 10  # times along a run that --early_stop asks
STOPS = ("no", "learned", "guard")


def kl_to_base(model, inputs: dict, index: torch.Tensor) -> torch.Tensor:
    """KL(base || model) at the positions `index` [N] of one row, padded or packed, summed; fp32
    with a graph. The base is the model with its adapter switched off."""
    with torch.no_grad(), model.disable_adapter():
        base = model(**inputs, logits_to_keep=index, use_cache=False).logits[0]
    tuned = model(**inputs, logits_to_keep=index, use_cache=False).logits[0]
    base = base.float().log_softmax(-1)
    tuned = tuned.float().log_softmax(-1)
    return F.kl_div(tuned, base, reduction="sum", log_target=True)


def check_kl(model) -> None:
    """SystemExit for a model whose forward cannot give some logits only."""
    forward = losses.without_adapter(model).forward
    if "logits_to_keep" not in inspect.signature(forward).parameters:
        raise SystemExit(
            f"--kl_weight: {type(losses.without_adapter(model)).__name__} gives no logits of some "
            "positions alone (logits_to_keep); mix more general rows instead (--identity_ratio)"
        )


class WithGeneral:
    """A collator of packed rows whose batches bring `general_index`: places in the row that predict
    a label of general rows, evenly spread, at most POSITIONS; and `general_labels`, of how many."""

    def __init__(self, collate: Callable[[list], dict], is_general: Sequence[bool]):
        """is_general: of each row to train on."""
        self.collate = collate
        self.is_general = torch.tensor(is_general, dtype=torch.bool)

    def __call__(self, items: list) -> dict:
        batch = self.collate(items)
        rows = torch.tensor(batch["row_ids"], dtype=torch.int64)
        index = batch["label_index"]
        owner = torch.bucketize(index, batch["cu_seq_lens_q"][1:].long(), right=True)
        index = index[self.is_general[rows[owner]]]
        step = max(1.0, len(index) / POSITIONS)
        kept = (torch.arange(min(len(index), POSITIONS)) * step).long()
        return batch | {"general_index": index[kept], "general_labels": len(index)}


class IdentityTrainer(RecipeTrainer):
    """RecipeTrainer with kl_weight * KL(base || model) on general rows, per label token like the
    loss itself.

    Args (beside RecipeTrainer's):
        kl_weight: of hold_to_base, which is to be called where it is above 0.
        early_stop: no, learned or guard (GuardedStop).
        max_forgetting: rise of the held-out loss, in parts of it, at which "guard" stops.
        ask: () -> {metric: share}, the questions about the identity; all ranks call it.
    """

    def __init__(
        self,
        *args,
        kl_weight: float = 0.0,
        early_stop: str = "no",
        max_forgetting: float = 0.0,
        ask: Callable[[], dict] | None = None,
        **more,
    ):
        super().__init__(*args, **more)
        self.kl_weight = kl_weight
        if early_stop != "no":
            self.add_callback(GuardedStop(self, early_stop == "guard", max_forgetting, ask))

    def hold_to_base(self, is_general: Sequence[bool]) -> None:
        """Add the KL term: rows must be packed, the model a PeftModel. is_general: of each row to
        train on, whether it is held to the base."""
        check_kl(self.model)
        self.data_collator = WithGeneral(self.data_collator, is_general)

    def loss_of(self, model, inputs, return_outputs, num_items_in_batch):
        index = inputs.pop("general_index", None)
        labels = inputs.pop("general_labels", 0)
        result = super().loss_of(model, inputs, return_outputs, num_items_in_batch)
        if index is None or not model.training:
            return result
        kl = self.kl_of(inputs, index, labels, num_items_in_batch)
        if return_outputs:
            return result[0] + kl, result[1]
        return result + kl

    def eval_sums(self, model, inputs):
        for name in ("general_index", "general_labels"):
            inputs.pop(name, None)
        return super().eval_sums(model, inputs)

    def kl_of(self, inputs: dict, index, labels: int, num_items) -> torch.Tensor:
        """The KL term of a micro-batch, scaled like its loss; 0 with a graph where it has no
        general row."""
        inputs = {k: v for k, v in inputs.items() if k not in ("labels", "label_index")}
        some = index if len(index) else index.new_zeros(1)
        total = kl_to_base(self.model, inputs, some) * (labels / len(some))
        if num_items is None:
            return self.kl_weight * total / max(1, labels)
        ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
        return self.kl_weight * total / num_items * ranks


class GuardedStop(TrainerCallback):
    """About ten looks along a run. It ends at one where the identity is learned; under "guard" only
    when the held-out loss has risen by more than `most` too: until then more steps do no harm."""

    def __init__(self, trainer, guarded: bool, most: float, ask: Callable[[], dict]):
        self.trainer = trainer
        self.guarded = guarded
        self.most = most
        self.ask = ask
        self.warned = False

    def on_step_end(self, args, state, control, **kwargs):
        every = max(1, round(state.max_steps / LOOKS))
        if state.global_step % every or state.global_step >= state.max_steps:
            return
        began = time.time()
        found, _ = self.trainer.asking.ask(lambda: (self.ask(), []))
        learned = bool(found) and min(found.values()) >= LEARNED
        rise = self.rise()
        self.trainer.started += time.time() - began  # speed is that of the training
        shares = ", ".join(f"{name} {share:.2f}" for name, share in found.items())
        cli.say(f"  step {state.global_step}: {shares}, held-out loss {rise:+.1%}")
        crossed = rise > self.most
        if crossed and not learned and not self.warned:
            self.warned = True
            cli.say(
                f"  warning: the held-out loss has risen by {rise:.1%} before the identity is "
                "learned: mix more general rows (--identity_ratio), give a --kl_weight, or a lower "
                "--learning_rate"
            )
        if learned and (crossed or not self.guarded):
            cli.say("  the identity is learned: the run ends here (--early_stop no goes on)")
            control.should_training_stop = True

    def rise(self) -> float:
        """Of the held-out loss since the start, in parts of it; 0 where nothing is held out."""
        before = self.trainer.before.get("metrics", {}).get("loss")
        if not self.trainer.eval_dataset or not before:
            return 0.0
        now = self.trainer.evaluate(quiet=True)["eval_loss"]
        return now / before - 1
