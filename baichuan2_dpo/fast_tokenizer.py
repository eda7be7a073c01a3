"""The tokenizer.model of Baichuan and Baichuan2 -> a native fast tokenizer with the same ids, without remote code.

The file is a sentencepiece BPE with bytes for rare characters: nothing is normalised, no blank is put in front, no
<s> or </s> added, and <unk> also pads. <reserved_106> (id 195) and <reserved_107> (196) announce what the user and the
assistant say. sentencepiece finds them in any text, so that a user could write a turn; here they are special tokens,
which split_special_tokens=True (as in common/chat.py) leaves as text.
"""

from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
USER, ASSISTANT = "<reserved_106>", "<reserved_107>"
SPACE = "▁"


def read_model(path: Path) -> model_pb2.ModelProto:
    """The sentencepiece model in a file; SystemExit when it is something else, or uses what a fast tokenizer cannot."""
    try:
        proto = model_pb2.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise SystemExit(f"{path}: not a sentencepiece model; cut off, or only a Git LFS pointer?") from None
    trainer, changes = proto.trainer_spec, proto.normalizer_spec
    reasons = {
        "not a BPE model": trainer.model_type != trainer.BPE,
        "blanks stand behind words": trainer.treat_whitespace_as_suffix,
        "it normalises texts": changes.precompiled_charsmap or changes.remove_extra_whitespaces,
        "it puts a blank in front": changes.add_dummy_prefix,
        "it keeps blanks as they are": not changes.escape_whitespaces,
        "it has unused pieces": any(p.type == p.UNUSED for p in proto.pieces),
        "it has no pieces <unk>, <s>, </s>": not {"<unk>", "<s>", "</s>"} <= {p.piece for p in proto.pieces},
    }
    if found := [reason for reason, true in reasons.items() if true]:
        raise SystemExit(f"{path}: cannot become a fast tokenizer: {', '.join(found)}")
    return proto


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Pieces with scores -> the pairs that sentencepiece joins, in its order: best result first.

    Of two pairs with one result the one with the longer left part comes first: where they overlap it begins further
    left, and sentencepiece takes the leftmost.
    """
    pairs = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [pair[2:] for pair in sorted(pairs)]


def make_tokenizer(proto: model_pb2.ModelProto, **settings) -> PreTrainedTokenizerFast:
    """The fast tokenizer; settings go to PreTrainedTokenizerFast.

    With the two turn tokens it has the chat template of Baichuan2-Chat. Ids are those of sentencepiece for any text;
    with split_special_tokens=True the turn tokens in it are spelt out.
    """
    vocabulary = {p.piece: i for i, p in enumerate(proto.pieces)}
    scores = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    core = Tokenizer(models.BPE(
        vocabulary, merges(scores), unk_token="<unk>", fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback
    ))  # fmt: skip
    core.normalizer = normalizers.Replace(" ", SPACE)
    core.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = special_pieces(proto)
    # user-defined pieces are found before all others, the longest first, with blanks already escaped
    fixed = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED and p.piece not in special]
    core.add_tokens([AddedToken(piece, special=False, normalized=True) for piece in fixed])
    core.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    if {USER, ASSISTANT} <= set(special):
        settings["chat_template"] = (HERE / "templates/baichuan2.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        padding_side="left", model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
        **settings,
    )  # fmt: skip


def special_pieces(proto: model_pb2.ModelProto) -> list[str]:
    turns = (USER, ASSISTANT)
    return [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.UNKNOWN) or p.piece in turns]


def as_text(proto: model_pb2.ModelProto) -> sentencepiece.SentencePieceProcessor:
    """The original, but for it too the turn tokens in a text are only text."""
    proto = model_pb2.ModelProto.FromString(proto.SerializeToString())
    for piece in proto.pieces:
        if piece.piece in (USER, ASSISTANT):
            piece.type = piece.CONTROL
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def compare(tokenizer: PreTrainedTokenizerFast, proto: model_pb2.ModelProto) -> None:
    """SystemExit when the two give different ids for the pieces of the vocabulary, alone and in rows."""
    original = as_text(proto)
    texts = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type in (p.NORMAL, p.USER_DEFINED)]
    texts += ["".join(texts[i : i + 50]) for i in range(0, len(texts), 50)]
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, found in zip(texts, ids, strict=True):
        if found != original.encode(text):
            raise SystemExit(f"a fast tokenizer would read {text!r} differently: this tokenizer.model is not supported")
