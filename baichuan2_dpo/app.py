"""Gradio page for a model trained on preferences: its answers beside those of the reference it
started from.

    python baichuan2_dpo/app.py                             # what `bash baichuan2_dpo/train_zero2.sh` left in output/
    python baichuan2_dpo/app.py --model output/baichuan2_dpo/final --port 7860 --host 127.0.0.1
    python baichuan2_dpo/app.py --model output/full --reference models/baichuan2-7b-native
    MODEL=models/merged python baichuan2_dpo/app.py --reference none

The reference of a LoRA adapter is the model without it; that of a run which trained all weights is
the model it began with, or --reference, loaded beside it: twice the memory. Both sides are asked in
the chat template saved with the trained model (common/data/labels.py, as in training), with the
same sampling and the same seed, one after the other. The implicit reward of an answer is beta *
(log p_policy - log p_reference) of its tokens and its end token, as in training (dpo_losses.py).
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the files beside this one
from common import device  # noqa: I001  (device before torch and transformers)
from common.data.labels import IGNORE, encode_prompt
from common.demo import page as shared
from common.demo.page import (
    AT_ONCE,
    BUSY,
    IDLE,
    MAX_CHARS,
    MAX_WAITING,
    MODEL,
    SAMPLING,
    literal,
    prose,
    size,
)
from common.demo.chat_model import split_thought

import math
import random
import threading
import time
from types import SimpleNamespace

import gradio as gr
import torch

import dpo_losses
from reference import Side, Speaker, answer_message, find_reference, scored_row
from reference import huggingface_hub, load_reference, losses  # noqa: F401  (for the tests)

DEFAULT = HERE.parent / "output" / HERE.name
MAX_SEED = 2**31 - 1
EXAMPLES = ["书店几点开门？", "中国的首都是哪里？", "1加1等于几？", "把“我吃苹果”改成否定句。"]
TWO_COLUMNS = """
.gradio-container { max-width: 80rem !important }
#about p { margin: 0.25rem 0 }
#policy, #reference { height: calc(100dvh - 23rem) !important; & .bubble-wrap { padding-top: 1.5rem } }
@media (max-width: 45rem) {  /* one above the other */
    #policy, #reference { height: 33dvh !important; & .placeholder { display: none } }
    #policy .examples { grid-template-columns: 1fr; gap: 0.4rem; & .example { padding: 0.4rem 0.8rem } } }
"""
CSS = shared.CSS + TWO_COLUMNS
TITLES = {"policy": "策略 · 训练后", "reference": "参考 · 训练前"}


# ---- a conversation: turns {"question", "answers": {side: answer}, "verdict"} ----------------------------------------


def show(history: list[dict], name: str) -> list[gr.ChatMessage]:
    """One column: thoughts folded, a line of facts under each answer."""
    shown = []
    for turn in history:
        answer = turn["answers"][name]
        thought, said, done = split_thought(answer["said"])
        shown.append(gr.ChatMessage(literal(turn["question"]), "user"))
        if thought:
            fold = {"title": "思考过程", "status": "done" if done or answer["note"] else "pending"}
            shown.append(gr.ChatMessage(prose(thought), "assistant", fold))
        if said or not thought:
            shown.append(
                gr.ChatMessage(
                    prose(said) or ("（没有说话）" if answer["note"] else "…"), "assistant"
                )
            )
        if answer["note"]:
            shown.append(
                gr.ChatMessage("", "assistant", {"title": answer["note"], "status": "done"})
            )
    return shown


def messages_of(history: list[dict], name: str, system: str) -> list[dict]:
    """What a model is asked: the turns as rows of the training data, with the answers of side
    `name`.

    The last turn is the question. Earlier ones that this side did not answer (stopped before it
    began, or not a word) are left out.
    """
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in history[:-1]:
        if split_thought(turn["answers"][name]["said"])[1]:
            messages += [
                {"role": "user", "content": turn["question"]},
                answer_message(turn["answers"][name]["said"]),
            ]
    return [*messages, {"role": "user", "content": history[-1]["question"]}]


# ---- rewards --------------------------------------------------------------------------------------------------


def verdict_of(
    rewards: dict[str, float], same_prompt: bool, same_answer: bool, odds: bool = True
) -> str:
    """The line under the columns, Markdown. odds: the loss takes rewards for the log odds of a
    preference."""
    apart = rewards["policy"] - rewards["reference"]
    if not same_prompt:
        return "两边的前文不同，奖励之间不能相比"
    if same_answer:
        return "两个回答一字不差"
    if abs(apart) < 0.005:
        return "训练后的模型对两个回答不分上下"
    better = "策略的回答" if apart > 0 else "参考的回答"
    share = (
        f"，按 Bradley–Terry 胜率 {1 / (1 + math.exp(-min(abs(apart), 500))):.0%}" if odds else ""
    )
    return f"训练后的模型更偏好**{better}**：隐式奖励高 {abs(apart):.2f}{share}"


# ---- what the events do ---------------------------------------------------------------------------------------


class Page(shared.Runs):
    """What the events of the page do. `ui`: its components, set by build_demo."""

    ui: SimpleNamespace

    def __init__(self, policy: Speaker, reference: Side | None):
        super().__init__()
        self.policy = policy
        self.sides = {"policy": Side(policy)} | ({"reference": reference} if reference else {})
        self.kind = policy.settings.get("loss_type", "sigmoid")
        self.beta = float(policy.settings.get("beta") or dpo_losses.BETA.get(self.kind, 0.1))
        self.window = min(side.chat_model.window for side in self.sides.values())

    def view(self, history: list[dict], **more) -> dict:
        ui = self.ui
        shown = {ui.chats[name]: show(history, name) for name in self.sides}
        return shown | {ui.history: history, ui.verdict: history[-1]["verdict"] if history else ""}

    def busy(self, now: bool) -> dict:
        off = gr.update(interactive=not now)
        return {
            self.ui.box: gr.update(**(BUSY if now else IDLE)),
            self.ui.again: off,
            self.ui.undo: off,
        }

    def refuse(self, text: str, system: str, room: int) -> None:
        """gr.Error for what the models cannot take whole."""
        for what in (text, system):
            shared.refuse_long(what)
        try:
            asked = messages_of([{"question": text}], "policy", system)
            tokens, most = len(encode_prompt(self.policy.tokenizer, asked)), self.window - room
        except ValueError as error:  # a template without system messages, say
            raise gr.Error(str(error)[:300], print_exception=False) from error
        if tokens > most:
            raise gr.Error(f"问题有 {tokens} 词元，最多 {most} 词元。", print_exception=False)

    def ask(self, text, history, request: gr.Request, shared, system, seed, most, *numbers):
        """Both sides answer, one after the other; then both answers are weighed."""
        if not text.strip():
            return
        most = min(int(most), self.window // 2)
        self.refuse(text, system, most)
        seed = random.SystemRandom().randint(0, MAX_SEED) if seed is None or seed < 0 else int(seed)
        how = {"max_new_tokens": most, "seed": seed} | dict(zip(SAMPLING, numbers, strict=True))
        turn = {
            "question": text,
            "verdict": "",
            "answers": {name: {"said": "", "note": ""} for name in self.sides},
        }
        history = [*history, turn]
        run = self.begin(request)
        try:
            yield self.view(history) | self.busy(True) | {self.ui.box: gr.update(value="", **BUSY)}
            for _ in self.answers(history, run.stop, shared, system, how):
                if not run.cleared:
                    yield self.view(history)
            if run.cleared:  # after the last look at it, which else would come back
                yield self.view([])
        except Exception as error:
            raise shared.failed(error) from error
        finally:
            self.end(request)

    def answers(
        self, history: list[dict], stop: threading.Event, shared: bool, system: str, how: dict
    ):
        """Let the last turn of `history` grow, with a step for each look at it."""
        turn, asked = history[-1], {}
        for name, side in self.sides.items():
            asked[name] = messages_of(history, "policy" if shared else name, system)
            yield from self.answer(side, turn["answers"][name], asked[name], stop, how)
        if not stop.is_set():
            self.weigh(turn, asked, how)
        yield

    def answer(
        self, side: Side, answer: dict, messages: list[dict], stop: threading.Event, how: dict
    ):
        """Let `answer` grow, with a step for each look at it; the last one has its facts."""
        if stop.is_set():
            answer |= {"note": "已停止，没有开始", "whole": False}
            return
        begun, count = time.perf_counter(), 0
        for answer["said"], count in side.stream(messages, stop, **how):  # noqa: B007
            yield
        seconds = time.perf_counter() - begun
        answer["whole"] = not stop.is_set() and count < how["max_new_tokens"]
        cut = "已停止" if stop.is_set() else "没说完"
        answer["note"] = shared.facts(count, seconds, *[cut] * (not answer["whole"]))
        yield

    def weigh(self, turn: dict, asked: dict[str, list[dict]], how: dict) -> None:
        """Add the implicit reward to the facts of both answers, and the verdict to the turn."""
        if "reference" not in self.sides:
            return
        answers = turn["answers"]
        try:
            rewards = self.rewards(asked, answers)
        except SystemExit as error:  # a model whose logits are changed after the head
            turn["verdict"] = literal(f"没有算隐式奖励：{error}")
            return
        if rewards is None:
            turn["verdict"] = "没有算隐式奖励：有一个回答没有词元，或者对话超出了模型的窗口"
            return
        for name, reward in rewards.items():
            answers[name]["note"] += f" · 隐式奖励 {reward:+.2f}".replace("-", "−")
        same = answers["policy"]["said"].strip() == answers["reference"]["said"].strip()
        turn["verdict"] = verdict_of(
            rewards, asked["policy"] == asked["reference"], same, self.kind in ("sigmoid", "robust")
        )
        if how["temperature"] > 0:
            turn["verdict"] += f" · 种子 {how['seed']}"

    def rewards(
        self, asked: dict[str, list[dict]], answers: dict[str, dict]
    ) -> dict[str, float] | None:
        """The implicit reward of each side's answer to what that side was asked; None: see
        scored_row."""
        rows = [
            scored_row(self.policy, asked[name], answer["said"], answer["whole"], self.window)
            for name, answer in answers.items()
        ]
        if None in rows:
            return None
        counts = [[sum(label != IGNORE for label in labels)] for _, labels in rows]
        policy, reference = (
            dpo_losses.Answers(*map(torch.tensor, [[side.log_prob(*row)] for row in rows] + counts))
            for side in self.sides.values()
        )
        averaged = bool(self.policy.settings.get("length_normalized"))
        found = dpo_losses.rewards(self.kind, policy, reference, self.beta, averaged)
        return {name: reward.item() for name, reward in zip(answers, found, strict=True)}

    def pick(self, example: gr.SelectData, history, request: gr.Request, *controls):
        yield from self.ask(example.value["text"], history, request, *controls)

    def retry(self, history, request: gr.Request, *controls):
        if history:
            yield from self.ask(history[-1]["question"], history[:-1], request, *controls)

    def back(self, history):
        if not history:
            return {self.ui.history: history}
        return self.view(history[:-1]) | {self.ui.box: history[-1]["question"]}

    def clear(self, request: gr.Request):
        """Empty columns; a run that is on empties them again at its end, and only then another can
        begin."""
        return self.view([]) | ({} if self.drop(request) else self.busy(False))


# ---- the page -------------------------------------------------------------------------------------------------


def about(page: Page, reason: str) -> str:
    """The lines under the title."""
    chat_model, reference = page.policy, page.sides.get("reference")
    facts = (
        [chat_model.name]
        + ["LoRA"] * chat_model.adapter
        + [f"{size(chat_model.model)} 参数", device.name()]
    )
    facts.append(str(chat_model.model.dtype).removeprefix("torch."))
    if reference is None:
        line = f"没有参考，只有一列：{reason}。用 --reference 给出训练前的模型，就有两列。"
    else:
        line = "参考：" + (
            "关掉适配器的同一个模型" if not reference.use_adapter else reference.chat_model.name
        )
        line += (
            f" · 同样的设置、同样的种子 · 隐式奖励 = β (log p 策略 − log p 参考)，β = {page.beta:g}"
        )
    return f"### {HERE.name}\n{literal(' · '.join(facts))}\n\n{literal(line)}"


def build_demo(
    model: str | Path | Speaker = DEFAULT, reference: str | Path | None = None
) -> gr.Blocks:
    """The page for a run, model or adapter folder; SystemExit with one line when there is no model.

    reference: folder or hub id, "none", or None for what find_reference knows.
    """
    policy = model if isinstance(model, Speaker) else Speaker(model)
    if policy.tokenizer.chat_template is None:
        raise SystemExit(
            f"{policy.name}: no chat template, so it cannot be asked; save one with its tokenizer"
        )
    side, reason = find_reference(policy, reference)
    page = Page(policy, side)
    with gr.Blocks(title=f"{HERE.name} · 对比", analytics_enabled=False, fill_height=True) as demo:
        gr.Markdown(about(page, reason), elem_id="about")
        page.ui = layout(page)
        connect(page, demo)
    return demo.queue(max_size=MAX_WAITING)


def layout(page: Page) -> SimpleNamespace:
    ui = SimpleNamespace(history=gr.State([]))
    with gr.Row():
        ui.chats = {name: column(name) for name in page.sides}
    ui.verdict = gr.Markdown(elem_id="verdict")
    ui.box = gr.Textbox(
        "",
        label="问题",
        show_label=False,
        placeholder="问点什么，回车发送",
        max_lines=8,
        max_length=MAX_CHARS,
        **IDLE,
    )
    label = "以后两边都接着策略的回答说（前文相同，奖励才能相比）；不勾：各接各的"
    shared = gr.Checkbox(
        False, label=label, container=False, visible="reference" in page.sides, elem_id="shared"
    )
    with gr.Row():
        names = ("再来一次", "撤销", "清空")
        ui.again, ui.undo, ui.clear = (gr.Button(name, size="sm", min_width=80) for name in names)
    ui.controls = [shared, *settings(page)]
    return ui


def column(name: str) -> gr.Chatbot:
    examples = [{"text": text} for text in EXAMPLES] if name == "policy" else None
    hint = "问点什么，或选一个例子" if name == "policy" else "同一个问题，训练前的回答"
    return gr.Chatbot(
        label=TITLES[name],
        elem_id=name,
        min_height=240,
        min_width=320,
        buttons=["copy"],
        allow_tags=False,
        placeholder=hint,
        examples=examples,
    )


def connect(page: Page, demo: gr.Blocks) -> None:
    ui = page.ui
    shown = [*ui.chats.values(), ui.history, ui.verdict, ui.box, ui.again, ui.undo]
    one = MODEL | {"show_progress": "hidden"}
    runs = [
        ui.box.submit(page.ask, [ui.box, ui.history, *ui.controls], shown, **one),
        ui.chats["policy"].example_select(page.pick, [ui.history, *ui.controls], shown, **one),
        ui.again.click(page.retry, [ui.history, *ui.controls], shown, **one),
    ]
    for run in runs:
        run.then(lambda: page.busy(False), None, [ui.box, ui.again, ui.undo], **AT_ONCE)
    ui.box.stop(page.halt, **AT_ONCE)
    ui.undo.click(page.back, ui.history, shown, **AT_ONCE)
    clears = [ui.clear.click, *(chat.clear for chat in ui.chats.values())]
    gr.on(clears, page.clear, None, shown, **AT_ONCE)
    demo.unload(page.halt)


def settings(page: Page) -> list[gr.components.Component]:
    """System prompt and sampling, in the order of Page.ask; their defaults are those of the run and
    of the model."""
    policy = page.policy
    with gr.Accordion("设置", open=False):
        system = gr.Textbox(
            policy.settings.get("system_prompt") or "",
            label="系统提示词",
            lines=2,
            max_length=MAX_CHARS,
            visible="system" in str(policy.tokenizer.chat_template),
        )
        with gr.Row():
            info = "两边相同；-1：每次另抽"
            seed = gr.Number(
                -1,
                precision=0,
                minimum=-1,
                maximum=MAX_SEED,
                min_width=300,
                label="种子",
                info=info,
            )
            numbers = [
                shared.length(page.window, 300),
                *shared.sampling(shared.own_sampling(policy), 300),
            ]
    return [system, seed, *numbers]


def launch(demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Start the page in the background and return its address; `demo.close()` ends it."""
    return shared.launch(demo, host, port, CSS)


def main() -> None:
    parser = shared.arguments(__doc__, DEFAULT)
    parser.add_argument(
        "--reference", default=None, help="what to compare with; default: the base; none: nothing"
    )
    args = parser.parse_args()
    shared.stay(build_demo(args.model, args.reference), args, launch)


if __name__ == "__main__":
    main()
