"""The built-in tiny model, as a checkpoint of InternLM2's published layout: fused wqkv, a
sentencepiece tokenizer whose last pieces are placeholders, their names in tokenizer_config.json.

It is then converted like a downloaded one, so that the default run takes the way of real models.
"""

import hashlib
import inspect
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import convert
import fast_tokenizer
import layout
import sentencepiece
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2 as model_pb2
from transformers import LlamaForCausalLM

from common.data.cache import cache_root

VOCABULARY = 4000  # pieces at most, placeholders included
ALONE = re.compile(r"([\u3400-\u9fff])")  # Chinese characters are pieces of their own
CUT = "\u001f"
CONFIG = {  # of a published config.json, at toy size
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    "model_type": "internlm2",
    "hidden_act": "silu",
    "hidden_size": 160,
    "intermediate_size": 448,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bias": False,
    "initializer_range": 0.05,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 2.0},
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
TOKENIZER = {
    "tokenizer_class": "InternLM2Tokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "</s>",
    "unk_token": "<unk>",
}


def native_tiny(
    texts: Iterable[str], teach: Callable | None = None, config: dict | None = None, seed: int = 0
) -> str:
    """Folder of the converted tiny model, made unless it is there; any number of processes may call
    it. The arguments are those of write_original."""
    from filelock import FileLock

    texts = list(texts)
    config = CONFIG | (config or {})
    sources = [Path(module.__file__) for module in (convert, fast_tokenizer, layout)]
    sources += [Path(__file__), Path(fast_tokenizer.HERE / "templates" / "internlm2.jinja")]
    if teach:
        sources.append(Path(inspect.getsourcefile(getattr(teach, "func", teach))))
    key = [json.dumps([config, seed, texts]), *(file.read_text("utf-8") for file in sources)]
    root = cache_root() / "tiny"
    root.mkdir(parents=True, exist_ok=True)
    final = root / hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    with FileLock(f"{final}.lock"):
        if not final.exists():
            draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=root))
            try:
                write_original(draft / "published", config, seed, texts, teach)
                convert.to_native(draft / "published", draft / "native")
                os.replace(draft / "native", final)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return str(final)


def write_original(
    folder: str | Path,
    config: dict,
    seed: int = 0,
    texts: Iterable[str] = (),
    teach: Callable | None = None,
) -> None:
    """A checkpoint in the published layout of InternLM2: config.json, model.safetensors,
    tokenizer.model, tokenizer_config.json.

    Args:
        config: fields of a published config.json beside those of CONFIG; vocab_size follows from
            the tokenizer.
        seed: of the random weights; the global generator stays as it was.
        texts: what the tokenizer learns its pieces from.
        teach: called with the random model, a Llama, and the converted tokenizer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    proto = train_sentencepiece(texts)
    settings = TOKENIZER | {"added_tokens_decoder": added_tokens(proto)}
    fields = CONFIG | config | {"vocab_size": len(proto.pieces)}
    native = convert.native_config(fields, fused=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(native)
    if teach is not None:
        path = folder / "tokenizer.model"
        names = fast_tokenizer.special_names(proto, settings, path)
        teach(model, fast_tokenizer.make_tokenizer(proto, names, "internlm2"))
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    for name, content in (("config.json", fields), ("tokenizer_config.json", settings)):
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / name).write_text(text, encoding="utf-8")
    save_file(published_tensors(model), folder / "model.safetensors", {"format": "pt"})


def published_tensors(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights of a Llama under InternLM2's names, q, k and v in one."""
    native = model.state_dict()
    groups = model.config.num_key_value_heads
    found = {}
    for name, parts in layout.native_names(native).items():
        tensors = [native[one] for one in parts]
        found[name] = tensors[0] if len(tensors) == 1 else layout.join_wqkv(*tensors, groups)
    return found


def train_sentencepiece(texts: Iterable[str], **more) -> model_pb2.ModelProto:
    """A sentencepiece model of InternLM2's layout: BPE with bytes, digits apart, nothing
    normalised, [UNUSED_TOKEN_141] ... [UNUSED_TOKEN_146] behind all other pieces.

    more: other settings of the trainer.
    """
    placeholders = [f"[UNUSED_TOKEN_{141 + i}]" for i in range(len(fast_tokenizer.CHATML))]
    lines = [ALONE.sub(rf"{CUT}\1{CUT}", line) for text in texts for line in text.splitlines()]
    out = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": VOCABULARY,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "pretokenization_delimiter": CUT,
        "user_defined_symbols": placeholders,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, **settings | more
    )
    proto = model_pb2.ModelProto.FromString(out.getvalue())
    pieces = [
        model_pb2.ModelProto.SentencePiece.FromString(p.SerializeToString()) for p in proto.pieces
    ]
    last = [piece for piece in pieces if fast_tokenizer.PLACEHOLDER.fullmatch(piece.piece)]
    del proto.pieces[:]
    proto.pieces.extend([piece for piece in pieces if piece not in last] + last)
    return proto


def added_tokens(proto: model_pb2.ModelProto) -> dict[str, dict]:
    """tokenizer_config.json's added_tokens_decoder: the names of the last pieces, and of the first
    three."""
    places = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    names = {places[name]: name for name in fast_tokenizer.FIRST}
    for placeholder, name in fast_tokenizer.STANDARD.items():
        if placeholder in places:
            names[places[placeholder]] = name
    return {str(i): {"content": name, "special": True} for i, name in names.items()}
