"""Gradio page for a trained model: talk to it, and judge two answers side by side, which writes
rows to train on.

    python chatglm_lora/app.py         # what `bash chatglm_lora/train_zero2.sh` left in output/
    python chatglm_lora/app.py --model THUDM/chatglm-6b --port 7860 --host 127.0.0.1
    python chatglm_lora/app.py --model output/chatglm_lora/final --questions asked.txt
    MODEL=models/chatglm3-native python chatglm_lora/app.py --feedback_dir feedback

--model: a run's output folder, a model folder, a LoRA adapter or a hub id. --questions: a .txt with
a question a line, or chat rows of any shape that train.py reads, without their last answers. What
is written: see feedback.py. The prompt is built by the code that built the training rows
(common/data/labels.py), so training and talking cannot differ.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the files beside this one
from common import device  # noqa: F401, I001  (before torch and transformers)

import json
import random
import threading
from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace

import gradio as gr

import modeling_chatglm  # noqa: F401  (tells the Auto classes about ChatGLM)
from common.data import files
from common.data.load import load_rows, summary
from common.demo import page
from common.demo.chat_model import SAMPLING, ChatModel
from common.demo.page import AT_ONCE, MAX_CHARS, MODEL, escape_markdown
from feedback import CHOICES, FILES, RATINGS, WHOLE, Store

DEFAULT = HERE.parent / "output" / HERE.name
MAX_COMMENT = 1000
MAX_WAITING = 32
MAX_VISITORS = 1000
EXAMPLES = ["你是谁？", "来两杯大杯红茶。", "类型#裙*颜色#红色", "换成二十四小时制。\n下午三点"]
CSS = page.CSS + "#counts p { color: var(--body-text-color-subdued); font-size: var(--text-sm) }\n"
FREE = {"submit_btn": "出两个回答", "stop_btn": False}
TAKEN = {"submit_btn": False, "stop_btn": "停下这个"}
SIDES = {"left": "左边的回答", "right": "右边的回答"}
WHO = {"base": "微调前", "tuned": "微调后", "A": "采样一", "B": "采样二"}
VERDICTS = dict(zip(CHOICES, ("左好", "右好", "一样好", "都不好"), strict=True))
ENDED = {"stopped": " · 已停下", "length": " · 没说完", WHOLE: ""}
ROLES = {"user": "问", "assistant": "答", "system": "系统"}
SECOND_SAMPLING = {"temperature": 0.95, "top_p": 0.7, "top_k": 0, "repetition_penalty": 1}
NOTHING_TO_RATE = "没有等着评的回答；请再出两个。"


# ---- judging -----------------------------------------------------------------------------------


@dataclass
class Sitting:
    """One visitor of the second tab.

    Kept here, so that the page itself does not hold which answer is which.
    """

    taken: list | None = None  # the prompt from the file that is shown
    pair: dict | None = None  # two answers that wait for a rating
    fixed: str | None = None  # the side that is being corrected
    stop: threading.Event = field(default_factory=threading.Event)
    turn: int = 0  # counts up when what is being generated is no longer wanted
    written: int = 0

    def forget(self) -> None:
        """Nothing is generated, rated or corrected any more."""
        self.turn += 1
        self.pair = None
        self.fixed = None


class Judge:
    """What the events of the second tab do; `ui`: its components, set by judge_tab."""

    ui: SimpleNamespace

    def __init__(self, chat_model: ChatModel, store: Store, prompts: list[list[dict]]):
        self.chat_model = chat_model
        self.store = store
        self.sittings: dict[str, Sitting] = {}
        self.lock = threading.Lock()
        rated = {key_of(rating["prompt"]) for rating in store.ratings() if rating}
        self.open = deque(prompt for prompt in prompts if key_of(prompt) not in rated)
        self.has_questions = bool(prompts)
        model = chat_model.model
        base = model.config._name_or_path
        if chat_model.adapter:
            base = model.peft_config["default"].base_model_name_or_path
        self.model = {"model": chat_model.name, "base": base}

    def sitting(self, request: gr.Request) -> Sitting:
        with self.lock:
            while len(self.sittings) >= MAX_VISITORS and request.session_hash not in self.sittings:
                oldest = next(iter(self.sittings))
                del self.sittings[oldest]
            return self.sittings.setdefault(request.session_hash, Sitting())

    def sides(self, mode: str, most: int, numbers: tuple) -> list[tuple[str, bool, dict]]:
        """(who, with the adapter, options of ChatModel.stream) of both answers, in random order."""
        length = {"max_new_tokens": most}
        first = length | dict(zip(SAMPLING, numbers[: len(SAMPLING)], strict=True))
        second = length | dict(zip(SAMPLING, numbers[len(SAMPLING) :], strict=True))
        if mode == "adapter":
            both = [("base", False, first), ("tuned", True, first)]
        else:
            both = [("A", True, first), ("B", True, second)]
        random.SystemRandom().shuffle(both)
        return both

    def compare(self, text, request: gr.Request, mode, most, *numbers):
        """Two answers, one after the other; then they can be rated."""
        ui = self.ui
        sitting = self.sitting(request)
        if not text.strip():
            return
        page.refuse_long(text)
        sitting.forget()
        turn = sitting.turn
        mode = mode if self.chat_model.adapter else "sampling"
        earlier = (sitting.taken or [])[:-1]
        prompt = [*earlier, {"role": "user", "content": text.strip()}]
        pair = {"prompt": prompt, "mode": mode} | self.model
        yield {ui.question: gr.update(**TAKEN), ui.news: "", **self.cleared()}
        for side, how in zip(SIDES, self.sides(mode, most, numbers), strict=True):
            answer: dict = {}
            for answer in self.answer(sitting, prompt, *how):
                yield {ui.answers[side]: answer["answer"]}
            if sitting.turn != turn:
                return
            pair[side] = answer
            label = SIDES[side] + ENDED[answer["ended"]]
            yield {ui.answers[side]: gr.update(value=answer["answer"], label=label)}
        sitting.pair = pair
        same = pair["left"]["answer"] == pair["right"]["answer"]
        yield {
            ui.rate: gr.update(visible=True),
            ui.send: gr.update(interactive=True),
            ui.news: "两个回答一字不差。" if same else "",
        }

    def answer(self, sitting: Sitting, prompt: list[dict], who: str, use_adapter: bool, how: dict):
        """Yield an answer as ratings keep it, while it grows; the last one is complete."""
        sitting.stop = stop = threading.Event()
        answer = {"who": who, "answer": "", "ended": WHOLE, "tokens": 0, "sampling": how}
        try:
            for text, count in self.chat_model.stream(prompt, stop, use_adapter, **how):
                answer |= {"answer": text.strip(), "tokens": count}
                yield answer
        except Exception as error:
            raise page.failed(error) from error
        if stop.is_set():
            answer["ended"] = "stopped"
        elif answer["tokens"] >= how["max_new_tokens"]:
            answer["ended"] = "length"

    def cleared(self) -> dict:
        """No answers, nothing to rate."""
        answers = self.ui.answers
        empty = {answers[side]: gr.update(value="", label=label) for side, label in SIDES.items()}
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
        ui = self.ui
        sitting = self.sitting(request)
        pair = sitting.pair
        sitting.fixed = side
        if pair is None:
            return {ui.news: NOTHING_TO_RATE}
        box = gr.update(value=pair[side]["answer"], label=f"改{SIDES[side]}", visible=True)
        return {ui.correction: box, ui.verdict: choice or side}

    def submit(self, choice, correction, comment, request: gr.Request):
        """Write the rating down, tell which answer was whose, and show the next question."""
        ui = self.ui
        sitting = self.sitting(request)
        correction = (correction or "").strip()
        comment = (comment or "").strip()
        if len(correction) > MAX_CHARS or len(comment) > MAX_COMMENT:
            return {ui.news: f"没有写入：修改最多 {MAX_CHARS} 字，备注最多 {MAX_COMMENT} 字。"}
        if choice not in CHOICES:
            return {ui.news: "先选一项：左好、右好、一样好，还是都不好。"}
        with self.lock:  # of two clicks one finds the pair
            pair = sitting.pair
            sitting.pair = None
        if pair is None:
            return {ui.news: NOTHING_TO_RATE}
        rating = {"choice": choice, "correction": None, "comment": comment}
        fixed = sitting.fixed
        if fixed and correction and correction != pair[fixed]["answer"]:
            rating["correction"] = {"of": fixed, "text": correction}
        try:
            written = self.store.add(pair | rating)
        except (ValueError, OSError) as error:
            sitting.pair = pair
            return {ui.news: f"没有写入：{escape_markdown(str(error))}。"}
        sitting.written += 1
        return self.revealed(pair, rating, written) | self.unrated() | self.following(sitting)

    def revealed(self, pair: dict, rating: dict, written: list[str]) -> dict:
        """Which answer was whose, and what became of the rating."""
        ui = self.ui
        who = {side: WHO[pair[side]["who"]] for side in SIDES}
        news = f"揭晓：左边是**{who['left']}**，右边是**{who['right']}**。"
        news += f"你选了{VERDICTS[rating['choice']]}"
        if rating["correction"]:
            news += "，并改了一个回答"
        news += f"。已写入 {'、'.join(written)}。"
        liked = {"left": ["left"], "right": ["right"], "tie": list(SIDES)}
        chosen = liked.get(rating["choice"], [])
        if not rating["correction"] and any(pair[side]["ended"] != WHOLE for side in chosen):
            news += "没说完的回答不当作榜样。"
        labels = {
            ui.answers[side]: gr.update(label=f"{SIDES[side]}：{who[side]}") for side in SIDES
        }
        return labels | {ui.news: news}

    def skip(self, request: gr.Request):
        """The next question; nothing is written."""
        sitting = self.sitting(request)
        sitting.forget()
        sitting.stop.set()
        return self.cleared() | {self.ui.news: ""} | self.following(sitting)

    def following(self, sitting: Sitting) -> dict:
        """The next question of the file, or an empty box."""
        ui = self.ui
        with self.lock:
            sitting.taken = self.open.popleft() if self.open else None
        *before, question = sitting.taken or [{"content": ""}]
        earlier = "\n".join(f"{ROLES.get(m['role'], m['role'])}：{m['content']}" for m in before)
        return {
            ui.question: gr.update(value=question["content"], **FREE),
            ui.earlier: gr.update(value=earlier, visible=bool(earlier)),
            ui.counts: self.progress(sitting),
        }

    def progress(self, sitting: Sitting) -> str:
        """How much was written, and where."""
        counts = self.store.counts()
        folder = escape_markdown(str(self.store.folder))
        rows = escape_markdown("，".join(f"{name} {counts[name]} 行" for name in FILES))
        written = f"这一次写了 {sitting.written} 条，一共 {counts[RATINGS]} 条 · {folder}：{rows}"
        if self.open:
            return f"{written} · 文件里还有 {len(self.open)} 题"
        if self.has_questions:
            return f"{written} · 文件里的题都出过了"
        return written

    def arrive(self, request: gr.Request):
        return self.following(self.sitting(request))

    def leave(self, request: gr.Request):
        with self.lock:
            sitting = self.sittings.pop(request.session_hash, Sitting())
            if sitting.taken:
                self.open.appendleft(sitting.taken)
        sitting.turn += 1
        sitting.stop.set()


def key_of(prompt: list[dict]) -> str:
    """Equal for equal prompts."""
    return json.dumps(prompt, ensure_ascii=False)


# ---- the second tab ----------------------------------------------------------------------------


def judge_tab(judge: Judge) -> None:
    ui = judge.ui = SimpleNamespace()
    adapter = judge.chat_model.adapter
    modes = [("两种采样", "sampling")]
    if adapter:
        modes.insert(0, ("微调前和微调后", "adapter"))
    mode = gr.Radio(modes, value=modes[0][1], label="比较什么", visible=adapter)
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
        ui.answers = {side: answer_box(side) for side in SIDES}
    fixes = rating_controls(ui)
    with gr.Row():
        skip = gr.Button("跳过", min_width=120)
        ui.send = gr.Button("提交", variant="primary", interactive=False, min_width=120)
    ui.news = gr.Markdown(elem_id="news")
    ui.counts = gr.Markdown(elem_id="counts")
    numbers = judge_settings(judge.chat_model, mode)
    connect(judge, [mode, *numbers], fixes, skip)


def answer_box(side: str) -> gr.Textbox:
    return gr.Textbox(
        label=SIDES[side],
        interactive=False,
        lines=5,
        max_lines=24,
        min_width=300,
        buttons=["copy"],
        elem_id=side,
    )


def rating_controls(ui: SimpleNamespace) -> dict[str, gr.Button]:
    """Choice, correction and comment, hidden until there are two answers; -> the buttons that open
    an answer for editing."""
    choices = [(text, choice) for choice, text in VERDICTS.items()]
    with gr.Column(visible=False) as ui.rate:
        ui.verdict = gr.Radio(choices, label="哪个好？左右是随机排的")
        with gr.Row():
            fixes = {
                side: gr.Button(f"修改{label}", size="sm", min_width=120)
                for side, label in SIDES.items()
            }
        ui.correction = gr.Textbox("", visible=False, lines=4, max_lines=24, max_length=MAX_CHARS)
        ui.comment = gr.Textbox("", label="备注（可以不写）", max_length=MAX_COMMENT)
    return fixes


def judge_settings(chat_model: ChatModel, mode: gr.Radio) -> list[gr.Slider]:
    """Length, the first sampling, and the second one, which is shown when two samplings are
    compared."""
    two = not chat_model.adapter  # at first
    with gr.Accordion("设置", open=False):
        most = page.length(chat_model.window)
        name = gr.Markdown(WHO["A"], visible=two)
        with gr.Row():
            first = page.sampling(chat_model.sampling_defaults(), width=300)
        with gr.Column(visible=two) as more:
            gr.Markdown(WHO["B"])
            with gr.Row():
                second = page.sampling(SECOND_SAMPLING, width=300)

    def changed(chosen: str):
        return [gr.update(visible=chosen == "sampling")] * 2

    mode.change(changed, mode, [name, more], **AT_ONCE)
    return [most, *first, *second]


def connect(judge: Judge, settings: list, fixes: dict[str, gr.Button], skip: gr.Button) -> None:
    """The events of the second tab; settings: what Judge.compare takes."""
    ui = judge.ui
    rating = [ui.verdict, ui.correction, ui.comment]
    answers = list(ui.answers.values())
    view = [ui.question, ui.earlier, *answers, ui.rate, *rating, ui.send, ui.news, ui.counts]
    run = ui.question.submit(
        judge.compare, [ui.question, *settings], view, **MODEL, show_progress="hidden"
    )
    run.then(lambda: gr.update(**FREE), None, ui.question, **AT_ONCE)
    ui.question.stop(judge.halt, **AT_ONCE)
    for side, button in fixes.items():
        fixed = [ui.correction, ui.verdict, ui.news]
        button.click(fix_of(judge, side), ui.verdict, fixed, **AT_ONCE)
    ui.send.click(judge.submit, rating, view, **AT_ONCE)
    skip.click(judge.skip, None, view, cancels=[run], **AT_ONCE)


def fix_of(judge: Judge, side: str):
    def fix(choice, request: gr.Request):  # Gradio looks for the request in the signature
        return judge.fix(side, choice, request)

    return fix


# ---- the page ----------------------------------------------------------------------------------


def read_questions(path: str | Path) -> list[list[dict]]:
    """A .txt with a question a line, or chat rows -> prompts (messages that end with the user's),
    each once."""
    path = Path(path)
    if files.suffix_of(path) == ".txt" and path.is_file():
        lines = files.records(path, files.told_encoding(path))
        found = [[{"role": "user", "content": row["text"]}] for _, row in lines]
    else:
        loaded, stats = load_rows(path, kind="chat")
        print(summary(stats), flush=True)
        found = [json.loads(row)["messages"][:-1] for row in loaded["row"]]
    fitting = {key_of(prompt): prompt for prompt in found if can_be_asked(prompt)}
    prompts = list(fitting.values())
    if not prompts:
        raise SystemExit(f"{path}: no question of at most {MAX_CHARS} characters")
    others = "the others are too long, or there already"
    print(f"{len(prompts)} questions of {len(found)}: {others}", flush=True)
    return prompts


def can_be_asked(prompt: list[dict]) -> bool:
    characters = sum(len(message["content"]) for message in prompt)
    return prompt[-1]["role"] == "user" and characters <= MAX_CHARS


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
    title = f"{HERE.name} · 对话与标注"
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True) as demo:
        gr.Markdown(page.about(chat_model, HERE.name), elem_id="about")
        with gr.Tabs():
            with gr.Tab("对话"):
                chat = page.chat_column(chat_model, EXAMPLES, height="calc(100dvh - 22rem)")
            with gr.Tab("标注"):
                judge_tab(judge)
        arriving = [judge.ui.question, judge.ui.earlier, judge.ui.counts]
        demo.load(judge.arrive, None, arriving, **AT_ONCE)
        demo.unload(chat.halt)
        demo.unload(judge.leave)
    return demo.queue(max_size=MAX_WAITING)


def launch(demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Start the page in the background and return its address; `demo.close()` ends it."""
    return page.launch(demo, host, port, CSS)


def main() -> None:
    parser = page.arguments(__doc__, DEFAULT)
    parser.add_argument("--feedback_dir", default="feedback", help="folder for the rated rows")
    parser.add_argument("--questions", help="file of questions to judge: .txt, or chat rows")
    args = parser.parse_args()
    questions = read_questions(args.questions) if args.questions else ()
    page.stay(build_demo(args.model, args.feedback_dir, questions), args, launch)


if __name__ == "__main__":
    main()
