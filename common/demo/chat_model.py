"""Talk to a trained model: load what a run left, stream an answer, stop it, switch its adapter
off."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

from common import device
from common.convert import adapter
from common.data.labels import encode_prompt

REFRESH = 0.05  # seconds between two looks at a growing answer


def find_model(model: str | Path) -> str:
    """A run's output folder -> its final/; a folder with a model or an adapter, and a hub id, stay
    as they are."""
    folder = Path(model)
    folder = folder / "final" if (folder / "final").is_dir() else folder
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return str(folder)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)) and not folder.parent.is_dir():
        return str(model)
    remedy = "train one first (bash RECIPE/train_zero2.sh), or name a run, model or adapter folder"
    raise SystemExit(f"{model}: no trained model here; {remedy}")


class ChatModel:
    """A model that answers one conversation at a time, token by token.

    adapter: whether it can be switched off; can_think: the template knows enable_thinking; window:
        tokens;
    settings: the arguments of the run that left it, {} when there is no run.json beside it.
    """

    def __init__(self, model: str | Path):
        """Load `model` (see find_model) on this machine's device: half precision on accelerators,
        float32 on a CPU."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = find_model(model)
        self.adapter = (Path(path) / "adapter_config.json").is_file()
        dtype = torch.float32 if device.kind() == "cpu" else device.half_dtype()
        try:
            base = adapter.check_base(path) if self.adapter else path
            self.tokenizer = AutoTokenizer.from_pretrained(path)
            self.model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
            if self.adapter:
                from peft import PeftModel

                self.model = PeftModel.from_pretrained(self.model, path)
        except Exception as error:  # damaged or missing files, an unknown architecture: each library has its own class
            raise SystemExit(
                f"{path}: cannot be loaded: {' '.join(str(error).split())[:300]}"
            ) from None
        self.model.to(device.device()).eval()
        self.name = "/".join(Path(path).parts[-3:])
        self.can_think = "enable_thinking" in str(self.tokenizer.chat_template)
        self.window = getattr(self.model.config, "max_position_embeddings", 4096)
        run = Path(path).parent / "run.json"
        self.settings = (
            json.loads(run.read_text(encoding="utf-8"))["settings"] if run.is_file() else {}
        )
        self.lock = threading.Lock()

    def prompt(self, messages: list[dict], room: int, thinking: bool = True) -> list[int]:
        """Token ids that generation starts from; the oldest exchanges go until `room` more fit in
        the window."""
        template = {"enable_thinking": thinking} if self.can_think else {}
        head = 1 if messages[0]["role"] == "system" else 0
        while True:
            ids = encode_prompt(self.tokenizer, messages, **template)
            if len(ids) + room <= self.window or len(messages) - head < 3:
                return ids[-(self.window - room) :]
            messages = messages[:head] + messages[head + 2 :]

    def stream(
        self,
        messages: list[dict],
        stop: threading.Event | None = None,
        use_adapter: bool = True,
        thinking: bool = True,
        max_new_tokens: int = 512,
        **sampling,
    ) -> Iterator[tuple[str, int]]:
        """Chat messages -> (answer so far, its tokens), some times a second while it grows; the
        last one is whole.

        stop: ends the answer within one token when set; leaving the iteration does the same.
        sampling: temperature (0, the default: greedy), top_p, top_k, repetition_penalty.
        Raises ValueError when the template refuses the messages, and whatever generation raises.
        """
        left, ids, failed = threading.Event(), [], []
        room = min(int(max_new_tokens), self.window // 2)
        prompt = self.prompt(messages, room, thinking)
        opened = (
            "<think>" if self.tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>") else ""
        )

        def heard(tokens, *_, **__):
            ids[:] = tokens[0, len(prompt) :].tolist()
            return tokens.new_full(
                (1,), left.is_set() or (stop is not None and stop.is_set())
            ).bool()

        def work():
            try:
                with (
                    self.lock,
                    nullcontext()
                    if use_adapter or not self.adapter
                    else self.model.disable_adapter(),
                ):
                    self._generate(prompt, room, heard, **sampling)
            except Exception as error:
                failed.append(error)

        worker, told = threading.Thread(target=work, daemon=True), 0
        worker.start()
        try:
            while worker.is_alive():
                worker.join(REFRESH)
                if len(ids) > told:
                    told = len(ids)  # a character whose last bytes are still to come is left out
                    yield (
                        opened
                        + self.tokenizer.decode(ids[:told], skip_special_tokens=True).rstrip(
                            "\ufffd"
                        ),
                        told,
                    )
        finally:
            left.set()
        if failed:
            raise failed[0]
        yield opened + self.tokenizer.decode(ids, skip_special_tokens=True), len(ids)

    def _generate(
        self, prompt, room, heard, temperature=0.0, top_p=1.0, top_k=0, repetition_penalty=1.0
    ):
        import torch
        from transformers import StoppingCriteriaList

        own = self.model.generation_config.eos_token_id
        ends = sorted(
            {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        )
        drawn = {"temperature": temperature, "top_p": top_p, "top_k": int(top_k)}
        ids = torch.tensor([prompt], device=self.model.device)
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            do_sample=temperature > 0,
            **(drawn if temperature > 0 else dict.fromkeys(drawn)),
            repetition_penalty=repetition_penalty,
            eos_token_id=ends,
            pad_token_id=ends[0],
            stopping_criteria=StoppingCriteriaList([heard]),
        )


def split_thought(text: str) -> tuple[str, str, bool]:
    """Generated text -> (thought, answer, whether the thought is finished)."""
    before, opened, rest = text.partition("<think>")
    thought, closed, answer = rest.partition("</think>")
    return (
        (thought.strip(), (before + answer).strip(), bool(closed))
        if opened
        else ("", text.strip(), True)
    )
