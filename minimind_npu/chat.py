"""Talk to a trained model in the terminal.

    python minimind_npu/chat.py                                                   # the newest run that answers
    python minimind_npu/chat.py --model_name_or_path output/minimind_npu/reason --temperature 0.7 --top_p 0.9
    python minimind_npu/chat.py --adapter output/minimind_npu/lora --think on --system 你是一位老师。
    printf '%s\\n' 你是谁？ /exit | python minimind_npu/chat.py                     # questions from a pipe

/clear forgets the conversation, /undo its last exchange; /think on|off opens a thought before each
answer; /system TEXT sets the system prompt, /system alone takes it away; /exit, or Ctrl-D, leaves.
Ctrl-C ends an answer that is being written. A pre-trained model goes on with what is typed.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common import cli, device  # noqa: I001  (device before torch and transformers)

import argparse
import signal
import threading
import time

from engine.generation import Sampling, MiniMindChatModel, newest

from common.demo.chat_model import split_thought

HELP = "/clear  /undo  /think on|off  /system TEXT  /exit"
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")


class Chat:
    """A conversation and the commands on it."""

    def __init__(
        self, speaker: MiniMindChatModel, system: str = "", thinking: bool = False, **sampling
    ):
        """sampling: what MiniMindChatModel.stream takes of SAMPLING."""
        self.speaker, self.system, self.thinking, self.sampling = (
            speaker,
            system,
            thinking,
            sampling,
        )
        self.history: list[dict] = []

    def command(self, line: str) -> str | None:
        """Obey a line that begins with /; -> what to tell, None to leave."""
        name, _, rest = line[1:].partition(" ")
        rest = rest.strip()
        if name in ("exit", "quit"):
            return None
        if name == "clear":
            self.history.clear()
            return "(a new conversation)"
        if name == "undo":
            gone, self.history = self.history[-2:], self.history[:-2]
            return f"(taken back: {gone[0]['content']})" if gone else "(nothing to take back)"
        if name == "system":
            self.system = rest
            return f"(system: {rest})" if rest else "(no system prompt)"
        if name == "think" and rest in ("on", "off"):
            if not self.speaker.can_think:
                return "(the chat template of this model knows no thinking)"
            self.thinking = rest == "on"
            return f"(think {rest})"
        return HELP

    def answer(self, question: str, stop: threading.Event):
        """Yield the answer piece by piece; what was said until `stop` stays in the history."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        asked, said = {"role": "user", "content": question}, ""
        told = [*system, *self.history, asked]
        for text, _ in self.speaker.stream(told, stop, thinking=self.thinking, **self.sampling):
            yield text[len(said) :]
            said = text
        thought, content, _ = split_thought(said)
        self.history += [
            asked,
            {"role": "assistant", "content": content, "reasoning_content": thought},
        ]


def show(chat: Chat, question: str, say) -> None:
    """Write the answer as it grows; Ctrl-C ends it."""
    stop, began = threading.Event(), time.perf_counter()
    before = signal.signal(signal.SIGINT, lambda *_: stop.set())
    try:
        for piece in chat.answer(question, stop):
            say(piece, end="", flush=True)
    except ValueError as error:  # the chat template refuses
        say(f"({error})", end="")
    finally:
        signal.signal(signal.SIGINT, before)
    say(f" (stopped after {time.perf_counter() - began:.1f} s)" if stop.is_set() else "")


def talk(chat: Chat, lines=None, say=print) -> None:
    """Read questions from the terminal, or from `lines`, until they end or /exit."""
    typed = lines is None and sys.stdin.isatty()
    lines = iter(lambda: input("> "), None) if typed else lines or sys.stdin
    try:
        for line in lines:
            line = line.strip()
            if line and not typed:
                say(f"> {line}")
            if line.startswith("/"):
                told = chat.command(line)
                if told is None:
                    return
                say(told)
            elif line:
                show(chat, line, say)
    except (EOFError, KeyboardInterrupt):
        say("")


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add(
        "--model_name_or_path",
        "--model",
        help="run, model or adapter folder; unset: the newest run",
    )
    add("--adapter", help="LoRA folder; its base is found by itself")
    add("--system", default="", help="system prompt")
    add("--think", choices=("on", "off"), default="off")
    add(
        "--temperature",
        type=float,
        help="0: always the likeliest token; unset: the model's own settings",
    )
    add("--top_p", type=float)
    add("--top_k", type=int)
    add("--repetition_penalty", type=float)
    add("--max_new_tokens", type=int, default=512)
    args = parser.parse_args(argv)
    if args.adapter and args.model_name_or_path:
        raise cli.usage_error("--adapter finds its base by itself; give only one of both")
    return args


def sampling(args, speaker: MiniMindChatModel) -> dict:
    """What was given, over what the model's generation config says."""
    own = speaker.model.generation_config
    heat = (own.temperature or 0) if own.do_sample else 0
    found = dict(
        zip(
            SAMPLING,
            (heat, own.top_p or 1, own.top_k or 0, own.repetition_penalty or 1),
            strict=False,
        )
    )
    found |= {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    try:
        Sampling(**found)
    except ValueError as error:
        raise cli.usage_error(f"--{error}") from None
    return found


def main() -> None:
    args = parse_args()
    cli.quiet_libraries()
    device.training_defaults(set())
    speaker = MiniMindChatModel(args.adapter or args.model_name_or_path or newest())
    chat = Chat(speaker, args.system, args.think == "on", **sampling(args, speaker))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C at the prompt leaves
    what = HELP if speaker.chats else "pre-trained: goes on with a text  /exit"
    print(f"{speaker.name} on {device.name()}   {what}")
    talk(chat)


if __name__ == "__main__":
    cli.run(main)
