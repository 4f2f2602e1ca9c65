"""What converted images are: formats, faults and duplicates, counted and named while they pass."""

import hashlib
import io
import os
import threading
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from hvd_lbt.data.formats import Findings
from hvd_lbt.data.formats.findings import Reason, picture_of
from hvd_lbt.data.pixels import encoded, plain_jpeg

if TYPE_CHECKING:
    from hvd_lbt.data.index_store import Store

ENDINGS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp"), "JPEG"),
    ".png": "PNG", ".bmp": "BMP", ".dib": "BMP", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF",
}  # fmt: skip
MISNAMED = Reason(
    "image in another format than its ending says",
    "images in other formats than their endings say",
    "note",
)
CMYK = Reason("JPEG in CMYK, which PIL decodes", "JPEGs in CMYK, which PIL decodes", "note")
BROKEN = Reason(
    "image that is not whole: training refuses it, or skips it with data.on_bad_sample=skip",
    "images that are not whole: training refuses them, or skips them with data.on_bad_sample=skip",
    "warning",
)
SAME = Reason(
    "image with the same bytes as another of its class",
    "images with the same bytes as others of their class",
    "note",
)
SAME_OTHER_CLASS = Reason(
    "image with the same bytes as one of another class",
    "images with the same bytes as some of other classes",
    "warning",
)
LEAK = Reason(
    "test image with the same bytes as a training image",
    "test images with the same bytes as training images",
    "warning",
)


class ImageNotes:
    """Of one split's images; threads may add at the same time."""

    def __init__(self, store: "Store"):
        self._store = store
        self._digests = np.zeros(len(store), np.uint64)
        self._known = np.zeros(len(store), bool)
        self._lock = threading.Lock()
        self._findings = Findings()

    def add(self, index: int, data: bytes, stored: bytes, name: str, fault: str = "") -> None:
        """Look at sample `index` as it was. stored: as it is now; fault: why it was not decoded."""
        digest = hashlib.sha256(stored).digest()
        self._digests[index] = int.from_bytes(digest[:8], "little")
        self._known[index] = True
        for reason, what in [(BROKEN, f"{name}: {fault}")] if fault else _looked_at(data, name):
            with self._lock:
                self._findings.add(reason, what)

    def findings(self) -> Findings:
        """What was found, with the images of the same bytes."""
        found = Findings()
        found.merge(self._findings)
        known = np.flatnonzero(self._known)
        labels = self._store.labels[known]
        digests = self._digests[known]
        order = np.lexsort((known, digests))
        firsts = np.flatnonzero(np.diff(digests[order], prepend=~digests[order][:1]))
        if len(firsts) == len(known):
            return found
        for start, end in zip(firsts, [*firsts[1:], len(known)], strict=True):
            if end - start < 2:
                continue
            its = order[start:end]
            several = len(set(labels[its].tolist())) > 1
            for place in its[1:]:
                one, other = (self._store.name(int(known[at])) for at in (place, its[0]))
                found.add(SAME_OTHER_CLASS if several else SAME, f"{one} is {other}")
        return found

    def leaks(self, train: "ImageNotes") -> Findings:
        """The images that are also among the training images."""
        found = Findings()
        known = np.flatnonzero(self._known)
        same = np.isin(self._digests[known], train._digests[train._known])
        for index in known[same]:
            found.add(LEAK, self._store.name(int(index)))
        return found


def _looked_at(data: bytes, name: str) -> list[tuple[Reason, str]]:
    """What is to be said of one image. One that needs PIL and is called a JPEG is decoded."""
    wanted = ENDINGS.get(os.path.splitext(name)[1].lower())
    if plain_jpeg(data) is not None:
        return [] if wanted in ("JPEG", None) else [(MISNAMED, f"{name} is JPEG")]
    kind = picture_of(data[:32])
    notes = []
    if kind == wanted != "JPEG":
        return []
    try:
        encoded(data)
    except ValueError as error:
        return [(BROKEN, f"{name}: {error}")]
    if kind == "JPEG":
        with Image.open(io.BytesIO(data)) as image:
            if image.mode == "CMYK":
                notes.append((CMYK, name))
    if wanted not in (kind, None):
        notes.append((MISNAMED, f"{name} is {kind}"))
    return notes
