"""Gradio page for a model trained on preferences: its answers beside those of the reference it
started from.

    python baichuan2_dpo/app.py        # what `bash baichuan2_dpo/train_zero2.sh` left in output/
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
from common import device  # noqa: F401, I001  (before torch and transformers)

import math
import random
import threading
import time
from types import SimpleNamespace

import gradio as gr
import torch

import dpo_losses
from common.data.spelling import IGNORE
from common.data.labels import encode_prompt
from common.demo import page
from common.demo.chat_model import SAMPLING, split_thought
from common.demo.page import AT_ONCE, BUSY, IDLE, MAX_WAITING, MODEL, escape_markdown
from reference import ScoringChatModel, Side, answer_message, find_reference, scored_row

DEFAULT = HERE.parent / "output" / HERE.name
MAX_SEED = 2**31 - 1
EXAMPLES = ["书店几点开门？", "中国的首都是哪里？", "1加1等于几？", "把“我吃苹果”改成否定句。"]
TWO_COLUMNS = """
.gradio-container { max-width: 80rem !important }
#about p { margin: 0.25rem 0 }
#policy, #reference {
    height: calc(100dvh - 23rem) !important;
    & .bubble-wrap { padding-top: 1.5rem }
}
@media (max-width: 45rem) {  /* one above the other */
    #policy, #reference { height: 33dvh !important; & .placeholder { display: none } }
    #policy .examples {
        grid-template-columns: 1fr; gap: 0.4rem;
        & .example { padding: 0.4rem 0.8rem }
    }
}
"""
CSS = page.CSS + TWO_COLUMNS
TITLES = {"policy": "策略 · 训练后", "reference": "参考 · 训练前"}


# ---- a conversation: turns {"question", "answers": {side: answer}, "verdict"} ------------------


def show(history: list[dict], name: str) -> list[gr.ChatMessage]:
    """One column as the chatbot displays it."""
    shown = []
    for turn in history:
        answer = turn["answers"][name]
        note = answer["note"]
        thought, text, done = split_thought(answer["text"])
        if not text and not thought:
            text = "（没有说话）" if note else "…"
        shown.append(gr.ChatMessage(escape_markdown(turn["question"]), "user"))
        shown += page.answer_bubbles(thought, done or bool(note), text, note)
    return shown


def messages_of(history: list[dict], name: str, system: str) -> list[dict]:
    """What a model is asked: the turns as rows of the training data, with the answers of side
    `name`.

    The last turn is the question. Earlier ones that this side did not answer (stopped before it
    began, or not a word) are left out.
    """
    messages = []
    if system.strip():
        messages.append({"role": "system", "content": system.strip()})
    for turn in history[:-1]:
        answer = answer_message(turn["answers"][name]["text"])
        if answer["content"]:
            messages += [{"role": "user", "content": turn["question"]}, answer]
    return [*messages, {"role": "user", "content": history[-1]["question"]}]


# ---- rewards -----------------------------------------------------------------------------------


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
    verdict = f"训练后的模型更偏好**{better}**：隐式奖励高 {abs(apart):.2f}"
    if odds:
        rate = 1 / (1 + math.exp(-min(abs(apart), 500)))
        verdict += f"，按 Bradley–Terry 胜率 {rate:.0%}"
    return verdict


# ---- what the events do ------------------------------------------------------------------------


class Comparison(page.Runs):
    """What the events of the page do. `ui`: its components, set by build_demo."""

    ui: SimpleNamespace

    def __init__(self, policy: ScoringChatModel, reference: Side | None):
        super().__init__()
        self.policy = policy
        self.sides = {"policy": Side(policy)}
        if reference:
            self.sides["reference"] = reference
        self.kind = policy.settings.get("loss_type", "sigmoid")
        self.beta = float(policy.settings.get("beta") or dpo_losses.BETA.get(self.kind, 0.1))
        self.window = min(side.chat_model.window for side in self.sides.values())

    def view(self, history: list[dict]) -> dict:
        """Both columns and the verdict."""
        ui = self.ui
        shown = {ui.chats[name]: show(history, name) for name in self.sides}
        verdict = history[-1]["verdict"] if history else ""
        return shown | {ui.history: history, ui.verdict: verdict}

    def busy(self, now: bool) -> dict:
        """The controls while both sides answer, and afterwards."""
        buttons = gr.update(interactive=not now)
        box = gr.update(**(BUSY if now else IDLE))
        return {self.ui.box: box, self.ui.again: buttons, self.ui.undo: buttons}

    def refuse(self, text: str, system: str, room: int) -> None:
        """gr.Error for what the models cannot take whole."""
        page.refuse_long(text)
        page.refuse_long(system)
        try:
            asked = messages_of([{"question": text}], "policy", system)
            tokens = len(encode_prompt(self.policy.tokenizer, asked))
        except ValueError as error:  # a template without system messages, say
            raise gr.Error(str(error)[:300], print_exception=False) from error
        most = self.window - room
        if tokens > most:
            raise gr.Error(f"问题有 {tokens} 词元，最多 {most} 词元。", print_exception=False)

    def ask(self, text, history, request: gr.Request, share, system, seed, most, *numbers):
        """Both sides answer, one after the other; then both answers are weighed.

        share: both continue the conversation of the policy.
        """
        if not text.strip():
            return
        most = min(int(most), self.window // 2)
        self.refuse(text, system, most)
        if seed is None or seed < 0:
            seed = random.SystemRandom().randint(0, MAX_SEED)
        options = {"max_new_tokens": most, "seed": int(seed)}
        options |= dict(zip(SAMPLING, numbers, strict=True))
        answers = {name: {"text": "", "note": ""} for name in self.sides}
        history = [*history, {"question": text, "verdict": "", "answers": answers}]
        run = self.begin(request)
        try:
            yield self.view(history) | self.busy(True) | {self.ui.box: gr.update(value="", **BUSY)}
            for _ in self.answers(history, run.stop, share, system, options):
                if not run.cleared:
                    yield self.view(history)
            if run.cleared:  # after the last look at it, which else would come back
                yield self.view([])
        except Exception as error:
            raise page.failed(error) from error
        finally:
            self.end(request)

    def answers(
        self, history: list[dict], stop: threading.Event, share: bool, system: str, options: dict
    ):
        """Let the last turn of `history` grow, with a step for each look at it."""
        turn = history[-1]
        asked = {}
        for name, side in self.sides.items():
            asked[name] = messages_of(history, "policy" if share else name, system)
            yield from self.answer(side, turn["answers"][name], asked[name], stop, options)
        if not stop.is_set():
            self.weigh(turn, asked, options)
        yield

    def answer(
        self, side: Side, answer: dict, messages: list[dict], stop: threading.Event, options: dict
    ):
        """Let `answer` grow, with a step for each look at it; the last one has its note."""
        if stop.is_set():
            answer |= {"note": "已停止，没有开始", "complete": False}
            return
        began = time.perf_counter()
        count = 0
        for text, count in side.stream(messages, stop, **options):  # noqa: B007
            answer["text"] = text
            yield
        seconds = time.perf_counter() - began
        cut = []
        if stop.is_set():
            cut = ["已停止"]
        elif count >= options["max_new_tokens"]:
            cut = ["没说完"]
        answer |= {"complete": not cut, "note": page.answer_note(count, seconds, *cut)}
        yield

    def weigh(self, turn: dict, asked: dict[str, list[dict]], options: dict) -> None:
        """Add the implicit reward to the notes of both answers, and the verdict to the turn."""
        if "reference" not in self.sides:
            return
        answers = turn["answers"]
        try:
            rewards = self.rewards(asked, answers)
        except SystemExit as error:  # a model whose logits are changed after the head
            turn["verdict"] = escape_markdown(f"没有算隐式奖励：{error}")
            return
        if rewards is None:
            turn["verdict"] = "没有算隐式奖励：有一个回答没有词元，或者对话超出了模型的窗口"
            return
        for name, reward in rewards.items():
            answers[name]["note"] += f" · 隐式奖励 {reward:+.2f}".replace("-", "−")
        same_prompt = asked["policy"] == asked["reference"]
        same_answer = answers["policy"]["text"].strip() == answers["reference"]["text"].strip()
        odds = self.kind in ("sigmoid", "robust")
        turn["verdict"] = verdict_of(rewards, same_prompt, same_answer, odds)
        if options["temperature"] > 0:
            turn["verdict"] += f" · 种子 {options['seed']}"

    def rewards(
        self, asked: dict[str, list[dict]], answers: dict[str, dict]
    ) -> dict[str, float] | None:
        """The implicit reward of each side's answer ({"text", "complete"}) to what that side was
        asked; None: see scored_row."""
        rows = []
        for name, answer in answers.items():
            row = scored_row(
                self.policy, asked[name], answer["text"], answer["complete"], self.window
            )
            if row is None:
                return None
            rows.append(row)
        policy = self.log_probs(self.sides["policy"], rows)
        reference = self.log_probs(self.sides["reference"], rows)
        averaged = bool(self.policy.settings.get("length_normalized"))
        found = dpo_losses.rewards(self.kind, policy, reference, self.beta, averaged)
        return {name: reward.item() for name, reward in zip(answers, found, strict=True)}

    def log_probs(self, side: Side, rows: list[tuple]) -> dpo_losses.Answers:
        """Two rows as a pair of the loss: the first as the chosen answer, the second as the
        rejected."""
        logps = [torch.tensor([side.log_prob(ids, labels)]) for ids, labels in rows]
        tokens = [torch.tensor([len(labels) - labels.count(IGNORE)]) for _, labels in rows]
        return dpo_losses.Answers(*logps, *tokens)

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
        if self.drop(request):
            return self.view([])
        return self.view([]) | self.busy(False)


# ---- the page ----------------------------------------------------------------------------------


def about(comparison: Comparison, reason: str) -> str:
    """The lines under the title."""
    reference = comparison.sides.get("reference")
    if reference is None:
        line = f"没有参考，只有一列：{reason}。用 --reference 给出训练前的模型，就有两列。"
    else:
        name = reference.chat_model.name if reference.use_adapter else "关掉适配器的同一个模型"
        line = f"参考：{name} · 同样的设置、同样的种子"
        line += f" · 隐式奖励 = β (log p 策略 − log p 参考)，β = {comparison.beta:g}"
    return f"{page.about(comparison.policy, HERE.name)}\n\n{escape_markdown(line)}"


def build_demo(
    model: str | Path | ScoringChatModel = DEFAULT, reference: str | Path | None = None
) -> gr.Blocks:
    """The page for a run, model or adapter folder; SystemExit with one line when there is no model.

    reference: folder or hub id, "none", or None for what find_reference knows.
    """
    policy = model if isinstance(model, ScoringChatModel) else ScoringChatModel(model)
    if not policy.chats:
        told = "no chat template, so it cannot be asked; save one with its tokenizer"
        raise SystemExit(f"{policy.name}: {told}")
    side, reason = find_reference(policy, reference)
    comparison = Comparison(policy, side)
    with gr.Blocks(title=f"{HERE.name} · 对比", analytics_enabled=False, fill_height=True) as demo:
        gr.Markdown(about(comparison, reason), elem_id="about")
        comparison.ui = layout(comparison)
        connect(comparison, demo)
    return demo.queue(max_size=MAX_WAITING)


def layout(comparison: Comparison) -> SimpleNamespace:
    ui = SimpleNamespace(history=gr.State([]))
    with gr.Row():
        ui.chats = {name: column(name) for name in comparison.sides}
    ui.verdict = gr.Markdown(elem_id="verdict")
    ui.box = page.question_box("问点什么")
    share = gr.Checkbox(
        False,
        label="以后两边都接着策略的回答说（前文相同，奖励才能相比）；不勾：各接各的",
        container=False,
        visible="reference" in comparison.sides,
        elem_id="shared",
    )
    with gr.Row():
        ui.again = gr.Button("再来一次", size="sm", min_width=80)
        ui.undo = gr.Button("撤销", size="sm", min_width=80)
        ui.clear = gr.Button("清空", size="sm", min_width=80)
    ui.controls = [share, *settings(comparison)]
    return ui


def column(name: str) -> gr.Chatbot:
    hint = "同一个问题，训练前的回答"
    examples = None
    if name == "policy":
        hint = "问点什么，或选一个例子"
        examples = [{"text": text} for text in EXAMPLES]
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


def settings(comparison: Comparison) -> list[gr.components.Component]:
    """System prompt and sampling, in the order of Comparison.ask; their defaults are those of the
    run and of the model."""
    policy = comparison.policy
    with gr.Accordion("设置", open=False):
        system = page.system_box(policy, policy.settings.get("system_prompt") or "")
        with gr.Row():
            seed = gr.Number(
                -1,
                precision=0,
                minimum=-1,
                maximum=MAX_SEED,
                min_width=300,
                label="种子",
                info="两边相同；-1：每次另抽",
            )
            most = page.length(comparison.window, width=300)
            numbers = page.sampling(policy.sampling_defaults(), width=300)
    return [system, seed, most, *numbers]


def connect(comparison: Comparison, demo: gr.Blocks) -> None:
    ui = comparison.ui
    shown = [*ui.chats.values(), ui.history, ui.verdict, ui.box, ui.again, ui.undo]
    asked = [ui.history, *ui.controls]
    generating = MODEL | {"show_progress": "hidden"}
    runs = [
        ui.box.submit(comparison.ask, [ui.box, *asked], shown, **generating),
        ui.chats["policy"].example_select(comparison.pick, asked, shown, **generating),
        ui.again.click(comparison.retry, asked, shown, **generating),
    ]
    for run in runs:
        run.then(lambda: comparison.busy(False), None, [ui.box, ui.again, ui.undo], **AT_ONCE)
    ui.box.stop(comparison.halt, **AT_ONCE)
    ui.undo.click(comparison.back, ui.history, shown, **AT_ONCE)
    clears = [ui.clear.click, *(chat.clear for chat in ui.chats.values())]
    gr.on(clears, comparison.clear, None, shown, **AT_ONCE)
    demo.unload(comparison.halt)


def launch(demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Start the page in the background and return its address; `demo.close()` ends it."""
    return page.launch(demo, host, port, CSS)


def main() -> None:
    parser = page.arguments(__doc__, DEFAULT)
    parser.add_argument(
        "--reference", help="what to compare with; default: the base; none: nothing"
    )
    args = parser.parse_args()
    page.stay(build_demo(args.model, args.reference), args, launch)


if __name__ == "__main__":
    main()
