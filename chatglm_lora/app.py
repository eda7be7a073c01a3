"""Gradio page for a trained model: talk to it, and judge two answers side by side, which writes
rows to train on.

    python chatglm_lora/app.py                              # what `bash chatglm_lora/train_zero2.sh` left in output/
    python chatglm_lora/app.py --model THUDM/chatglm-6b --port 7860 --host 127.0.0.1
    python chatglm_lora/app.py --model output/chatglm_lora/final --feedback_dir feedback --questions asked.txt
    MODEL=models/chatglm3-native python chatglm_lora/app.py

--model: a run's output folder, a model folder, a LoRA adapter or a hub id. --questions: a .txt with
a question a line, or chat rows of any shape that train.py reads, without their last answers. What
is written: see feedback.py. The prompt is built by the code that built the training rows
(common/data/labels.py), so training and talking cannot differ.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the files beside this one
from common import device  # noqa: I001  (device before torch and transformers)
from common.data import files
from common.demo import page
from common.data.load import load_rows, summary
from common.demo.page import AT_ONCE, IDLE, MAX_CHARS, MODEL, SAMPLING, literal, size
from common.demo.chat_model import ChatModel

import json
import random
import threading
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import gradio as gr

import modeling_chatglm  # noqa: F401  (tells the Auto classes about ChatGLM)
from feedback import CHOICES, FILES, WHOLE, Store

DEFAULT = HERE.parent / "output" / HERE.name
MAX_COMMENT, MAX_WAITING, MAX_VISITORS = 1000, 32, 1000
EXAMPLES = ["你是谁？", "来两杯大杯红茶。", "类型#裙*颜色#红色", "换成二十四小时制。\n下午三点"]
CSS = page.CSS + "#counts p { color: var(--body-text-color-subdued); font-size: var(--text-sm) }\n"
FREE, TAKEN = (
    {"submit_btn": "出两个回答", "stop_btn": False},
    {"submit_btn": False, "stop_btn": "停下这个"},
)
SIDES = {"left": "左边的回答", "right": "右边的回答"}
WHO = {"base": "微调前", "tuned": "微调后", "A": "采样一", "B": "采样二"}
VERDICTS = dict(zip(CHOICES, ("左好", "右好", "一样好", "都不好"), strict=True))
UNFINISHED = {"stopped": " · 已停下", "length": " · 没说完", WHOLE: ""}


# ---- talking --------------------------------------------------------------------------------------------------


def chat_tab(chat_model: ChatModel) -> page.Chat:
    chat = page.Chat(chat_model, ("use_adapter", "max_new_tokens", *SAMPLING))
    chatbot = gr.Chatbot(
        show_label=False,
        min_height=320,
        height="calc(100dvh - 22rem)",
        buttons=["copy"],
        allow_tags=False,
        placeholder="问点什么，或选一个例子",
        examples=[{"text": text} for text in EXAMPLES],
    )
    box = gr.Textbox(
        "",
        label="问题",
        show_label=False,
        placeholder="问点什么，回车发送",
        max_lines=8,
        max_length=MAX_CHARS,
        **IDLE,
    )
    switch = gr.Checkbox(True, label="用微调后的权重", visible=chat_model.adapter)
    with gr.Accordion("设置", open=False):
        knows = "system" in str(chat_model.tokenizer.chat_template)
        system = gr.Textbox("", label="系统提示词", lines=2, max_length=MAX_CHARS, visible=knows)
        with gr.Row():
            numbers = [
                page.length(chat_model.window),
                *page.sampling(page.own_sampling(chat_model)),
            ]
    chat.connect(chatbot, box, [system, switch, *numbers])
    return chat


# ---- judging --------------------------------------------------------------------------------------------------


@dataclass
class Sitting:
    """One visitor of the second tab; kept here, so that the page itself does not hold which answer
    is which."""

    taken: list | None = None  # the prompt from the file that is shown
    pair: dict | None = None  # two answers that wait for a rating
    fixed: str | None = None  # the side that is being corrected
    stop: threading.Event = field(default_factory=threading.Event)
    turn: int = 0  # counts up when what is being generated is no longer wanted
    written: int = 0


class Judge:
    """What the events of the second tab do; `ui`: its components, set by judge_tab."""

    ui: SimpleNamespace

    def __init__(self, chat_model: ChatModel, store: Store, prompts: list[list[dict]]):
        self.chat_model, self.store, self.sittings, self.lock = (
            chat_model,
            store,
            {},
            threading.Lock(),
        )
        rated = {json.dumps(r["prompt"], ensure_ascii=False) for r in store.ratings() if r}
        self.open = deque(p for p in prompts if json.dumps(p, ensure_ascii=False) not in rated)
        self.asks = bool(prompts)  # questions come from a file
        model = chat_model.model
        base = (
            model.peft_config["default"].base_model_name_or_path
            if chat_model.adapter
            else model.config._name_or_path
        )
        self.model = {"model": chat_model.name, "base": base}

    def sitting(self, request: gr.Request) -> Sitting:
        with self.lock:
            while len(self.sittings) >= MAX_VISITORS and request.session_hash not in self.sittings:
                self.sittings.pop(next(iter(self.sittings)))
            return self.sittings.setdefault(request.session_hash, Sitting())

    def sides(self, mode: str, most: int, numbers: tuple) -> list[tuple[str, bool, dict]]:
        """(who, with the adapter, sampling) of the two answers, in random order."""
        first, second = (
            dict(zip(SAMPLING, some, strict=True)) for some in (numbers[:4], numbers[4:])
        )
        two = [("A", True, first), ("B", True, second)]
        if mode == "adapter":
            two = [("base", False, first), ("tuned", True, first)]
        return [
            (who, on, {"max_new_tokens": most} | how)
            for who, on, how in random.SystemRandom().sample(two, 2)
        ]

    def compare(self, text, request: gr.Request, mode, most, *numbers):
        """Two answers, one after the other; then they can be rated."""
        ui, sitting = self.ui, self.sitting(request)
        if not text.strip():
            return
        page.refuse_long(text)
        sitting.turn, sitting.pair, sitting.fixed = sitting.turn + 1, None, None
        mode = mode if self.chat_model.adapter else "sampling"
        turn, prompt = (
            sitting.turn,
            [*(sitting.taken or [])[:-1], {"role": "user", "content": text.strip()}],
        )
        pair = {"prompt": prompt, "mode": mode} | self.model
        yield {ui.question: gr.update(**TAKEN), ui.news: "", **self.cleared()}
        for side, (who, use_adapter, how) in zip(
            SIDES, self.sides(mode, most, numbers), strict=True
        ):
            stop, said, count = threading.Event(), "", 0
            sitting.stop = stop
            try:
                for said, count in self.chat_model.stream(prompt, stop, use_adapter, **how):  # noqa: B007
                    yield {ui.answers[side]: said.strip()}
            except Exception as error:
                raise page.failed(error) from error
            if sitting.turn != turn:
                return
            ended = "stopped" if stop.is_set() else "length" if count >= most else WHOLE
            pair[side] = {
                "who": who,
                "answer": said.strip(),
                "ended": ended,
                "tokens": count,
                "sampling": how,
            }
            yield {
                ui.answers[side]: gr.update(
                    value=said.strip(), label=SIDES[side] + UNFINISHED[ended]
                )
            }
        sitting.pair = pair
        same = "两个回答一字不差。" if pair["left"]["answer"] == pair["right"]["answer"] else ""
        yield {
            ui.rate: gr.update(visible=True),
            ui.send: gr.update(interactive=True),
            ui.news: same,
        }

    def cleared(self) -> dict:
        """No answers, nothing to rate."""
        ui = self.ui
        empty = {
            ui.answers[side]: gr.update(value="", label=label) for side, label in SIDES.items()
        }
        return empty | self.unrated()

    def unrated(self) -> dict:
        """The controls of a rating, as they are before one."""
        ui = self.ui
        return {
            ui.rate: gr.update(visible=False),
            ui.send: gr.update(interactive=False),
            ui.verdict: None,
            ui.comment: "",
            ui.correction: gr.update(value="", visible=False),
        }

    def halt(self, request: gr.Request):
        self.sitting(request).stop.set()

    def fix(self, side: str, choice, request: gr.Request):
        """Open an answer for editing; unless something is chosen, it is the better one."""
        ui, sitting = self.ui, self.sitting(request)
        pair, sitting.fixed = sitting.pair, side
        if pair is None:
            return {ui.news: "没有等着评的回答；请再出两个。"}
        box = gr.update(value=pair[side]["answer"], label=f"改{SIDES[side]}", visible=True)
        return {ui.correction: box, ui.verdict: choice or side}

    def submit(self, choice, correction, comment, request: gr.Request):
        ui, sitting, correction, comment = (
            self.ui,
            self.sitting(request),
            correction or "",
            comment or "",
        )
        if len(correction) > MAX_CHARS or len(comment) > MAX_COMMENT:
            return {ui.news: f"没有写入：修改最多 {MAX_CHARS} 字，备注最多 {MAX_COMMENT} 字。"}
        if choice not in CHOICES:
            return {ui.news: "先选一项：左好、右好、一样好，还是都不好。"}
        with self.lock:  # of two clicks one finds the pair
            pair, sitting.pair = sitting.pair, None
        if pair is None:
            return {ui.news: "没有等着评的回答；请再出两个。"}
        fixed, text = sitting.fixed, correction.strip()
        changed = fixed and text and text != pair[fixed]["answer"]
        correction = {"of": fixed, "text": text} if changed else None
        said = {"choice": choice, "correction": correction, "comment": comment.strip()}
        try:
            written = self.store.add(pair | said)
        except (ValueError, OSError) as error:
            sitting.pair = pair
            return {ui.news: f"没有写入：{literal(str(error))}。"}
        sitting.written += 1
        return self.revealed(pair, said, written) | self.unrated() | self.following(sitting)

    def revealed(self, pair: dict, said: dict, written: list[str]) -> dict:
        """Which answer was whose, and what became of the rating."""
        ui = self.ui
        news = (
            f"揭晓：左边是**{WHO[pair['left']['who']]}**，右边是**{WHO[pair['right']['who']]}**。"
        )
        news += (
            f"你选了{VERDICTS[said['choice']]}"
            + "，并改了一个回答" * bool(said["correction"])
            + "。"
        )
        news += f"已写入 {'、'.join(written)}。"
        liked = {"left": ["left"], "right": ["right"], "tie": list(SIDES)}.get(said["choice"], [])
        if not said["correction"] and any(pair[side]["ended"] != WHOLE for side in liked):
            news += "没说完的回答不当作榜样。"
        labels = {
            ui.answers[side]: gr.update(label=f"{label}：{WHO[pair[side]['who']]}")
            for side, label in SIDES.items()
        }
        return labels | {ui.news: news}

    def skip(self, request: gr.Request):
        """The next question; nothing is written."""
        sitting = self.sitting(request)
        sitting.turn, sitting.pair, sitting.fixed = sitting.turn + 1, None, None
        sitting.stop.set()
        return self.cleared() | {self.ui.news: ""} | self.following(sitting)

    def following(self, sitting: Sitting) -> dict:
        """The next question of the file, or an empty box."""
        ui = self.ui
        with self.lock:
            sitting.taken = self.open.popleft() if self.open else None
        said = {"user": "问", "assistant": "答", "system": "系统"}
        earlier = "\n".join(
            f"{said.get(m['role'], m['role'])}：{m['content']}" for m in (sitting.taken or [])[:-1]
        )
        text = sitting.taken[-1]["content"] if sitting.taken else ""
        return {
            ui.question: gr.update(value=text, **FREE),
            ui.earlier: gr.update(value=earlier, visible=bool(earlier)),
            ui.counts: self.told(sitting),
        }

    def told(self, sitting: Sitting) -> str:
        """How much was written, and where."""
        counts, files_of = self.store.counts(), literal(str(self.store.folder))
        here = "，".join(f"{name} {counts[name]} 行" for name in FILES)
        left = (
            f" · 文件里还有 {len(self.open)} 题"
            if self.open
            else " · 文件里的题都出过了"
            if self.asks
            else ""
        )
        return f"这一次写了 {sitting.written} 条，一共 {counts[FILES[0]]} 条 · {files_of}：{literal(here)}{left}"

    def arrive(self, request: gr.Request):
        return self.following(self.sitting(request))

    def leave(self, request: gr.Request):
        with self.lock:
            sitting = self.sittings.pop(request.session_hash, Sitting())
            if sitting.taken:
                self.open.appendleft(sitting.taken)
        sitting.turn += 1
        sitting.stop.set()


def judge_tab(judge: Judge) -> None:
    chat_model, ui = judge.chat_model, SimpleNamespace()
    judge.ui = ui
    modes = [("微调前和微调后", "adapter")] * chat_model.adapter + [("两种采样", "sampling")]
    mode = gr.Radio(modes, value=modes[0][1], label="比较什么", visible=chat_model.adapter)
    ui.earlier = gr.Textbox(label="前文", interactive=False, visible=False, max_lines=12)
    ui.question = gr.Textbox(
        "",
        label="题目",
        placeholder="写一个问题，回车出两个回答",
        max_lines=8,
        max_length=MAX_CHARS,
        **FREE,
    )
    with gr.Row():
        ui.answers = {
            side: gr.Textbox(
                label=label,
                interactive=False,
                lines=5,
                max_lines=24,
                min_width=300,
                buttons=["copy"],
                elem_id=side,
            )
            for side, label in SIDES.items()
        }
    with gr.Column(visible=False) as ui.rate:
        ui.verdict = gr.Radio(
            [(text, choice) for choice, text in VERDICTS.items()], label="哪个好？左右是随机排的"
        )
        with gr.Row():
            fixes = {
                side: gr.Button(f"修改{label}", size="sm", min_width=120)
                for side, label in SIDES.items()
            }
        ui.correction = gr.Textbox("", visible=False, lines=4, max_lines=24, max_length=MAX_CHARS)
        ui.comment = gr.Textbox("", label="备注（可以不写）", max_length=MAX_COMMENT)
    with gr.Row():
        skip = gr.Button("跳过", min_width=120)
        ui.send = gr.Button("提交", variant="primary", interactive=False, min_width=120)
    ui.news = gr.Markdown(elem_id="news")
    ui.counts = gr.Markdown(elem_id="counts")
    numbers = judge_settings(chat_model, mode)
    view = [
        ui.question,
        ui.earlier,
        *ui.answers.values(),
        ui.rate,
        ui.verdict,
        ui.correction,
        ui.comment,
        ui.send,
        ui.news,
        ui.counts,
    ]
    run = ui.question.submit(
        judge.compare, [ui.question, mode, *numbers], view, **MODEL, show_progress="hidden"
    )
    run.then(lambda: gr.update(**FREE), None, ui.question, **AT_ONCE)
    ui.question.stop(judge.halt, **AT_ONCE)
    for side, button in fixes.items():
        start = judge_fix(judge, side)
        button.click(start, ui.verdict, [ui.correction, ui.verdict, ui.news], **AT_ONCE)
    ui.send.click(judge.submit, [ui.verdict, ui.correction, ui.comment], view, **AT_ONCE)
    skip.click(judge.skip, None, view, cancels=[run], **AT_ONCE)


def judge_fix(judge: Judge, side: str):
    def start(choice, request: gr.Request):  # Gradio looks for the request in the signature
        return judge.fix(side, choice, request)

    return start


def judge_settings(chat_model: ChatModel, mode: gr.Radio) -> list[gr.Slider]:
    """Length, the first sampling, and the second one, which is shown when two samplings are
    compared."""
    with gr.Accordion("设置", open=False):
        most, apart = page.length(chat_model.window), not chat_model.adapter
        name = gr.Markdown(WHO["A"], visible=apart)
        with gr.Row():
            one = page.sampling(page.own_sampling(chat_model), 300)
        with gr.Column(visible=apart) as more:
            gr.Markdown(WHO["B"])
            with gr.Row():
                two = page.sampling((0.95, 0.7, 0, 1), 300)
    mode.change(
        lambda chosen: [gr.update(visible=chosen == "sampling")] * 2, mode, [name, more], **AT_ONCE
    )
    return [most, *one, *two]


# ---- the page -------------------------------------------------------------------------------------------------


def read_questions(path: str | Path) -> list[list[dict]]:
    """A .txt with a question a line, or chat rows -> prompts (messages that end with the user's),
    each once."""
    path = Path(path)
    if files.suffix_of(path) == ".txt" and path.is_file():
        found = [
            [{"role": "user", "content": row["text"]}]
            for _, row in files.records(path, files.encoding_of(path))
        ]
    else:
        loaded, stats = load_rows(path, kind="chat")
        print(summary(stats), flush=True)
        found = [json.loads(row)["messages"][:-1] for row in loaded["row"]]
    fit = [
        p
        for p in found
        if p[-1]["role"] == "user" and sum(len(m["content"]) for m in p) <= MAX_CHARS
    ]
    prompts = list({json.dumps(p): p for p in fit}.values())
    if not prompts:
        raise SystemExit(f"{path}: no question of at most {MAX_CHARS} characters")
    print(
        f"{len(prompts)} questions of {len(found)}: the others are too long, or there already",
        flush=True,
    )
    return prompts


def build_demo(
    model: str | Path | ChatModel = DEFAULT, feedback_dir: str | Path = "feedback", questions=()
) -> gr.Blocks:
    """The page for a run, model or adapter folder; SystemExit with one line when there is no model.

    feedback_dir: where ratings go, made by the first one. questions: prompts as read_questions
        gives them.
    """
    store = Store(feedback_dir)
    chat_model = model if isinstance(model, ChatModel) else ChatModel(model)
    judge = Judge(chat_model, store, list(questions))
    about = f"{chat_model.name}{' · LoRA' * chat_model.adapter} · {size(chat_model.model)} 参数 · {device.name()}"
    with gr.Blocks(
        title=f"{HERE.name} · 对话与标注", analytics_enabled=False, fill_height=True
    ) as demo:
        gr.Markdown(
            f"### {HERE.name}\n{about} · {chat_model.model.dtype}".replace("torch.", ""),
            elem_id="about",
        )
        with gr.Tabs():
            with gr.Tab("对话"):
                chat = chat_tab(chat_model)
            with gr.Tab("标注"):
                judge_tab(judge)
        demo.load(
            judge.arrive, None, [judge.ui.question, judge.ui.earlier, judge.ui.counts], **AT_ONCE
        )
        demo.unload(chat.halt)
        demo.unload(judge.leave)
    return demo.queue(max_size=MAX_WAITING)


def launch(demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Start the page in the background and return its address; `demo.close()` ends it."""
    return page.launch(demo, host, port, CSS)


def main() -> None:
    parser = page.arguments(__doc__, DEFAULT)
    parser.add_argument(
        "--feedback_dir", default="feedback", help="folder for the rows that ratings give"
    )
    parser.add_argument(
        "--questions",
        default=None,
        help="file of questions to judge answers to: .txt, or chat rows",
    )
    args = parser.parse_args()
    questions = read_questions(args.questions) if args.questions else ()
    page.stay(build_demo(args.model, args.feedback_dir, questions), args, launch)


if __name__ == "__main__":
    main()
