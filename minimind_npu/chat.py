"""Talk to a trained model in the terminal.

    python minimind_npu/chat.py                             # the newest run that answers
    python minimind_npu/chat.py --model_name_or_path output/minimind_npu/reason --temperature 0.7
    python minimind_npu/chat.py --adapter output/minimind_npu/lora --think on --system 像老师
    python minimind_npu/chat.py --base_url http://127.0.0.1:8998/v1       # a server's; --model ID
    python minimind_npu/chat.py --model output/minimind_npu/toolcall --tools python my_tools.py
    printf '%s\\n' 你是谁？ /exit | python minimind_npu/chat.py           # questions from a pipe

/clear forgets the conversation, /undo its last exchange; /think on|off opens a thought before each
answer; /system TEXT sets the system prompt, /system alone takes it away; /exit, or Ctrl-D, leaves.
Ctrl-C ends an answer that is being written. A pre-trained model continues what is typed.

With --tools, or after /tools on, the model may call tools within its answer: the built-in ones and
those that are named (python runs code in the sandbox). A call is run, `=` shows what it gives, and
the model goes on.
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
from collections.abc import Iterator

from common.demo.chat_model import SAMPLING
from engine.generation import MiniMindChatModel, Sampling, newest
from server.client import ServedModel
from toolcall.own_tools import registry_of
from toolcall.registry import Registry
from toolcall.talk import Part, with_tools

HELP = "/clear  /undo  /think on|off  /tools on|off  /system TEXT  /exit"


class Chat:
    """A conversation and the commands on it."""

    def __init__(
        self,
        chat_model: MiniMindChatModel,
        system: str = "",
        thinking: bool = False,
        registry: Registry | None = None,
        uses_tools: bool = False,
        **options,
    ):
        """registry: the tools that /tools on and uses_tools let it call; options: of
        ChatModel.stream: max_new_tokens, and those of SAMPLING."""
        self.chat_model = chat_model
        self.system = system
        self.thinking = thinking
        self.registry = registry
        self.uses_tools = uses_tools
        self.options = options
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
            return self.undo()
        if name == "system":
            self.system = rest
            return f"(system: {rest})" if rest else "(no system prompt)"
        if name == "think" and rest in ("on", "off"):
            return self.think(rest)
        if name == "tools" and rest in ("on", "off"):
            return self.use_tools(rest)
        return HELP

    def undo(self) -> str:
        if not self.history:
            return "(nothing to take back)"
        place = max(i for i, turn in enumerate(self.history) if turn["role"] == "user")
        question = self.history[place]
        del self.history[place:]
        return f"(taken back: {question['content']})"

    def think(self, switch: str) -> str:
        if not self.chat_model.can_think:
            return "(the chat template of this model knows no thinking)"
        self.thinking = switch == "on"
        return f"(think {switch})"

    def use_tools(self, switch: str) -> str:
        if self.registry is None or not self.chat_model.takes_tools:
            return "(the chat template of this model knows no tools)"
        self.uses_tools = switch == "on"
        return f"(tools {switch}: {', '.join(self.registry.tools)})"

    def answer(self, question: str, stop: threading.Event) -> Iterator[str]:
        """Yield the answer piece by piece, calls of tools and their results among them; what was
        said until `stop` stays in the history."""
        asked = {"role": "user", "content": question}
        messages = [*self.history, asked]
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        registry = self.registry if self.uses_tools else None
        options = {"thinking": self.thinking, **self.options}
        parts: list[Part] = []
        said = ""
        for parts, _ in with_tools(self.chat_model, messages, registry, stop, **options):
            text = "".join(map(written, parts))
            yield text[len(said) :]
            said = text
        self.history += [asked, *(part.message for part in parts)]


def written(part: Part) -> str:
    """A part as the terminal shows it."""
    return f"\n  = {part.text}\n" if part.role == "tool" else part.text


def show(chat: Chat, question: str, say) -> None:
    """Write the answer as it grows; Ctrl-C ends it."""
    stop = threading.Event()
    began = time.perf_counter()
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
    on_terminal = lines is None and sys.stdin.isatty()
    if on_terminal:
        lines = typed_lines()
    elif lines is None:
        lines = sys.stdin
    try:
        for line in lines:
            line = line.strip()
            if line and not on_terminal:
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


def typed_lines() -> Iterator[str]:
    while True:
        yield input("> ")


def parse_args(argv=None) -> argparse.Namespace:
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    which = "run, model or adapter folder; unset: the newest run"
    add("--model_name_or_path", "--model", help=which)
    add("--adapter", help="LoRA folder; its base is found by itself")
    add("--base_url", help="ask an OpenAI-compatible server; its key: DANPU_API_KEY")
    add("--system", default="", help="system prompt")
    add("--think", choices=("on", "off"), default="off")
    own = "let it call tools: the built-in ones and, if named, python (the sandbox), files of yours"
    add("--tools", nargs="*", help=own)
    add("--temperature", type=float, help="0: the likeliest token; unset: the model's own settings")
    add("--top_p", type=float)
    add("--top_k", type=int)
    add("--repetition_penalty", type=float)
    add("--max_new_tokens", type=int, default=512)
    args = parser.parse_args(argv)
    if args.adapter and args.model_name_or_path:
        raise cli.usage_error("--adapter finds its base by itself; give only one of both")
    if args.adapter and args.base_url:
        raise cli.usage_error("--adapter: a server has its own; name one of its ids as --model")
    return args


def options_of(args, chat_model: MiniMindChatModel) -> dict:
    """What was given, over what the model's generation config says."""
    options = {"max_new_tokens": args.max_new_tokens}
    if not args.base_url:  # a server has its own settings
        options |= chat_model.sampling_defaults()
    given = {name: getattr(args, name) for name in SAMPLING}
    options |= {name: value for name, value in given.items() if value is not None}
    try:
        Sampling(**options)
    except ValueError as error:
        raise cli.usage_error(f"--{error}") from None
    return options


def open_model(args) -> MiniMindChatModel | ServedModel:
    if args.base_url:
        return ServedModel(args.base_url, args.model_name_or_path or "")
    cli.quiet_libraries()
    device.training_defaults(set())
    return MiniMindChatModel(args.adapter or args.model_name_or_path or newest())


def main() -> None:
    args = parse_args()
    registry = registry_of(args.tools or [])
    chat_model = open_model(args)
    uses_tools = args.tools is not None
    if uses_tools and not chat_model.takes_tools:
        raise SystemExit(f"--tools: the chat template of {chat_model.name} knows no tools")
    options = options_of(args, chat_model)
    chat = Chat(chat_model, args.system, args.think == "on", registry, uses_tools, **options)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C at the prompt leaves
    hint = HELP if chat_model.chats else "pre-trained: continues a text  /exit"
    where = args.base_url or device.name()
    print(f"{chat_model.name} on {where}   {hint}")
    talk(chat)


if __name__ == "__main__":
    cli.run(main)
