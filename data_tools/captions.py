"""Captions: what is repaired in them, and which are left out.

Every caption loses control characters and repeated white space; empty ones and repetitions are dropped. `clean_captions` also undoes what
pages of the web do to text, in this order (docs/shards.md states it for users):

1. HTML characters: `&amp;` becomes `&`, again while that leaves others (`&amp;amp;`), three times at most
2. HTML tags and comments go; those that break a line leave a space. `<PERSON>` and other words in brackets stay
3. Unicode becomes NFC: one spelling for each letter with its accents
4. invisible characters go: soft hyphens, zero-width spaces, marks of writing direction, byte order marks, private ones and U+FFFD; joiners,
   of which Persian, Indic scripts and emoji are made, stay
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Iterable, Sequence

from data_tools.packing import BadRow, Packing

_UNESCAPES = 3
_ATTRIBUTES = r"(\s+[\w:-]+(\s*=[^<>]*)?)?\s*/?"
_WITHIN = "a|abbr|b|big|code|em|font|i|img|mark|small|span|strike|strong|sub|sup|tt|u"
_BETWEEN = "blockquote|br|center|div|figcaption|h[1-6]|hr|li|ol|p|pre|table|tbody|td|th|tr|ul"
_INLINE = re.compile(rf"<!--.*?-->|</?({_WITHIN}){_ATTRIBUTES}>", re.IGNORECASE | re.DOTALL)
_BREAKING = re.compile(rf"</?({_BETWEEN}){_ATTRIBUTES}>", re.IGNORECASE)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_INVISIBLE = re.compile(
    "[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffd\ue000-\uf8ff\U000f0000-\U0010ffff]"
)


def pack_captions(captions: Sequence[str], packing: Packing) -> list[str]:
    """The captions that are packed.

    Raises:
        BadRow: there are none, or none has as many words as asked.
    """
    tidied = tidy(map(repair, captions) if packing.clean_captions else captions)
    if not tidied:
        raise BadRow("no caption", "it is empty" if captions else "there is none")
    lengths = [len(caption.split()) for caption in tidied]
    most = packing.max_words or max(lengths)
    packed = [caption for caption, words in zip(tidied, lengths, strict=True) if packing.min_words <= words <= most]
    if not packed:
        longest, shortest = max(lengths), min(lengths)
        if longest < packing.min_words:
            raise BadRow("caption too short", f"{longest} words: {tidied[lengths.index(longest)][:200]}")
        raise BadRow("caption too long", f"{shortest} words: {tidied[lengths.index(shortest)][:200]}")
    return packed


def tidy(captions: Iterable[str]) -> list[str]:
    """Captions with single spaces and no control characters; empty ones and repetitions are dropped."""
    cleaned = (" ".join(_without_controls(caption).split()) for caption in captions)
    return list(dict.fromkeys(caption for caption in cleaned if caption))


def _without_controls(text: str) -> str:
    return text if text.isprintable() else "".join(char if char >= " " else " " for char in text)


def repair(caption: str) -> str:
    """The caption as its writer saw it; white space may be left over."""
    for _ in range(_UNESCAPES):
        caption, before = html.unescape(caption), caption
        if caption == before:
            break
    text = _BREAKING.sub(" ", _INLINE.sub("", caption)) if "<" in caption else caption
    if text.isascii() and text.isprintable():
        return text
    return _INVISIBLE.sub("", _CONTROL.sub(" ", unicodedata.normalize("NFC", text)))
