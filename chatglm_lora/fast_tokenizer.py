"""The tokenizer.model of ChatGLM2 and ChatGLM3 -> a native fast tokenizer with the same ids,
without remote code.

The file is a sentencepiece BPE of bytes and pieces; the special tokens stand behind it, as in the
original: [MASK] [gMASK] [sMASK] <sop> <eop>, and for ChatGLM3 <|system|> <|user|> <|assistant|>
<|observation|>. The original writes "sop" and "eop" and never finds them in a text; a fast
tokenizer would find them in "philosophy", hence the brackets.
"""

from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from transformers import PreTrainedTokenizerFast

from common.convert import sentence_pieces
from common.convert.sentence_pieces import SPACE

HERE = Path(__file__).resolve().parent
TASKS = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
SPECIALS = {"chatglm2": TASKS, "chatglm3": TASKS + ROLES}
# first of the characters that stand for pieces which are matched before all others
PRIVATE = 0x100000


def read_model(path: Path) -> model_pb2.ModelProto:
    """The sentencepiece model in a file; SystemExit when it is something else, or uses what a fast
    tokenizer cannot."""
    return sentence_pieces.read_model(path, ("<unk>", "</s>"))


def make_tokenizer(proto: model_pb2.ModelProto, family: str, **settings) -> PreTrainedTokenizerFast:
    """The fast tokenizer of `family` (chatglm2 or chatglm3); settings go to
    PreTrainedTokenizerFast.

    Ids are those of sentencepiece for any text that is encoded with split_special_tokens=True;
    otherwise special tokens in a text are found, as by any fast tokenizer.
    """
    stand_in = stand_ins(proto)
    core = Tokenizer(sentence_pieces.bpe(proto, stand_in))
    core.normalizer = normalizers.Sequence(normaliser_steps(proto.normalizer_spec, stand_in))
    core.decoder = decoders.Sequence(decoder_steps(proto.normalizer_spec, stand_in))
    control = [p.piece for p in proto.pieces if p.type in (p.CONTROL, p.UNKNOWN)]
    core.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in [*control, *SPECIALS[family]]]
    )
    core.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A",
        pair="[gMASK] <sop> $A $B </s>",
        special_tokens=[(name, core.token_to_id(name)) for name in ("[gMASK]", "<sop>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=(HERE / "templates" / f"{family}.jinja").read_text(encoding="utf-8"),
        **settings,
    )


def stand_ins(proto: model_pb2.ModelProto) -> dict[str, str]:
    """User-defined pieces, which are never split and never joined -> a character for each, the
    longest first: so a BPE can do neither."""
    fixed = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED]
    fixed.sort(key=len, reverse=True)
    return {piece: chr(PRIVATE + i) for i, piece in enumerate(fixed)}


def normaliser_steps(spec: model_pb2.NormalizerSpec, stand_in: dict[str, str]) -> list:
    """What sentencepiece does to a text before it looks for pieces."""
    steps = [normalizers.Replace(piece, char) for piece, char in stand_in.items()]
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +|[ ▁]+\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE if spec.escape_whitespaces else " "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    return steps


def decoder_steps(spec: model_pb2.NormalizerSpec, stand_in: dict[str, str]) -> list:
    """Pieces -> text."""
    steps = [decoders.Replace(SPACE, " ")]
    steps += [decoders.Replace(char, piece) for piece, char in stand_in.items()]
    steps += [decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return steps


def compare(tokenizer: PreTrainedTokenizerFast, proto: model_pb2.ModelProto) -> None:
    """SystemExit when the two give different ids for the pieces of the vocabulary, alone and in
    rows."""
    original = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    normal = [p.piece for p in proto.pieces if p.type == p.NORMAL]
    sentence_pieces.compare(tokenizer, original, normal)
