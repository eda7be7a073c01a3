"""The search page: what it answers, what it refuses, and the page itself in a real Chromium."""

from __future__ import annotations

import io
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from types import SimpleNamespace

import gradio as gr
import pytest
import torch
from browser import Visit
from harness import ROOT, expect, finish, own_modules, start
from PIL import Image, ImageDraw
from torch.nn import functional as F

from common.data import pictures

app, index, models, tiny_base, evaluation = own_modules(
    "chinese_clip_ddp", "app", "index", "model", "tiny_base", "eval"
)
COLOURS = {
    "红": (220, 30, 30),
    "绿": (30, 180, 60),
    "蓝": (40, 70, 220),
    "黄": (240, 210, 30),
    "紫": (150, 50, 190),
    "灰": (110, 110, 110),
}
HTML_NAME = "<img src=x onerror=\"document.title='hacked'\">.png"


class Colours:
    """A model that knows colours: the share of each in a picture, and the ones a text names."""

    size = len(COLOURS) + 1
    path = "colours"
    fingerprint = "colours 1"
    model = torch.nn.Linear(2, 2)
    image_processor = SimpleNamespace(do_resize=True, size={"height": 64, "width": 64})
    preparation = SimpleNamespace(max_length=12)

    class tokenizer:
        unk_token_id = 1

        def __new__(cls, text, **_):
            known = [2 if char in "".join(COLOURS) + "色的圆方块" else 1 for char in text]
            return {"input_ids": [0, *known, 0]}

    def embed_text(self, texts, batch_size: int = 64):
        rows = [[float(name in text) for name in COLOURS] + [0.1] for text in texts]
        return F.normalize(torch.tensor(rows), dim=-1)

    def embed_images(self, some, batch_size: int = 32):
        palette = torch.tensor(list(COLOURS.values())).float()
        rows = []
        for picture in some:
            picture = pictures.open_picture(picture, 64).resize((32, 32))
            pixels = torch.tensor(list(picture.get_flattened_data())).float()
            pixels = pixels[pixels.min(-1).values < 200]
            nearest = torch.cdist(pixels, palette).argmin(-1)
            rows.append([(nearest == i).float().mean().item() for i in range(len(COLOURS))] + [0.1])
        return F.normalize(torch.tensor(rows), dim=-1)


def draw(path, colour: str, other: str = "", shape: str = "ellipse", size=(300, 220)) -> None:
    picture = Image.new("RGB", size, "white")
    drawn = getattr(ImageDraw.Draw(picture), shape)
    drawn((30, 30, 180, 180), fill=COLOURS[colour])
    if other:
        drawn((190, 60, 280, 150), fill=COLOURS[other])
    picture.save(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """root/ with indexed pictures in first/, more in more/, and what must not come in."""
    root = tmp_path_factory.mktemp("photos")
    (root / "root/first").mkdir(parents=True)
    for colour in COLOURS:
        draw(root / f"root/first/{colour}圆.png", colour)
        draw(root / f"root/first/{colour}方.jpg", colour, shape="rectangle")
    draw(root / "root/first/红和蓝.png", "红", "蓝")
    draw(root / f"root/first/{HTML_NAME}", "灰")
    (root / "root/first/torn.png").write_bytes((root / "root/first/红圆.png").read_bytes()[:300])
    (root / "root/more").mkdir()
    for i in range(300):
        draw(root / f"root/more/{i:03d}.png", "紫", size=(200, 200))
    (root / "root/more/page.jpg").write_text("<html>404</html>")
    (root / "root/none").mkdir()
    (root / "outside").mkdir()
    draw(root / "outside/secret.png", "绿")
    (root / "root/away").symlink_to(root / "outside")
    (root / "root/none/link.png").symlink_to(root / "outside/secret.png")
    return root


def make_index(photos, folder):
    store = index.Store(folder, Colours.fingerprint, Colours.size)
    places = pictures.find_places(str(photos / "root/first"))
    counts = index.build(store, places, index.embedding(Colours()))
    assert counts["added"] == 14 and counts["unusable"] == 1
    return folder


@pytest.fixture(scope="module")
def folder(photos):
    return make_index(photos, photos / "index")


@pytest.fixture
def search(folder):
    return app.Search(Colours(), index.Index(folder, Colours.fingerprint))


@pytest.fixture
def adding(photos, tmp_path):
    folder = make_index(photos, tmp_path / "index")
    search = app.Search(Colours(), index.Index(folder, Colours.fingerprint))
    return app.Adding(search, str(photos / "root"))


def names(found) -> list[str]:
    return [caption.split(" · ")[1] for _, caption in found[0]]


def message(call, *args) -> str:
    """What the page shows of a refusal."""
    with pytest.raises(gr.Error) as caught:
        call(*args)
    return caught.value.message


# ---- searching -----------------------------------------------------------------------------------


def test_words_pictures_and_what_is_not_wanted(search, photos):
    assert set(names(search.find("红色的圆", "", None, 0.5, 2))) == {"红圆.png", "红方.jpg"}
    assert names(search.find("红和蓝", "", None, 0.5, 1)) == ["红和蓝.png"]
    assert "红和蓝.png" in names(search.find("红", "", None, 0.5, 3))
    with_blue, without = (
        {caption.split(" · ")[1]: float(caption[:5].split(" ")[0]) for _, caption in found[0]}
        for found in (search.find("红", no, None, 0.8, 14) for no in ("", "蓝"))
    )
    assert without["红和蓝.png"] < with_blue["红和蓝.png"] - 0.2
    assert [name[0] for name in list(without)[-2:]] == ["蓝", "蓝"]
    like = search.of_picture(str(photos / "root/first/绿圆.png"))
    assert set(names(search.find("", "", like, 0.5, 2))) == {"绿圆.png", "绿方.jpg"}
    both = names(search.find("红", "", like, 0.5, 4))
    assert {name[0] for name in both} == {"红", "绿"}
    assert len(names(search.find("红", "", None, 0.5, 60))) == 14, "not more than there are"


def test_the_note_says_what_the_model_does_not_see(search):
    assert "14 张图片里最近的 3 张" in search.find("红色", "", None, 0.5, 3)[1]
    assert "不认识" not in search.find("红色", "", None, 0.5, 3)[1]
    assert "有 2 个词元是模型不认识的字" in search.find("红色鲸鱼", "", None, 0.5, 3)[1]
    assert "文字有 22 个词元，模型只看前 12 个" in search.find("红" * 20, "", None, 0.5, 3)[1]


def test_what_is_refused(search, tmp_path, photos):
    assert "写几个字，或放一张图片" in message(search.find, " ", "", None, 0.5, 3)
    assert "还要写想找什么" in message(search.find, "", "红", None, 0.5, 3)
    assert "最多 1000 字，这里有 10000 字" in message(search.find, "红" * 10_000, "", None, 0.5, 3)
    assert "最多 1000 字" in message(search.find, "红", "红" * 10_000, None, 0.5, 3)
    huge = io.BytesIO()
    Image.new("1", (9000, 9000)).save(huge, "PNG")
    for data, said in [
        (huge.getvalue(), "太大（最多 6400 万像素）"),
        (b"<html>404</html>", "是网页，不是图片"),
        (b"", "是空的"),
        ((photos / "root/first/红圆.png").read_bytes()[:300], "已损坏"),
        (b"no picture at all", "不是图片"),
    ]:
        (tmp_path / "sent").write_bytes(data)
        assert said in message(search.of_picture, str(tmp_path / "sent"))
    assert "文件不在了" in message(search.of_picture, str(tmp_path / "nothing"))
    empty = app.Search(Colours(), index.Index(tmp_path / "empty", Colours.fingerprint))
    assert "索引是空的" in message(empty.find, "红", "", None, 0.5, 3)


def test_an_index_that_others_break_or_replace_does_not_end_the_page(photos, tmp_path):
    """What is one line and the end of a program is an answer here, until the index is whole."""
    folder = make_index(photos, tmp_path / "index")
    search = app.Search(Colours(), index.Index(folder, Colours.fingerprint))
    manifest = folder / index.MANIFEST
    whole = manifest.read_text()
    for broken, said in [
        (whole.replace(Colours.fingerprint, "another"), "holds vectors of another model"),
        ("{", "cannot be read"),
    ]:
        manifest.write_text(broken)
        assert said in message(search.find, "红", "", None, 0.5, 3)
    manifest.write_text(whole)
    assert len(names(search.find("红", "", None, 0.5, 3))) == 3


def test_index_page_and_evaluation_see_the_pixels_of_training(tmp_path, monkeypatch):
    """Bit for bit, of a JPEG that is decoded smaller and turned, and of a transparent PNG."""
    embedder = models.load(tiny_base.tiny_model(["红色的圆"]))
    noise = torch.randint(0, 255, (700, 900, 3), generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(noise.to(torch.uint8).numpy())
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.resize((90, 70)).convert("RGBA").save(tmp_path / "alpha.png")
    paths = [str(tmp_path / name) for name in ("turned.jpg", "alpha.png")]
    of_training = [pictures.pixels(path, embedder.image_processor) for path in paths]
    expected = embedder.embed_images(paths)

    seen = []
    real = embedder.preparation.pixels
    monkeypatch.setattr(
        embedder.preparation, "pixels", lambda picture: seen.append(real(picture)) or seen[-1]
    )
    places = [pictures.Place(path) for path in paths]
    by_index = index.embedding(embedder)(places)[0]
    by_evaluation = evaluation.embed_places(embedder, places)[0]
    search = app.Search(embedder, index.Index(tmp_path / "none"))
    by_page = torch.stack([search.of_picture(path) for path in paths])
    assert len(seen) == 6
    for i, found in enumerate(seen):
        assert torch.equal(found, of_training[i % 2])
    for found in (by_index, by_evaluation):
        assert torch.equal(found, expected)
    assert torch.allclose(by_page, expected, atol=1e-6)  # a batch of one, in another order of sums


def test_every_reason_of_a_picture_has_words():
    described = re.search(r"counted under: (.+?)\.", pictures.PictureError.__doc__, re.S)[1]
    assert {" ".join(reason.split()) for reason in described.split(",")} == set(app.REASONS)


def test_a_thumbnail_is_of_the_file_that_was_indexed(search, photos, tmp_path):
    """Not of what has come into its place: a link to another file, or nothing."""
    path = tmp_path / "here.png"
    draw(path, "黄")
    entry = index.Entry(pictures.Place(str(path)), index.stamp_of(pictures.Place(str(path))))
    picture, problem = search.thumbnail(entry)
    assert problem == "" and picture.size == (256, 188)
    path.unlink()
    assert search.thumbnail(entry)[1] == "文件不在了"
    path.symlink_to(photos / "outside/secret.png")
    grey, problem = search.thumbnail(entry)
    assert problem == "建索引以后变了" and len(grey.getcolors()) == 1
    assert "（建索引以后变了）" in search.shown(entry, 0.5)[1]


# ---- adding --------------------------------------------------------------------------------------


def test_a_folder_is_added_with_progress_while_searching_goes_on(adding):
    before = names(adding.search.find("紫", "", None, 0.5, 60))
    lines = []
    sizes = set()
    for line in adding.watch("more"):
        lines.append(line)
        sizes.add(len(names(adding.search.find("紫", "", None, 0.5, 60))))
    assert "新增 300 张" in lines[-1] and "1 张是网页，不是图片" in lines[-1]
    assert len(before) == 14 and max(sizes) == 60
    assert len(adding.search.index) == 314
    assert list(adding.watch("more"))[-1].startswith("完成：新增 0 张，原有 301 张")


def test_adding_can_be_stopped_and_goes_on(adding, monkeypatch):
    monkeypatch.setattr(app, "ADDED_AT_ONCE", 16)
    watching = adding.watch("more")
    next(watching)
    adding.stop.set()
    assert "停下了" in list(watching)[-1]
    assert 14 < len(adding.search.index) < 314
    assert "完成" in list(adding.watch("more"))[-1] and len(adding.search.index) == 314


@pytest.mark.parametrize(
    "text, said",
    [
        ("../outside", "只能添加 --image_root 里面的文件夹"),
        ("more/../../outside", "只能添加 --image_root 里面的文件夹"),
        ("away", "只能添加 --image_root 里面的文件夹"),
        ("/etc", "只能添加 --image_root 里面的文件夹"),
        ("~", "只能添加 --image_root 里面的文件夹"),
        ("nothing", "没有这个文件夹"),
        ("first/红圆.png", "没有这个文件夹"),
        ("", "写一个文件夹的名字"),
        ("a\0b", "写一个文件夹的名字"),
        ("x" * 10_000, "写一个文件夹的名字"),
    ],
)
def test_folders_that_are_refused(adding, text, said):
    assert said in message(adding.begin, text)
    assert adding.thread is None


def test_links_out_of_a_folder_are_passed_over(adding):
    assert list(adding.watch("none"))[-1] == "这个文件夹里没有图片。"
    assert "完成" in list(adding.watch("."))[-1]
    assert not any("secret" in str(entry.place) for entry in adding.search.index.entries)
    assert not any("link" in str(entry.place) for entry in adding.search.index.entries)


def test_without_a_root_nothing_is_added(search):
    assert "没有给 --image_root" in message(app.Adding(search, "").begin, ".")


def test_one_folder_at_a_time(adding):
    watching = adding.watch("more")
    next(watching)
    assert "正在添加另一个文件夹" in message(adding.begin, "first")
    list(watching)


# ---- the server ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def address(photos):
    folder = make_index(photos, photos / "index of the page")
    demo = app.build_demo(Colours(), folder, str(photos / "root"))
    yield app.launch(demo)
    demo.close()


def fetch(address, data=None, **headers) -> tuple[int, bytes]:
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, data, headers), timeout=20
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_server_keeps_strangers_out(address):
    join = address + "gradio_api/queue/join"
    assert address.startswith("http://127.0.0.1:") and fetch(address)[0] == 200
    assert fetch(address, Host="evil.example")[0] == 421
    assert fetch(join, b"{}", Origin="https://evil.example", Content_Type="text/plain")[0] == 403
    assert fetch(join, b" " * (app.LIMITS.body + 1))[0] == 413
    assert fetch(address + "openapi.json")[0] == 404


def test_no_file_is_served_by_its_name(address, photos, folder):
    """Neither what is indexed, nor what lies beside it, nor the index itself."""
    wanted = [
        photos / "root/first/红圆.png",
        photos / "outside/secret.png",
        folder / "manifest.json",
        ROOT / "README.md",
        "/etc/passwd",
    ]
    for path in wanted:
        for name in (str(path), f"{photos}/root/first/../../{os.path.relpath(path, photos)}"):
            url = address + "gradio_api/file=" + urllib.parse.quote(name)
            status, body = fetch(url)
            assert status in (403, 404), (status, name)
            assert b"PNG" not in body and b"root:" not in body


def test_importing_the_app_starts_nothing():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import app, threading; print(threading.active_count())"
    result = expect(finish(start([sys.executable, "-c", code, ROOT / "chinese_clip_ddp"])))
    assert result.stdout.split()[-1] == "1"


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--image_root", "/nowhere"], "--image_root /nowhere: no such folder"),
        (["--model", "/nowhere"], "/nowhere"),
        (["--modle", "x"], "did you mean --model?"),
    ],
)
def test_wrong_flags_are_one_line(flags, said):
    result = finish(start([sys.executable, ROOT / "chinese_clip_ddp/app.py", *flags]))
    lines = result.stderr.strip().splitlines()
    assert result.returncode in (1, 2) and len(lines) == 1 and said in lines[0], result.stderr


# ---- the page ------------------------------------------------------------------------------------


@pytest.fixture
def visit(browser, address):
    visit = Visit(browser, address, box="找什么", viewport={"width": 1200, "height": 1000})
    yield visit
    visit.close()


def captions(visit) -> list[str]:
    found = visit.page.locator("#found .caption-label").all_inner_texts()
    return [caption.split(" · ")[1] for caption in found]


def ask(visit, text: str, right) -> None:
    """Type and press Enter; until right(names of the pictures in their order)."""
    visit.box.fill(text)
    visit.box.press("Enter")
    visit.until(lambda: right(captions(visit)))
    visit.page.wait_for_function(
        "[...document.querySelectorAll('#found img')].every(i => i.complete && i.naturalWidth)"
    )


def toast(visit) -> str:
    shown = visit.page.get_by_test_id("toast-body").last
    shown.wait_for()
    text = shown.inner_text()
    visit.page.get_by_test_id("toast-close").last.click()
    shown.wait_for(state="hidden")
    return text


def set_number(visit, label: str, value: int) -> None:
    box = visit.page.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Tab")


def test_searching_in_chromium(visit, photos, tmp_path):
    page = visit.page
    set_number(visit, "张数", 6)
    ask(visit, "红色的圆", lambda found: set(found[:2]) == {"红圆.png", "红方.jpg"})
    assert page.locator("#found img").count() == 6
    ask(visit, "红和蓝", lambda found: found[:1] == ["红和蓝.png"])
    page.get_by_label("不要", exact=True).fill("蓝")
    set_number(visit, "“不要”的力度", 1)
    ask(visit, "红和蓝", lambda found: set(found[:2]) == {"红圆.png", "红方.jpg"})
    page.screenshot(path=os.environ.get("DANPU_SCREENSHOTS", str(tmp_path)) + "/search.png")

    page.get_by_label("不要", exact=True).fill("")
    visit.box.fill("")
    page.locator("input[type=file]").set_input_files(photos / "root/first/绿方.jpg")
    visit.until(lambda: set(captions(visit)[:2]) == {"绿圆.png", "绿方.jpg"})
    page.get_by_role("button", name="拿掉图片").wait_for()
    page.screenshot(path=os.environ.get("DANPU_SCREENSHOTS", str(tmp_path)) + "/by_picture.png")
    page.get_by_role("button", name="拿掉图片").click()
    page.get_by_role("button", name="拿掉图片").wait_for(state="hidden")

    ask(visit, "灰色", lambda found: set(found[:3]) == {"灰圆.png", "灰方.jpg", HTML_NAME})
    assert page.title() != "hacked"
    assert page.locator("#found .caption-label img").count() == 0
    page.get_by_role("button", name="红色的圆").click()  # an example
    visit.until(lambda: set(captions(visit)[:2]) == {"红圆.png", "红方.jpg"})


def test_refusals_in_chromium(visit, tmp_path):
    page = visit.page
    visit.box.fill("  ")
    visit.box.press("Enter")
    assert "写几个字，或放一张图片" in toast(visit)
    visit.box.fill("红" * 10_000)
    visit.box.press("Enter")
    assert "最多 1000 字，这里有 10000 字" in toast(visit)
    (tmp_path / "page.jpg").write_text("<html>404</html>")
    page.locator("input[type=file]").set_input_files(tmp_path / "page.jpg")
    assert "是网页，不是图片" in toast(visit)
    Image.new("1", (14_000, 14_000)).save(tmp_path / "huge.png")
    page.locator("input[type=file]").set_input_files(tmp_path / "huge.png")
    assert "太大（最多 6400 万像素）" in toast(visit)


def test_adding_in_chromium(visit):
    page = visit.page
    page.get_by_text("添加图片", exact=True).click()
    box = page.get_by_label("文件夹", exact=True)
    box.wait_for()
    page.wait_for_timeout(500)  # Gradio mounts what is in a closed accordion only now
    box.fill("../outside")
    page.get_by_role("button", name="添加", exact=True).click()
    assert "只能添加 --image_root 里面的文件夹" in toast(visit)
    box.fill("more")
    page.get_by_role("button", name="添加", exact=True).click()
    line = page.locator("#added")
    visit.until(lambda: line.inner_text() != "")
    ask(visit, "红", lambda found: set(found[:2]) == {"红圆.png", "红方.jpg"})  # meanwhile
    visit.until(lambda: "新增 300 张" in line.inner_text())
    set_number(visit, "张数", 60)
    ask(visit, "紫", lambda found: len(found) == 60)
