"""From rows to batches: texts tokenised and padded, pictures opened, another row where a picture
cannot be used."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from common.data.pictures import PictureError, Place, pixels

STEP = 8  # texts are padded to a multiple of so many tokens
TRIES = 30  # rows that are tried in place of one; at 50 % torn pictures one in 10^9 finds none
UNKNOWN = 0.05  # more characters than this as [UNK] is a tokenizer that does not fit
LOOKED_AT = 200_000  # captions
SOON = 500  # pictures after which a share of torn ones says something


# ---- texts ---------------------------------------------------------------------------------------


def tokenise(tokenizer, texts: Sequence[str], max_length: int, fixed: bool = False) -> dict:
    """Texts -> {"input_ids", "attention_mask"} int64 [B, T], padded on the right, cut to max_length
    (the token that ends a text stays).

    T: the longest of them in steps of 8, at most max_length; with `fixed` max_length itself and no
        mask, as SigLIP was trained.
    """
    rows = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    longest = max(map(len, rows), default=0)
    width = max_length if fixed else min(max_length, -(-longest // STEP) * STEP)
    input_ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, ids in enumerate(rows):
        input_ids[i, : len(ids)] = torch.tensor(ids)
        mask[i, : len(ids)] = 1
    return {"input_ids": input_ids} if fixed else {"input_ids": input_ids, "attention_mask": mask}


def check_captions(texts: Sequence[str], tokenizer, max_length: int) -> dict:
    """What becomes of captions in a tokenizer: {looked_at, cut, longest, unknown (share of their
    characters), warnings [a line each]}. Of more than LOOKED_AT texts an even choice is looked at.
    """
    texts = texts[:: max(1, -(-len(texts) // LOOKED_AT))]
    cut = 0
    longest = 0
    characters = 0
    unknown = 0
    examples = {}
    for start in range(0, len(texts), 1000):
        some = list(texts[start : start + 1000])
        for text, ids in zip(some, tokenizer(some)["input_ids"], strict=True):
            longest = max(longest, len(ids))
            if len(ids) > max_length:
                cut += 1
                examples.setdefault("cut", text)
            characters += len(text)
            lost = _unknown(tokenizer, text, ids)
            if lost:
                unknown += lost
                examples.setdefault("unknown", text)
    share = unknown / max(1, characters)
    found = {"looked_at": len(texts), "cut": cut, "longest": longest, "unknown": share}
    return found | {"warnings": _warnings(found, max_length, examples)}


def _unknown(tokenizer, text: str, ids: list[int]) -> int:
    """Characters of a text that its tokens do not say."""
    unk = tokenizer.unk_token_id
    if unk is None or unk not in ids:
        return 0
    if tokenizer.is_fast:
        spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        return sum(end - start for (start, end), i in zip(spans, ids, strict=True) if i == unk)
    # CLIP's end of text is its unknown token too
    return tokenizer(text, add_special_tokens=False)["input_ids"].count(unk)


def _warnings(found: dict, max_length: int, examples: dict) -> list[str]:
    lines = []
    if found["cut"]:
        lines.append(
            f"{found['cut']:,} of {found['looked_at']:,} captions are cut to {max_length} tokens "
            f"(the longest has {found['longest']}), e.g. {examples['cut'][:40]!r}"
        )
    if found["unknown"] > UNKNOWN:
        lines.append(
            f"the tokenizer turns {found['unknown']:.0%} of the characters into [UNK], e.g. of "
            f"{examples['unknown'][:40]!r}: it does not fit these texts (another language, or a "
            "vocabulary that was not loaded)"
        )
    return lines


# ---- pairs ---------------------------------------------------------------------------------------


class PairDataset(Dataset):
    """Rows of rows.load_pairs, opened.

    Item: row_id (int, the index), text, text_hash and picture_hash (of the row that is used),
    pixel_values [3, H, W] (with an image processor) and fault: None, or (reason, "where: what") of
    the picture in whose place another row stands.

    That row is drawn by (seed, epoch, index) from `own`, so that batches keep their shape on every
    rank and no rank has to ask another.
    """

    def __init__(
        self,
        rows,
        image_processor=None,
        seed: int = 0,
        own: Sequence[int] | None = None,
        replaces: bool = True,
    ):
        """own: the rows that this rank may read; all of them where every rank has the whole list,
        and then N ranks read the same rows as one.

        replaces: False: a row stays, with an empty picture (held-out rows are each asked once).
        """
        self.rows = rows
        self.image_processor = image_processor
        self.seed = seed
        self.own = range(len(rows)) if own is None else own
        self.replaces = replaces
        # shared with workers that live longer than an epoch
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Other rows stand in for torn ones in each epoch."""
        self.epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.rows)

    def most_tokens(self, size: int) -> int:
        """Of a batch of `size` rows: nothing is packed here."""
        return 0

    def __getitem__(self, index: int) -> dict:
        row = self.rows[int(index)]
        item = {"row_id": int(index), "fault": None}
        if self.image_processor is None:
            return item | _said(row)
        try:
            return item | _said(row) | {"pixel_values": self.pixels_of(row)}
        except PictureError as error:
            item["fault"] = (error.reason, f"{row['source']}: {Place(**row['place'])}: {error}")
        if not self.replaces:
            return item | _said(row) | {"pixel_values": pixels(blank(), self.image_processor)}
        for other in self.substitutes(int(index)):
            row = self.rows[other]
            try:
                return item | _said(row) | {"row_id": other, "pixel_values": self.pixels_of(row)}
            except PictureError:
                continue  # it is counted when its own turn comes
        raise SystemExit(
            f"{TRIES} pictures in a row cannot be used, the first at {item['fault'][1]}"
        )

    def pixels_of(self, row: dict) -> Tensor:
        return pixels(Place(**row["place"]), self.image_processor)

    def substitutes(self, index: int) -> Iterator[int]:
        """Rows that may stand in for one, in the order in which they are tried."""
        draw = random.Random(f"{self.seed}/{int(self.epoch)}/{index}")
        for _ in range(TRIES):
            yield int(self.own[draw.randrange(len(self.own))])


def blank() -> Image.Image:
    """What stands where no picture can be used and no other row is taken."""
    return Image.new("RGB", (64, 64))


def _said(row: dict) -> dict:
    return {name: row[name] for name in ("text", "text_hash", "picture_hash")}


class PairCollator:
    """Items of PairDataset -> a batch: pixel_values float32 [B, 3, H, W], input_ids and
    attention_mask int64 [B, T], text_hash and picture_hash int64 [B], row_ids (B ints), faults
    (what could not be used: (reason, where) each), is_faulty (bool [B]: where), and counts for the
    trainer: tokens, label_tokens.
    """

    def __init__(self, tokens: Callable[[list[str]], dict] | None = None):
        """tokens: texts -> {"input_ids", ...}, e.g. partial(tokenise, tokenizer, max_length=52);
        None: no texts in the batch."""
        self.tokens = tokens

    def __call__(self, items: list[dict]) -> dict:
        batch = {
            name: torch.tensor([item[name] for item in items])
            for name in ("text_hash", "picture_hash")
        }
        if "pixel_values" in items[0]:
            batch["pixel_values"] = torch.stack([item["pixel_values"] for item in items])
        tokens = 0
        if self.tokens is not None:
            batch |= self.tokens([item["text"] for item in items])
            mask = batch.get("attention_mask")
            tokens = batch["input_ids"].numel() if mask is None else int(mask.sum())
        return batch | {
            "row_ids": [item["row_id"] for item in items],
            "faults": [item["fault"] for item in items if item["fault"]],
            "is_faulty": torch.tensor([item["fault"] is not None for item in items]),
            "tokens": tokens,
            "label_tokens": tokens,
            "on_host": {},
        }


class PictureFaults:
    """Counts the pictures that could not be used, in the process that trains.

    Each reason is shown once, with file and line. More than `limit` of all pictures are the end of
    the run: SystemExit.
    """

    def __init__(self, limit: float = 0.2, soon: int = SOON, say: Callable[[str], None] = print):
        """soon: pictures before which nothing is stopped (an epoch, if that is shorter)."""
        self.limit = limit
        self.soon = soon
        self.say = say
        self.seen = 0
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, str] = {}

    def add(self, faults: list[tuple[str, str]], size: int) -> None:
        """faults: of a batch; size: its pictures."""
        self.seen += size
        for reason, where in faults:
            self.counts[reason] += 1
            if reason not in self.examples:
                self.examples[reason] = where
                self.say(f"picture replaced by another row: {where}")
        bad = self.counts.total()
        if self.seen >= self.soon and bad > self.limit * self.seen:
            shown = "; ".join(f"{n:,} {reason}" for reason, n in self.counts.most_common())
            raise SystemExit(
                f"{bad:,} of {self.seen:,} pictures cannot be used ({shown}), e.g. "
                f"{next(iter(self.examples.values()))}; more than {self.limit:.0%}: repair the "
                "data, or raise --bad_picture_limit"
            )
