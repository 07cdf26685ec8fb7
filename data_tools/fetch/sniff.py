"""What a body is, by its first bytes; what a server says of it is not believed."""

from __future__ import annotations

from typing import Literal

HEAD_BYTES = 16
"""What `kind_of` needs."""

Kind = Literal["image", "speech", ""]

_IMAGES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF87a", b"GIF89a", b"BM", b"II*\0", b"MM\0*")
_SPEECH = (b"fLaC", b"OggS", b"ID3", b".snd", b"caff")
_BRANDS = (b"avif", b"avis")


def kind_of(head: bytes) -> Kind:
    """Whether bytes begin as an image or a recording does; empty when they begin otherwise."""
    inner = head[8:12]
    if head.startswith(_IMAGES) or (head.startswith(b"RIFF") and inner == b"WEBP") or (head[4:8] == b"ftyp" and inner in _BRANDS):
        return "image"
    wave = (head.startswith((b"RIFF", b"RF64")) and inner == b"WAVE") or (head.startswith(b"FORM") and inner in (b"AIFF", b"AIFC"))
    if wave or head.startswith(_SPEECH) or (head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xE6 in (0xE2, 0xE4, 0xE6)):
        return "speech"
    return ""
