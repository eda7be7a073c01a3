"""The embedded default: a tokenizer trained on a recipe's own texts and a small random model of any
config.

Both end as an ordinary checkpoint folder, so that everything after it treats them like a downloaded
model.
"""

import hashlib
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path


def make_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str],
    chat_template: str | None = None,
    plain_tokens: Sequence[str] = (),
    **settings,
):
    """Train a byte-level BPE on `texts`; any string survives encode + decode, seen in `texts` or
    not.

    Digits and Chinese characters are never merged with their neighbours, so that sums and
    paraphrases look alike to a small model. The same texts give the same tokenizer in every
    process.

    Args:
        texts: what to learn merges from, but for special tokens that stand in them.
        vocab_size: upper bound, tokens; texts with few different words end below it.
        special_tokens: get ids 0, 1, ... in this order and are skipped by
            decode(skip_special_tokens=True).
        plain_tokens: get the last ids; one id each too, but part of the visible text (<think>,
            <tool_call>).
        settings: go to PreTrainedTokenizerFast: eos_token, pad_token, bos_token, model_max_length
            (tokens) ...; their tokens have to be among special_tokens, else ValueError.
    Returns:
        a PreTrainedTokenizerFast; pad_token defaults to eos_token.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    settings.setdefault("pad_token", settings.get("eos_token"))
    named = {v for k, v in settings.items() if k.endswith("_token") and v}
    if unknown := sorted(named - set(special_tokens)):
        raise ValueError(f"{', '.join(unknown)}: not among special_tokens {list(special_tokens)}")
    core = Tokenizer(models.BPE())
    split = [
        pre_tokenizers.Split(Regex(r"\p{Han}|\p{N}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
    core.pre_tokenizer = pre_tokenizers.Sequence(split)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(plain_tokens),
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    marks = re.compile("|".join(map(re.escape, special_tokens)) or "(?!)")
    core.train_from_iterator(chain.from_iterable(map(marks.split, texts)), trainer)
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain_tokens])
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=chat_template, **settings)


def _random_model(config, seed: int, dtype, model_class, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # the class itself, not from_config: that would spread the weights over ranks where ZeRO-3
        # is configured
        model_class = model_class or AutoModelForCausalLM._model_mapping[type(config)]
        model = model_class(config).to(dtype or torch.float32)
    config.dtype = dtype or torch.float32
    # the rank that holds the lock writes
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    if model.can_generate():
        model.generation_config = GenerationConfig(
            bos_token_id=getattr(tokenizer, "bos_token_id", None),
            eos_token_id=getattr(tokenizer, "eos_token_id", None),
            pad_token_id=getattr(tokenizer, "pad_token_id", None),
        )
    return model


def save_tiny(
    config,
    tokenizer,
    folder: str | Path,
    seed: int = 0,
    dtype=None,
    model_class=None,
    teach: Callable | None = None,
) -> str:
    """Make the checkpoint FOLDER/<key> unless it is there, and return its path; any number of
    processes may call it.

    The key is a hash of config, tokenizer files, seed, dtype and class, so nothing is ever
    overwritten or outdated.
    Args:
        config: the model's config, its vocab_size at least len(tokenizer).
        tokenizer: anything with save_pretrained (a processor too).
        seed: of the weights; the global generator stays as it was.
        dtype: torch dtype of the weights, default float32.
        model_class: default AutoModelForCausalLM.
        teach: called with the random model before it is saved; the file it stands in belongs to the
            key.
    Raises ValueError for a config with too few tokens, OSError when the folder cannot be written.
    """
    from filelock import FileLock

    from common.convert.older_readers import for_older_readers, save_tokenizer

    text = config.get_text_config()
    if hasattr(tokenizer, "vocab_size") and text.vocab_size < len(tokenizer):
        raise ValueError(
            f"vocab_size {text.vocab_size} of the config is below the tokenizer's "
            f"{len(tokenizer)} tokens"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder))
    try:
        save_tokenizer(tokenizer, draft)
        parts = [config.to_json_string(use_diff=False), str((seed, dtype, model_class))]
        if teach:
            source = inspect.getsourcefile(getattr(teach, "func", teach))
            parts.append(Path(source).read_text(encoding="utf-8"))
        key = [part.encode() for part in parts]
        key += [file.name.encode() + file.read_bytes() for file in sorted(draft.iterdir())]
        final = folder / hashlib.sha256(b"\n".join(key)).hexdigest()[:16]
        with FileLock(f"{final}.lock"):
            if not final.exists():
                model = _random_model(config, seed, dtype, model_class, tokenizer)
                if teach:
                    teach(model)
                model.save_pretrained(draft)
                for_older_readers(draft)
                draft.chmod(0o755)  # mkdtemp makes it private
                os.replace(draft, final)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return str(final)
