"""What a split consists of: which folder or which shards, and all else that lies there."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from hvd_lbt.data.formats import SUMS_FILE, SplitError, other_format, shard_kind
from hvd_lbt.data.formats import findings as found
from hvd_lbt.data.formats.findings import SUFFIXES, Findings, classify, is_litter
from hvd_lbt.data.formats.folder import first_bytes
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

VERSION = 2  # of the index: one of another version is built anew
SPLITS = {"train": ("train",), "test": ("test", "val", "validation")}
SHARD_ENDING = re.compile(r"\.(tar|tfrecords?|tfrec|rec|record|recordio|wds)$|-of-\d+$", re.I)
NUMBERED = re.compile(r"^(.*?)(\d+)-of-(\d+)(.*)$", re.S)
OWN = {".hvd_lbt", SUMS_FILE, "convert.json"}  # the index; of `hvd_lbt data convert`
ABOUT_SHARDS = {"dataset_info.json", "features.json"}  # of TensorFlow Datasets


@dataclass(frozen=True, kw_only=True)
class Source:
    """A split's class folders or shards by name, with their size and times; what else lies there.

    name: what the data set calls the split: train, test, val or validation.
    """

    kind: str
    name: str
    root: Path
    parts: tuple[str, ...]
    stats: tuple[tuple[int, int, int], ...]  # bytes (0 for a folder), mtime and ctime in ns
    findings: Findings

    def fingerprint(self) -> str:
        """SHA-256 (hex) of all that tells that the data changed.

        A class folder's ctime moves whenever an entry comes, goes or is renamed, also where its
        mtime is set back afterwards, as tar and rsync do.
        """
        about = [VERSION, self.kind, str(self.root.name), self.parts, self.stats]
        return hashlib.sha256(json.dumps(about).encode("utf-8", "surrogateescape")).hexdigest()


@dataclass
class _Seen:
    """The entries of a folder: class folders, shards by kind, images without a class, the rest."""

    folders: list[os.DirEntry[str]] = field(default_factory=list)
    shards: dict[str, list[os.DirEntry[str]]] = field(default_factory=dict)
    images: list[str] = field(default_factory=list)
    strangers: list[os.DirEntry[str]] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)

    def kinds(self) -> dict[str, list[os.DirEntry[str]]]:
        """What could be the split."""
        return self.shards | ({"folder": self.folders} if self.folders else {})


def has_split(data: Path, split: str) -> bool:
    """Whether DATA has a folder for this split, or files that are called so."""
    words = SPLITS[split]
    folder = any((data / word).is_dir() for word in words)
    return folder or any(_says(entry.name, words) for entry in _entries(data))


def find_source(data: Path, split: str, asked: list[Path]) -> Source:
    """Find what `split` (train or test) consists of, by content.

    DATA/train (DATA/test, DATA/val) with CLASS/FILE or with shards, or shards in DATA itself whose
    names say train (test, val). asked: see `bounded`. Raises UserError for nothing, for a mixture,
    and for what cannot be read.
    """
    try:
        return _find_source(data, split, asked)
    except OSError as error:
        raise UserError(f"--data {data} cannot be read ({error}).") from error


def _find_source(data: Path, split: str, asked: list[Path]) -> Source:
    asked.append(data)
    if not data.is_dir():
        what = (
            "it is a file, and no data set by itself"
            if data.exists()
            else "there is no such folder"
        )
        raise UserError(
            f"--data {data}: {what}. A folder must hold train/CLASS/FILE and "
            "test/CLASS/FILE (or val/…), or shards; without --data the built-in digits are used."
        )
    words = SPLITS[split]
    named = [data / word for word in words if (data / word).is_dir()]
    if named:
        root, seen = _folder_of(named, asked)
        name = root.name
    else:
        root = data
        seen, name = _shards_of(data, split, asked)
    choice = words[0] if len(words) == 1 else "{" + ",".join(words) + "}"
    where = str(root) if named else f"{data}/{choice}"
    kinds = seen.kinds()
    _compare_names(root, split, seen, named=bool(named))
    if seen.findings.errors:
        raise SplitError(seen.findings, str(data))
    if len(kinds) > 1:
        listed = ", ".join(f"{kind} ({its[0].name})" for kind, its in sorted(kinds.items()))
        raise UserError(
            f"{where} is ambiguous, it has {listed}. One split is either class folders or shards "
            "of one format: give each format a folder of its own."
        )
    if not kinds:
        raise UserError(_nothing(data, where, seen, asked, named=bool(named)))
    ((kind, parts),) = kinds.items()
    stats, same = [], dict[tuple[int, int], str]()
    for entry in parts:
        asked.append(Path(entry.path))
        about = _fresh_stat(entry.path)
        other = same.setdefault((about.st_dev, about.st_ino), entry.name)
        if other != entry.name and kind == "folder":
            raise UserError(
                f"{printable(entry.path)} and {printable(other)} are one folder under two names: "
                "its images would have two classes. Remove one."
            )
        if other != entry.name:
            seen.findings.add(found.SAME_FILE, f"{entry.name} is {other}")
        size = 0 if kind == "folder" else about.st_size
        stats.append((size, about.st_mtime_ns, about.st_ctime_ns))
    return Source(
        kind=kind,
        name=name,
        root=root,
        parts=tuple(entry.name for entry in parts),
        stats=tuple(stats),
        findings=seen.findings,
    )


def _fresh_stat(path: str) -> os.stat_result:
    """As os.stat; a network file system that keeps attributes for a while asks for them anew."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError:
        return os.stat(path)
    try:
        return os.fstat(descriptor)
    finally:
        os.close(descriptor)


def _folder_of(named: list[Path], asked: list[Path]) -> tuple[Path, _Seen]:
    """Of the folders that a split may be, the first that has class folders or shards."""
    looked = []
    for root in named:
        asked.append(root)
        looked.append((root, _look(_entries(root), asked)))
    root, seen = next((one for one in looked if one[1].kinds()), looked[0])
    for other, its in looked:
        if other is not root:
            what = "" if its.kinds() else " (no class folders and no shards)"
            seen.findings.add(found.NOT_USED, f"{other.name}/{what}: {root.name}/ is used")
    return root, seen


def _shards_of(data: Path, split: str, asked: list[Path]) -> tuple[_Seen, str]:
    """The shards in DATA itself whose names say this split, and the word that they say."""
    words = SPLITS[split]
    files = [entry for entry in _entries(data) if not entry.name.startswith(".")]
    said = {entry.name: _says(entry.name, words) for entry in files}
    seen, chosen = _Seen(), ""
    for word in words:
        entries = [entry for entry in files if word in said[entry.name] and not entry.is_dir()]
        its = _look(entries, asked)
        if not its.kinds() and not its.findings.errors:
            seen.strangers += its.strangers
            continue
        if chosen:
            for name in (entry.name for its_kind in its.shards.values() for entry in its_kind):
                seen.findings.add(found.NOT_USED, f"{name}: the shards of {chosen} are used")
        else:
            seen, chosen = its, word
    if chosen:
        splits = [word for words in SPLITS.values() for word in words]
        for entry in files:
            if SHARD_ENDING.search(entry.name) and not _says(entry.name, splits):
                seen.findings.add(found.NOT_USED, f"{entry.name}: its name says no split")
    return seen, chosen


def _look(entries: Iterable[os.DirEntry[str]], asked: list[Path]) -> _Seen:
    """Sort the entries of a split; what is damaged goes to findings.errors."""
    seen = _Seen()
    for entry in entries:
        path, name = Path(entry.path), entry.name
        asked.append(path)
        if name in OWN:
            continue
        if is_litter(name):
            seen.findings.add(found.HIDDEN, name)
        elif entry.is_symlink() and not path.exists():
            seen.findings.errors.append(
                f"{printable(entry.path)} is a link to {printable(os.readlink(path))!r}, which is "
                "not there: repair the link, or remove it."
            )
        elif entry.is_dir():
            seen.folders.append(entry)
        elif not entry.is_file():
            seen.findings.add(found.SPECIAL, name)
        else:
            try:
                kind = shard_kind(path)
            except UserError as error:
                seen.findings.errors.append(str(error))
                continue
            if kind:
                seen.shards.setdefault(kind, []).append(entry)
            else:
                seen.strangers.append(entry)
    _sort_strangers(seen)
    return seen


def _sort_strangers(seen: _Seen) -> None:
    """Name the files that are no shards; what should be a shard by its name is an error."""
    like = {_pattern(entry.name) for its in seen.shards.values() for entry in its}
    shards = {entry.name for its in seen.shards.values() for entry in its}
    for entry in seen.strangers:
        name, path = entry.name, Path(entry.path)
        what = other_format(path)
        if SHARD_ENDING.search(name) or _pattern(name) in like:
            seen.findings.errors.append(
                f"{printable(entry.path)} is {what or 'no whole tar, TFRecord or RecordIO file'}"
                + ("." if what and what != "empty" else
                   ": it is damaged, or something else. Copy it anew, or remove it.")
            )  # fmt: skip
        elif what and what != "empty" and seen.kinds():
            seen.findings.errors.append(f"{printable(entry.path)} is {what}; or remove it.")
        elif os.path.splitext(name)[1].lower() in SUFFIXES:
            seen.images.append(name)
        elif name in ABOUT_SHARDS or (
            name.endswith((".idx", ".json", ".lst"))
            and any(shard.startswith(name.rpartition(".")[0]) for shard in shards)
        ):
            seen.findings.add(found.SIDE_FILES, name)
        else:
            reason = classify(name, first_bytes(path, 32) or b"")
            if reason is None:
                seen.images.append(name)
            else:
                seen.findings.add(found.NO_SHARD if shards else reason, name)
    if seen.images and seen.folders:
        seen.findings.errors.append(
            f"{printable(os.path.dirname(seen.folders[0].path))} has {len(seen.images):,} images "
            f"beside its class folders ({', '.join(map(printable, seen.images[:3]))}): they have "
            "no class. Move them into a class folder, or out."
        )
    elif seen.kinds():
        for name in seen.images:
            seen.findings.add(found.NO_SHARD, name)


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _compare_names(root: Path, split: str, seen: _Seen, *, named: bool) -> None:
    """What the shards' names say against the split, and against each other (NNN-of-NNN)."""
    words = {split: set(words) for split, words in SPLITS.items()}
    own, others = words[split], set().union(*(words[name] for name in words if name != split))
    all_said = [word for each in words.values() for word in each]
    counts: dict[tuple[str, str], dict[str, set[int]]] = {}
    for entry in (entry for its in seen.shards.values() for entry in its):
        said = set(_says(entry.name, all_said))
        if said & others and (said & own or named):
            seen.findings.errors.append(
                f"{printable(entry.path)} is called after {' and '.join(sorted(said))}, and it "
                f"would be taken for {split}: rename it, or put it into a folder train or test."
            )
        if (match := NUMBERED.match(entry.name)) and len(match[3]) < 7:
            counts.setdefault((match[1], match[4]), {}).setdefault(match[3], set()).add(
                int(match[2])
            )
    for (before, after), series in counts.items():
        if len(series) > 1:
            names = " and ".join(f"{before}…-of-{count}{after}" for count in sorted(series))
            seen.findings.errors.append(
                f"{printable(root)} has the shards of two conversions, {printable(names)}: "
                "their samples would count twice. Remove one."
            )
        for count, there in series.items():
            first = 0 if 0 in there or int(count) not in there else 1
            missing = sorted(set(range(first, first + int(count))) - there)
            if missing:
                name = f"{before}{missing[0]:0{len(count)}}-of-{count}{after}"
                seen.findings.add(found.MISSING, name, len(missing))


def _nothing(data: Path, where: str, seen: _Seen, asked: list[Path], *, named: bool) -> str:
    """Why there is nothing to train on, and what would be right."""
    shape = (
        "A split is CLASS/FILE, or shards in WebDataset's (tar), TFRecord's or RecordIO's format"
    )
    if seen.images:
        return (
            f"{where} has no images with a class: {len(seen.images):,} lie directly in it "
            f"({', '.join(map(printable, seen.images[:3]))}). {shape}."
        )
    if not named and not has_split(data, "train"):
        its = _look([e for e in _entries(data) if e.name not in _all_words()], asked)
        if its.kinds():
            what = "class folders" if its.folders else "shards"
            first = next(iter(its.kinds().values()))[0].name
            is_split = data.resolve().name in _all_words()
            return (
                f"--data {data} is itself a split or a folder of another kind: it has {what} "
                f"({printable(first)}) and no folder train. "
                + (
                    f"Give the folder above it: --data {data.resolve().parent}."
                    if is_split
                    else "Put them into a folder train, and the test images into a folder test; "
                    "or give shards names that say train and test."
                )
            )
    for entry in seen.strangers:
        if (what := other_format(Path(entry.path))) not in ("", "empty"):
            return f"{where} has no images: {printable(entry.name)} is {what}. {shape}."
    return (
        f"{where} has no images. {shape}; among {len(seen.strangers)} files there is none of these."
    )


def _all_words() -> set[str]:
    return {word for words in SPLITS.values() for word in words}


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What is in a folder, sorted."""
    return sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))


def _says(name: str, words: Iterable[str]) -> list[str]:
    """Those of the words that stand in the name, between what is no letter: train-0001.tar."""
    separated = "".join(letter if letter.isalpha() else " " for letter in name.lower()).split()
    return [word for word in words if word in separated]
