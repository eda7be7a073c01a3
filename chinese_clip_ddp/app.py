"""Gradio page that searches pictures by words or by a picture.

    python chinese_clip_ddp/app.py                       # what train_zero2.sh left in output/
    python chinese_clip_ddp/app.py --model MODEL --index photos.index --image_root photos/
    MODEL=OFA-Sys/chinese-clip-vit-base-patch16 python chinese_clip_ddp/app.py --index photos.index

The index is that of build_index.py; without one the sample pictures are indexed first. Folders
below --image_root can be added on the page, while searching goes on. Only thumbnails of indexed
pictures ever leave the server.
"""

import os
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for common/ and the modules beside this file
from common.demo import page, serve  # noqa: I001  (with common.device, which comes before torch)

import gradio as gr
import torch
from PIL import Image
from torch.nn import functional as F

import build_index
import index
import model as models
from common.data.pictures import PictureError, find_places, inside, open_picture, target_size

from common import device

DEFAULT = build_index.DEFAULT
MAX_CHARS = 1000
MAX_SHOWN = 60
THUMBNAIL = 256  # pixels of the longer side
ADDED_AT_ONCE = 128  # pictures after which the added ones can be found
LIMITS = serve.Limits(body=40 << 20, bodies=8)
EXAMPLES = ["红色的圆", "三个蓝色的三角形", "左上角有一个绿色的三角形", "黄色的房子"]
REASONS = {  # of pictures.PictureError
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
    page.CSS.replace("60rem", "80rem")
    + """
#found img { image-rendering: auto; background: white }
#note p { color: var(--body-text-color-subdued); font-size: var(--text-sm); min-height: 1.4em }
"""
)
SEARCH = {"concurrency_id": "search", "concurrency_limit": 2, **page.PRIVATE}
ADD = {"concurrency_id": "add", "concurrency_limit": 8, **page.PRIVATE}


def refuse(text: str) -> gr.Error:
    return gr.Error(text, print_exception=False, title="请改一改")


def told(error: PictureError) -> str:
    return f"这张图片不能用：{REASONS.get(error.reason, error.reason)}"


# ---- searching -----------------------------------------------------------------------------------


class Search:
    """What the page asks: vectors of words and pictures, the nearest pictures, their thumbnails."""

    def __init__(self, embedder, opened: index.Index):
        self.embedder = embedder
        self.index = opened
        self.size = target_size(embedder.image_processor)

    def of_text(self, text: str) -> torch.Tensor:
        """[E]; gr.Error for one that is too long."""
        if len(text) > MAX_CHARS:
            raise refuse(f"最多 {MAX_CHARS} 字，这里有 {len(text)} 字。")
        return self.embedder.embed_text([text])[0]

    def of_picture(self, path: str) -> torch.Tensor:
        """[E]; gr.Error for what is no usable picture."""
        try:
            return self.embedder.embed_images([open_picture(path, self.size)])[0]
        except PictureError as error:
            raise refuse(told(error)) from None

    def note(self, text: str) -> str:
        """What the model does not see of a text."""
        tokenizer = self.embedder.tokenizer
        window = self.embedder.preparation.max_length
        ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
        notes = []
        if len(ids) > window:
            notes.append(f"文字有 {len(ids)} 个词元，模型只看前 {window} 个")
        unknown = ids.count(tokenizer.unk_token_id) if tokenizer.unk_token_id is not None else 0
        if unknown:
            notes.append(f"有 {unknown} 个词元是模型不认识的字")
        return "；".join(notes)

    def find(self, text: str, without: str, picture: torch.Tensor | None, strength: float, k: int):
        """-> [(thumbnail, caption)], a line about the search."""
        began = time.perf_counter()
        text, without = text.strip(), without.strip()
        wanted = [self.of_text(text)] if text else []
        if picture is not None:
            wanted.append(picture)
        if not wanted:
            raise refuse(
                "写几个字，或放一张图片。" if not without else "“不要”之外，还要写想找什么。"
            )
        query = F.normalize(torch.stack(wanted).mean(0), dim=0)
        if without:
            query = F.normalize(query - strength * self.of_text(without), dim=0)
        self.index.refresh()
        if not len(self.index):
            raise refuse("索引是空的：先在下面添加图片，或运行 build_index.py。")
        found = self.index.nearest(query, k)
        seconds = time.perf_counter() - began
        shown = [self.shown(entry, score) for score, entry in found]
        notes = [f"{len(self.index):,} 张图片里最近的 {len(shown)} 张，{1000 * seconds:.0f} 毫秒"]
        notes += [note for note in (self.note(text), self.note(without)) if note]
        return shown, page.escape_markdown("；".join(notes))

    def shown(self, entry: index.Entry, score: float) -> tuple[Image.Image, str]:
        name = entry.place.name or os.path.basename(entry.place.path)
        picture, problem = self.thumbnail(entry)
        return picture, f"{score:.3f} · {name}" + (f"（{problem}）" if problem else "")

    def thumbnail(self, entry: index.Entry) -> tuple[Image.Image, str]:
        """A small copy of an indexed picture, as it was then; else a grey one, and why."""
        problem = ""
        if index.stamp_of(entry.place) == entry.stamp:
            try:
                picture = open_picture(entry.place, THUMBNAIL)
                picture.thumbnail((THUMBNAIL, THUMBNAIL))
                return picture, ""
            except PictureError as error:
                problem = REASONS.get(error.reason, error.reason)
        gone = not os.path.exists(entry.place.path)
        problem = problem or ("文件不在了" if gone else "建索引以后变了")
        return Image.new("RGB", (THUMBNAIL, THUMBNAIL), (200, 200, 200)), problem


# ---- adding --------------------------------------------------------------------------------------


class Adding:
    """The one folder that is being added, in a thread of its own: it goes on when its page is
    closed."""

    def __init__(self, search: Search, root: str):
        """root: folder below which everything lies that may be added; "": nothing may."""
        self.search = search
        self.root = os.path.realpath(root) if root else ""
        self.thread: threading.Thread | None = None
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.line = ""

    def folder(self, text: str) -> str:
        """Its true path; gr.Error for what is none below the root."""
        if not self.root:
            raise refuse("这个页面不能添加图片：启动时没有给 --image_root。")
        if not text.strip() or len(text) > MAX_CHARS or "\0" in text:
            raise refuse("写一个文件夹的名字。")
        path = os.path.realpath(os.path.join(self.root, os.path.expanduser(text.strip())))
        if not inside(path, self.root):
            raise refuse("只能添加 --image_root 里面的文件夹。")
        if not os.path.isdir(path):
            raise refuse("没有这个文件夹。")
        return path

    def begin(self, text: str) -> None:
        path = self.folder(text)
        with self.lock:
            if self.thread and self.thread.is_alive():
                raise refuse("正在添加另一个文件夹，等它完成。")
            self.stop.clear()
            self.line = "找图片……"
            self.thread = threading.Thread(target=self.run, args=[path], daemon=True)
            self.thread.start()

    def run(self, path: str) -> None:
        try:
            self.line = self.build(path)
        except SystemExit as error:
            self.line = f"没有完成：{error}"
        except Exception as error:
            self.line = f"没有完成：{type(error).__name__}: {str(error)[:200]}"

    def build(self, path: str) -> str:
        """-> the line at the end."""
        opened = self.search.index
        embedder = self.search.embedder
        store = index.Store(opened.store.folder, embedder.fingerprint, embedder.size)
        torn_files = []
        places = list(find_places(path, torn_files))
        if not places:
            return "这个文件夹里没有图片。"
        done = [0, len(places)]
        problems: Counter[str] = Counter()

        def begin(count: int) -> None:
            done[1] = count

        def after(entries: list[index.Entry]) -> bool:
            done[0] += len(entries)
            problems.update(entry.problem for entry in entries if entry.problem)
            self.line = f"已看过 {done[0]:,} / {done[1]:,} 张"
            opened.refresh()
            return not self.stop.is_set()

        embed = index.embedding(embedder)
        counts = index.build(store, places, embed, ADDED_AT_ONCE, begin, after)
        opened.refresh()
        line = "停下了" if done[0] < done[1] else "完成"
        line += f"：新增 {counts['added']:,} 张，原有 {counts['known']:,} 张"
        bad = [f"{count:,} 张{REASONS.get(name, name)}" for name, count in problems.items()]
        bad += [f"{len(torn_files):,} 个文件已损坏"] if torn_files else []
        return line + ("；" + "，".join(bad) if bad else "")

    def watch(self, text: str):
        """Begin, and show how far it is; others search meanwhile."""
        self.begin(text)
        while self.thread.is_alive():
            yield page.escape_markdown(self.line)
            self.thread.join(0.3)
        yield page.escape_markdown(self.line)


# ---- the page ------------------------------------------------------------------------------------


def about(search: Search) -> str:
    embedder = search.embedder
    count = sum(weight.numel() for weight in embedder.model.parameters())
    facts = [
        "/".join(Path(embedder.path).parts[-3:]),
        f"{count / 1e6:.1f} M 参数",
        f"{embedder.size} 维",
        f"索引 {len(search.index):,} 张图片",
        device.name(),
    ]
    return f"### {HERE.name} · 找图\n{page.escape_markdown(' · '.join(facts))}"


def build_demo(
    model: str | Path | models.Embedder = DEFAULT,
    index_folder: str | Path = "",
    image_root: str = "",
    two_stage: bool = False,
) -> gr.Blocks:
    """The search page for a run or model folder; SystemExit with one line when there is no model,
    or the index is torn or another model's."""
    embedder = models.load(model) if isinstance(model, str | Path) else model
    folder = index_folder or build_index.default_index(embedder.path.removesuffix("/final"))
    search = Search(embedder, index.Index(folder, embedder.fingerprint, two_stage))
    if search.index.note:
        print(search.index.note, flush=True)
    adding = Adding(search, image_root)
    title = f"{HERE.name} · 找图"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        head = gr.Markdown(about(search), elem_id="about")
        search_column(search)
        add_column(adding)
        demo.load(partial(about, search), None, head, **page.AT_ONCE)
    return demo.queue(max_size=page.MAX_WAITING)


def search_column(search: Search) -> None:
    vector = gr.State(None)
    with gr.Row(equal_height=True):
        text = gr.Textbox(
            label="找什么", placeholder="写几个字，回车搜索", scale=4, submit_btn="搜索"
        )
        without = gr.Textbox(label="不要", placeholder="不要这样的", scale=2)
    with gr.Row(equal_height=True):
        upload = gr.UploadButton("以图找图", file_types=["image"], type="filepath", scale=1)
        drop = gr.Button("拿掉图片", visible=False, scale=1)
        count = gr.Slider(1, MAX_SHOWN, 12, step=1, label="张数", scale=2)
        strength = gr.Slider(0, 1, 0.5, step=0.05, label="“不要”的力度", scale=2)
    preview = gr.Image(
        visible=False, interactive=False, height=160, label="按这张图片找", buttons=[]
    )
    gallery = gr.Gallery(
        label="找到的图片",
        show_label=False,
        columns=6,
        object_fit="contain",
        height="auto",
        elem_id="found",
        interactive=False,
        buttons=[],
        format="png",
    )
    note = gr.Markdown(elem_id="note")
    asked = [text, without, vector, strength, count]

    def find(text, without, vector, strength, count):
        return search.find(text, without, vector, float(strength), int(count))

    def take(path):
        found = search.of_picture(path)
        picture = open_picture(path, THUMBNAIL)
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        return found, gr.update(value=picture, visible=True), gr.update(visible=True)

    def let_go():
        return None, gr.update(value=None, visible=False), gr.update(visible=False)

    show = {"show_progress_on": gallery, **SEARCH}
    gr.on([text.submit, without.submit], find, asked, [gallery, note], **show)
    taken = upload.upload(take, upload, [vector, preview, drop], **SEARCH)
    taken.success(find, asked, [gallery, note], **show)
    gr.Examples(
        EXAMPLES,
        text,
        [gallery, note],
        partial(search.find, without="", picture=None, strength=0, k=12),
        run_on_click=True,
        cache_examples=False,
        label="例子",
        api_visibility="private",
    )
    drop.click(let_go, None, [vector, preview, drop], **page.AT_ONCE)


def add_column(adding: Adding) -> None:
    if not adding.root:
        gr.Markdown("启动时加 `--image_root 文件夹`，就能在这里添加图片。")
        return
    with gr.Accordion("添加图片", open=False):
        with gr.Row(equal_height=True):
            folder = gr.Textbox(
                label="文件夹", placeholder="--image_root 里面的文件夹；. 是它自己", scale=4
            )
            start = gr.Button("添加", scale=1)
            stop = gr.Button("停止", scale=1)
        line = gr.Markdown(elem_id="added")
    gr.on([start.click, folder.submit], adding.watch, folder, line, show_progress="hidden", **ADD)
    stop.click(adding.stop.set, None, None, **page.AT_ONCE)


def launch(demo: gr.Blocks, host: str = "127.0.0.1", port: int | None = None) -> str:
    """Start the page in the background and return its address; `demo.close()` ends it."""
    return serve.serve(demo, host, port, LIMITS, uploads=True, theme=page.THEME, css=CSS)


def main() -> None:
    parser = page.arguments(__doc__, DEFAULT)
    parser.add_argument("--index", default="", help="folder; default: index/ in the run's folder")
    parser.add_argument("--image_root", default="", help="folders below it may be added")
    parser.add_argument("--two_stage", default="false", choices=["true", "false"])
    args = parser.parse_args()
    if args.image_root and not os.path.isdir(args.image_root):
        raise SystemExit(f"--image_root {args.image_root}: no such folder")
    embedder = models.load(args.model)
    folder = args.index or build_index.default_index(args.model)
    if not args.index and not Path(folder).exists():
        build_index.add(embedder, folder, [str(HERE / "data")])
    demo = build_demo(embedder, folder, args.image_root, args.two_stage == "true")
    address = launch(demo, args.host, args.port)
    print(f"search with {args.model}: {address}  (Ctrl-C ends)", flush=True)
    demo.block_thread()


if __name__ == "__main__":
    main()
