"""The form of a segment file: a head, a table of record headers, then the pages themselves.

    head      magic, fingerprint of what made the pages, sizes, time of creation, digest
    table     per slot: mark, parent's mark, checksum of the page, tokens; zeros when empty
    pages     per slot: the page's bytes

The table is apart from the pages so that a start learns what a segment holds by reading a few
kilobytes. Slots are filled in order, the page before its header. Nothing read is believed: a
header must equal the one the reader expects, and the page its checksum.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from hashlib import blake2b

from coppice.cache.marks import MARK_BYTES, PageKey
from coppice.weights.stored import checksum

MAGIC = b"COPKV\0\0\1"
ALIGN = 4096
MOST_SLOTS = 1 << 14
_HEAD = struct.Struct("<8s32sIIIQ16s")
"""Magic, fingerprint, tokens and bytes of a page, slots, nanoseconds since 1970, digest."""
_CHECKSUM_BYTES = 16


@dataclass(frozen=True, slots=True)
class SegmentForm:
    """Where things lie in the segments of one model's pages.

    Attributes:
        fingerprint: 32 bytes; of model, formats and kernels.
        page_size: tokens a page.
        page_bytes: bytes of a page over all layers.
        slots: pages a segment has room for.
    """

    fingerprint: bytes
    page_size: int
    page_bytes: int
    slots: int

    @property
    def header_bytes(self) -> int:
        """Bytes of a record's header."""
        return 2 * MARK_BYTES + _CHECKSUM_BYTES + 4 * self.page_size

    @property
    def table_at(self) -> int:
        """First byte of the table."""
        return ALIGN

    @property
    def pages_at(self) -> int:
        """First byte of the pages."""
        return -(-(self.table_at + self.slots * self.header_bytes) // ALIGN) * ALIGN

    @property
    def file_bytes(self) -> int:
        """A full segment's size."""
        return self.pages_at + self.slots * self.page_bytes

    def header_at(self, slot: int) -> int:
        """First byte of a slot's header."""
        return self.table_at + slot * self.header_bytes

    def page_at(self, slot: int) -> int:
        """First byte of a slot's page."""
        return self.pages_at + slot * self.page_bytes

    def head(self, created_ns: int) -> bytes:
        """The bytes a segment of this form begins with."""
        fields = (MAGIC, self.fingerprint, self.page_size, self.page_bytes, self.slots, created_ns)
        unsigned = _HEAD.pack(*fields, b"")
        return _HEAD.pack(*fields, blake2b(unsigned, digest_size=16).digest())

    def header(self, key: PageKey, page: memoryview) -> bytes:
        """The header of a page."""
        sum_ = checksum(page)[:_CHECKSUM_BYTES].encode()
        tokens = struct.pack(f"<{self.page_size}i", *key.tokens)
        return key.mark + key.parent + sum_ + tokens

    def marks(self, table: bytes) -> list[bytes]:
        """The marks of the slots in use."""
        found = []
        for at in range(0, len(table) - self.header_bytes + 1, self.header_bytes):
            mark = table[at : at + MARK_BYTES]
            if mark == bytes(MARK_BYTES):
                break
            found.append(mark)
        return found


def read_head(data: bytes, like: SegmentForm) -> SegmentForm | None:
    """The form of a segment that holds pages ``like`` ours, by its first bytes.

    Segments may have been made with another number of slots. None for other models' segments,
    damaged ones and files of something else.
    """
    if len(data) < _HEAD.size:
        return None
    magic, fingerprint, page_size, page_bytes, slots, created_ns, _ = _HEAD.unpack_from(data)
    form = SegmentForm(fingerprint, page_size, page_bytes, slots)
    same = (fingerprint, page_size, page_bytes) == (
        like.fingerprint,
        like.page_size,
        like.page_bytes,
    )
    sound = magic == MAGIC and same and 0 < slots <= MOST_SLOTS
    return form if sound and data[: _HEAD.size] == form.head(created_ns) else None


HEAD_BYTES = _HEAD.size
