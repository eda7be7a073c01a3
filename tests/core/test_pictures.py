"""common/data/pictures: what opens, how it comes out, and what is refused under which reason."""

import base64
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from common.data import pictures
from common.data.pictures import PictureError, Place, find_places, open_picture

RED, BLUE = (200, 30, 40), (20, 60, 220)


def saved(image: Image.Image, kind: str, **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


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


# ---- what comes out ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_every_format_comes_out_as_rgb(kind):
    image = open_picture(saved(halves(), kind))
    assert image.mode == "RGB" and image.size == (40, 20)
    assert near(image.getpixel((5, 10)), RED) and near(image.getpixel((35, 10)), BLUE)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_orientations_come_out_upright(orientation):
    """A picture is stored turned, with the tag that says so; it has to look as it was."""
    upright = halves()
    back = {2: 0, 3: 1, 4: 2, 5: 3, 6: 4, 7: 5, 8: 6}
    turns = [
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.ROTATE_180,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.TRANSPOSE,
        Image.Transpose.ROTATE_90,  # 6 is undone by 270
        Image.Transpose.TRANSVERSE,
        Image.Transpose.ROTATE_270,
    ]
    stored = upright.transpose(turns[back[orientation]]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = open_picture(saved(stored, "PNG", exif=exif))
    assert image.size == (40, 20) and np.array_equal(np.asarray(image), np.asarray(upright))


def test_transparent_parts_lie_on_white():
    image = Image.new("RGBA", (8, 8), (*RED, 0))
    image.paste((*BLUE, 255), (0, 0, 4, 8))
    for data in (saved(image, "PNG"), saved(image, "WEBP", lossless=True)):
        found = open_picture(data)
        assert found.getpixel((6, 4)) == (255, 255, 255) and near(found.getpixel((1, 4)), BLUE)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([*RED, *BLUE])
    assert open_picture(saved(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255,) * 3


def test_sixteen_bits_keep_their_high_byte():
    ramp = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)
    found = np.asarray(open_picture(saved(Image.fromarray(ramp), "PNG")))
    assert np.array_equal(found[..., 0], (ramp >> 8).astype(np.uint8))


def test_cmyk_grey_and_one_bit_become_rgb():
    cmyk = halves().convert("CMYK")
    assert near(open_picture(saved(cmyk, "JPEG")).getpixel((5, 10)), RED)
    for mode in ("L", "1", "LA"):
        assert open_picture(saved(halves().convert(mode), "PNG")).mode == "RGB"


def test_the_first_picture_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in (RED, BLUE)]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert near(open_picture(data).getpixel((4, 4)), RED)


def test_a_large_jpeg_is_decoded_small():
    data = saved(halves(1600, 1200), "JPEG")
    assert open_picture(data, 224).size == (400, 300)
    assert open_picture(data).size == (1600, 1200)
    assert open_picture(saved(halves(1600, 1200), "PNG"), 224).size == (1600, 1200)


# ---- what is refused -----------------------------------------------------------------------------


def test_reasons():
    jpeg = saved(halves(400, 300), "JPEG")
    assert reason(b"") == "empty"
    assert reason(jpeg[: len(jpeg) // 2]) == "torn"
    assert reason(jpeg[:20]) == "torn"
    assert reason(saved(halves(), "PNG")[:-30]) == "torn"
    assert reason(b"<!DOCTYPE html><html>404") == "a web page"
    assert (
        reason(b"version https://git-lfs.github.com/spec/v1\noid sha256:1") == "a Git LFS pointer"
    )
    assert reason(b"\0\0\0\x18ftypheic") == "not a picture"
    assert reason(b"hello") == "not a picture"
    assert reason(saved(Image.new("L", (1, 500)), "PNG")) == "too narrow"
    assert reason(saved(Image.new("1", (10_000, 10_000)), "PNG")) == "too large"
    assert reason(saved(Image.new("1", (16_000, 16_000)), "PNG")) == "too large"


def test_formats_that_start_programs_are_not_tried():
    assert reason(saved(halves(), "EPS")) == "not a picture"
    assert reason(saved(halves(), "PDF")) == "not a picture"


def test_files_that_are_none(tmp_path, monkeypatch):
    assert reason(tmp_path / "no.png") == "missing"
    assert reason(tmp_path) == "not a file"
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "pipe.png") == "not a file"  # and does not wait for a writer
    assert reason("a\0b.png") == "not readable"
    monkeypatch.setattr(pictures, "MAX_BYTES", 10)
    (tmp_path / "a.png").write_bytes(saved(halves(), "PNG"))
    assert reason(tmp_path / "a.png") == "too large"


def test_nothing_outside_the_root(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(saved(halves(), "PNG"))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    for path in (root / "../secret.png", root / "link.png", tmp_path / "secret.png"):
        assert reason(Place(str(path), root=str(root))) == "outside the picture folder"
    (root / "own.png").write_bytes(saved(halves(), "PNG"))
    assert open_picture(Place(str(root / "own.png"), root=str(root))).size == (40, 20)


def test_an_error_crosses_processes():
    error = pickle.loads(pickle.dumps(PictureError("torn", "at byte 3")))
    assert (error.reason, error.detail, str(error)) == ("torn", "at byte 3", "torn (at byte 3)")


# ---- many in one file, or in a folder ------------------------------------------------------------


def packed(folder):
    """A tar and an *_imgs.tsv with the same two pictures."""
    data = {
        name: saved(Image.new("RGB", (4, 4), c), "PNG") for name, c in (("a", RED), ("b", BLUE))
    }
    with tarfile.open(folder / "x.tar", "w") as tar:
        for name, content in data.items():
            info = tarfile.TarInfo(f"{name}.png")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    lines = [f"{name}\t{base64.b64encode(content).decode()}\n" for name, content in data.items()]
    (folder / "y_imgs.tsv").write_text("".join(lines))
    return data


def test_pictures_inside_other_files(tmp_path):
    packed(tmp_path)
    places = list(find_places(tmp_path))
    assert [place.form for place in places] == ["member", "member", "base64", "base64"]
    colors = [open_picture(place).getpixel((0, 0)) for place in places]
    assert colors == [RED, BLUE, RED, BLUE]
    assert pickle.loads(pickle.dumps(places[0])) == places[0]


def test_a_torn_container_gives_what_is_whole(tmp_path):
    packed(tmp_path)
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[: 512 + 512 + 512 + 20])
    problems: list = []
    places = list(find_places(tmp_path / "x.tar", problems))
    assert [place.name for place in places] == ["a.png"] and "torn" in problems[0]
    with pytest.raises(PictureError, match="torn"):
        list(find_places(tmp_path / "x.tar"))
    place = Place(str(tmp_path / "y_imgs.tsv"), "base64", 0, 10**6, "a")
    with pytest.raises(PictureError, match="torn"):
        place.read()


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
    assert pictures.pixels(saved(halves(), "PNG"), processor).shape == (3, 32, 32)
