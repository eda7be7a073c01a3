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
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from transformers import PreTrainedTokenizerFast

from common.convert import sentence_pieces
from common.convert.sentence_pieces import SPACE

HERE = Path(__file__).resolve().parent
USER = "<reserved_106>"
ASSISTANT = "<reserved_107>"


def read_model(path: Path) -> model_pb2.ModelProto:
    """The sentencepiece model in a file; SystemExit when it is something else, or treats texts in
    another way."""
    return sentence_pieces.read_model(path, ("<unk>", "<s>", "</s>"), _refusals)


def _refusals(proto: model_pb2.ModelProto) -> dict[str, bool]:
    changes = proto.normalizer_spec
    normalises = bool(changes.precompiled_charsmap) or changes.remove_extra_whitespaces
    return {
        "it normalises texts": normalises,
        "it puts a blank in front": changes.add_dummy_prefix,
        "it keeps blanks as they are": not changes.escape_whitespaces,
    }


def make_tokenizer(proto: model_pb2.ModelProto, **settings) -> PreTrainedTokenizerFast:
    """The fast tokenizer; settings go to PreTrainedTokenizerFast.

    With the two turn tokens it has the chat template of Baichuan2-Chat. Ids are those of
    sentencepiece for any text; with split_special_tokens=True the turn tokens in it are spelt out.
    """
    core = Tokenizer(sentence_pieces.bpe(proto))
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
    """What a text never is: control pieces, <unk> and the turn tokens."""
    found = []
    for piece in proto.pieces:
        if piece.type in (piece.CONTROL, piece.UNKNOWN) or piece.piece in (USER, ASSISTANT):
            found.append(piece.piece)
    return found


def as_text(proto: model_pb2.ModelProto) -> sentencepiece.SentencePieceProcessor:
    """The original, except that the turn tokens in a text are only text to it too."""
    copy = model_pb2.ModelProto.FromString(proto.SerializeToString())
    for piece in copy.pieces:
        if piece.piece in (USER, ASSISTANT):
            piece.type = piece.CONTROL
    return sentencepiece.SentencePieceProcessor(model_proto=copy.SerializeToString())


def compare(tokenizer: PreTrainedTokenizerFast, proto: model_pb2.ModelProto) -> None:
    """SystemExit when the two give different ids for the pieces of the vocabulary, alone and in
    rows."""
    pieces = [p.piece for p in proto.pieces if p.type in (p.NORMAL, p.USER_DEFINED)]
    sentence_pieces.compare(tokenizer, as_text(proto), pieces)
