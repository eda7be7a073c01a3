"""Tokenizer of ChatGLM-6B for transformers, without remote code: one class for both published
vocabularies.

    import modeling_chatglm                        # AutoTokenizer then knows the class
    tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm-6b")
    tokenizer("你好")["input_ids"]                 # [5, 74874, 130001, 130004]: text [gMASK] <sop>
    tokenizer(["你好", "1 + 1 ="], padding=True)   # with attention_mask and position_ids

The vocabulary of 130528 has all pieces in ice_text.model. In the first one (150528) 20000 ids of
image tokens stand in front, and the file lacks special tokens, runs of blanks and bytes, which are
appended here; the pieces of the file tell which one it is. Texts come back from decode() as they
were, as far as the file's own normalisation lets them: the published files turn full width
punctuation into half width, those of `train_sentencepiece` keep everything.

T tokens.
"""

import hashlib
import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

import sentencepiece
from configuration_chatglm import IMAGE_TOKENS
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from transformers import PreTrainedTokenizer
from transformers.utils import PaddingStrategy

# kinds of pieces
NORMAL = 1
UNKNOWN = 2
CONTROL = 3
USER_DEFINED = 4
BYTE = 6
SPACE = "▁"  # how sentencepiece writes a blank
HEAD = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL, "<pad>": CONTROL}
TASKS = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
BLANKS = {"<|tab|>": "\t"} | {f"<|blank_{n}|>": " " * n for n in range(2, 81)}
WHITESPACE = {"<n>": "\n"} | BLANKS
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TAIL = {
    **dict.fromkeys(TASKS, CONTROL),
    **dict.fromkeys(BLANKS, USER_DEFINED),
    **dict.fromkeys(BYTES, BYTE),
}
# control pieces without an attribute of their own
CONTROLS = ["<s>", "[sMASK]", "<unused_0>", "<ENC>", "<dBLOCK>"]
# settings of published files: remote code; the first generation's name of eos_token
FOREIGN = ("auto_map", "eop_token")

_NAMES = {blank: name for name, blank in WHITESPACE.items()}
_RUNS = re.compile(r"[\n\t]| {2,80}")
# text that reads like one of our own pieces would come back as something else
_LOOKALIKE = re.compile(r"(▁+)|(?<=<)(?=n>|\|tab\|>|\|blank_\d+\|>)")


def _add_pieces(proto, pieces: dict[str, int]) -> int:
    """Append the pieces that `proto` lacks; returns how many these are."""
    known = {piece.piece for piece in proto.pieces}
    missing = [name for name in pieces if name not in known]
    for name in missing:
        proto.pieces.add(piece=name, score=0.0, type=pieces[name])
    return len(missing)


def _read(vocab_file: str | None, name: str) -> tuple[bytes, model_pb2.ModelProto, bool]:
    """-> (bytes of the file, the model with all pieces, whether the file brought the special
    tokens)."""
    if vocab_file is None:
        raise ValueError(
            f"{name or 'this folder'}: no ice_text.model, the vocabulary of ChatGLM-6B"
        )
    data = Path(vocab_file).read_bytes()
    try:
        proto = model_pb2.ModelProto.FromString(data)
    except DecodeError:
        raise ValueError(
            f"{vocab_file}: not a sentencepiece model; cut off, or only a Git LFS pointer?"
        ) from None
    pieces = {piece.piece for piece in proto.pieces}
    if not pieces.issuperset([*HEAD, "<n>"]):
        raise ValueError(
            f"{vocab_file}: no piece <n>, so not of ChatGLM-6B (convert.py makes native models of "
            "ChatGLM2/3)"
        )
    complete = pieces.issuperset(TASKS)
    if _add_pieces(proto, TAIL):
        proto.trainer_spec.byte_fallback = True
    return data, proto, complete


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Sentencepiece, with line breaks, tabs and runs of blanks as pieces of their own.

    vocab_file: ice_text.model.
    num_image_tokens: ids in front of the text; unset: 20000 where the file lacks the special
        tokens, else 0.
    eos_token: ends an answer, <eop>; </s> (end_token), which the first published settings name,
        does not.
    padding=True adds position_ids [2, T] as well: the place of each token, held at [gMASK] from
    <sop> on, and the place within the answer. The model computes the same ones where none are
    given. ValueError for files that are not the vocabulary of ChatGLM-6B.
    """

    vocab_files_names = {"vocab_file": "ice_text.model"}
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    padding_side = "left"
    SPECIAL_TOKENS_ATTRIBUTES = [
        *PreTrainedTokenizer.SPECIAL_TOKENS_ATTRIBUTES,
        "gmask_token",
        "end_token",
    ]

    def __init__(
        self,
        vocab_file,
        do_lower_case=False,
        remove_space=False,
        bos_token="<sop>",
        eos_token="<eop>",
        end_token="</s>",
        mask_token="[MASK]",
        gmask_token="[gMASK]",
        pad_token="<pad>",
        unk_token="<unk>",
        num_image_tokens=None,
        extra_special_tokens=None,
        chat_template=None,
        **kwargs,
    ):
        self._file, proto, complete = _read(vocab_file, kwargs.get("name_or_path", ""))
        self.sp_model = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        if num_image_tokens is None:
            num_image_tokens = 0 if complete else IMAGE_TOKENS
        self.num_image_tokens = num_image_tokens
        self._pieces = [f"<image_{i}>" for i in range(num_image_tokens)]
        self._pieces += [piece.piece for piece in proto.pieces]
        self._ids = {piece: i for i, piece in enumerate(self._pieces)}
        self._byte_of = {self._ids[name]: bytes([byte]) for byte, name in enumerate(BYTES)}
        # the pieces in front of a text that follows "<n>"
        self._lead = len(self.sp_model.encode("<n>"))
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        own_tokens = kwargs.get("model_specific_special_tokens") or {}
        for name in FOREIGN:
            kwargs.pop(name, None)
            own_tokens.pop(name, None)
        super().__init__(
            do_lower_case=do_lower_case,
            remove_space=remove_space,
            num_image_tokens=num_image_tokens,
            bos_token=bos_token,
            eos_token="<eop>" if str(eos_token) == str(end_token) else eos_token,
            end_token=end_token,
            mask_token=mask_token,
            gmask_token=gmask_token,
            pad_token=pad_token,
            unk_token=unk_token,
            extra_special_tokens=_with_all_controls(extra_special_tokens),
            chat_template=chat_template or _default_template(),
            **kwargs,
        )

    @property
    def sop_token_id(self) -> int:
        return self.bos_token_id

    @property
    def eop_token_id(self) -> int:
        return self.eos_token_id

    @property
    def vocab_size(self) -> int:
        """Tokens of the file and in front of it; the model's own, a padded size, may be larger."""
        return len(self._pieces)

    def get_vocab(self) -> dict[str, int]:
        return self._ids | self.added_tokens_encoder

    def _convert_token_to_id(self, token: str) -> int:
        return self._ids.get(token, self._ids["<unk>"])

    def _convert_id_to_token(self, index: int) -> str:
        return self._pieces[index] if 0 <= index < len(self._pieces) else "<unk>"

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        start, *rest = _LOOKALIKE.split(text)  # text, lookalike or None, text, ...
        pieces = self._encode(start)
        for literal, part in zip(rest[::2], rest[1::2], strict=True):
            pieces += [BYTES[byte] for byte in (literal or "").encode()]
            # as after a line break: no blank in front, this is no start of a text
            pieces += self._encode("\n" + part)[self._lead :]
        return pieces

    def _encode(self, text: str) -> list[str]:
        ids = self.sp_model.encode(_RUNS.sub(lambda run: _NAMES[run.group()], text))
        return [self._pieces[i + self.num_image_tokens] for i in ids]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return self._decode(self.convert_tokens_to_ids(tokens))

    def _decode(
        self, token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=None, **kwargs
    ) -> str:
        """The text; special tokens by name unless skipped; image tokens and ids outside the
        vocabulary have none."""
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        skipped = set(self.all_special_ids) if skip_special_tokens else ()
        texts = []
        for added, run in groupby(map(int, ids), key=self._added_tokens_decoder.__contains__):
            if added:
                texts += [self._added_tokens_decoder[i].content for i in run if i not in skipped]
            else:
                own = [i for i in run if self.num_image_tokens <= i < len(self._pieces)]
                texts.append(self._text(own))
        text = "".join(texts)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def _text(self, ids: list[int]) -> str:
        """Ids of pieces that were encoded as one text -> the text; half a character becomes
        U+FFFD."""
        data = b"".join(self._byte_of.get(i) or self._plain(self._pieces[i]) for i in ids)
        if self._lead == 2 and ids and self._pieces[ids[0]].startswith(SPACE):
            data = data[1:]  # the blank that every text gets in front
        return data.decode(errors="replace")

    @staticmethod
    def _plain(piece: str) -> bytes:
        return WHITESPACE.get(piece, piece.replace(SPACE, " ")).encode()

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1=None
    ) -> list[int]:
        """text [gMASK] <sop>; with a second text, the answer: text [gMASK] <sop> answer <eop>."""
        prompt = [*token_ids_0, self.gmask_token_id, self.bos_token_id]
        if token_ids_1 is None:
            return prompt
        return [*prompt, *token_ids_1, self.eos_token_id]

    def get_special_tokens_mask(
        self, token_ids_0, token_ids_1=None, already_has_special_tokens=False
    ) -> list[int]:
        if already_has_special_tokens:
            return super().get_special_tokens_mask(token_ids_0, token_ids_1, True)
        prompt = [0] * len(token_ids_0) + [1, 1]
        if token_ids_1 is None:
            return prompt
        return prompt + [0] * len(token_ids_1) + [1]

    def _positions(self, ids: list[int], mask: list[int]) -> list[list[int]]:
        """ids [T], mask [T] -> [2][T], 0 where the mask is; without <sop> all is prefix."""
        kept = [i for i, real in zip(ids, mask, strict=True) if real]
        prefix = kept.index(self.bos_token_id) if self.bos_token_id in kept else len(kept)
        answer = len(kept) - prefix
        held = [token for token in (self.gmask_token_id, self.mask_token_id) if token in kept]
        if held:
            places = [*range(prefix), *[kept.index(held[0])] * answer]
        else:
            places = [*range(len(kept))]
        blocks = [0] * prefix + [*range(1, answer + 1)]
        rows = []
        for positions in (iter(places), iter(blocks)):
            rows.append([next(positions) if real else 0 for real in mask])
        return rows

    def _pad(
        self,
        encoded_inputs,
        max_length=None,
        padding_strategy=PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of=None,
        padding_side=None,
        return_attention_mask=None,
    ) -> dict:
        """As in transformers, and position_ids where padding is asked for and model_input_names has
        them."""
        ids = encoded_inputs["input_ids"]
        mask = encoded_inputs.get("attention_mask", [1] * len(ids))
        out = super()._pad(
            encoded_inputs,
            max_length,
            padding_strategy,
            pad_to_multiple_of,
            padding_side,
            return_attention_mask,
        )
        if (
            padding_strategy == PaddingStrategy.DO_NOT_PAD
            or "position_ids" not in self.model_input_names
        ):
            return out
        fill = [0] * (len(out["input_ids"]) - len(ids))
        rows = self._positions(ids, mask)
        if (padding_side or self.padding_side) == "left":
            out["position_ids"] = [fill + row for row in rows]
        else:
            out["position_ids"] = [row + fill for row in rows]
        return out

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Write the file as it was read. -> (its path,)."""
        name = self.vocab_files_names["vocab_file"]
        if filename_prefix:
            name = f"{filename_prefix}-{name}"
        path = Path(save_directory) / name
        path.write_bytes(self._file)
        return (str(path),)


def _with_all_controls(extra) -> list:
    """Every control piece that has no attribute of its own is a special token too."""
    given = list(extra or [])
    named = {str(token) for token in given}
    return given + [name for name in CONTROLS if name not in named]


def _default_template() -> str:
    return (Path(__file__).parent / "templates" / "chatglm.jinja").read_text(encoding="utf-8")


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, path: str | Path, first_generation=False
) -> Path:
    """Make an ice_text.model of the characters in `texts`, most frequent first, laid out as the
    published ones.

    Characters, so that digits and Chinese are never merged with their neighbours; the rest falls
    back on bytes, and nothing is normalised. A sentencepiece model of single characters is a count
    of them, so it is counted here: the same texts give the same bytes in every process, and rows of
    any length count.

    vocab_size: upper bound of all tokens; 350 are special tokens, blanks and bytes.
    path: the file if it ends in .model; else a folder, in which the file is named after its
        content.
    first_generation: without the special tokens, blanks and bytes, as in the first vocabulary.
    Returns the path of the file. ValueError when vocab_size leaves no room for characters.
    """
    room = vocab_size - len(HEAD) - len(TAIL) - 2
    if room < 1:
        raise ValueError(
            f"vocab_size {vocab_size}: {vocab_size - room} tokens are fixed, so give more than "
            "these"
        )
    counts = Counter()
    for text in texts:
        counts.update(text)
    for char in ("\n", "\t", " ", SPACE, "\0"):
        counts.pop(char, None)
    chars = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    proto = model_pb2.ModelProto()
    _add_pieces(proto, HEAD | {"<n>": USER_DEFINED, SPACE: NORMAL})
    total = sum(counts.values()) or 1
    for char, count in chars[:room]:
        proto.pieces.add(piece=char, score=math.log(count / total), type=NORMAL)
    if not first_generation:
        _add_pieces(proto, TAIL)
    trainer = proto.trainer_spec
    trainer.model_type = trainer.CHAR
    trainer.vocab_size = len(proto.pieces)
    trainer.byte_fallback = not first_generation
    trainer.unk_id = 0
    trainer.bos_id = 1
    trainer.eos_id = 2
    trainer.pad_id = 3
    trainer.pad_piece = "<pad>"
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = True
    normalizer.remove_extra_whitespaces = False
    return _write(proto.SerializeToString(deterministic=True), Path(path))


def _write(data: bytes, path: Path) -> Path:
    """Whole or not at all; processes may write the same file at once, so each has a draft of its
    own."""
    if path.suffix != ".model":
        path = path / f"ice_text-{hashlib.sha256(data).hexdigest()[:16]}.model"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as out:
        out.write(data)
    os.chmod(draft, 0o644)  # mkstemp makes it private
    os.replace(draft, path)
    return path
