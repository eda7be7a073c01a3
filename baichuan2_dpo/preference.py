"""Pairs of answers through the Trainer: batches, reference log-probs, the loss of a step, metrics.

A token row here is {"chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"}:
each answer behind its prompt, labels -100 on the prompt. The two stand next to each other in one
packed row, the prompt once (shared_prompt.py), or twice where the model's attention is its own.

T tokens of a row, n pairs of a batch, N answer tokens.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import shared_prompt
import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from dpo_losses import BETA, REFERENCE_FREE, Answers, preference_loss, rewards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from common import cli, collators
from common.data.cache import cache_root
from common.data.columns import lengths_of, numbered
from common.data.counts import for_model
from common.data.progress import Progress
from common.data.spelling import IGNORE
from common.fast import losses, packing_check, shared_start
from common.trainer import RecipeTrainer

SIDES = ("chosen", "rejected")
COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


# ---- batches ----
class Pairs(Dataset):
    """Token rows with their number and, once they are known, the reference's log-prob of each
    answer token."""

    def __init__(self, rows, packing: bool = True, share_prompt: bool = True):
        """packing, share_prompt: as PairCollator makes batches of them."""
        self.packing = packing
        self.share = packing and share_prompt
        self.rows = rows.select_columns(list(COLUMNS)).with_format("numpy")
        self.offsets: np.ndarray | None = None  # [rows + 1] answer tokens before each row
        self.reference: np.ndarray | None = None  # [offsets[-1]] of all rows, one after the other

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """What a DataLoader asks for: all pairs of a batch are read at once."""
        rows = numbered(self.rows, indices)
        if self.reference is not None:
            for row in rows:
                start, end = self.offsets[row["row_id"]], self.offsets[row["row_id"] + 1]
                row["reference"] = self.reference[start:end]
        return rows

    def most_tokens(self, size: int) -> int:
        """Of a batch of `size` pairs. Whose prompts are long is looked for among the longest pairs
        only."""
        chosen = lengths_of(self.rows, "chosen_input_ids")
        rejected = lengths_of(self.rows, "rejected_input_ids")
        if not self.packing:
            return 2 * size * int(max(chosen.max(initial=0), rejected.max(initial=0)))
        tokens = chosen + rejected
        if not self.share:
            return int(np.sort(tokens)[-size:].sum())
        longest = [self[int(i)] for i in np.argsort(tokens)[-4 * size :]]
        shared = [shared_prompt.packed_length(both_sides(pair)) for pair in longest]
        return sum(sorted(shared)[-size:])

    def index(self) -> str:
        """Fill `offsets`; returns a hash of all rows."""
        digest = hashlib.sha256()
        counts = [0]
        for row in self.rows:
            for name in COLUMNS:
                digest.update(np.int64(len(row[name])).tobytes() + row[name].tobytes())
            counts.append(sum(int((row[f"{side}_labels"][1:] != IGNORE).sum()) for side in SIDES))
        self.offsets = np.cumsum(counts)
        return digest.hexdigest()


class PairCollator:
    """Pairs -> one batch of 2n sequences, chosen and rejected in turn.

    Returns what PackedCollator (packing) or PaddedCollator returns, or pack_pairs where prompts are
    shared, and
        row_ids: [n]
        padding_tokens: of a packed row, those of a last document without labels that rounds the row
            up to `multiple`
        reference_logprobs: [N] the bits of fp32, in the order of the labels, if the pairs bring
            them
    """

    def __init__(
        self,
        pad_token_id: int | None,
        packing: bool = True,
        share_prompt: bool = True,
        multiple: int = 1,
    ):
        self.packing = packing
        self.share = packing and share_prompt
        self.multiple = multiple
        self.packed = collators.PackedCollator()
        self.padded = collators.PaddedCollator(pad_token_id, multiple)

    def __call__(self, pairs: list[dict]) -> dict:
        rows = [row for pair in pairs for row in both_sides(pair)]
        batch = self.pack(rows) if self.packing else self.padded(rows)
        batch["row_ids"] = [pair["row_id"] for pair in pairs]
        if "reference" in pairs[0]:
            known = np.concatenate([pair["reference"] for pair in pairs])
            # as bits: with DeepSpeed the Trainer casts whatever floats a batch has to its half
            # dtype
            batch["reference_logprobs"] = torch.from_numpy(known).view(torch.int32)
        return batch

    def pack(self, rows: list[dict]) -> dict:
        if self.share:
            tokens = shared_prompt.packed_length(rows)
        else:
            tokens = sum(len(row["input_ids"]) for row in rows)
        padding = -tokens % self.multiple
        if padding:
            rows = [*rows, collators.pad_document(padding)]
        batch = shared_prompt.pack_pairs(rows) if self.share else self.packed([rows])
        return batch | {"padding_tokens": padding}


def both_sides(pair: dict) -> list[dict]:
    """The chosen and the rejected row of a pair."""
    return [
        {"input_ids": pair[f"{side}_input_ids"], "labels": pair[f"{side}_labels"]} for side in SIDES
    ]


# ---- the trainer ----
METRICS = (
    "loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
)  # sums over pairs in this order; behind them the pairs, the sum of KL, and the answer tokens


class PreferenceTrainer(RecipeTrainer):
    """RecipeTrainer with a loss of pairs. The loss of a step is the mean over its pairs, on all
    ranks together.

    Args (beside RecipeTrainer's):
        loss: arguments of dpo_losses.preference_loss, kind included.
        reference: precomputed (once, kept on disk), adapter (switched off in each step), model (a
            second one).
        load_reference: () -> the reference model under losses.use_chunked_loss; called when it is
            needed.
        fingerprint: of the reference's weights; the log-probs on disk belong to it and to the rows.
    """

    plots = {
        "loss": "loss per pair",
        "rewards/margins": "reward margin",
        "rewards/accuracies": "reward accuracy",
    }

    def __init__(
        self,
        *args,
        loss: dict,
        reference: str,
        load_reference: Callable,
        fingerprint: str = "",
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        collator = self.data_collator.collate
        self.packs_answers = collator.packing
        if collator.share:
            shared_start.require(self.model)
        self.loss_is_scaled_for_ga = True  # loss_of divides by the pairs of the whole step
        self.loss_settings = {"beta": BETA.get(loss["kind"], 0.1)} | loss
        self.reference = None if loss["kind"] in REFERENCE_FREE else reference
        self.load_reference = load_reference
        self.fingerprint = fingerprint
        self._reference_model = None
        self._sums: Tensor | None = None  # of pair_losses, since the last log
        config = self.model.config.get_text_config()
        if getattr(config, "output_router_logits", False):
            cli.say(
                "note: output_router_logits: a loss of pairs has no balance of experts; left out"
            )
            config.output_router_logits = False

    # ---- reference ----
    def before_measuring(self) -> None:
        if self.packs_answers:
            packing_check.refuse_leaks(self, self.some_answers())
        if self.reference != "precomputed":
            return
        for pairs in (self.train_dataset, self.eval_dataset):
            if pairs:
                self.precompute(pairs)

    def some_answers(self) -> list[dict]:
        """Chosen answers of the first pairs, for the check of packing."""
        pairs = [self.train_dataset[i] for i in range(min(8, len(self.train_dataset)))]
        return [
            {"input_ids": pair["chosen_input_ids"], "labels": pair["chosen_labels"]}
            for pair in pairs
        ]

    def precompute(self, pairs: Pairs) -> None:
        """Give each pair the reference's log-probs: from disk, or computed by all ranks together
        and then kept."""
        facts = [pairs.index(), self.fingerprint, self.compute_dtype()]
        key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        file = cache_root() / "reference" / f"{key}.safetensors"
        if self._all_have(file, int(pairs.offsets[-1])):
            found = load_file(file)["logprobs"]
            cli.say(
                f"reference log-probs of {len(pairs):,} pairs: kept from an earlier run, {file}"
            )
        else:
            found = self.compute_reference(pairs)
            self._keep(file, found)
        pairs.reference = found.numpy()

    def _all_have(self, file: Path, tokens: int) -> bool:
        """Whether every rank finds the file, complete."""
        try:
            with safe_open(file, "pt") as kept:
                complete = kept.get_slice("logprobs").get_shape() == [tokens]
        except (OSError, SafetensorError):
            complete = False
        have = torch.tensor(int(complete), device=self.args.device)
        if self.args.world_size > 1:
            dist.all_reduce(have, dist.ReduceOp.MIN)
        return bool(have)

    def _keep(self, file: Path, found: Tensor) -> None:
        """One rank of each machine writes, under a name of its own first: machines may share the
        cache."""
        if self.args.process_index == 0 or self.args.local_process_index == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{self.args.process_index}.part")
            save_file({"logprobs": found}, part)
            part.replace(file)
        cli.wait_for_all("it keeps the reference log-probs")

    def compute_reference(self, pairs: Pairs) -> Tensor:
        """Reference log-probs of all answer tokens of `pairs`, fp32 [offsets[-1]] on the CPU, the
        same on every rank."""
        rank = self.args.process_index
        world = self.args.world_size
        size = self.args.per_device_eval_batch_size
        # equal work for all ranks, which ZeRO-3 needs in each forward: the first pairs come again
        # at the end
        rounds = -(-len(pairs) // (world * size))
        mine = range(rank, rounds * world * size, world)
        # a generator of its own: a run that finds the log-probs kept must draw the same numbers as
        # this one
        loader = DataLoader(
            Subset(pairs, [number % len(pairs) for number in mine]),
            size,
            collate_fn=self.data_collator,
            generator=torch.Generator(),
        )
        numbers = iter(mine)
        found = torch.zeros(int(pairs.offsets[-1]), device=self.args.device)
        with Progress("reference", total=len(pairs), unit="pairs") as progress:
            for batch in loader:
                rows = batch["row_ids"]
                inputs = for_model(send_to_device(batch, self.args.device))
                known = self.reference_logprobs(self.model_wrapped, inputs, live=False)
                lengths = [int(pairs.offsets[row + 1] - pairs.offsets[row]) for row in rows]
                for row, of_row in zip(rows, known.split(lengths), strict=True):
                    # ranks are summed, so that a pair that comes again must not count
                    if next(numbers) < len(pairs):
                        found[pairs.offsets[row] : pairs.offsets[row + 1]] = of_row
                progress.update(min(len(rows) * world, len(pairs) - progress.done))
        if world > 1:
            cli.wait_for_all("it computes reference log-probs")
            dist.all_reduce(found)
        return found.cpu()

    def reference_logprobs(self, model, inputs: dict, live: bool = True) -> Tensor:
        """Log-probs of the labels [N] by the reference: the adapter switched off, the second model,
        or, before the first step of full training (live is False), the model itself."""
        plain = self.accelerator.unwrap_model(model)
        if self.reference != "model" and hasattr(plain, "disable_adapter"):
            with plain.disable_adapter():
                return self._frozen_logprobs(model, inputs)
        untouched = not live and self.state.global_step == 0 and self.reference != "model"
        return self._frozen_logprobs(model if untouched else self.reference_model(), inputs)

    @torch.no_grad()
    def _frozen_logprobs(self, model, inputs: dict) -> Tensor:
        was_training = model.training
        model.eval()
        with self.compute_loss_context_manager():
            log_probs, *_ = losses.answer_logprobs(model, **inputs)
        model.train(was_training)
        return log_probs

    def reference_model(self):
        """The second model, frozen; under ZeRO-3 its weights are spread over the ranks like the
        policy's."""
        if self._reference_model is None:
            model = self.load_reference().requires_grad_(False).eval()
            if self.is_deepspeed_enabled:
                model = self._spread(model)
            self._reference_model = model.to(self.args.device)
        return self._reference_model

    def _spread(self, model):
        config = copy.deepcopy(self.accelerator.state.deepspeed_plugin.deepspeed_config)
        if config.get("zero_optimization", {}).get("stage") != 3:
            return model
        import deepspeed

        for trained in ("optimizer", "scheduler"):
            config.pop(trained, None)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        engine.eval()  # DeepSpeed's returns nothing
        return engine

    # ---- one batch ----
    def count_items(self, samples: list[dict]) -> int:
        """Pairs of one optimizer step on this rank: what its loss is divided by."""
        return sum(len(batch["row_ids"]) for batch in samples)

    def loss_of(self, model, inputs, return_outputs, num_items_in_batch):
        loss, sums = self.pair_losses(model, inputs)
        if model.training:
            self._sums = sums if self._sums is None else self._sums + sums
        if num_items_in_batch is None:
            pairs = len(loss)
        else:
            pairs = num_items_in_batch / self.args.world_size  # ranks are averaged afterwards
        loss = loss.sum() / pairs
        return (loss, {}) if return_outputs else loss

    def pair_losses(self, model, inputs: dict) -> tuple[Tensor, Tensor]:
        """-> loss of each pair [n], with a graph, and sums for the metrics (METRICS)."""
        known = inputs.pop("reference_logprobs", None)
        if known is not None:
            known = known.view(torch.float32)
        elif self.reference is not None:
            known = self.reference_logprobs(model, inputs)
        log_probs, *whose = losses.answer_logprobs(model, **inputs)
        longest = inputs.get("max_length_q", inputs["labels"].shape[1])
        policy = answers(log_probs, *whose, longest)
        reference = None if known is None else answers(known, *whose, longest)
        loss = preference_loss(policy=policy, reference=reference, **self.loss_settings)
        return loss, self._metric_sums(loss.detach(), policy, reference, log_probs.detach(), known)

    def _metric_sums(
        self,
        loss: Tensor,
        policy: Answers,
        reference: Answers | None,
        log_probs: Tensor,
        known: Tensor | None,
    ) -> Tensor:
        """fp32 [10]: the sums of METRICS, the pairs, the sum of KL, the answer tokens."""
        chosen, rejected = rewards(
            kind=self.loss_settings["kind"],
            policy=policy,
            reference=reference,
            beta=self.loss_settings["beta"],
            averaged=self.loss_settings.get("averaged", False),
        )
        # a tie, as before the first step, is half right
        right = (torch.sign(chosen - rejected) + 1) / 2
        # k3 estimate of KL(reference | policy), whose samples the answers stand for
        ratio = log_probs.new_zeros(1) if known is None else log_probs - known
        kl = torch.expm1(ratio) - ratio
        per_pair = (
            loss,
            right,
            chosen - rejected,
            chosen,
            rejected,
            policy.chosen.detach(),
            policy.rejected.detach(),
            torch.ones_like(chosen),
        )
        tokens = log_probs.new_full((), len(log_probs))
        return torch.stack([*(x.sum() for x in per_pair), kl.sum(), tokens]).float()

    # ---- metrics ----
    def named(self, sums: list[float]) -> dict[str, float]:
        *per_pair, pairs, kl, tokens = sums
        found = {name: value / max(1, pairs) for name, value in zip(METRICS, per_pair, strict=True)}
        if self.reference is not None:
            found["kl"] = kl / max(1, tokens)
        return found

    def eval_sums(self, model, inputs) -> Tensor:
        if len(inputs["label_index"]):
            return self.pair_losses(model, inputs)[1]
        # a rank without rows takes part in the forwards
        known = inputs.pop("reference_logprobs", None)
        if known is None and self.reference is not None:
            self.reference_logprobs(model, inputs)
        losses.answer_logprobs(model, **inputs)
        return torch.zeros(len(METRICS) + 3, device=self.args.device)

    def eval_metrics(self, sums: list[float]) -> dict[str, float]:
        return self.named(sums)

    def add_to_log(self, logs: dict) -> None:
        sums = self._sums
        self._sums = None
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        found = self.named(sums.tolist())
        del found["loss"]
        logs |= found


def answers(log_probs: Tensor, owner: Tensor, count: int, longest: int) -> Answers:
    """Log-probs of tokens [N] and the sequence each belongs to [N] -> sums and lengths of chosen
    and rejected [n]. longest: tokens that a sequence may have."""
    count -= count % 2  # a last sequence alone is padding
    sums = losses.sum_by_owner(log_probs, owner, count, longest)
    lengths = losses.count_by_owner(owner, count).clamp(min=1).to(sums)
    return Answers(sums[::2], sums[1::2], lengths[::2], lengths[1::2])
