"""The checksums of a PNG, which PIL reads past: of a file that lost its end to zeros it makes a picture with black."""

import struct
import zlib
from typing import BinaryIO

_HEAD = struct.Struct(">I4s")


def check_png(file: BinaryIO) -> None:
    """Raises OSError for a PNG in which header, palette or pixels are not those that were written."""
    file.seek(8)
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        length, name = _HEAD.unpack(head)
        if name == b"IEND":
            return
        if name in (b"IHDR", b"PLTE", b"IDAT"):
            content, checksum = file.read(length), file.read(4)
            if len(content) < length or zlib.crc32(content, zlib.crc32(name)) != int.from_bytes(checksum):
                raise OSError(f"the checksum of its part {name.decode()} does not fit, so that it is damaged")
        else:
            file.seek(length + 4, 1)
