"""Damage many shards of each format, index and check them, and count what was lost without a word.

    python tests/campaigns/damaged_shards.py [--shards 3000] [--seed 0]

Not part of the test suite. A split of one good and one damaged shard is indexed and read as
training does it, then every image is examined and checksums are compared as `hvd_lbt data check`
does it. Verdicts on the damaged shard:
  intact   every sample has its bytes and its label
  error    the index is refused, with the shard's name
  named    the shard is named when it is indexed, with what is odd about it
  check    only `data check` names it: an image that is not whole, the checksum of a TFRecord, a
           RecordIO record that has swallowed the next
  in place bytes of one image or one label were changed where the format has no checksum over them:
           nothing is lost, all other samples are right
  shorter  the shard ends between two of its records or members, as a whole shard with fewer samples
           does. Only the number of samples or a checksum beside it shows that: convert.json,
           dataset_info.json and .idx files when it is indexed, sha256sums.txt in `data check`
  SILENT   anything else. The exit code is 1 if there is one
"""

import argparse
import io
import random
import shutil
import struct
import sys
import tarfile
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
from PIL import Image

from hvd_lbt.data.check import CHECKED
from hvd_lbt.data.formats import RECORDIO_MAGIC, tfrecord, tfrecord_places
from hvd_lbt.data.index import open_index
from hvd_lbt.data.store import Store
from hvd_lbt.errors import SampleError, UserError

KINDS = ("webdataset", "tfrecord", "recordio")
BLOCK = 512
Sample = tuple[bytes, int | str]


def encoded(pixels: np.ndarray) -> bytes:
    """A PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()


def whole_shard(
    kind: str, rng: random.Random, labels: str
) -> tuple[bytes, list[Sample], list[int]]:
    """A shard's bytes, its samples, and where each begins."""
    samples: list[Sample] = []
    starts = []
    file = io.BytesIO()
    side = rng.choice([0, 0, 8, 20])  # of all images, or 0: each its own
    form = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    archive = None
    if kind == "webdataset":
        archive = tarfile.open(fileobj=file, mode="w", format=form)  # noqa: SIM115  # closed below
    for number in range(rng.randint(3, 12)):
        pixels = np.frombuffer(rng.randbytes(40 * 40 * 3), np.uint8).reshape(40, 40, 3)
        image = encoded(pixels[: side or rng.randint(1, 40), : side or rng.randint(1, 40)])
        label = rng.randrange(1000)
        starts.append(file.tell())
        if archive is not None:
            folder = f"class {label}/" if labels == "folder" else ""
            members = {f"{folder}{number:04}.png": image, f"{number:04}.cls": b"%d" % label}
            names = sorted(members, reverse=labels == "cls first")
            for name in (
                names if labels != "folder" else [n for n in names if folder and folder in n]
            ):
                about = tarfile.TarInfo(name)
                about.size = len(members[name])
                archive.addfile(about, io.BytesIO(members[name]))
            samples.append((image, f"class {label}" if folder else label))
        elif kind == "tfrecord":
            file.write(tfrecord(image, f"{number}", label, f"class {label}"))
            samples.append((image, f"class {label}"))
        else:
            payload = struct.pack("<IfQQ", 0, float(label), number, 0) + image
            assert RECORDIO_MAGIC not in payload
            head = RECORDIO_MAGIC + struct.pack("<I", len(payload))
            file.write(head + payload + bytes(-len(payload) % 4))
            samples.append((image, label))
    if archive is not None:
        archive.close()
    return file.getvalue(), samples, starts


def damage(data: bytes, other: bytes, starts: list[int], rng: random.Random) -> tuple[str, bytes]:
    """One damage of a kind chosen by chance; (its name, the bytes)."""
    how = rng.choice(
        ["bit", "bits in a header", "bytes", "cut", "cut at a block", "cut at a sample", "zeros",
         "blocks of zeros", "joined", "appended", "a block repeated", "a block left out"]
    )  # fmt: skip
    out = bytearray(data)
    at = rng.randrange(len(data))
    block = rng.randrange(len(data) // BLOCK + 1) * BLOCK
    count = rng.choice([1, 2, 4, 8]) * BLOCK
    match how:
        case "bit":
            out[at] ^= 1 << rng.randrange(8)
        case "bits in a header":
            place = min(
                rng.choice(starts) + rng.randrange(32 if len(data) % BLOCK else 512), len(out) - 1
            )
            out[place] ^= 1 << rng.randrange(8)
        case "bytes":
            out[at : at + 8] = rng.randbytes(len(out[at : at + 8]))
        case "cut":
            del out[at:]
        case "cut at a block":
            del out[block:]
        case "cut at a sample":
            del out[rng.choice(starts) :]
        case "zeros":
            out[at : at + count] = bytes(len(out[at : at + count]))
        case "blocks of zeros":
            out[block : block + count] = bytes(len(out[block : block + count]))
        case "joined":
            out += other
        case "appended":
            out += rng.choice([rng.randbytes(700), bytes(700), other[:900], b"\n"])
        case "a block repeated":
            out[block:block] = out[block : block + count]
        case "a block left out":
            del out[block : block + count]
    return how, bytes(out)


def read(folder: Path) -> tuple[list[Sample], Store]:
    """The samples of the damaged shard as training reads them. Raises UserError as indexing
    does.
    """
    shutil.rmtree(folder / ".hvd_lbt", ignore_errors=True)
    with redirect_stderr(io.StringIO()):
        store = Store(open_index(folder, "train", timeout=60))
    assert store.index.extents is not None
    its = [at for at in range(len(store)) if store.index.extents[at, 0] == 1]
    tokens = store.index.token_names
    return [(store.read(at), tokens[store.index.tokens[at]]) for at in its], store


def check_finds(store: Store) -> bool:
    """Whether `data check` would name an image of the damaged shard."""
    tfrecord_places.cache_clear()
    examined = store
    if store.index.kind in CHECKED:
        examined = CHECKED[store.index.kind](store)
    try:
        for at in range(len(store)):
            examined.image(at)
    except SampleError:
        return True
    return False


def verdict(folder: Path, file: Path, samples: list[Sample], whole: bytes, how: str) -> str:
    """What became of the samples of a damaged shard."""
    try:
        found, store = read(folder)
    except UserError as error:
        return "error" if file.name in str(error) else "SILENT: an error without the shard's name"
    if found == samples:
        return "intact"
    data = file.read_bytes()
    twice = how in ("joined", "appended") or data == whole * 2
    if twice and store.index.kind != "webdataset" and found[: len(samples)] == samples:
        return "intact"  # records of two files in one are a whole shard
    if file.name in "".join(store.index.findings.lines()):
        return "named"
    if check_finds(store):
        return "check"
    changed = sum(mine != its for mine, its in zip(samples, found, strict=False))
    if len(found) == len(samples) and changed == 1 and len(data) == len(whole):
        return "in place"
    if found == samples[: len(found)]:
        return "shorter"
    return f"SILENT: {len(samples)} samples, {len(found)} found, {changed} changed"


def main() -> int:
    """Print a table of verdicts by format and damage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, default=3000, help="of each format [3000]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/damaged_shards"))
    args = parser.parse_args()
    folder = args.folder / "train"
    silent = 0
    for kind in KINDS:
        seen: Counter[tuple[str, str]] = Counter()
        shutil.rmtree(args.folder, ignore_errors=True)
        folder.mkdir(parents=True)
        ending = {"webdataset": "tar", "tfrecord": "tfrecord", "recordio": "rec"}[kind]
        for number in range(args.shards):
            rng = random.Random(f"{args.seed} {kind} {number}")
            labels = rng.choice(["cls", "cls first", "folder"])
            (folder / f"a.{ending}").write_bytes(whole_shard(kind, rng, labels)[0])
            whole, samples, starts = whole_shard(kind, rng, labels)
            other = whole_shard(kind, rng, labels)[0]
            file = folder / f"damaged.{ending}"
            file.write_bytes(whole)
            assert read(args.folder)[0] == samples
            how, data = damage(whole, other, starts, rng)
            file.write_bytes(data)
            what = verdict(args.folder, file, samples, whole, how)
            if what.startswith("SILENT"):
                print(f"{kind}, shard {number}, {how}: {what}")
            seen[how, what.partition(":")[0]] += 1
        verdicts = sorted({what for _, what in seen})
        print(f"\n{kind}, {args.shards:,} damaged shards, seed {args.seed}")
        print(f"{'damage':20}" + "".join(f"{what:>10}" for what in verdicts))
        for how in sorted({how for how, _ in seen}):
            print(f"{how:20}" + "".join(f"{seen[how, what]:>10,}" for what in verdicts))
        totals = {what: sum(n for (_, its), n in seen.items() if its == what) for what in verdicts}
        print(f"{'all':20}" + "".join(f"{totals[what]:>10,}" for what in verdicts))
        silent += totals.get("SILENT", 0)
    print(f"\n{silent} silent losses")
    return int(silent > 0)


if __name__ == "__main__":
    sys.exit(main())
