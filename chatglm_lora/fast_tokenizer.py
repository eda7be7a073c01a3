"""The tokenizer.model of ChatGLM2 and ChatGLM3 -> a native fast tokenizer with the same ids, without remote code.

The file is a sentencepiece BPE of bytes and pieces; the special tokens stand behind it, as in the original: [MASK]
[gMASK] [sMASK] <sop> <eop>, and for ChatGLM3 <|system|> <|user|> <|assistant|> <|observation|>. The original writes
"sop" and "eop" and never finds them in a text; a fast tokenizer would find them in "philosophy", hence the brackets.
"""

from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
TASKS = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
SPECIALS = {"chatglm2": TASKS, "chatglm3": TASKS + ROLES}
SPACE = "▁"
PRIVATE = 0x100000  # first of the characters that stand for pieces which are matched before all others


def read_model(path: Path) -> model_pb2.ModelProto:
    """The sentencepiece model in a file; SystemExit when it is something else, or uses what a fast tokenizer cannot."""
    try:
        proto = model_pb2.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise SystemExit(f"{path}: not a sentencepiece model; cut off, or only a Git LFS pointer?") from None
    piece = model_pb2.ModelProto.SentencePiece
    reasons = {
        "not a BPE model": proto.trainer_spec.model_type != proto.trainer_spec.BPE,
        "blanks stand behind words": proto.trainer_spec.treat_whitespace_as_suffix,
        "it has unused pieces": any(p.type == piece.UNUSED for p in proto.pieces),
        "it has no pieces <unk>, </s>": not {"<unk>", "</s>"} <= {p.piece for p in proto.pieces},
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


def make_tokenizer(proto: model_pb2.ModelProto, family: str, **settings) -> PreTrainedTokenizerFast:
    """The fast tokenizer of `family` (chatglm2 or chatglm3); settings go to PreTrainedTokenizerFast.

    Ids are those of sentencepiece for any text that is encoded with split_special_tokens=True; otherwise special tokens
    in a text are found, as by any fast tokenizer.
    """
    kind = model_pb2.ModelProto.SentencePiece
    fixed = [p.piece for p in proto.pieces if p.type == kind.USER_DEFINED]  # never split, never joined
    stand_in = {piece: chr(PRIVATE + i) for i, piece in enumerate(sorted(fixed, key=len, reverse=True))}
    vocabulary = {stand_in.get(p.piece, p.piece): i for i, p in enumerate(proto.pieces)}
    scores = {p.piece: p.score for p in proto.pieces if p.type == kind.NORMAL}
    core = Tokenizer(models.BPE(
        vocabulary, merges(scores), unk_token="<unk>", fuse_unk=True, byte_fallback=proto.trainer_spec.byte_fallback
    ))  # fmt: skip
    core.normalizer = normalizers.Sequence(_normalizers(proto.normalizer_spec, stand_in))
    back = [decoders.Replace(char, piece) for piece, char in stand_in.items()]
    lead = [decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), *back, decoders.ByteFallback(), decoders.Fuse(), *lead]
    )
    control = [p.piece for p in proto.pieces if p.type in (kind.CONTROL, kind.UNKNOWN)]
    names = [*control, *SPECIALS[family]]
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    front = [(name, core.token_to_id(name)) for name in ("[gMASK]", "<sop>", "</s>")]
    core.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", pair="[gMASK] <sop> $A $B </s>", special_tokens=front
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", eos_token="</s>", pad_token="<unk>", padding_side="left",
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False,
        chat_template=(HERE / "templates" / f"{family}.jinja").read_text(encoding="utf-8"), **settings,
    )  # fmt: skip


def _normalizers(spec, stand_in: dict[str, str]) -> list:
    """What sentencepiece does to a text before it looks for pieces."""
    steps = [normalizers.Replace(piece, char) for piece, char in stand_in.items()]
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE if spec.escape_whitespaces else " "))
    return steps + ([normalizers.Replace(" ", SPACE)] if spec.escape_whitespaces else [])


def compare(tokenizer: PreTrainedTokenizerFast, proto: model_pb2.ModelProto) -> None:
    """SystemExit when the two give different ids for the pieces of the vocabulary, alone and in rows."""
    original = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    texts = [p.piece.replace(SPACE, " ") for p in proto.pieces if p.type == p.NORMAL]
    texts += ["".join(texts[i : i + 50]) for i in range(0, len(texts), 50)]
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for text, found in zip(texts, ids, strict=True):
        if found != original.encode(text):
            raise SystemExit(f"a fast tokenizer would read {text!r} differently: this tokenizer.model is not supported")
