"""Load a fetched model once and let it write."""

from __future__ import annotations

import time
from pathlib import Path

from common import device  # before torch and transformers
from tools.hub.model_folder import say


def try_out(folder: Path, prompt: str) -> None:
    """Load the model as every recipe does and let it write one sentence."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from common.runs.generate import generate_answers

    logging.disable_progress_bar()
    where = device.device()
    try:
        config = AutoConfig.from_pretrained(folder)
        if type(config) not in AutoModelForCausalLM._model_mapping:
            return say(
                f"--try: {config.model_type} is no model that writes text; it was not loaded"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder)
        dtype = device.half_dtype() or torch.float32
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(where)
    except torch.OutOfMemoryError:
        raise SystemExit(
            f"--try: {folder} does not fit into the memory of {device.name()}"
        ) from None
    except Exception as error:  # many kinds: unknown type, code of its own, no tokenizer, a shape that does not fit
        raise SystemExit(
            f"--try: {folder} cannot be loaded ({' '.join(str(error).split())[:300]})"
        ) from None
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    else:
        ids = tokenizer(prompt)["input_ids"]
    began = time.monotonic()
    answer = generate_answers(model, tokenizer, [ids], max_new_tokens=48)[0]
    speed = len(tokenizer(answer)["input_ids"]) / (time.monotonic() - began)
    say(
        f"{prompt} -> {answer.strip()!r}\n{speed:.1f} tokens/s on {device.name()}, {str(dtype).removeprefix('torch.')}"
    )
