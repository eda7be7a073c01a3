"""Pairs of text and picture through the Trainer: the loss of a step over all ranks, GradCache,
features of frozen towers, held-out recall.

b pairs of this rank, E width of the embeddings, N held-out pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from batches import PictureFaults
from contrastive import (
    MAX_LOG_SCALE,
    Embeddings,
    Teacher,
    batch_facts,
    contrastive_loss,
    gather,
    grad_cache,
    plain_loss,
    split_batch,
)
from feature_cache import features_of
from model import Embedder, Preparation, image_features
from retrieval import among, both_ways, number_pairs
from torch import Tensor
from torch.nn import functional as F
from towers import frozen_towers, make_plain, parameter_groups
from transformers import TrainerCallback

from common import cli
from common.data.pictures import Place
from common.trainer import RecipeTrainer

SHOWN = 12  # held-out captions whose first picture the report names


class ContrastiveTrainer(RecipeTrainer):
    """RecipeTrainer for two towers under towers.for_training. The loss of a step is that of the
    pairs of all ranks together.

    Args (beside RecipeTrainer's):
        kind, mode: of contrastive.contrastive_loss.
        mask_duplicates: equal captions, and captions of one picture, are no negatives.
        grad_cache_chunk: pairs of a rank that have a graph at a time; 0: all.
        rates: learning rate of each part (towers.rates).
        faults: counts pictures that cannot be used.
        fingerprint: of the weights that the run begins with; features on disk belong to it.
        caches_features: of frozen towers.
        adapter_factor: lora_alpha / r where adapters train, else None.
        load_teacher: () -> the Embedder to learn from, or None.
        teacher_weight: of the divergence from it.
    """

    plots = {"loss": "loss per pair", "mean_recall": "held-out mean recall"}

    def __init__(
        self,
        *args,
        preparation: Preparation,
        kind: str,
        mode: str,
        rates: dict[str, float],
        faults: PictureFaults,
        fingerprint: str,
        mask_duplicates: bool = True,
        grad_cache_chunk: int = 0,
        caches_features: bool = True,
        adapter_factor: float | None = None,
        load_teacher: Callable[[], Embedder] | None = None,
        teacher_weight: float = 1.0,
        **kwargs,
    ):
        super().__init__(*args, processing_class=preparation, **kwargs)
        self.preparation = preparation
        self.kind = kind
        self.mode = mode
        self.rates = rates
        self.faults = faults
        self.fingerprint = fingerprint
        self.mask_duplicates = mask_duplicates
        self.chunk = grad_cache_chunk
        self.caches_features = caches_features
        self.adapter_factor = adapter_factor
        self.load_teacher = load_teacher
        self.teacher_weight = teacher_weight
        self.teacher_scale = 0.0
        self.sums: Tensor | None = None  # of batch_facts, since the last log
        self.captions = torch.zeros(4)  # of batch_facts in the whole run, and the steps
        self.held_out: list[Tensor] = []  # embeddings and hashes of this rank's held-out pairs
        self.held_out_rows = None  # the data set that is being measured
        self.held_out_faults: dict[str, str] = {}  # where -> reason, of this rank's pictures in it
        self.told: set[str] = set()  # reasons of which an example was shown
        self.found: list[dict] = []  # what the last measurement found first for some captions
        self.add_callback(Steps(self))

    # ---- optimizer ----
    def create_optimizer(self, model=None):
        if self.optimizer is None:
            groups = parameter_groups(
                self.model if model is None else model, self.rates, self.args.weight_decay
            )
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def bound_scale(self) -> None:
        """The scale stays within [1, 100], as in CLIP's own training."""
        log_scale = self.model.logit_scale
        if not log_scale.requires_grad:
            return
        if self.is_deepspeed_enabled:
            bound_masters(log_scale)
        if log_scale.numel():  # ZeRO-3 has spread it
            log_scale.data.clamp_(0, MAX_LOG_SCALE)

    # ---- features ----
    def before_measuring(self) -> None:
        """Features of frozen towers and of the teacher: from disk, or computed by all ranks."""
        data = [pairs for pairs in (self.train_dataset, self.eval_dataset) if pairs]
        frozen = frozen_towers(self.model) if self.caches_features else []
        for part in frozen:
            facts = [self.fingerprint, self.compute_dtype(), *self.preparation.facts()]
            embed = partial(self.pooled, part)
            for pairs in data:
                self.use_features(pairs, f"{part}_pooled", part, facts, embed)
        if self.load_teacher is not None:
            self.ask_teacher()

    def use_features(self, pairs, name: str, part: str, facts: list, embed, prepare=None) -> None:
        found = features_of(
            pairs.pairs.rows,
            part,
            facts,
            embed,
            prepare or self.preparation.pixels,
            self.args.per_device_eval_batch_size,
            self.args.dataloader_num_workers,
        )
        pairs.use(name, found)

    @torch.no_grad()
    def pooled(self, part: str, items: list) -> Tensor:
        """Captions or pixels -> what the frozen tower hands to its projection, [n, H]."""
        batch = self.preparation.tokens(items) if part == "text" else pixels_of(items)
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        with self.compute_loss_context_manager():
            found = model(**send_to_device(batch, self.args.device), pooled=True)
        model.train(was_training)
        return found[f"{part}_pooled"]

    def ask_teacher(self) -> None:
        """Its embeddings of the pairs that are trained on; then it is not needed any more."""
        teacher = self.load_teacher()
        self.teacher_scale = teacher.logit_scale
        facts = [teacher.fingerprint, "whole", *teacher.preparation.facts()]
        ways = {"text": teacher.embed_text, "image": partial(embed_pixels, teacher)}
        for part, embed in ways.items():
            prepare = teacher.preparation.pixels
            name = f"teacher_{part}s"
            self.use_features(self.train_dataset, name, part, facts, embed, prepare)

    # ---- one step ----
    def count_items(self, samples: list[dict]) -> int:
        """Pairs of one optimizer step on this rank."""
        for batch in samples:
            self.faults.add(batch.pop("faults"), len(batch["row_ids"]))
            batch.pop("is_faulty")
        return sum(len(batch["row_ids"]) for batch in samples)

    def loss_of(self, model, inputs, return_outputs, num_items_in_batch):
        ids = torch.stack([inputs.pop("text_hash"), inputs.pop("picture_hash")], 1)
        teacher = self.teacher_of(inputs)
        negatives = ids if self.mask_duplicates else None
        loss_from = partial(self.pair_loss, ids=negatives, teacher=teacher)
        self.add_facts(batch_facts(ids[:, 0], self.kind))
        forward = partial(self.embed, model)
        if 0 < self.chunk < len(ids):
            chunks = split_batch(inputs, self.chunk)
            loss = grad_cache(forward, chunks, loss_from, self.send_back, partial(self.hold, model))
        else:
            loss = loss_from(forward(inputs))
        return (loss, {}) if return_outputs else loss

    def pair_loss(self, found: Embeddings, ids: Tensor | None, teacher: Teacher | None) -> Tensor:
        """With the gradient of the mode; what is shown is the loss of the whole batch in each."""
        loss = contrastive_loss(found, ids, self.kind, self.mode, teacher)
        if self.mode != "base":
            return loss
        known = Embeddings(*(None if x is None else x.detach() for x in found))
        return loss + (contrastive_loss(known, ids, self.kind) - loss).detach()

    def embed(self, model, inputs: dict) -> Embeddings:
        found = model(**inputs)
        embeds = (found["image_embeds"], found["text_embeds"])
        return Embeddings(*embeds, found["scale"], found["bias"])

    def teacher_of(self, inputs: dict) -> Teacher | None:
        if "teacher_images" not in inputs:
            return None
        images = inputs.pop("teacher_images").view(torch.float32)
        texts = inputs.pop("teacher_texts").view(torch.float32)
        return Teacher(images, texts, self.teacher_scale, self.teacher_weight)

    def send_back(self, loss: Tensor) -> None:
        """Backward of a chunk that is not the last one of its step."""
        if self.is_deepspeed_enabled:
            self.deepspeed.set_gradient_accumulation_boundary(False)
            self.deepspeed.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    def hold(self, model):
        """Gradients wait for the last chunk before ranks exchange them."""
        return nullcontext() if self.is_deepspeed_enabled else self.accelerator.no_sync(model)

    def add_facts(self, sums: Tensor) -> None:
        self.sums = sums if self.sums is None else self.sums + sums
        self.steps_of_sums = getattr(self, "steps_of_sums", 0) + 1

    # ---- logging ----
    def add_to_log(self, logs: dict) -> None:
        sums = self.sums
        if self.args.world_size > 1:
            dist.all_reduce(sums)
        distinct, floors, size = sums.tolist()
        steps = self.steps_of_sums
        self.captions += torch.tensor([distinct, floors, size, steps])
        logs["distinct_captions"] = distinct / steps
        logs["duplicate_floor"] = floors / size
        self.sums = None
        self.steps_of_sums = 0

    # ---- evaluation ----
    def evaluate(
        self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval", quiet=False
    ) -> dict[str, float]:
        """Loss among as many negatives as in training, and recall both ways over all held-out
        pairs, each counted once; pictures that cannot be used are misses. All ranks call it."""
        self.held_out_rows = self.eval_dataset if eval_dataset is None else eval_dataset
        self.held_out = []
        self.held_out_faults = {}
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix, quiet)

    def eval_sums(self, model, inputs) -> Tensor:
        """Keeps the embeddings; there is nothing to sum before all are there."""
        self.held_out_faults |= {where: reason for reason, where in inputs.pop("faults")}
        is_faulty = inputs.pop("is_faulty")[:, None].float()
        hashes = torch.stack([inputs.pop("text_hash"), inputs.pop("picture_hash")], 1)
        found = self.embed(model, inputs)
        self.scale_and_bias = (found.scale, found.bias)
        # the hashes as the bits of fp32, so that one exchange takes all
        bits = hashes.view(torch.float32)
        parts = [found.images.float(), found.texts.float(), is_faulty, bits]
        self.held_out.append(torch.cat(parts, 1))
        return torch.zeros(1, device=self.args.device)

    def eval_metrics(self, sums: list[float]) -> dict[str, float]:
        images, texts, hashes, is_usable = self.all_held_out(len(self.held_out_rows))
        self.share_held_out_faults()
        if not is_usable.any():
            where = next(iter(self.held_out_faults))
            raise SystemExit(f"no held-out picture can be used, e.g. {where}")
        captions, pictures = hashes.T.tolist()
        *_, pairs = number_pairs(captions, pictures)
        places = first_places(pictures)
        kept = [number for number, place in enumerate(places) if is_usable[place]]
        asked = texts[first_places(captions)]
        shown = images[[places[number] for number in kept]]
        found = both_ways(asked, shown, among(pairs, kept), len(places) - len(kept))
        self.note_found(texts, images, is_usable)
        loss = self.held_out_loss(images[is_usable], texts[is_usable], hashes[is_usable])
        return {"loss": loss} | flat(found)

    def held_out_loss(self, images: Tensor, texts: Tensor, hashes: Tensor) -> float:
        """Of a pair, among as many negatives as in training. [n, E], [n, E], int64 [n, 2]."""
        total = 0.0
        size = self.args.train_batch_size * self.args.world_size
        scale, bias = (None if x is None else x.cpu() for x in self.scale_and_bias)
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            found = Embeddings(images[part], texts[part], scale, bias)
            ids = hashes[part] if self.mask_duplicates else None
            total += float(plain_loss(found, ids, self.kind)) * len(found.images)
        return total / len(images)

    def all_held_out(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of all ranks, in the order of the rows: images and texts [N, E], hashes int64 [N, 2],
        whether the picture could be used, bool [N]."""
        world = self.args.world_size
        share = math.ceil(count / world)
        own = torch.cat(self.held_out)[:share]
        if len(own) < share:  # equal parts are gathered
            own = F.pad(own, (0, 0, 0, share - len(own)))
        every = gather(own).view(world, share, -1).transpose(0, 1).flatten(0, 1)[:count].cpu()
        width = (every.shape[1] - 5) // 2
        images, texts, is_faulty, bits = every.split([width, width, 1, 4], 1)
        self.held_out = []
        return images, texts, bits.contiguous().view(torch.int64), is_faulty[:, 0] == 0

    def share_held_out_faults(self) -> None:
        """Every rank knows those of all; each reason is shown once."""
        for share in self.of_all_ranks(self.held_out_faults):
            self.held_out_faults = share | self.held_out_faults
        for where, reason in self.held_out_faults.items():
            if reason not in self.told:
                self.told.add(reason)
                cli.say(f"held-out picture cannot be used and is a miss: {where}")

    def note_found(self, texts: Tensor, images: Tensor, is_usable: Tensor) -> None:
        """For the report: some held-out captions and the picture that each finds first."""
        data = self.held_out_rows
        if data is not self.eval_dataset:
            return
        rows = data.pairs.rows
        usable = is_usable.nonzero()[:, 0]
        asked = torch.linspace(0, len(usable) - 1, min(SHOWN, len(usable))).round().long()
        asked = usable[asked].tolist()
        first = usable[(texts[asked] @ images[is_usable].T).argmax(1)].tolist()
        self.found = [
            {
                "prompt": rows[i]["text"],
                "reference": str(Place(**rows[i]["place"])),
                "answer": str(Place(**rows[j]["place"])),
            }
            for i, j in zip(asked, first, strict=True)
        ]

    def measure_all(self) -> dict:
        metrics = self.evaluate(quiet=True) if self.eval_dataset else {}
        metrics = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        return {"metrics": metrics, "samples": self.found}

    # ---- the end ----
    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            # a checkpoint goes on with its adapters; what is left in the end is the plain model
            factor = None if _internal_call else self.adapter_factor
            make_plain(output_dir, self.model.numbers, factor)
        cli.wait_for_all("it writes the model")

    def report(self, recipe: str, model_name: str, rows: dict, after: dict) -> None:
        distinct, floors, size, steps = self.captions.tolist()
        facts = {
            "batch": round(size / max(1, steps), 1),
            "distinct": round(distinct / max(1, steps), 1),
            "loss_floor_if_negatives": round(floors / max(1, size), 4),
            "masked": self.mask_duplicates,
        }
        unusable = dict(Counter(self.held_out_faults.values()))
        rows = rows | {"captions_of_a_batch": facts, "pictures_replaced": self.replaced()}
        rows |= {"held_out_pictures_unusable": unusable}
        masked = "are no negatives" if self.mask_duplicates else "count as negatives"
        cli.say(
            f"captions: {facts['distinct']:g} different ones in a batch of {facts['batch']:g}; "
            f"equal ones {masked} (as negatives no loss below "
            f"{facts['loss_floor_if_negatives']:.3f} is possible)"
        )
        super().report(recipe, model_name, rows, after)

    def replaced(self) -> dict[str, int]:
        """Pictures that could not be used in training, by reason, of all ranks."""
        return dict(sum(self.of_all_ranks(self.faults.counts), Counter()))

    def of_all_ranks(self, value) -> list:
        """What each rank has; all of them call it."""
        shares = [value]
        if self.args.world_size > 1:
            shares = [None] * self.args.world_size
            dist.all_gather_object(shares, value)
        return shares


class Steps(TrainerCallback):
    """What a ContrastiveTrainer does at the events of a run."""

    def __init__(self, trainer: ContrastiveTrainer):
        self.trainer = trainer

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.train_dataset.set_epoch(math.floor((state.epoch or 0) + 1e-6))

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.bound_scale()


def bound_masters(log_scale: Tensor) -> None:
    """The same for DeepSpeed's fp32 copy, of which ZeRO-3 has a part on each rank."""
    from deepspeed import utils

    if hasattr(log_scale, "ds_id"):
        part = utils.safe_get_local_fp32_param(log_scale)
        utils.safe_set_local_fp32_param(log_scale, part.clamp(0, MAX_LOG_SCALE))
    else:
        whole = utils.safe_get_full_fp32_param(log_scale)
        utils.safe_set_full_fp32_param(log_scale, whole.clamp(0, MAX_LOG_SCALE))


def flat(found: dict) -> dict[str, float]:
    """both_ways -> names of the report."""
    metrics = {"mean_recall": found["mean_recall"]}
    for way in ("text_to_image", "image_to_text"):
        for name, value in found[way].items():
            if name.startswith("R@"):
                metrics[f"{way}_{name}"] = value
    return metrics


def first_places(values: list) -> list[int]:
    """Where each different value stands first, in the order of number_pairs."""
    places: dict = {}
    for place, value in enumerate(values):
        places.setdefault(value, place)
    return list(places.values())


def pixels_of(items: list[Tensor]) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack(items)}


@torch.inference_mode()
def embed_pixels(teacher: Embedder, items: list[Tensor]) -> Tensor:
    """Prepared pictures -> normalised [n, E]."""
    batch = send_to_device(pixels_of(items), teacher.device)
    return image_features(teacher.model, batch)
