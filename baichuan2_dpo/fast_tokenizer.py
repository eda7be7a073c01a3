"""The tokenizer.model of Baichuan and Baichuan2 -> a native fast tokenizer with the same ids,
without remote code.

The file is a sentencepiece BPE with bytes for rare characters: nothing is normalised, no blank is
put in front, no <s> or </s> added, and <unk> also pads. <reserved_106> (id 195) and <reserved_107>
(196) announce what the user and the assistant say. sentencepiece finds them in any text, so that a
user could write a turn; here they are special tokens, which split_special_tokens=True (as in
common/data/labels.py) leaves as text.
"""

from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from common.convert import sentence_pieces
from common.convert.sentence_pieces import SPACE, merges

HERE = Path(__file__).resolve().parent
USER, ASSISTANT = "<reserved_106>", "<reserved_107>"


def read_model(path: Path) -> model_pb2.ModelProto:
    """The sentencepiece model in a file; SystemExit when it is something else, or not one that is
    read like this."""
    return sentence_pieces.read_model(path, ("<unk>", "<s>", "</s>"), _refusals)


def _refusals(proto: model_pb2.ModelProto) -> dict[str, bool]:
    changes = proto.normalizer_spec
    return {
        "it normalises texts": changes.precompiled_charsmap or changes.remove_extra_whitespaces,
        "it puts a blank in front": changes.add_dummy_prefix,
        "it keeps blanks as they are": not changes.escape_whitespaces,
    }


def make_tokenizer(proto: model_pb2.ModelProto, **settings) -> PreTrainedTokenizerFast:
    """The fast tokenizer; settings go to PreTrainedTokenizerFast.

    With the two turn tokens it has the chat template of Baichuan2-Chat. Ids are those of
    sentencepiece for any text; with split_special_tokens=True the turn tokens in it are spelt out.
    """
    vocabulary = {p.piece: i for i, p in enumerate(proto.pieces)}
    scores = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    core = Tokenizer(
        models.BPE(
            vocabulary,
            merges(scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    core.normalizer = normalizers.Replace(" ", SPACE)
    core.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = special_pieces(proto)
    # user-defined pieces are found before all others, the longest first, with blanks already
    # escaped
    fixed = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED and p.piece not in special]
    core.add_tokens([AddedToken(piece, special=False, normalized=True) for piece in fixed])
    core.add_special_tokens(
        [AddedToken(piece, special=True, normalized=False) for piece in special]
    )
    if {USER, ASSISTANT} <= set(special):
        settings["chat_template"] = (HERE / "templates/baichuan2.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **settings,
    )


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
    """SystemExit when the two give different ids for the pieces of the vocabulary, alone and in
    rows."""
    pieces = [p.piece for p in proto.pieces if p.type in (p.NORMAL, p.USER_DEFINED)]
    sentence_pieces.compare(tokenizer, as_text(proto), pieces)
