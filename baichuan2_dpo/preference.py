"""Pairs of answers through the Trainer: batches in which a pair shares its prompt, reference
log-probs, metrics.

A token row here is {"chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"}:
each answer behind its prompt, labels -100 on the prompt. The two stand next to each other in one
packed row, the prompt once:

    prompt[:-1] | prompt[-1] chosen | prompt[-1] rejected

The rejected answer looks at the prompt and at itself, at the positions it would have alone
(key_columns of common/fast/attention.py). Models with an attention of their own get the prompt
twice.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from dpo_losses import BETA, REFERENCE_FREE, Answers, preference_loss, rewards
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from common import cli, collators
from common.data.cache import cache_root
from common.fast import losses
from common.trainer import RecipeTrainer

IGNORE = -100
COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


# ---- batches --------------------------------------------------------------------------------------------------------


class Pairs(torch.utils.data.Dataset):
    """Token rows with their number and, once they are known, the reference's log-prob of each
    answer token."""

    def __init__(self, rows):
        self.rows, self.reference, self.starts = (
            rows.select_columns(list(COLUMNS)).with_format("numpy"),
            None,
            None,
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = {**self.rows[index], "row_id": index}
        if self.reference is not None:
            row["reference"] = self.reference[self.starts[index] : self.starts[index + 1]]
        return row

    def index(self) -> str:
        """Fill `starts` [n + 1], the answer tokens before each row; returns a hash of all rows."""
        digest, counts = hashlib.sha256(), [0]
        for row in self.rows:
            for name in COLUMNS:
                digest.update(np.int64(len(row[name])).tobytes() + row[name].tobytes())
            counts.append(sum(int((row[name][1:] != IGNORE).sum()) for name in COLUMNS[1::2]))
        self.starts = np.cumsum(counts)
        return digest.hexdigest()


class PairCollator:
    """Pairs -> one batch of 2n sequences, chosen and rejected in turn; see the head of this file.

    Returns what PackedCollator (packing) or PaddedCollator returns; key_columns where a prompt is
    shared; row_ids [n]; filling, the tokens of a last sequence without labels that rounds a packed
    row up to `multiple`; reference_logprobs [answer tokens], the bits of fp32, in the order of the
    labels, if the pairs bring them.
    """

    def __init__(
        self,
        pad_token_id: int | None,
        packing: bool = True,
        share_prompt: bool = True,
        multiple: int = 1,
    ):
        self.packed = collators.PackedCollator() if packing else None
        self.padded, self.share = (
            collators.PaddedCollator(pad_token_id, multiple),
            packing and share_prompt,
        )
        self.multiple = multiple

    def __call__(self, pairs: list[dict]) -> dict:
        rows = [
            {"input_ids": pair[f"{side}_input_ids"], "labels": pair[f"{side}_labels"]}
            for pair in pairs
            for side in ("chosen", "rejected")
        ]
        if self.packed:
            pack = shared_prompts if self.share else (lambda rows: self.packed([rows]))
            filling = -packed_length(rows, self.share) % self.multiple
            rows += [
                {"input_ids": np.zeros(filling, np.int64), "labels": np.full(filling, IGNORE)}
            ] * bool(filling)
            batch = pack(rows) | {"filling": filling}
        else:
            batch = self.padded(rows)
        batch["row_ids"] = [pair["row_id"] for pair in pairs]
        if "reference" in pairs[0]:
            known = np.concatenate([pair["reference"] for pair in pairs])
            # as bits: with DeepSpeed the Trainer casts whatever floats a batch has to its half
            # dtype
            batch["reference_logprobs"] = torch.from_numpy(known).view(torch.int32)
        return batch


def packed_length(rows: list[dict], share: bool) -> int:
    twice = (
        sum(common_start(*pair) for pair in zip(rows[::2], rows[1::2], strict=True)) if share else 0
    )
    return sum(len(row["input_ids"]) for row in rows) - twice


def shared_prompts(rows: list[dict]) -> dict:
    """Rows chosen, rejected, chosen, ... -> one packed row in which the second of two leaves out
    what both begin with.

    A last row that has no other stands alone.

    Returns input_ids, labels, position_ids [1, T]; cu_seq_lens_q (columns of each sequence),
    cu_seq_lens_k (its keys) [2n + 1] int32; key_columns [keys]; max_length_q, max_length_k.
    """
    ids, labels, positions, keys, queries, lengths, at = [], [], [], [], [], [], 0
    for number, row in enumerate(rows):
        second = number % 2 == 1
        shared = common_start(rows[number - 1], row) if second else 0
        size = len(row["input_ids"]) - shared
        ids.append(row["input_ids"][shared:])
        labels.append(row["labels"][shared:])
        positions.append(np.arange(shared, shared + size))
        start = at - len(rows[number - 1]["input_ids"]) if second else at  # of the prompt
        keys += [np.arange(start, start + shared), np.arange(at, at + size)]
        queries.append(size)
        lengths.append(shared + size)
        at += size
    flat = [
        torch.from_numpy(np.concatenate(part).astype(np.int64))
        for part in (ids, labels, positions, keys)
    ]
    edges = [torch.tensor([0, *part]).cumsum(0) for part in (queries, lengths)]
    flat[1][edges[0][:-1]] = IGNORE  # nothing before it in the row predicts it
    names = ("input_ids", "labels", "position_ids")
    return {name: part[None] for name, part in zip(names, flat, strict=False)} | {
        "key_columns": flat[3],
        "cu_seq_lens_q": edges[0].to(torch.int32),
        "cu_seq_lens_k": edges[1].to(torch.int32),
        "max_length_q": max(queries),
        "max_length_k": max(lengths),
    }


def common_start(chosen: dict, rejected: dict) -> int:
    """Tokens that both rows begin with, short of the one that predicts the first label."""
    labelled = [
        np.flatnonzero(np.asarray(row["labels"][1:]) != IGNORE)[0] for row in (chosen, rejected)
    ]
    most = min(labelled)  # a label at column c + 1 is predicted by column c, which stays in both
    a, b = (np.asarray(row["input_ids"][:most]) for row in (chosen, rejected))
    different = np.flatnonzero(a != b)
    return int(different[0]) if len(different) else int(most)


# ---- the trainer ----------------------------------------------------------------------------------------------------


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
        self.loss_settings = {"beta": BETA.get(loss["kind"], 0.1)} | loss
        self.reference = None if loss["kind"] in REFERENCE_FREE else reference
        self.load_reference, self.fingerprint, self._reference_model = (
            load_reference,
            fingerprint,
            None,
        )
        self._sums: Tensor | None = None  # metrics since the last log
        self.loss_is_scaled_for_ga = True

    # ---- reference ----
    def before_measuring(self) -> None:
        if self.reference == "precomputed":
            for part in (self.train_dataset, self.eval_dataset):
                if part:
                    self.precompute(part)

    def precompute(self, pairs: Pairs) -> None:
        """Give each pair the reference's log-probs: from disk, or computed by all ranks together
        and then kept."""
        key = hashlib.sha256(
            json.dumps([pairs.index(), self.fingerprint, self.compute_dtype()]).encode()
        ).hexdigest()
        file = cache_root() / "reference" / f"{key[:32]}.safetensors"
        if self._all_have(file, int(pairs.starts[-1])):
            found = load_file(file)["logprobs"]
            cli.say(
                f"reference log-probs of {len(pairs):,} pairs: kept from an earlier run, {file}"
            )
        else:
            found = self.compute_reference(pairs)
            if self.args.process_index == 0 or self.args.local_process_index == 0:
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix(f".{self.args.process_index}.part")
                save_file({"logprobs": found}, part)
                part.replace(file)
            self._barrier()
        pairs.reference = found.numpy()

    def _all_have(self, file: Path, tokens: int) -> bool:
        """Whether every rank finds the file, whole."""
        try:
            with safe_open(file, "pt") as kept:
                whole = kept.get_slice("logprobs").get_shape() == [tokens]
        except (OSError, SafetensorError):
            whole = False
        have = torch.tensor(int(whole), device=self.args.device)
        if self.args.world_size > 1:
            dist.all_reduce(have, dist.ReduceOp.MIN)
        return bool(have)

    def compute_reference(self, pairs: Pairs) -> Tensor:
        """Reference log-probs of all answer tokens of `pairs`, fp32 [starts[-1]] on the CPU, the
        same on every rank."""
        rank, world, size = (
            self.args.process_index,
            self.args.world_size,
            self.args.per_device_eval_batch_size,
        )
        rounds = -(-len(pairs) // (world * size))
        order = [
            i % len(pairs) for i in range(rounds * world * size)
        ]  # equal work: ZeRO-3 needs all in each forward
        mine = torch.utils.data.Subset(pairs, order[rank::world])
        # a generator of its own: a run that finds the log-probs kept must draw the same numbers as
        # this one
        loader = DataLoader(mine, size, collate_fn=self.data_collator, generator=torch.Generator())
        found = torch.zeros(int(pairs.starts[-1]), device=self.args.device)
        bar = tqdm(loader, "reference", unit="batch", disable=rank > 0 or None, leave=False)
        for number, batch in enumerate(bar):
            rows, _ = batch.pop("row_ids"), batch.pop("filling", None)
            known = self.reference_logprobs(
                self.model_wrapped, self._prepare_inputs(batch), live=False
            )
            edges = np.cumsum([0, *(pairs.starts[row + 1] - pairs.starts[row] for row in rows)])
            for j, (row, (a, b)) in enumerate(zip(rows, pairwise(edges), strict=True)):
                if (number * size + j) * world + rank < len(pairs):  # not the filling at the end
                    found[pairs.starts[row] : pairs.starts[row + 1]] = known[a:b]
        if world > 1:
            dist.all_reduce(found)
        return found.cpu()

    @torch.no_grad()
    def reference_logprobs(self, model, inputs: dict, live: bool = True) -> Tensor:
        """Log-probs of the labels by the reference: the adapter switched off, the second model, or,
        before the first step of full training, the model itself."""
        plain = self.accelerator.unwrap_model(model)
        if self.reference != "model" and hasattr(plain, "disable_adapter"):
            was_training = model.training
            model.eval()
            with plain.disable_adapter(), self.compute_loss_context_manager():
                found, *_ = losses.answer_logprobs(model, **inputs)
            model.train(was_training)
            return found
        untouched = not live and self.state.global_step == 0 and self.reference != "model"
        other = model if untouched else self.reference_model()
        was_training = other.training
        other.eval()
        with self.compute_loss_context_manager():
            found, *_ = losses.answer_logprobs(other, **inputs)
        other.train(was_training)
        return found

    def reference_model(self):
        """The second model, frozen; under ZeRO-3 its weights are spread over the ranks like the
        policy's."""
        if self._reference_model is None:
            model = self.load_reference().requires_grad_(False).eval()
            config = (
                self.accelerator.state.deepspeed_plugin.deepspeed_config
                if self.is_deepspeed_enabled
                else {}
            )
            if config.get("zero_optimization", {}).get("stage") == 3:
                import deepspeed

                config = {
                    k: v
                    for k, v in copy.deepcopy(config).items()
                    if k not in ("optimizer", "scheduler")
                }
                model, *_ = deepspeed.initialize(model=model, config=config)
                model.eval()
            self._reference_model = model.to(self.args.device)
        return self._reference_model

    # ---- one batch ----
    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Pairs of one optimizer step, on all ranks."""
        count = torch.tensor(sum(len(batch["row_ids"]) for batch in batch_samples), device=device)
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def loss_of(self, model, inputs, return_outputs, num_items_in_batch):
        loss, sums = self.pair_losses(model, inputs)
        if model.training:
            self._sums = sums if self._sums is None else self._sums + sums
        pairs = (
            len(loss) if num_items_in_batch is None else num_items_in_batch / self.args.world_size
        )
        loss = loss.sum() / pairs  # ranks are averaged afterwards
        return (loss, {}) if return_outputs else loss

    def pair_losses(self, model, inputs: dict) -> tuple[Tensor, Tensor]:
        """-> loss of each pair [n], with a graph, and sums for the metrics (see `named`)."""
        inputs = {name: value for name, value in inputs.items() if name != "filling"}
        known = inputs.pop("reference_logprobs", None)
        if known is not None:
            known = known.view(torch.float32)
        elif self.reference is not None:
            known = self.reference_logprobs(model, inputs)
        tokens, owner, count = losses.answer_logprobs(model, **inputs)
        policy = answers(tokens, owner, count)
        reference = None if known is None else answers(known, owner, count)
        loss = preference_loss(policy=policy, reference=reference, **self.loss_settings)
        settings = {
            name: self.loss_settings.get(name, False) for name in ("kind", "beta", "averaged")
        }
        chosen, rejected = rewards(policy=policy, reference=reference, **settings)
        ratio = tokens.new_zeros(1) if known is None else tokens.detach() - known
        kl = (
            torch.expm1(ratio) - ratio
        )  # k3 estimate of KL(reference | policy), whose samples the answers stand for
        right = (
            torch.sign(chosen - rejected) + 1
        ) / 2  # a tie, as before the first step, is half right
        per_pair = [
            loss.detach(),
            right,
            chosen - rejected,
            chosen,
            rejected,
            policy.chosen.detach(),
            policy.rejected.detach(),
            torch.ones_like(chosen),
        ]
        sums = [x.sum() for x in per_pair] + [kl.sum(), tokens.new_tensor(float(len(tokens)))]
        return loss, torch.stack(sums).float()

    # ---- metrics ----
    def named(self, sums: list[float]) -> dict[str, float]:
        names = (
            "loss",
            "rewards/accuracies",
            "rewards/margins",
            "rewards/chosen",
            "rewards/rejected",
            "logps/chosen",
            "logps/rejected",
        )
        *per_pair, pairs, kl, tokens = sums
        found = {name: value / max(1, pairs) for name, value in zip(names, per_pair, strict=True)}
        return found if self.reference is None else found | {"kl": kl / max(1, tokens)}

    def eval_sums(self, model, inputs) -> Tensor:
        if bool((inputs["labels"] != IGNORE).any()):
            return self.pair_losses(model, inputs)[1]
        inputs.pop("filling", None)
        known = inputs.pop("reference_logprobs", None)
        if known is None and self.reference is not None:
            self.reference_logprobs(model, inputs)
        losses.answer_logprobs(model, **inputs)  # a rank without rows takes part in the forward
        return torch.zeros(10, device=self.args.device)

    def eval_metrics(self, sums: list[float]) -> dict[str, float]:
        return self.named(sums)

    def totals(self) -> dict:
        sums, self._sums = self._sums, None
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        self._shown = {k: v for k, v in self.named(sums.tolist()).items() if k != "loss"}
        return super().totals()

    def log(self, logs, start_time=None):
        super().log(logs | self._shown if "loss" in logs else logs, start_time)


def answers(log_probs: Tensor, owner: Tensor, count: int) -> Answers:
    """Log-probs of tokens [N] and the sequence each belongs to [N] -> sums and lengths of chosen
    and rejected [n]."""
    count -= count % 2  # a last sequence alone is filling
    sums = losses.sum_by_owner(log_probs, owner, count)
    lengths = torch.bincount(owner, minlength=count).clamp(min=1).to(sums)
    return Answers(sums[::2], sums[1::2], lengths[::2], lengths[1::2])
