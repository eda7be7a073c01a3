"""common/data/pictures: what opens, how it comes out, and what is refused under which reason."""

import base64
import io
import os
import pickle
import random
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import encoded, photo
from PIL import Image
from transformers import ChineseCLIPImageProcessorPil, CLIPImageProcessorPil

from common.data import pictures
from common.data.pictures import PictureError, Place, find_places, open_picture

RED, BLUE = (200, 30, 40), (20, 60, 220)


def halves(width: int = 40, height: int = 20) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def reason(source) -> str:
    with pytest.raises(PictureError) as caught:
        open_picture(source)
    return caught.value.reason


def near(pixel, color) -> bool:
    return max(abs(a - b) for a, b in zip(pixel, color, strict=True)) < 12


def pixel(source, at=(0, 0)) -> tuple:
    image = open_picture(source)
    assert image.mode == "RGB"
    return image.getpixel(at)


def reason_of(source, size=None) -> str:
    with pytest.raises(PictureError) as caught:
        open_picture(source, size)
    return caught.value.reason


# ---- opening -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_steps(kind):
    ramp = np.linspace(0, 65535, 1024).astype(np.uint16)[None].repeat(16, 0)
    found = np.asarray(open_picture(encoded(Image.fromarray(ramp), kind)))
    assert (found[0, :, 0] == ramp[0] >> 8).all() and len(np.unique(found)) == 256


def test_wider_numbers_are_scaled():
    floats = np.linspace(-3, 7, 256, dtype=np.float32)[None].repeat(16, 0)
    found = np.asarray(open_picture(encoded(Image.fromarray(floats), "TIFF")))
    assert (
        found.min() == 0 and found.max() == 255 and (np.diff(found[0, :, 0].astype(int)) >= 0).all()
    )
    wide = np.array([[0, 1 << 20, 1 << 21]], dtype=np.int32)
    assert np.asarray(open_picture(encoded(Image.fromarray(wide), "TIFF")))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]


def test_alpha_lies_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (255, 0, 0, 255))
    image.putpixel((2, 2), (255, 0, 0, 128))
    assert pixel(encoded(image)) == (255, 255, 255)
    assert pixel(encoded(image), (1, 1)) == (255, 0, 0)
    half = pixel(encoded(image), (2, 2))
    assert half[0] == 255 and abs(half[1] - 127) <= 1
    grey = Image.new("LA", (4, 4), (0, 0))
    assert pixel(encoded(grey)) == (255, 255, 255)


def test_palettes_and_colour_keys():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30] + [0] * 762)
    assert pixel(encoded(image)) == (10, 200, 30)
    assert pixel(encoded(image, transparency=1)) == (255, 255, 255)
    assert pixel(encoded(image, "GIF", transparency=1)) == (255, 255, 255)
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    assert pixel(encoded(keyed, transparency=(1, 2, 3))) == (255, 255, 255)
    assert pixel(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)


def test_cmyk_is_no_negative():
    red = Image.new("RGB", (16, 16), (220, 30, 30)).convert("CMYK")
    found = pixel(encoded(red, "JPEG", quality=95))
    assert max(abs(a - b) for a, b in zip(found, (220, 30, 30), strict=True)) < 12
    assert pixel(encoded(red, "TIFF")) == red.convert("RGB").getpixel((0, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [None, 32])
def test_every_orientation_comes_upright(orientation, size):
    upright = photo(96, 64)
    turned_by = {value: key for key, value in pictures.UPRIGHT.items()}
    back = {5: Image.Transpose.TRANSPOSE, 7: Image.Transpose.TRANSVERSE}
    back |= {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    lying = upright
    if orientation > 1:
        lying = upright.transpose(back.get(orientation, pictures.UPRIGHT[orientation]))
    assert len(turned_by) == 7
    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    found = open_picture(encoded(lying, "JPEG", quality=95, exif=exif.tobytes()), size)
    ratio = 96 / found.width
    assert found.size == (96 // ratio, 64 // ratio)
    expected = np.asarray(upright.resize(found.size, Image.Resampling.BOX), dtype=float)
    assert np.abs(np.asarray(found, dtype=float) - expected).mean() < 6


def test_a_broken_exif_block_says_nothing():
    data = encoded(photo(32, 32), "JPEG", exif=b"Exif\0\0nonsense that is no TIFF")
    assert open_picture(data).size == (32, 32)


def test_a_jpeg_is_reduced_while_both_sides_stay_long_enough():
    data = encoded(photo(1600, 1200), "JPEG")
    assert open_picture(data, 224).size == (400, 300)
    assert open_picture(data, 300).size == (400, 300)
    assert open_picture(data, 301).size == (800, 600)
    assert open_picture(data).size == open_picture(data, 0).size == (1600, 1200)
    narrow = encoded(photo(1600, 200), "JPEG")
    assert open_picture(narrow, 224).size == (1600, 200)


def huge_png(width: int, height: int) -> bytes:
    """Its header says so; there are no pixels."""
    data = bytearray(encoded(Image.new("L", (8, 8))))
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    import zlib

    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("sides", [(8001, 8000), (20_000, 20_000), (60_000, 60_000)])
def test_a_bomb_is_refused_by_its_header(sides):
    assert reason_of(huge_png(*sides)) == "too large"
    assert reason_of(huge_png(*sides), 224) == "too large"


def test_what_is_no_picture_has_a_reason(tmp_path):
    good = encoded(photo(), "JPEG")
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    cases = {
        b"": "empty",
        b"  <!DOCTYPE html><html>404</html>": "a web page",
        b"\xef\xbb\xbf<html>": "a web page",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0": "a Git LFS pointer",
        b"hello": "not a picture",
        b"\0\0\0\x18ftypheic": "not a picture",
        b"\0" * 5000: "torn",
        good[:20]: "torn",
        good[: len(good) // 2]: "torn",
        encoded(photo())[:-300]: "torn",
        encoded(Image.new("RGB", (1, 3000))): "too narrow",
        tmp_path / "none.jpg": "missing",
        tmp_path / "empty.jpg/x.jpg": "missing",
        tmp_path / "empty.jpg": "empty",
        tmp_path / "pipe.jpg": "not a file",
        tmp_path: "not a file",
        "/dev/zero": "not a file",
        "a\0b": "not readable",
    }
    for source, reason in cases.items():
        assert reason_of(source) == reason, source
    assert reason_of(good[: len(good) // 2], 64) == "torn"
    # the one example that people see
    with pytest.raises(PictureError, match="HEIC"):
        open_picture(b"\0\0\0\x18ftypheic")


def test_what_cannot_be_opened_leaves_no_file_open(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        for source in (
            tmp_path,
            tmp_path / "pipe.jpg",
            tmp_path / "none.jpg",
            tmp_path / "torn.jpg",
        ):
            reason_of(source)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("form", ["member", "base64"])
def test_a_part_of_a_file_is_as_large_as_a_file_may_be(tmp_path, monkeypatch, form):
    """What a header says is asked before a byte is read: it may say terabytes."""
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)
    place = Place(str(tmp_path / "large"), form, 0, 1 << 39)
    monkeypatch.setattr(pictures, "_read", lambda *_: pytest.fail("it was read"))
    assert reason_of(place) == "too large"


def test_a_pipe_with_the_name_of_a_tar_is_passed_over(tmp_path):
    for name in ("pipe.tar", "pipe_imgs.tsv"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "a.png").write_bytes(encoded(photo()))
    problems = []
    assert [place.path for place in find_places(tmp_path, problems)] == [str(tmp_path / "a.png")]
    assert len(problems) == 2 and all("not a file" in problem for problem in problems)


def test_no_other_program_is_started_for_a_picture():
    """Pillow would run ghostscript for these."""
    assert reason_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n") == (
        "not a picture"
    )
    assert not {"EPS", "WMF", "PSD", "FITS"} & set(pictures.FORMATS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_torn_and_changed_bytes_give_a_picture_or_a_reason(kind):
    """Whatever the decoders stumble over: nothing else than PictureError comes out."""
    data = encoded(photo(48, 40), kind)
    chance = random.Random(kind)
    for trial in range(150):
        bad = bytearray(data[: chance.randrange(len(data))] if trial % 3 == 0 else data)
        for _ in range(chance.randrange(4)):
            if bad:
                bad[chance.randrange(len(bad))] = chance.randrange(256)
        try:
            assert open_picture(bytes(bad), chance.choice([None, 16])).mode == "RGB"
        except PictureError as error:
            assert error.reason


def test_pixels_are_those_of_the_models_processor():
    image = photo(64, 48)
    for processor in (
        ChineseCLIPImageProcessorPil(),
        CLIPImageProcessorPil(size={"shortest_edge": 32}),
    ):
        expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pictures.pixels(encoded(image), processor), expected)


def test_the_size_before_the_crop_counts():
    target = pictures.target_size
    assert target(CLIPImageProcessorPil(size={"shortest_edge": 256}, crop_size=224)) == 256
    assert target(ChineseCLIPImageProcessorPil(size={"height": 48, "width": 64})) == 64
    assert target(CLIPImageProcessorPil(do_resize=False)) == 0


def test_one_file_has_the_same_pixels_wherever_it_lies(tmp_path):
    """A file, its bytes, a member of a tar, a line of a tsv: what training, index and page open."""
    data = encoded(photo(1024, 768), "JPEG")
    (tmp_path / "a.jpg").write_bytes(data)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.jpg", "x/a.jpg")
    (tmp_path / "a_imgs.tsv").write_bytes(b"7\t" + base64.urlsafe_b64encode(data) + b"\n")
    processor = ChineseCLIPImageProcessorPil()
    expected = pictures.pixels(data, processor)
    places = list(pictures.find_places(tmp_path))
    assert [place.form for place in places] == ["file", "member", "base64"]
    assert [str(place)[len(str(tmp_path)) :] for place in places] == [
        "/a.jpg",
        "/a.tar:x/a.jpg",
        "/a_imgs.tsv:7",
    ]
    for source in [*places, str(tmp_path / "a.jpg"), tmp_path / "a.jpg"]:
        assert torch.equal(pictures.pixels(source, processor), expected)
    assert all(Place(**asdict(place)) == place for place in places)


# ---- many in one ---------------------------------------------------------------------------------


def test_a_torn_tar_gives_what_stands_before(tmp_path):
    small = encoded(photo(16, 16))
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as tar:
        for i in range(10):
            info = tarfile.TarInfo(f"{i}.png")
            info.size = len(small)
            tar.addfile(info, io.BytesIO(small))
    whole = list(pictures.tar_members(file))
    data = file.read_bytes()
    assert [name for name, *_ in whole] == [f"{i}.png" for i in range(10)]
    assert data[whole[3][1] :][: len(small)] == small
    cuts = {whole[4][1] + 100: 4, whole[4][1] - 512: 4, whole[4][1] - 212: 4}
    for cut, count in cuts.items():
        file.write_bytes(data[:cut])
        problems = []
        found = list(pictures.find_places(file, problems))
        # a cut before a header ends the tar like any other
        assert len(found) in (count, count + 1) and (problems or cut == whole[4][1] - 512)
    broken = bytearray(data)
    broken[whole[4][1] - 512 : whole[4][1] - 400] = b"q" * 112
    file.write_bytes(broken)
    problems = []
    assert len(list(pictures.find_places(file, problems))) == 4
    assert "torn" in problems[0] and "header" in problems[0]


def test_a_compressed_tar_is_named(tmp_path):
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w:gz") as tar:
        tar.add(__file__, "x.py")
    with pytest.raises(PictureError, match="gunzip"):
        list(pictures.tar_members(file))


def test_links_lead_nowhere(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(photo(8, 8)))
    root = tmp_path / "root"
    root.mkdir()
    (root / "in.png").write_bytes(secret.read_bytes())
    (root / "out.png").symlink_to(secret)
    (root / "folder").symlink_to(tmp_path)
    (root / "twin.png").symlink_to(root / "in.png")
    problems = []
    found = [Path(str(place)).name for place in pictures.find_places(root, problems)]
    assert found == ["in.png", "twin.png"]
    assert "leads out" in problems[0]
    for path in (root / "out.png", root / "../secret.png", root / "folder/secret.png", secret):
        assert reason_of(Place(str(path), root=str(root))) == "outside the picture folder"
    assert open_picture(Place(str(root / "twin.png"), root=str(root))).size == (8, 8)
    # a link that was put there after it was indexed
    (root / "in.png").unlink()
    (root / "in.png").symlink_to(secret)
    assert reason_of(Place(str(root / "in.png"), root=str(root))) == "outside the picture folder"


def test_the_wrong_base64_is_torn(tmp_path):
    assert reason_of_base64(tmp_path, b"$$$") == "torn"
    assert reason_of_base64(tmp_path, b"aGVsbG8=") == "not a picture"
    assert reason_of_base64(tmp_path, b"") == "empty"


def reason_of_base64(folder: Path, text: bytes) -> str:
    file = folder / "b_imgs.tsv"
    file.write_bytes(b"1\t" + text + b"\r\n")
    (place,) = pictures.find_places(file)
    return reason_of(place)


def test_any_base64_alphabet():
    data = bytes(range(256))
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        assert pictures.from_base64(encode(data)) == data
        assert pictures.from_base64(encode(data).rstrip(b"=") + b"\r\n") == data


# ---- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_every_format_comes_out_as_rgb(kind):
    image = open_picture(encoded(halves(), kind))
    assert image.mode == "RGB" and image.size == (40, 20)
    assert near(image.getpixel((5, 10)), RED) and near(image.getpixel((35, 10)), BLUE)


def test_the_first_picture_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert near(open_picture(data).getpixel((4, 4)), RED)


# ---- what is refused -----------------------------------------------------------------------------


def test_reasons():
    jpeg = encoded(halves(400, 300), "JPEG")
    assert reason(b"") == "empty"
    assert reason(jpeg[: len(jpeg) // 2]) == "torn"
    assert reason(jpeg[:20]) == "torn"
    assert reason(encoded(halves(), "PNG")[:-30]) == "torn"
    assert reason(b"<!DOCTYPE html><html>404") == "a web page"
    assert (
        reason(b"version https://git-lfs.github.com/spec/v1\noid sha256:1") == "a Git LFS pointer"
    )
    assert reason(b"\0\0\0\x18ftypheic") == "not a picture"
    assert reason(b"hello") == "not a picture"
    assert reason(encoded(Image.new("L", (1, 500)), "PNG")) == "too narrow"
    assert reason(encoded(Image.new("1", (10_000, 10_000)), "PNG")) == "too large"
    assert reason(encoded(Image.new("1", (16_000, 16_000)), "PNG")) == "too large"


def test_files_that_are_none(tmp_path, monkeypatch):
    assert reason(tmp_path / "no.png") == "missing"
    assert reason(tmp_path) == "not a file"
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "pipe.png") == "not a file"  # and does not wait for a writer
    assert reason("a\0b.png") == "not readable"
    monkeypatch.setattr(pictures, "MAX_BYTES", 10)
    (tmp_path / "a.png").write_bytes(encoded(halves(), "PNG"))
    assert reason(tmp_path / "a.png") == "too large"


def test_nothing_outside_the_root(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded(halves(), "PNG"))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    for path in (root / "../secret.png", root / "link.png", tmp_path / "secret.png"):
        assert reason(Place(str(path), root=str(root))) == "outside the picture folder"
    (root / "own.png").write_bytes(encoded(halves(), "PNG"))
    assert open_picture(Place(str(root / "own.png"), root=str(root))).size == (40, 20)


def test_an_error_crosses_processes():
    error = pickle.loads(pickle.dumps(PictureError("torn", "at byte 3")))
    assert (error.reason, error.detail, str(error)) == ("torn", "at byte 3", "torn (at byte 3)")


# ---- folders ----


def test_a_folder_leaves_hidden_files_and_links_out(tmp_path):
    inner = tmp_path / "in" / "deep"
    inner.mkdir(parents=True)
    for path in (inner / "b.png", tmp_path / "in" / "a.JPG", tmp_path / "in" / ".hidden.png"):
        path.write_bytes(b"x")
    (tmp_path / "out.png").write_bytes(b"x")
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "out.png")
    (tmp_path / "in" / "notes.txt").write_text("x")
    found = [os.path.relpath(place.path, tmp_path / "in") for place in find_places(tmp_path / "in")]
    assert found == ["a.JPG", "deep/b.png"]


def test_what_a_processor_resizes_to():
    from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

    assert pictures.target_size(CLIPImageProcessorPil(size={"shortest_edge": 64})) == 64
    assert pictures.target_size(ViTImageProcessorPil(size={"height": 32, "width": 48})) == 48
    assert pictures.target_size(ViTImageProcessorPil(do_resize=False)) == 0
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    assert pictures.pixels(encoded(halves(), "PNG"), processor).shape == (3, 32, 32)
