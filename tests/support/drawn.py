"""Pictures for tests."""

import io

import numpy as np
from PIL import Image, ImageDraw


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def photo(width: int = 640, height: int = 480, seed: int = 0) -> Image.Image:
    """Smooth areas with edges, like a photo's."""
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill="navy")
    return image
