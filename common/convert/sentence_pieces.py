"""A sentencepiece BPE -> the parts of a fast tokenizer with the same ids; each recipe adds what is
its model's own."""

from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import models

from common.convert import model_folder

SPACE = "▁"
AT_ONCE = 250  # texts that are compared; memory holds what the two make of them


def read_model(
    path: Path,
    pieces: Collection[str],
    refusals: Callable[[model_pb2.ModelProto], dict[str, bool]] | None = None,
) -> model_pb2.ModelProto:
    """The sentencepiece model in a file; SystemExit when it is something else, or uses what a fast
    tokenizer cannot.

    pieces: that it must have; refusals: further reasons to refuse it -> whether they hold.
    """
    try:
        proto = model_pb2.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        why = "perhaps cut off"
        if model_folder.is_pointer(path):
            why = "only a Git LFS pointer: fetch the file itself"
        raise SystemExit(f"{path}: not a sentencepiece model, {why}") from None
    trainer = proto.trainer_spec
    present = {p.piece for p in proto.pieces}
    reasons = {
        "not a BPE model": trainer.model_type != trainer.BPE,
        "blanks stand behind words": trainer.treat_whitespace_as_suffix,
        "it has unused pieces": any(p.type == p.UNUSED for p in proto.pieces),
        f"it has no pieces {', '.join(pieces)}": not present.issuperset(pieces),
    }
    if refusals is not None:
        reasons |= refusals(proto)
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise SystemExit(f"{path}: cannot become a fast tokenizer: {', '.join(found)}")
    return proto


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pieces with scores -> the pairs that sentencepiece joins, in its order: best result first.

    Of two pairs with one result the one with the longer left part comes first: where they overlap
    it begins further left, and sentencepiece takes the leftmost.
    """
    cuts = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                cuts.append((-score, -cut, piece))
    cuts.sort()
    return [(piece[:-cut], piece[-cut:]) for _, cut, piece in cuts]


def bpe(proto: model_pb2.ModelProto, renamed: Mapping[str, str] | None = None) -> models.BPE:
    """The pieces and what joins them; renamed: {piece that is never joined: its name here}."""
    renamed = renamed or {}
    names = [p.piece for p in proto.pieces]  # each look at a piece makes a string of its own
    scores = {}
    for name, piece in zip(names, proto.pieces, strict=True):
        if piece.type == piece.NORMAL and name not in renamed:
            scores[name] = piece.score
    return models.BPE(
        {renamed.get(name, name): i for i, name in enumerate(names)},
        merges(scores),
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def compare(
    tokenizer, original: sentencepiece.SentencePieceProcessor, pieces: Iterable[str]
) -> None:
    """SystemExit when the two give different ids for the pieces, alone and in rows; special tokens
    in them are text."""
    texts = [piece.replace(SPACE, " ") for piece in pieces]
    texts += ["".join(texts[i : i + 50]) for i in range(0, len(texts), 50)]
    core = tokenizer.backend_tokenizer  # what a call adds to its ids would take most of the time
    core.encode_special_tokens = True
    for i in range(0, len(texts), AT_ONCE):
        some = texts[i : i + AT_ONCE]
        found = core.encode_batch_fast(some, add_special_tokens=False)
        wanted = original.encode(some, num_threads=1)
        for text, one, ids in zip(some, found, wanted, strict=True):
            if one.ids != ids:
                raise SystemExit(
                    f"a fast tokenizer would read {text!r} differently: "
                    "this tokenizer.model is not supported"
                )
    core.encode_special_tokens = False
