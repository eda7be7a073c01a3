"""Ask a trained model: load what a run left, stream an answer, stop it, switch its adapter off."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import device
from common.convert import adapter, model_folder, models
from common.data.labels import encode_prompt
from common.data.spelling import encode_text

REFRESH = 0.05  # seconds between two looks at a growing answer
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


def find_model(model: str | Path) -> str:
    """A run's output folder -> its final/; a model or adapter folder and a hub id stay as they are.

    SystemExit with one line when it is none of these.
    """
    folder = Path(model)
    if (folder / "final").is_dir():
        folder = folder / "final"
    if any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return str(folder)
    looks_like_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model))
    if looks_like_hub_id and not folder.parent.is_dir():
        return str(model)
    remedy = "train one first (bash RECIPE/train_zero2.sh), or name a run, model or adapter folder"
    raise SystemExit(f"{model}: no trained model here; {remedy}")


class ChatModel:
    """A model that answers one conversation at a time, token by token.

    Attributes:
        path, name: where it lies, and the end of that for people.
        adapter: whether it is an adapter, which can be switched off.
        chats: whether it is asked in its chat template; otherwise it continues the last text.
        can_think, takes_system, takes_tools: what the chat template knows.
        window: tokens of prompt and answer together.
        settings: the arguments of the run that left it, {} when there is no run.json beside it.
    """

    def __init__(self, model: str | Path, pretraining_stage: str = ""):
        """Load `model` (see find_model): half precision on accelerators, float32 on a CPU.

        pretraining_stage: what --stage was in runs whose models continue a text.
        """
        self.path = find_model(model)
        self.name = "/".join(Path(self.path).parts[-3:])
        self.adapter = (Path(self.path) / "adapter_config.json").is_file()
        self._load()
        run = Path(self.path).parent / "run.json"
        self.settings = {}
        if run.is_file():
            self.settings = json.loads(run.read_text(encoding="utf-8"))["settings"]
        template = self.tokenizer.chat_template
        self.chats = template is not None and self.settings.get("stage") != pretraining_stage
        self.can_think = "enable_thinking" in str(template)
        self.takes_system = self.chats and "system" in str(template)
        self.takes_tools = self.chats and "tools" in str(template)
        self.window = getattr(self.model.config, "max_position_embeddings", 4096)
        self.lock = threading.Lock()

    def _load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        dtype = torch.float32 if device.kind() == "cpu" else device.half_dtype()
        model_folder.check(self.path)
        try:
            base = adapter.check_base(self.path) if self.adapter else self.path
            no_code = {"trust_remote_code": False}  # unset, transformers asks on a terminal
            self.tokenizer = AutoTokenizer.from_pretrained(self.path, **no_code)
            self.model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype, **no_code)
            if self.adapter:
                self.model = adapter.put_on(self.model, self.path)
        except Exception as error:  # damaged files, unknown architectures: many libraries' classes
            words = model_folder.reason(error)
            raise SystemExit(f"{self.path}: cannot be loaded: {words}") from None
        models.check_vocabulary(self.tokenizer, self.model.config, self.path)
        self.model.to(device.device()).eval()

    def described(self) -> list[str]:
        """Size, device and dtype, for people."""
        count = self.model.num_parameters()
        size = f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.1f} M"
        dtype = str(self.model.dtype).removeprefix("torch.")
        return [f"{size} 参数", device.name(), dtype]

    def sampling_defaults(self) -> dict[str, float]:
        """SAMPLING as the model's generation config has it; temperature 0 when it does not draw."""
        own = self.model.generation_config
        temperature = 0
        if own.do_sample:
            temperature = 1 if own.temperature is None else own.temperature
        return {
            "temperature": temperature,
            "top_p": own.top_p or 1,
            "top_k": own.top_k or 0,
            "repetition_penalty": own.repetition_penalty or 1,
        }

    @contextmanager
    def turn(self, use_adapter: bool = True):
        """The model for one caller at a time, with its adapter or without."""
        with self.lock:
            if use_adapter or not self.adapter:
                yield
            else:
                with self.model.disable_adapter():
                    yield

    def prompt(
        self,
        messages: list[dict],
        room: int,
        thinking: bool = True,
        tools: list[dict] | None = None,
    ) -> list[int]:
        """Token ids [T] that generation starts from. tools: schemas that the template shows.

        The oldest exchanges are left out until `room` more tokens fit into the window. A model that
        does not chat continues the last message.
        """
        most = self.window - room
        if not self.chats:
            return self.text_prompt(messages[-1]["content"])[-most:]
        template = {"enable_thinking": thinking} if self.can_think else {}
        system = [message for message in messages[:1] if message["role"] == "system"]
        turns = messages[len(system) :]
        ids = encode_prompt(self.tokenizer, system + turns, tools, **template)
        starts = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
        for start in starts[1:]:
            if len(ids) <= most:
                break
            ids = encode_prompt(self.tokenizer, system + turns[start:], tools, **template)
        return ids[-most:]

    def text_prompt(self, text: str) -> list[int]:
        """Token ids of a text that is continued, as documents begin in training."""
        return encode_text(self.tokenizer, text)

    def stream(
        self,
        messages: list[dict],
        stop: threading.Event | None = None,
        use_adapter: bool = True,
        thinking: bool = True,
        max_new_tokens: int = 512,
        tools: list[dict] | None = None,
        **sampling,
    ) -> Iterator[tuple[str, int]]:
        """Chat messages -> (answer so far, its tokens) while it grows; the last one is complete.

        stop: ends the answer within one token when set; leaving the iteration does the same.
        tools: schemas of those that it may call; a call is text of the answer.
        sampling: some of SAMPLING; temperature 0, the default, is greedy.
        Raises ValueError when the template refuses the messages, and whatever generation raises.
        """
        from common.runs.generate import answer_text

        room = min(int(max_new_tokens), self.window // 2)
        shown = {"tools": tools} if tools else {}
        prompt = self.prompt(messages, room, thinking, **shown)
        thought_is_open = self.tokenizer.decode(prompt[-8:]).rstrip().endswith("<think>")
        opened = "<think>" if thought_is_open else ""  # by the template: not among the new tokens
        stop = stop or threading.Event()
        left = threading.Event()
        ids: list[int] = []
        errors: list[Exception] = []

        def heard(tokens, *_, **__):
            ids[:] = tokens[0, len(prompt) :].tolist()
            ended = stop.is_set() or left.is_set()
            return tokens.new_full((1,), ended).bool()

        def work():
            try:
                with self.turn(use_adapter):
                    self._generate(prompt, room, heard, **sampling)
            except Exception as error:
                errors.append(error)

        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        seen = 0
        try:
            while worker.is_alive():
                worker.join(REFRESH)
                if len(ids) > seen:
                    seen = len(ids)
                    yield opened + answer_text(self.tokenizer, ids[:seen]), seen
        finally:
            left.set()
        if errors:
            raise errors[0]
        yield opened + answer_text(self.tokenizer, ids), len(ids)

    def _generate(
        self,
        prompt,
        room,
        heard,
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        **inputs,
    ):
        """At most `room` tokens after `prompt`; heard(ids [1, T]) is asked at each token whether
        that was the last one. inputs: more of generate's."""
        import torch
        from transformers import StoppingCriteriaList

        from common.runs.generate import end_token_ids

        ids = torch.tensor([prompt], device=self.model.device)
        ends = end_token_ids(self.model, self.tokenizer)
        draws = temperature > 0
        drawing = {"temperature": temperature, "top_p": top_p, "top_k": int(top_k)}
        if not draws:
            drawing = dict.fromkeys(drawing)  # transformers warns of values that have no effect
        self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            do_sample=draws,
            **drawing,
            repetition_penalty=repetition_penalty,
            eos_token_id=ends,
            pad_token_id=ends[0],
            stopping_criteria=StoppingCriteriaList([heard]),
            **inputs,
        )


def split_thought(text: str) -> tuple[str, str, bool]:
    """Generated text -> (thought, answer, whether the thought is finished)."""
    before, opened, rest = text.partition("<think>")
    if not opened:
        return "", text.strip(), True
    thought, closed, answer = rest.partition("</think>")
    return thought.strip(), (before + answer).strip(), bool(closed)
