"""Small copies of pictures as data URLs, for pages that need no other file."""

import base64
import io

from PIL import Image


def thumbnail_url(image: Image.Image, size: int) -> str:
    """A copy of at most `size` pixels a side as a data URL: exact where the picture is small, else JPEG."""
    small, copy = max(image.size) <= size, image.copy()
    copy.thumbnail((size, size))
    file = io.BytesIO()
    copy.save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 80}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"
