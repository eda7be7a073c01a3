"""The model behind the page: it sees each picture of a conversation once, begins a next question
where the last answer ended, and can be asked as it was before training."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from encoding import check_template, encode_newest
from features import pixels_of
from model import Llava
from parts import general_name
from sight import Normaliser, as_outputs, features_of, project
from torch import Tensor
from transformers import DynamicCache

from common.convert.weight_files import Weights
from common.demo.chat_model import ChatModel
from common.fast.losses import without_adapter
from common.runs import memory
from common.runs.run_folder import read_run_file

KEPT_BYTES = 2 << 30  # of keys and values of conversations, on the model's device
KEPT_PICTURES = 64  # whose features are kept
GROWING = ("full_attention", "sliding_attention")  # kinds of layers whose beginnings can be kept


@dataclass(frozen=True)
class Seen:
    """A picture as the model gets it. pixels: uint8 [3, height, width]; digest: of these; shown:
    file that a page displays, or ""."""

    pixels: Tensor
    digest: str
    shown: str = ""

    @classmethod
    def of(cls, picture, image_processor, shown: str = "") -> Seen:
        """picture: whatever open_picture takes; PictureError for what is no usable picture."""
        pixels = pixels_of(picture, image_processor)
        return cls(pixels, hashlib.blake2b(pixels.numpy(), digest_size=16).hexdigest(), shown)


class Prompt(list):
    """Token ids [T] with the tokens of every picture; pictures: Seen, in the order of their
    blocks."""

    def __init__(self, ids: list[int], pictures: list[Seen]):
        super().__init__(ids)
        self.pictures = pictures


def user_turn(text: str, pictures: list[Seen]) -> dict:
    """A question as rows of the training data write it: its pictures, each on a line, then the
    words."""
    parts = []
    for picture in pictures:
        parts += [{"type": "image", "picture": picture}, {"type": "text", "text": "\n"}]
    if parts:
        parts[-1] = {"type": "text", "text": "\n" + text}
    return {"role": "user", "content": parts or text}


# ---- what is kept of conversations ---------------------------------------------------------------


@dataclass
class Beginning:
    """Keys and values of a conversation so far.

    marks [T]: token ids, in place of a picture's tokens its digest. tuned: which weights computed
    it. asked: marks of the prompt, the rest was answered.
    """

    marks: list
    tuned: bool
    asked: int
    cache: DynamicCache

    def bytes(self) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class Beginnings:
    """The newest conversations' Beginning, up to a limit in bytes."""

    def __init__(self, most_bytes: int = KEPT_BYTES):
        self.most_bytes = most_bytes
        self.kept: list[Beginning] = []

    def find(self, marks: list, tuned: bool) -> tuple[DynamicCache, int]:
        """(a cache of the longest beginning that is known, its length). The kept one stays."""
        best, length = None, 0
        for beginning in self.kept:
            shared = common_length(beginning.marks, marks)
            if beginning.tuned == tuned and shared > length:
                best, length = beginning, shared
        cache = DynamicCache()
        if best is None:
            return cache, 0
        for number, layer in enumerate(best.cache.layers):
            keys, values = layer.keys[..., :length, :], layer.values[..., :length, :]
            cache.update(keys, values, number)
        return cache, length

    def add(self, new: Beginning) -> None:
        """Also forgets what the new one continues."""
        self.kept = [
            old
            for old in self.kept
            if old.tuned != new.tuned or common_length(old.marks, new.marks) < old.asked - 1
        ]
        self.kept.append(new)
        sizes = [beginning.bytes() for beginning in self.kept]
        while len(sizes) > 1 and sum(sizes) > self.most_bytes:
            sizes.pop(0)
            self.kept.pop(0)


def common_length(one: list, other: list) -> int:
    """Marks that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


# ---- before training -----------------------------------------------------------------------------


class Before:
    """What training changed, as it was: exchanged for the model's own while somebody asks."""

    def __init__(self, base: str):
        """base: folder of the model that training began with."""
        self.base = base
        self.tensors: dict[str, Tensor] | None = None

    def read(self, model) -> None:
        """RuntimeError where the base is another model, or does not fit into memory beside it."""
        weights = Weights(Path(self.base))
        known = {general_name(name): name for name in weights}
        found = {}
        room = 0.8 * memory.free_bytes()
        for name, parameter in model.named_parameters():
            if general_name(name) not in known:
                raise RuntimeError(f"{self.base} is another model: it has no {name}")
            stored = weights[known[general_name(name)]].to(parameter.dtype)
            if stored.shape != parameter.shape:
                raise RuntimeError(f"{self.base} is another model: {name} differs in shape")
            if not torch.equal(stored, parameter.detach().cpu()):
                found[name] = stored.to(parameter.device)
                room -= stored.nbytes
                if room < 0:
                    raise RuntimeError("no memory for the weights before training beside these")
        self.tensors = found

    @contextmanager
    def in_place(self, model):
        if self.tensors is None:
            self.read(model)
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    def _exchange(self, model) -> None:
        for name, parameter in model.named_parameters():
            if name in self.tensors:
                own = parameter.data
                parameter.data = self.tensors[name]
                self.tensors[name] = own


def folder_before(output: Path) -> str:
    """The model that the run in `output` began with; "" where that is no folder of this machine."""
    run = read_run_file(output)
    base = str(run.get("base") or run.get("settings", {}).get("model_name_or_path") or "")
    return base if base and (Path(base) / "config.json").is_file() else ""


# ---- the model -----------------------------------------------------------------------------------


class LlavaChatModel(ChatModel):
    """A ChatModel that sees. Contents of messages are texts, or lists of parts as user_turn makes
    them.

    Attributes (beside ChatModel's): processor, image_processor, image_tokens (of a picture), side
    (height, width), can_compare (whether it can be asked as it was before training), reused (tokens
    of the last prompt that were known).
    """

    def __init__(self, model: str | Path):
        super().__init__(model)
        config = self.model.config.get_text_config()
        self.window = config.max_position_embeddings
        self.keeps = set(getattr(config, "layer_types", None) or GROWING) <= set(GROWING)
        self.beginnings = Beginnings()
        self.features: OrderedDict[tuple, Tensor] = OrderedDict()
        base = "" if self.adapter else folder_before(Path(self.path).parent)
        self.before = Before(base) if base else None
        self.can_compare = self.adapter or self.before is not None
        self.tuned = True
        self.reused = 0

    def _load(self) -> None:
        llava = Llava(self.path)
        check_template(llava.tokenizer, llava.image_token_id)
        self.model = llava.model
        self.tokenizer = llava.tokenizer
        self.processor = llava.processor
        self.image_processor = llava.image_processor
        self.image_token_id = llava.image_token_id
        self.image_tokens = llava.image_tokens
        self.normaliser = Normaliser(llava.image_processor)
        self.side = (self.normaliser.height, self.normaliser.width)

    @contextmanager
    def turn(self, use_adapter: bool = True):
        with super().turn(use_adapter):
            self.tuned = use_adapter
            if use_adapter or self.before is None:
                yield
            else:
                with self.before.in_place(self.model):
                    yield

    def look(self, messages: list[dict], max_new_tokens: int) -> tuple[Prompt, int]:
        """(the prompt, how many of the oldest exchanges have no room in it). ValueError where the
        last question alone has none."""
        room = min(int(max_new_tokens), self.window // 2)
        turns, pictures = [], []
        for message in messages:
            content = message["content"]
            if isinstance(content, list):
                pictures += [part["picture"] for part in content if part["type"] == "image"]
                content = [{"type": "image"} if "picture" in part else part for part in content]
            turns.append(message | {"content": content})
        row = {"messages": turns, "pictures": pictures}
        known = (self.tokenizer, self.image_token_id, self.image_tokens)
        found, left_out = encode_newest(row, *known, self.window - room)
        return Prompt(found["input_ids"], found["pictures"]), left_out

    def prompt(self, messages: list[dict], room: int, thinking: bool = True) -> Prompt:
        return self.look(messages, room)[0]

    def _generate(self, prompt: Prompt, room: int, heard, **sampling) -> None:
        marks = self.marks_of(prompt)
        cache, known = DynamicCache(), 0
        if self.keeps:
            cache, known = self.beginnings.find(self.whole_blocks(marks[:-1]), self.tuned)
        seen_tokens = sum(isinstance(mark, str) for mark in marks[:known])
        new = prompt.pictures[seen_tokens // self.image_tokens :]
        inputs = {"past_key_values": cache, "use_cache": True} if self.keeps else {}
        if new:
            inputs["mm_encoder_outputs"] = self.see(new)
        self.reused = known
        answered: list[int] = []

        def remembered(tokens, *rest, **more):
            answered[:] = tokens[0, len(prompt) :].tolist()
            return heard(tokens)

        super()._generate(prompt, room, remembered, **inputs, **sampling)
        if self.keeps:
            # the last token was never read
            marks = [*marks, *answered][: cache.get_seq_length()]
            self.beginnings.add(Beginning(marks, self.tuned, len(prompt), cache))

    def marks_of(self, prompt: Prompt) -> list:
        """Token ids [T], in place of a picture's tokens its digest."""
        marks: list = list(prompt)
        places = [place for place, token in enumerate(prompt) if token == self.image_token_id]
        for count, place in enumerate(places):
            marks[place] = prompt.pictures[count // self.image_tokens].digest
        return marks

    def whole_blocks(self, marks: list) -> list:
        """Without a picture at the end of which only a part is there."""
        rest = sum(isinstance(mark, str) for mark in marks) % self.image_tokens
        return marks[: len(marks) - rest]

    @torch.no_grad()
    def see(self, pictures: list[Seen]) -> dict:
        """mm_encoder_outputs; the tower runs for what it has not seen yet."""
        inner = without_adapter(self.model)
        keys = [(self.tuned, picture.digest) for picture in pictures]
        unknown = {
            key: picture.pixels
            for key, picture in zip(keys, pictures, strict=True)
            if key not in self.features
        }
        if unknown:
            pixels = torch.stack(list(unknown.values())).to(self.model.device)
            found = features_of(inner, pixels, self.normaliser)
            self.features |= dict(zip(unknown, found, strict=True))
        features = torch.stack([self.features[key] for key in keys])
        while len(self.features) > KEPT_PICTURES:
            self.features.popitem(last=False)
        return as_outputs(project(inner, features))
