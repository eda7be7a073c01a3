"""Gradio chat about pictures with a LLaVA: a run's output folder, a model folder, an adapter or a
hub id.

    python train_llava/app.py         # what `bash train_llava/train_zero2.sh` left in output/
    python train_llava/app.py --model output/train_llava/stage1 --port 7860 --host 127.0.0.1
    MODEL=llava-hf/llava-1.5-7b-hf python train_llava/app.py

Any question may show several pictures. The prompt is built by the code that built the training rows
(encoding.py), the pictures are opened by the code that opened those of training, and what the model
sees of them is shown beside.
"""

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common.demo import page, serve  # noqa: I001  (with common.device, which comes before torch)

import gradio as gr
from gradio.processing_utils import save_pil_to_cache
from PIL import Image

from common.data.pictures import PictureError, find_places, open_picture
from common.demo.chat_model import SAMPLING
from talk import LlavaChatModel, Seen, user_turn

DEFAULT = HERE.parent / "output" / HERE.name
THUMBNAIL = 384  # pixels of the longer side, of what the conversation shows
MOST_PICTURES = 64  # of a question, before any is opened
LIMITS = serve.Limits(body=40 << 20, bodies=8)
ASKED = "请描述这张图片。"  # where somebody sends pictures without a word
EXAMPLES = [  # question, its pictures among the sample's
    ("图里一共有几个图形？", ["valid_0082.png"]),
    ("图形是什么颜色？", ["valid_0010.png"]),
    ("第二张图是什么颜色？", ["valid_0029.png", "valid_0095.png"]),
]
REASONS = {  # of PictureError
    "missing": "文件不在了",
    "not a file": "不是文件",
    "outside the picture folder": "在图片目录之外",
    "empty": "是空的",
    "torn": "已损坏",
    "not a picture": "不是图片",
    "a web page": "是网页，不是图片",
    "a Git LFS pointer": "是 Git LFS 指针，不是图片",
    "too large": "太大（最多 6400 万像素）",
    "too narrow": "太狭长",
    "not readable": "读不了",
}
CSS = (
    page.CSS.replace("60rem", "75rem")
    + """
#seen img { image-rendering: pixelated; background: white; object-fit: contain }
#seen_title p { color: var(--body-text-color-subdued); font-size: var(--text-sm) }
.user-row img { max-height: 10rem !important; width: auto !important }
"""
)
NOTHING = {"text": "", "files": []}


def refuse(text: str) -> gr.Error:
    return gr.Error(text, print_exception=False, title="请改一改")


# ---- pictures ------------------------------------------------------------------------------------


class Album:
    """Pictures as the model gets them, and small copies of them for the page."""

    def __init__(self, chat_model: LlavaChatModel, folder: str):
        """folder: Gradio's cache, from which pages may load files."""
        self.chat_model = chat_model
        self.folder = folder

    def take(self, picture) -> Seen:
        """A path or Place; PictureError for what is no usable picture."""
        seen = Seen.of(picture, self.chat_model.image_processor)
        small = open_picture(picture, THUMBNAIL)
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        return replace(seen, shown=save_pil_to_cache(small, self.folder, format="png"))

    def take_all(self, paths: list[str]) -> list[Seen]:
        """gr.Error that says which one cannot be used and why, or that they are too many."""
        chat_model = self.chat_model
        if len(paths) > MOST_PICTURES:
            raise refuse(f"一次最多 {MOST_PICTURES} 张图片，这里有 {len(paths)} 张。")
        tokens = len(paths) * chat_model.image_tokens
        if tokens >= chat_model.window:
            each = chat_model.image_tokens
            raise refuse(
                f"{len(paths)} 张图片要 {tokens} 个词元（每张 {each}），模型的窗口只有 "
                f"{chat_model.window} 个。"
            )
        taken = []
        for number, path in enumerate(paths, 1):
            try:
                taken.append(self.take(path))
            except PictureError as error:
                reason = REASONS.get(error.reason, error.reason)
                raise refuse(f"第 {number} 张图片不能用：{reason}") from None
        return taken

    def examples(self) -> list[tuple[str, list[Seen]]]:
        """EXAMPLES whose pictures lie in data/; in a copy with other data there may be none."""
        data = HERE / "data"
        if not data.is_dir():
            return []
        wanted = {name.rpartition(".")[0] for _, names in EXAMPLES for name in names}
        places = {}
        for place in find_places(data, []):
            name = Path(place.name or place.path).name
            stem = name.removesuffix(".png")
            if stem in wanted:
                places[f"{stem}.png"] = place
        found = []
        for text, names in EXAMPLES:
            if all(name in places for name in names):
                found.append((text, [self.take(places[name]) for name in names]))
        return found


def as_image(seen: Seen) -> Image.Image:
    return Image.fromarray(seen.pixels.permute(1, 2, 0).numpy())


def shown_file(seen: Seen) -> str:
    """The small copy of a picture; where Gradio has cleared it away, what the model sees of it."""
    path = Path(seen.shown)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        as_image(seen).save(path)
    return seen.shown


def gallery_of(history: list[dict]) -> list[tuple[Image.Image, str]]:
    """All pictures of a conversation as the model sees them."""
    pictures = [seen for row in history for seen in row.get("pictures", [])]
    return [(as_image(seen), f"图 {number}") for number, seen in enumerate(pictures, 1)]


# ---- a chat --------------------------------------------------------------------------------------


def show(history: list[dict]) -> list[gr.ChatMessage]:
    """The conversation as the chatbot displays it."""
    shown = []
    for row in history:
        if row["role"] == "user":
            shown += [
                gr.ChatMessage({"path": shown_file(seen)}, "user") for seen in row["pictures"]
            ]
            shown.append(gr.ChatMessage(page.escape_markdown(row["content"]), "user"))
        else:
            shown += page.answer_bubbles(
                row["reasoning_content"], row["thought_done"], row["content"], row["note"]
            )
    return shown


def turns_of(history: list[dict], system: str) -> list[dict]:
    """The conversation as rows of the training data."""
    turns = []
    for row in history:
        if row["role"] == "user":
            turns.append(user_turn(row["content"], row["pictures"]))
        else:
            turns.append({key: row[key] for key in ("role", "content", "reasoning_content")})
    if system.strip():
        turns.insert(0, {"role": "system", "content": system.strip()})
    return turns


class PictureChat(page.Chat):
    """The events of a chat about pictures.

    `history`: rows as of page.Chat; those of the user have `pictures` (Seen) and `files`, the names
    under which they were sent.
    """

    def __init__(self, chat_model: LlavaChatModel, album: Album, examples, controls):
        """controls: as of page.Chat."""
        super().__init__(chat_model, controls)
        self.album = album
        self.examples = examples

    def send(self, value, history, request: gr.Request, system, *values):
        """What stands in the box: {"text", "files": paths}."""
        value = value or NOTHING
        text, files = value.get("text") or "", value.get("files") or []
        if not text.strip() and not files:
            return
        page.refuse_long(text)
        question = {"role": "user", "content": text if text.strip() else ASKED, "files": files}
        question["pictures"] = self.album.take_all(files)
        yield from self.ask(question, history, request, system, *values)

    def ask(self, question: dict, history, request: gr.Request, system, *values):
        page.refuse_long(system)
        options = dict(zip(self.controls, values, strict=True))
        history = [*history, question]
        turns = turns_of(history, system)
        try:
            _, left_out = self.chat_model.look(turns, options["max_new_tokens"])
        except ValueError:
            raise refuse("窗口放不下这个问题和它的图片：少放几张图片，或少写几个字。") from None
        run = self.begin(request)
        answer = {
            "role": "assistant",
            "content": "",
            "reasoning_content": "",
            "thought_done": True,
            "note": "",
        }
        history.append(answer)
        seen = gallery_of(history)
        try:
            yield show(history), history, gr.update(value=NOTHING, **page.BUSY), seen
            for _ in self.answer(answer, turns, run.stop, options, left_out):
                if not run.cleared:
                    yield show(history), history, gr.skip(), gr.skip()
            if run.cleared:  # after the last look at it, which else would come back
                yield [], [], gr.skip(), []
        except Exception as error:
            raise page.failed(error) from error
        finally:
            self.end(request)

    def answer(self, answer, turns, stop: threading.Event, options: dict, left_out: int = 0):
        """Let `answer` grow; its last note says when it began, how much of the prompt was known,
        and what the model could not see."""
        began = time.perf_counter()
        first = 0.0
        for _ in super().answer(answer, turns, stop, options):
            first = first or time.perf_counter() - began
            yield
        more = [f"首词元 {first:.2f} 秒"]
        if self.chat_model.reused:
            more.append(f"沿用 {self.chat_model.reused} 词元")
        if left_out:
            more.append(f"窗口放不下最早的 {left_out} 轮")
        answer["note"] = " · ".join([answer["note"], *more])
        yield

    def pick(self, example: gr.SelectData, history, request: gr.Request, *controls):
        """The index alone is taken from the page: its files could be any."""
        number = example.index if isinstance(example.index, int) else -1
        if 0 <= number < len(self.examples):
            text, pictures = self.examples[number]
            files = [shown_file(seen) for seen in pictures]
            question = {"role": "user", "content": text, "pictures": pictures, "files": files}
            yield from self.ask(question, history, request, *controls)

    def again(self, history, request: gr.Request, *controls):
        if history:
            yield from self.ask(history[-2], history[:-2], request, *controls)

    def undo(self, history):
        box = NOTHING
        if history:
            question = history[-2]
            files = [path for path in question["files"] if Path(path).is_file()]
            box = {"text": question["content"], "files": files}
        history = history[:-2]
        return show(history), history, box, gallery_of(history)

    def clear(self, request: gr.Request):
        answering = self.drop(request)
        return [], [], gr.skip() if answering else gr.update(**page.IDLE), []

    def connect(self, chatbot, box, controls: list, gallery: gr.Gallery) -> None:
        """controls: the system prompt, then those of __init__."""
        history = gr.State([])
        shown = [chatbot, history, box, gallery]
        generating = page.MODEL | {"show_progress_on": chatbot}
        runs = [
            box.submit(self.send, [box, history, *controls], shown, **generating),
            chatbot.example_select(self.pick, [history, *controls], shown, **generating),
            chatbot.retry(self.again, [history, *controls], shown, **generating),
        ]
        for run in runs:
            run.then(lambda: gr.update(**page.IDLE), None, box, **page.AT_ONCE)
        box.stop(self.halt, **page.AT_ONCE)
        chatbot.undo(self.undo, history, shown, **page.AT_ONCE)
        chatbot.clear(self.clear, None, shown, **page.AT_ONCE)


# ---- the page ------------------------------------------------------------------------------------


def about(chat_model: LlavaChatModel) -> str:
    height, width = chat_model.side
    picture = f"图片 {width}×{height}，每张 {chat_model.image_tokens} 词元"
    return page.about(chat_model, f"{HERE.name} · 看图聊天", picture)


def build_demo(model: str | Path | LlavaChatModel = DEFAULT) -> gr.Blocks:
    """The chat page for a run, model or adapter folder; SystemExit with one line when there is no
    model."""
    chat_model = model if isinstance(model, LlavaChatModel) else LlavaChatModel(model)
    title = f"{HERE.name} · 看图聊天"
    with gr.Blocks(
        title=title, analytics_enabled=False, fill_height=True, delete_cache=(600, 3600)
    ) as demo:
        gr.Markdown(about(chat_model), elem_id="about")
        chat = chat_column(chat_model)
        demo.unload(chat.halt)
    return demo.queue(max_size=page.MAX_WAITING)


def chat_column(chat_model: LlavaChatModel) -> PictureChat:
    """A conversation, what the model sees, the box to type in and the settings, connected."""
    gallery = gr.Gallery(
        label="模型看到的",
        show_label=False,
        columns=2,
        object_fit="contain",
        height=320,
        elem_id="seen",
        interactive=False,
        buttons=[],
        format="png",
        render=False,
    )
    album = Album(chat_model, gallery.GRADIO_CACHE)
    examples = album.examples()
    with gr.Row(scale=1):
        with gr.Column(scale=4):
            chatbot = gr.Chatbot(
                show_label=False,
                min_height=320,
                buttons=["copy"],
                allow_tags=False,
                placeholder="放几张图片，问点什么，或选一个例子",
                examples=[example_of(text, pictures) for text, pictures in examples],
                scale=1,
            )
        for example in chatbot.examples:  # else they are cleared away like what visitors send
            chatbot.keep_in_cache.update(file["path"] for file in example["files"])
        with gr.Column(scale=1, min_width=240):
            gr.Markdown("模型看到的图片：", elem_id="seen_title")
            gallery.render()
    box = gr.MultimodalTextbox(
        label="问题",
        show_label=False,
        placeholder="问点什么，回车发送；左边的按钮放图片，也可以拖进来或粘贴",
        file_types=["image"],
        file_count="multiple",
        max_lines=8,
        max_plain_text_length=page.MAX_CHARS,
        **page.IDLE,
    )
    with gr.Row(visible=chat_model.can_compare):
        use_adapter = gr.Checkbox(True, label="用训练后的权重（不勾：训练前的）")
    with gr.Accordion("设置", open=False):
        system = page.system_box(chat_model, chat_model.settings.get("system_prompt", ""))
        with gr.Row():
            numbers = [
                page.length(chat_model.window),
                *page.sampling(chat_model.sampling_defaults()),
            ]
    controls = ["use_adapter", "max_new_tokens", *SAMPLING]
    chat = PictureChat(chat_model, album, examples, controls)
    chat.connect(chatbot, box, [system, use_adapter, *numbers], gallery)
    return chat


def example_of(text: str, pictures: list[Seen]) -> dict:
    return {"text": text, "files": [seen.shown for seen in pictures]}


def launch(demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Start the page in the background and return its address; `demo.close()` ends it."""
    return serve.serve(demo, host, port, LIMITS, uploads=True, theme=page.THEME, css=CSS)


def main() -> None:
    args = page.arguments(__doc__, DEFAULT).parse_args()
    page.stay(build_demo(args.model), args, launch)


if __name__ == "__main__":
    main()
