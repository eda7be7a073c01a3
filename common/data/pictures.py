"""The one way in which pictures are opened: by training, evaluation and pages alike.

A picture comes out as RGB, upright, its transparent parts on white. What cannot be used raises
PictureError, whose `reason` is what it is counted under. Nothing is decoded before its size is
known, and nothing but the formats below is tried (Pillow's others may start programs or read
fonts).
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import stat
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

Image.init()
FORMATS = [
    name
    for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000")
    if name in Image.OPEN  # Pillow may be built without some
]
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".avif", ".jp2", ".j2k"),
)
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 << 20
# of the part of a file that is one picture; base64 writes three bytes as four
LARGEST = {"file": MAX_BYTES, "member": MAX_BYTES, "base64": 4 * MAX_BYTES // 3 + 4}
MAX_RATIO = 200  # of the sides: one pixel by 60,000 would become 224 by 13 million
ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {  # its values -> what brings the picture upright (EXIF 2.32, section 4.6.4)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WHITE = (255, 255, 255, 255)
BEGINNINGS = (  # of files that are a picture of some kind, whole or not
    *(b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*"),
    *(b"\0\0\0\x0cjP", b"\xff\x4f\xff\x51"),
)
# refused by MAX_PIXELS, which is lower than where Pillow begins to warn
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class PictureError(ValueError):
    """A picture that cannot be used.

    reason: what it is counted under: missing, not a file, outside the picture folder, empty, torn,
        not a picture, a web page, a Git LFS pointer, too large, too narrow, not readable.
    detail: shown with the one example of that reason.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self):  # it crosses from worker processes
        return PictureError, (self.reason, self.detail)


# ---- where a picture lies ------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where the bytes of a picture lie: a file, or a part of one.

    form: "file" (all of it), "member" (of a tar: `size` bytes from `offset`) or "base64" (the same,
        of a line of an *_imgs.tsv).
    name: of the member, or the picture's id; for people.
    root: a folder out of which neither `..` nor links may lead; "": none.
    """

    path: str
    form: str = "file"
    offset: int = 0
    size: int = 0
    name: str = ""
    root: str = ""

    def __str__(self) -> str:
        return f"{self.path}:{self.name}" if self.name else self.path

    def read(self) -> bytes:
        """PictureError where there is nothing that can be read."""
        if self.root and not inside(self.path, self.root):
            raise PictureError("outside the picture folder", f"not in {self.root}")
        if self.size > LARGEST[self.form]:
            raise PictureError("too large", f"more than {MAX_BYTES >> 20} MiB")
        size = MAX_BYTES + 1 if self.form == "file" else self.size
        data = _read(self.path, self.offset, size)
        if self.form != "file" and len(data) < self.size:
            raise PictureError("torn", "the file ends before this picture")
        return from_base64(data) if self.form == "base64" else data


def inside(path: str | Path, root: str | Path) -> bool:
    """Whether a path, links followed, lies in a folder."""
    root = os.path.realpath(root)
    return os.path.commonpath([root, os.path.realpath(path)]) == root


def _read(path: str, offset: int, size: int) -> bytes:
    try:
        with open(path, "rb", opener=without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PictureError("not a file")
            file.seek(offset)
            return file.read(size)
    except PictureError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise PictureError("missing") from None
    except IsADirectoryError:
        raise PictureError("not a file", "a folder") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero in it
        raise PictureError("not readable", getattr(error, "strerror", "") or str(error)) from None


def without_waiting(path: str, flags: int) -> int:
    """For open(): a pipe would wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)


def from_base64(data: bytes) -> bytes:
    """Standard or urlsafe alphabet, with or without padding."""
    data = data.strip().rstrip(b"=").translate(bytes.maketrans(b"-_", b"+/"))
    try:
        return base64.b64decode(data + b"=" * (-len(data) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise PictureError("torn", "wrong base64") from None


# ---- many in one file, or in a folder ------------------------------------------------------------


def tar_members(path: str | Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, bytes) of the files in a tar, in their order; nothing is unpacked.

    PictureError at its end where the tar is torn: what stands before is sound.
    """
    size = os.path.getsize(path)
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # it would keep all of them
                if member.isreg() and not member.issparse():
                    if member.offset_data + member.size > size:
                        raise PictureError("torn", f"the tar ends inside {member.name}")
                    yield member.name, member.offset_data, member.size
            end = tar.offset
    except (tarfile.TarError, EOFError, OSError) as error:
        hint = "a compressed tar has no offsets; gunzip it" if _is_compressed(path) else str(error)
        raise PictureError("torn", hint) from None
    # tarfile takes whatever is no header for the end
    if end < size and _read(os.fspath(path), end, 512).strip(b"\0"):
        raise PictureError("torn", f"byte {end:,} of the tar is no header")


def _is_compressed(path: str | Path) -> bool:
    return _read(os.fspath(path), 0, 4).startswith(
        (b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f")
    )


def tsv_pictures(path: str | Path) -> Iterator[tuple[int, str, int, int]]:
    """(line, picture's id, offset, bytes) of the base64 texts in an *_imgs.tsv; the id is "" for a
    line that has no tab."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(iter(partial(file.readline, 2 * MAX_BYTES), b""), 1):
            name, tab, text = line.rstrip(b"\r\n").partition(b"\t")
            if tab:
                start = offset + len(name) + 1
                yield number, name.decode(errors="replace").strip(), start, len(text)
            elif name.strip():
                yield number, "", offset, len(name)
            offset += len(line)


def find_places(path: str | Path, problems: list | None = None) -> Iterator[Place]:
    """Every picture of a file, tar, *_imgs.tsv or folder (and of the tars and tsv files in it), by
    name; hidden files and links that lead out of the folder are passed over.

    problems: gets a text for each file that is torn, and for each such link.
    """
    path = Path(path)
    if not path.is_dir():
        yield from _places_in(path, "", problems)
        return
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            suffixes = (*SUFFIXES, ".tar", "_imgs.tsv")
            if name.startswith(".") or not name.lower().endswith(suffixes):
                continue
            if not file.is_symlink() or inside(file, path):
                yield from _places_in(file, str(path), problems)
            elif problems is not None:
                problems.append(f"{file}: a link that leads out of the folder")


def _places_in(file: Path, root: str, problems: list | None) -> Iterator[Place]:
    """The pictures of one file."""
    try:
        is_tar = file.suffix.lower() == ".tar"
        is_tsv = file.name.endswith("_imgs.tsv")
        if (is_tar or is_tsv) and not file.is_file():  # a pipe would wait for its writer
            raise PictureError("not a file")
        if is_tar:
            for name, offset, size in tar_members(file):
                if name.lower().endswith(SUFFIXES):
                    yield Place(str(file), "member", offset, size, name, root)
        elif is_tsv:
            for _, name, offset, size in tsv_pictures(file):
                if name:
                    yield Place(str(file), "base64", offset, size, name, root)
        else:
            yield Place(str(file), root=root)
    except (PictureError, OSError) as error:
        if problems is None:
            raise
        problems.append(f"{file}: {error}")


# ---- opening -------------------------------------------------------------------------------------


def open_picture(source, size: int | None = None) -> Image.Image:
    """A path, bytes, Place or Pillow image -> RGB, upright, transparent parts on white.

    size: both sides will be brought to about this many pixels: a JPEG is then decoded at 1/2, 1/4
        or 1/8 as long as both sides stay at least so long. Give it everywhere or nowhere: the
        pixels differ a little (an image that is already decoded is never reduced).
    16-bit grey keeps its high byte; of animations the first picture is taken. PictureError for what
    is no usable picture.
    """
    data = b""
    image = source
    if not isinstance(source, Image.Image):
        data = _bytes_of(source)
        image = identified(data)
    _check_shape(*image.size)
    try:
        if size:
            image.draft("RGB", (size, size))
        image.load()
        return _rgb(_upright(image))
    except MemoryError:
        raise
    except Exception as error:  # torn files raise what the decoders stumble over: anything
        raise PictureError("torn", " ".join(str(error).split())[:80]) from None


def _bytes_of(source) -> bytes:
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    else:
        place = source if isinstance(source, Place) else Place(os.fspath(source))
        data = place.read()
    if len(data) > MAX_BYTES:
        raise PictureError("too large", f"more than {MAX_BYTES >> 20} MiB")
    return data


def identified(data: bytes) -> Image.Image:
    """Its size and format are known, no pixel is decoded."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except MemoryError:
        raise
    except Image.DecompressionBombError:
        raise PictureError("too large", f"more than {MAX_PIXELS // 1_000_000} megapixels") from None
    except UnidentifiedImageError:
        raise _no_picture(data) from None
    except Exception as error:
        raise PictureError("torn", " ".join(str(error).split())[:80]) from None


def _no_picture(data: bytes) -> PictureError:
    head = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not data:
        return PictureError("empty", "0 bytes")
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")):
        return PictureError("a web page", "HTML in place of the picture")
    if head.startswith(b"version https://git-lfs"):
        return PictureError("a Git LFS pointer", "fetch the file itself: git lfs pull")
    if head[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftyphevc"):
        return PictureError("not a picture", "HEIC is not read; save it as JPEG")
    if data.startswith(BEGINNINGS) or not data.strip(b"\0"):
        return PictureError("torn", "it ends, or is broken, in its first bytes")
    return PictureError("not a picture", f"it begins with {data[:12]!r}")


def _check_shape(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        megapixels = width * height / 1e6
        raise PictureError("too large", f"{megapixels:.0f} megapixels, {width} x {height}")
    if min(width, height) < 1:
        raise PictureError("empty", f"{width} x {height} pixels")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise PictureError("too narrow", f"{width} x {height} pixels")


def _upright(image: Image.Image) -> Image.Image:
    """As ImageOps.exif_transpose, which fails on other EXIF tags that it cannot write again."""
    try:
        turned = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except Exception:  # a broken EXIF block says nothing of the orientation
        turned = None
    if turned is None:
        return image
    upright = image.transpose(turned)
    upright.info.pop("exif", None)  # or whoever opens this image again would turn it again
    return upright


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):
        image = _grey8(image)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, WHITE), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey8(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by its high byte (Pillow's own conversion cuts everything above 255 off);
    wider integers and floats from their smallest to their largest value."""
    grey = np.asarray(image)
    fits = grey.dtype.kind in "iu" and grey.min() >= 0 and grey.max() <= 0xFFFF
    if fits:
        return Image.fromarray((grey.astype(np.uint16) >> 8).astype(np.uint8))
    grey = np.nan_to_num(grey.astype(np.float64), posinf=0.0, neginf=0.0)
    span = float(grey.max() - grey.min()) or 1.0
    return Image.fromarray(((grey - grey.min()) / span * 255).round().astype(np.uint8))


# ---- for a model ---------------------------------------------------------------------------------


def target_size(image_processor) -> int:
    """The longest side that an image processor brings pictures to before it crops: what `size` of
    open_picture should be. 0 where it does not resize: then nothing may be reduced before it."""
    if not getattr(image_processor, "do_resize", False):
        return 0
    size = image_processor.size
    if isinstance(size, int):
        return size
    size = dict(size)
    names = ("height", "width", "shortest_edge", "longest_edge")
    return max(int(size.get(name) or 0) for name in names)


def pixels(picture, image_processor):
    """A picture (whatever open_picture takes) -> torch.Tensor [3, H, W] float32, what the model's
    own processor makes of it."""
    image = open_picture(picture, target_size(image_processor))
    return image_processor(images=image, return_tensors="pt")["pixel_values"][0]
