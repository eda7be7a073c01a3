"""The tokenizer.model of InternLM, InternLM2 and InternLM2.5 -> a native fast tokenizer with the
same ids, without remote code.

The file is a sentencepiece BPE with bytes for rare characters. Its last pieces are placeholders,
and the tokens of a chat stand in the place of some: tokenizer_config.json names them
(added_tokens_decoder), else their numbers tell, [UNUSED_TOKEN_146] is <|im_start|>. Loaded by other
ways, these tokens end up behind the vocabulary of the model, or <s> and the blank in front of a
text are lost. sentencepiece finds a placeholder in any text, so that a user could write a turn;
here such pieces are special tokens, which split_special_tokens=True (as in common/data/labels.py)
leaves as text.
"""

import random
import re
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from transformers import PreTrainedTokenizerFast

from common.convert import sentence_pieces
from common.convert.sentence_pieces import SPACE

HERE = Path(__file__).resolve().parent
FIRST = ("<unk>", "<s>", "</s>")
CHATML = (  # in place of [UNUSED_TOKEN_141] ... [UNUSED_TOKEN_146]
    "<|plugin|>",
    "<|interpreter|>",
    "<|action_end|>",
    "<|action_start|>",
    "<|im_end|>",
    "<|im_start|>",
)
ENDS = ("<eoh>", "<eoa>")  # of a human's and an assistant's turn: the first InternLM
PLACEHOLDER = re.compile(r"\[UNUSED_TOKEN_\d+\]|<TOKENS_UNUSED_\d+>")
STANDARD = {f"[UNUSED_TOKEN_{141 + i}]": name for i, name in enumerate(CHATML)}
STANDARD |= {f"<TOKENS_UNUSED_{i}>": name for i, name in enumerate(ENDS)}
END_OF_ANSWER = {"internlm2": "<|im_end|>", "internlm": "<eoa>", "internlm_v1.1": "<eoa>"}
RANDOM_TEXTS = 300
ODD = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\u3000",
    "\u200d",
    "👋",
    "👨‍👩‍👧",
    "🇨🇳",
    "é",
    "e\u0301",
    "0",
    "，",
]


# ---- the file ------------------------------------------------------------------------------------


def read_model(path: Path) -> model_pb2.ModelProto:
    """The sentencepiece model in a file; SystemExit when it is something else, or treats texts in
    another way."""
    return sentence_pieces.read_model(path, FIRST, _refusals)


def _refusals(proto: model_pb2.ModelProto) -> dict[str, bool]:
    changes = proto.normalizer_spec
    normalises = bool(changes.precompiled_charsmap) or changes.remove_extra_whitespaces
    names = [piece.piece for piece in proto.pieces]
    chats = set(STANDARD) | set(STANDARD.values())
    return {
        "it normalises texts": normalises,
        "it keeps blanks as they are": not changes.escape_whitespaces,
        f"{' '.join(FIRST)} are not its first pieces": tuple(names[:3]) != FIRST,
        "it has none of InternLM's chat tokens": not chats & set(names),
    }


def special_names(proto: model_pb2.ModelProto, settings: dict, path: Path) -> dict[int, str]:
    """{id: name} of what a text never is: control pieces and the tokens of a chat.

    settings: those of the published tokenizer_config.json; SystemExit where they name other pieces
    than placeholders.
    """
    given = {
        int(i): token["content"] for i, token in settings.get("added_tokens_decoder", {}).items()
    }
    pieces = [piece.piece for piece in proto.pieces]
    _check_names(given, pieces, path)
    taken = set(given.values())
    found = {}
    for i, piece in enumerate(proto.pieces):
        name = STANDARD.get(piece.piece, piece.piece)
        is_control = piece.type in (piece.CONTROL, piece.UNKNOWN)
        if (is_control or name in CHATML + ENDS) and name not in taken:
            found[i] = name
    found |= given
    names = list(found.values()) + [piece for i, piece in enumerate(pieces) if i not in found]
    twice = sorted(name for name in set(found.values()) if names.count(name) > 1)
    if twice:
        raise SystemExit(f"{path}: {', '.join(twice)} stands in it twice")
    return found


def _check_names(given: dict[int, str], pieces: list[str], path: Path) -> None:
    for i, name in given.items():
        if i >= len(pieces):
            raise SystemExit(
                f"{path}: tokenizer_config.json gives {name} the id {i}, but the file has "
                f"{len(pieces)} pieces: not its tokenizer?"
            )
        if name != pieces[i] and not PLACEHOLDER.fullmatch(pieces[i]):
            raise SystemExit(
                f"{path}: tokenizer_config.json calls piece {i} {name}; here it is {pieces[i]!r} "
                "and no placeholder: a file of another layout"
            )


# ---- the tokenizer -------------------------------------------------------------------------------


def make_tokenizer(
    proto: model_pb2.ModelProto, names: dict[int, str], chat: str, **settings
) -> PreTrainedTokenizerFast:
    """The fast tokenizer with the chat template `chat` (see END_OF_ANSWER); settings go to
    PreTrainedTokenizerFast.

    Ids are those of sentencepiece for any text, <s> in front; with split_special_tokens=True the
    special tokens in it are spelt out. Where the file puts a blank in front of texts, only a text
    that is one user-defined piece and nothing else gets none.
    """
    renamed = {proto.pieces[i].piece: name for i, name in names.items()}
    core = Tokenizer(sentence_pieces.bpe(proto, renamed))
    # user-defined pieces are found before all others, the longest first, with blanks escaped
    fixed = [p.piece for p in proto.pieces if p.type == p.USER_DEFINED]
    core.normalizer = normalizers.Sequence(_normaliser_steps(proto, fixed))
    core.decoder = decoders.Sequence(_decoder_steps(proto))
    core.add_special_tokens(
        [AddedToken(name, special=True, normalized=name in fixed) for name in names.values()]
    )
    core.add_tokens(
        [AddedToken(p, special=False, normalized=True) for p in fixed if p not in renamed]
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    template = HERE / "templates" / f"{chat}.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=template.read_text(encoding="utf-8"),
        **settings,
    )


def _normaliser_steps(proto: model_pb2.ModelProto, fixed: list[str]) -> list:
    """What sentencepiece does to a text before it looks for pieces."""
    if not proto.normalizer_spec.add_dummy_prefix:
        return [normalizers.Replace(" ", SPACE)]
    steps = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
    if fixed:
        # the library normalises the user-defined pieces too, to look for them; they have no blank
        # in front
        alone = "|".join(re.escape(piece.replace(" ", SPACE)) for piece in fixed)
        steps.append(normalizers.Replace(Regex(rf"\A{SPACE}(?=(?:{alone})\z)"), ""))
    return steps


def _decoder_steps(proto: model_pb2.ModelProto) -> list:
    """Pieces -> text."""
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    return steps


# ---- the comparison ------------------------------------------------------------------------------


def as_text(
    proto: model_pb2.ModelProto, names: dict[int, str]
) -> sentencepiece.SentencePieceProcessor:
    """The original, except that special tokens in a text are only text to it too."""
    copy = model_pb2.ModelProto.FromString(proto.SerializeToString())
    for i in names:
        piece = copy.pieces[i]
        if piece.type != piece.UNKNOWN:
            piece.type = piece.CONTROL
    return sentencepiece.SentencePieceProcessor(model_proto=copy.SerializeToString())


def compare(
    tokenizer: PreTrainedTokenizerFast, proto: model_pb2.ModelProto, names: dict[int, str]
) -> None:
    """SystemExit when the two give different ids for the pieces of the vocabulary, alone and in
    rows, or for random texts."""
    pieces = []
    for i, piece in enumerate(proto.pieces):
        if piece.type == piece.NORMAL and i not in names:
            pieces.append(piece.piece)
        elif piece.type == piece.USER_DEFINED and i not in names:
            pieces.append(f"a{piece.piece}")  # see make_tokenizer
    sentence_pieces.compare(tokenizer, as_text(proto, names), pieces + random_texts(pieces))


def random_texts(pieces: list[str], seed: int = 0) -> list[str]:
    """Texts of pieces, of what people type between them, and of any characters; some begin or end
    with blanks."""
    source = random.Random(seed)
    texts = []
    for _ in range(RANDOM_TEXTS):
        words = source.choices(pieces, k=source.randrange(8)) + source.choices(ODD, k=4)
        words += [_any_character(source) for _ in range(4)]
        source.shuffle(words)
        texts.append("".join(words))
    return texts


def _any_character(source: random.Random) -> str:
    """Of any plane but the surrogates, which are no characters."""
    code = source.choice([source.randrange(1, 0x3000), source.randrange(0xE000, 0x110000)])
    return chr(code)
