"""Parquet files as the Hugging Face hub has them: `image` (bytes, path) and `label`, a row each.

Names: train-00000-of-00294.parquet, validation-…, test-…, in the folder, in `data` or in one named
after a configuration; or SPLIT/0000.parquet. Class names: the ClassLabel in the schema's metadata.
Rows keep their order. Labels are read at the start, images while they are converted, a few rows at
a time: a file's row group is never in memory as a whole.
"""

import json
import os
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hvd_lbt.data.downloads.apart import run_apart
from hvd_lbt.data.downloads.common import NO_LABELS, Download, note_classes, some, what_is
from hvd_lbt.data.formats import Findings
from hvd_lbt.data.formats import findings as found
from hvd_lbt.data.formats.extents import LabelError, class_name
from hvd_lbt.data.formats.findings import SUFFIXES
from hvd_lbt.data.index import Index, Names
from hvd_lbt.data.index_store import Store
from hvd_lbt.data.source import NUMBERED, SPLITS
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable

WORDS = tuple(word for words in SPLITS.values() for word in words)
ROWS_AT_ONCE = 16  # images of one read: 2 MB of ImageNet's
# All that is read of each file but the images. What ends this process would end ours.
READ_ALL = """
import os, sys
import pyarrow as pa
import pyarrow.parquet as pq
for path in sys.stdin.buffer.read().split(bytes(1)):
    sys.stderr.buffer.write(b"FILE " + path + bytes([10]))
    sys.stderr.buffer.flush()
    try:
        file = pq.ParquetFile(os.fsdecode(path), pre_buffer=False, buffer_size=1 << 20)
        about, schema = file.metadata, file.schema_arrow
        for group in range(about.num_row_groups):
            row_group = about.row_group(group)
            for at in range(row_group.num_columns):
                statistics = row_group.column(at).statistics
                statistics is not None and statistics.has_null_count and statistics.null_count
        kinds = {field.name: field.type for field in schema}
        plain = [n for n, k in kinds.items() if pa.types.is_integer(k) or pa.types.is_string(k)]
        file.read(columns=plain)
        next(file.iter_batches(batch_size=1), None)
    except Exception:
        pass
"""
EXTRA = (
    "Reading Parquet needs the package pyarrow, which is not installed: "
    "pip install 'hvd_lbt[parquet]'."
)


@dataclass(frozen=True, kw_only=True)
class _Columns:
    """Where image and label are. names: of the classes by label, None if the file has none."""

    image: str
    in_struct: bool
    has_path: bool
    label: str | None
    names: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class _File:
    """One file. starts: the first row of each row group, and the number of rows at the end."""

    path: Path
    columns: _Columns
    starts: NDArray[np.int64]


def find_parquet(source: Path) -> dict[str, list[Path]] | None:
    """The files by split's word (train, validation, …); None if there are none."""
    if source.is_file():
        return {"train": [source]} if source.suffix == ".parquet" else None
    # not below class folders, which may have a million files
    patterns = ["*.parquet", "*/*.parquet", *(f"*/{word}/*.parquet" for word in WORDS)]
    files = [file for pattern in patterns for file in sorted(source.glob(pattern))]
    files = [file for file in files if not file.name.startswith(".")]
    if not files:
        return None
    return _by_split(source, files)


def open_parquet(source: Path, files: dict[str, list[Path]], label_column: str | None) -> Download:
    """Read schemas and labels. Raises UserError for a label or an image that is not certain."""
    if "train" not in files:
        raise UserError(
            f"{printable(source)} has no Parquet file that is called after train "
            f"({some(file.name for its in files.values() for file in its)}): "
            "train-00000-of-00294.parquet, or train/0000.parquet."
        )
    root = source.parent if source.is_file() else source
    _arrow()
    paths = [file for its in files.values() for file in its if file.is_file()]
    run_apart(READ_ALL, b"\0".join(map(os.fsencode, paths)), source)
    opened = {word: [_look(file, label_column) for file in its] for word, its in files.items()}
    findings = {word: _missing(its) for word, its in files.items()}
    labels = {word: _labels(opened[word]) for word in files}
    classes = _classes(source, opened, labels)
    if labels["train"] is None:
        raise UserError(
            f"{printable(files['train'][0])} has no labels (all are -1): it is a test split."
        )
    train = ParquetStore(root, opened["train"], labels["train"], classes, findings["train"])
    test: ParquetStore | None = None
    unused = []
    for word in SPLITS["test"]:
        its = labels.get(word)
        if word in files and its is None:
            unused.append((NO_LABELS, f"{word}: all labels are -1"))
        elif its is not None and test is None:
            test = ParquetStore(root, opened[word], its, classes, findings[word])
        elif its is not None and test is not None:
            unused.append((found.NOT_USED, f"the files of {word}: those of {test.word} are used"))
    for word in files.keys() - {"train", *SPLITS["test"]}:
        unused.append((found.NOT_USED, f"the files of {word}"))
    for reason, name in unused:
        (test or train).index.findings.add(reason, name)
    return Download(
        what="Parquet files",
        train=train,
        test=test,
        watched=tuple(file for its in files.values() for file in its),
    )


def _by_split(source: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Files by the split that their name or their folder says."""
    split: dict[str, list[Path]] = {}
    unknown = []
    for file in files:
        said = re.match(r"[A-Za-z]+", file.name)
        word = said[0].lower() if said else ""
        if word not in WORDS:
            word = file.parent.name.lower() if file.parent != source else ""
        word = "validation" if word in ("val", "valid") else word
        if word in WORDS:
            split.setdefault(word, []).append(file)
        else:
            unknown.append(file)
    if unknown:
        raise UserError(
            f"{printable(source)} has Parquet files whose names say no split "
            f"({some(file.relative_to(source) for file in unknown)}): train-….parquet, "
            "validation-…, test-…, or a folder of that name. Rename them, or give the folder that "
            "has one data set."
        )
    for word, its in split.items():
        folders = sorted({file.parent for file in its})
        if len(folders) > 1:
            raise UserError(
                f"{printable(source)} has files of {word} in several folders ({some(folders)}): "
                "they are several configurations or copies. Name the folder of one."
            )
    return split


def _missing(files: list[Path]) -> Findings:
    """Files that are missing by the names of the others. Raises UserError for two conversions."""
    findings = Findings()
    series: dict[str, set[int]] = {}
    for file in files:
        if match := NUMBERED.match(file.name):
            series.setdefault(match[3], set()).add(int(match[2]))
    if len(series) > 1 or (series and sum(map(len, series.values())) < len(files)):
        raise UserError(
            f"{printable(files[0].parent)} has the files of two conversions "
            f"({some(file.name for file in files)}): their images would count twice. Remove one."
        )
    for count, there in series.items():
        for number in sorted(set(range(int(count))) - there) if len(count) < 7 else ():
            findings.add(found.MISSING, f"{number:0{len(count)}}-of-{count}")
    return findings


def _arrow() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet. Raises UserError naming the extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"{EXTRA} ({error})") from error
    return pyarrow, pyarrow.parquet


def _open(path: Path) -> Any:
    pyarrow, parquet = _arrow()
    if not path.is_file():
        raise UserError(f"{printable(path)} is no regular file.")
    try:
        # without these two a whole row group is read at once
        return parquet.ParquetFile(
            path, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(
            f"{printable(path)} is no whole Parquet file ({printable(error)[:200]}): "
            f"{'download it again' if _begins_well(path) else what_is(path)}."
        ) from error


def _begins_well(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def _look(path: Path, label_column: str | None) -> _File:
    """Schema and row groups of a file."""
    file = _open(path)
    about, schema = file.metadata, file.schema_arrow
    groups = [about.row_group(number).num_rows for number in range(about.num_row_groups)]
    features = _features(path, schema.metadata)
    image = _image_column(path, schema, features)
    kind = schema.field(image).type
    pyarrow, _ = _arrow()
    in_struct = pyarrow.types.is_struct(kind)
    fields = [kind.field(at).name for at in range(kind.num_fields)] if in_struct else []
    label = _label_column(path, schema, features, label_column)
    names = _names(path, features.get(label or "")) if label else None
    columns = _Columns(
        image=image, in_struct=in_struct, has_path="path" in fields, label=label, names=names
    )
    return _File(path=path, columns=columns, starts=np.cumsum([0, *groups], dtype=np.int64))


def _features(path: Path, metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """The features in the schema's metadata, {} if it has none."""
    raw = (metadata or {}).get(b"huggingface")
    if raw is None:
        return {}
    try:
        features = json.loads(raw)["info"]["features"]
        if not isinstance(features, dict):
            raise TypeError("features is no dictionary")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{printable(path)} has metadata of Hugging Face that cannot be read ({error!r})."
        ) from error
    return features


def _image_column(path: Path, schema: Any, features: dict[str, Any]) -> str:
    """The one column of images: by the features, else a struct with `bytes`, or bytes."""
    pyarrow, _ = _arrow()

    def has_bytes(kind: Any) -> bool:
        inner = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)} if (
            pyarrow.types.is_struct(kind)) else {"bytes": kind}  # fmt: skip
        its = inner.get("bytes")
        return its is not None and (
            pyarrow.types.is_binary(its) or pyarrow.types.is_large_binary(its)
        )

    said = [
        name for name, about in features.items()
        if isinstance(about, dict) and about.get("_type") == "Image" and name in schema.names
    ]  # fmt: skip
    usable = [name for name in schema.names if has_bytes(schema.field(name).type)]
    chosen = said or usable
    if len(chosen) > 1 and "image" in chosen:
        chosen = ["image"]
    if len(chosen) != 1 or chosen[0] not in usable:
        kinds = ", ".join(f"{name}: {schema.field(name).type}" for name in schema.names[:8])
        raise UserError(
            f"{printable(path)} has {len(chosen)} columns of encoded images "
            f"({printable(kinds)[:300]}): needed is one, image, with bytes (and path)."
        )
    return str(chosen[0])


def _label_column(
    path: Path, schema: Any, features: dict[str, Any], wanted: str | None
) -> str | None:
    """The column of labels: --label-column, `label`, or the only ClassLabel."""
    if wanted is not None:
        if wanted not in schema.names:
            raise UserError(
                f"--label-column {wanted}: {printable(path)} has the columns {some(schema.names)}."
            )
        return wanted
    if "label" in schema.names:
        return "label"
    said = [
        name for name, about in features.items()
        if isinstance(about, dict) and about.get("_type") == "ClassLabel" and name in schema.names
    ]  # fmt: skip
    if len(said) == 1:
        return said[0]
    raise UserError(
        f"{printable(path)} has no column label: it has {some(schema.names)}. Name it with "
        "--label-column."
    )


def _names(path: Path, feature: Any) -> tuple[str, ...] | None:
    """The class names of a ClassLabel, in the order of the labels."""
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, dict):
        try:
            names = [names[str(number)] for number in range(len(names))]
        except KeyError as error:
            raise UserError(f"{printable(path)} has no class name for label {error}.") from error
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{printable(path)} has class names that are no list of text.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{printable(path)} has the class name {twice!r} twice.")
    return tuple(names)


def _labels(files: list[_File]) -> NDArray[np.int64] | list[str] | None:
    """All labels of a split, numbers or names; None if every one is -1. Nulls are errors.

    Also the images' nulls, where the file's statistics count them, before anything is written.
    """
    numbers, names = [], list[str]()
    pyarrow, _ = _arrow()
    for file in files:
        its = _open(file.path)
        _check_nulls(file, its.metadata)
        try:
            column = its.read(columns=[file.columns.label]).column(0)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _unreadable(file.path, error) from error
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
            raise UserError(
                f"{printable(file.path)} has no label in {column.null_count:,} of {len(column):,} "
                f"rows (row {row:,} is the first): an image without a label is no sample."
            )
        kind = column.type
        if pyarrow.types.is_integer(kind):
            values = column.to_numpy()
            if len(values) and int(values.max()) > 10**9:
                raise UserError(
                    f"{printable(file.path)} has the label {values.max()}: no class's number."
                )
            numbers.append(values.astype(np.int64))
        elif pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind):
            names += column.to_pylist()
        else:
            raise UserError(
                f"{printable(file.path)} has labels of the type {kind} in the column "
                f"{file.columns.label}: whole numbers or text are needed."
            )
    if numbers and names:
        raise UserError(
            f"{printable(files[0].path.parent)} has labels that are numbers in some files and text "
            "in others."
        )
    if names:
        return names
    labels = np.concatenate(numbers) if numbers else np.zeros(0, np.int64)
    if not len(labels):
        raise UserError(f"{printable(files[0].path)} has no rows.")
    if (labels == -1).all():
        return None
    if (labels < 0).any():
        at = int(np.flatnonzero(labels < 0)[0])
        raise UserError(
            f"{printable(files[0].path.parent)} has {int((labels < 0).sum()):,} of {len(labels):,} "
            f"labels below 0 (row {at:,} of {files[0].path.name} and those after it has "
            f"{labels[at]}): a test split is -1 in all rows."
        )
    return labels


def _check_nulls(file: _File, about: Any) -> None:
    """Raise UserError if the statistics count images without bytes."""
    wanted = f"{file.columns.image}.bytes" if file.columns.in_struct else file.columns.image
    for group in range(about.num_row_groups):
        for at in range(about.row_group(group).num_columns):
            chunk = about.row_group(group).column(at)
            if chunk.path_in_schema != wanted or chunk.statistics is None:
                continue
            if chunk.statistics.has_null_count and chunk.statistics.null_count:
                raise UserError(
                    f"{printable(file.path)} has no bytes in {chunk.statistics.null_count:,} of "
                    f"{chunk.num_values:,} rows of row group {group}: {_NO_BYTES}"
                )


_NO_BYTES = (
    "the images lie elsewhere (a path or an address), or are missing. Needed are files with the "
    "images in them: load the data set with `datasets` and save it with embedded images."
)


def _classes(
    source: Path, opened: dict[str, list[_File]], labels: dict[str, Any]
) -> tuple[str, ...]:
    """The class names in the order of the labels, the same in all files."""
    named = {file.columns.names: file.path for its in opened.values() for file in its}
    if len(named) > 1:
        one, other = list(named.values())[:2]
        raise UserError(
            f"{printable(one)} and {printable(other)} have other class names: they are files of "
            "several data sets."
        )
    (names,) = named
    texts = {type(its) is list for its in labels.values() if its is not None}
    if len(texts) > 1:
        raise UserError(f"{printable(source)} has labels that are numbers in one split only.")
    if texts == {True}:
        return _text_classes(source, labels)
    used = [its for its in labels.values() if its is not None]
    largest = max((int(its.max()) for its in used), default=-1)
    if names is None:
        return tuple(map(str, range(largest + 1)))
    if largest >= len(names):
        raise UserError(
            f"{printable(source)} has the label {largest:,}, and its {len(names):,} class names "
            f"are for 0 to {len(names) - 1:,}."
        )
    return names


def _text_classes(source: Path, labels: dict[str, Any]) -> tuple[str, ...]:
    """The sorted names of labels that are text."""
    names = sorted(set(labels["train"] or ()))
    try:
        for name in names:
            class_name(name.encode())
    except LabelError as error:
        raise UserError(f"{printable(source)} has the label {error.what}: {error}.") from error
    for word, its in labels.items():
        if unknown := sorted(set(its or ()) - set(names)):
            raise UserError(
                f"{printable(source)} has classes in {word} that train does not have: "
                f"{some(unknown)}."
            )
    return tuple(names)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{printable(path)} cannot be read ({printable(error)[:300]}): it is damaged. Download it "
        "again."
    )


class ParquetStore(Store):
    """Rows of Parquet files. Each thread reads on from where it was, a few rows at a time."""

    def __init__(
        self,
        root: Path,
        files: list[_File],
        labels: NDArray[np.int64] | list[str],
        classes: tuple[str, ...],
        findings: Findings,
    ):
        if isinstance(labels, list):
            place = {name: label for label, name in enumerate(classes)}
            labels = np.array([place[name] for name in labels], np.int64)
        note_classes(findings, labels.tolist(), classes)
        rows = [int(file.starts[-1]) for file in files]
        # in place of offset and length: the row, and no bytes, which are not known before
        extents = np.stack(
            [
                np.repeat(np.arange(len(files)), rows),
                np.concatenate([np.arange(count) for count in rows]),
                np.zeros(sum(rows), np.int64),
            ],
            axis=1,
        )
        names = [bytes(file.path.relative_to(root)) for file in files]
        index = Index(
            kind="parquet",
            root=root,
            files=Names.of(names),
            tokens=labels.astype(np.int32),
            token_names=classes,
            extents=extents,
            findings=findings,
        )
        super().__init__(index, classes)
        self.word = files[0].path.name
        self._files, self._reading = files, threading.local()

    def name(self, index: int) -> str:
        """The file and the row."""
        number, row, _ = map(int, self.index.extents[index])  # type: ignore[index]
        return f"{self._files[number].path} (row {row:,})"

    def member(self, index: int) -> str:
        """CLASS/FILE, by the row's path; or the file and the row."""
        number, row, _ = map(int, self.index.extents[index])  # type: ignore[index]
        path = self._row(number, row)[1]
        name = os.path.basename(path) if path else f"{self._files[number].path.stem}-{row}"
        if os.path.splitext(name)[1].lower() not in SUFFIXES:
            name += ".jpg" if self.read(index)[:3] == b"\xff\xd8\xff" else ".png"
        return f"{self.classes[self.labels[index]]}/{name}"

    def read(self, index: int) -> bytes:
        """The encoded image. Raises UserError for a row without one."""
        number, row, _ = map(int, self.index.extents[index])  # type: ignore[index]
        data = self._row(number, row)[0]
        if data is None:
            raise UserError(f"{self.name(index)} has no bytes: {_NO_BYTES}")
        return data

    def _row(self, number: int, row: int) -> tuple[bytes | None, str | None]:
        """Bytes and path of a row; the last row that was read is kept."""
        its = self._reading
        if getattr(its, "at", None) == (number, row):
            return its.values
        if getattr(its, "at", None) != (number, row - 1):
            its.rows = self._rows(number, row)
        try:
            its.values, its.at = next(its.rows), (number, row)
        except StopIteration:
            raise UserError(
                f"{printable(self._files[number].path)} has become shorter while it was read."
            ) from None
        return its.values

    def _rows(self, number: int, row: int) -> Iterator[tuple[bytes | None, str | None]]:
        """Bytes and path of this row and those after it."""
        file = self._files[number]
        columns = file.columns
        pyarrow, _ = _arrow()
        group = int(np.searchsorted(file.starts, row, side="right")) - 1
        skip = row - int(file.starts[group])
        try:
            batches = _open(file.path).iter_batches(
                batch_size=ROWS_AT_ONCE,
                row_groups=list(range(group, len(file.starts) - 1)),
                columns=[columns.image],
                use_threads=False,
            )
            for batch in batches:
                if skip >= len(batch):
                    skip -= len(batch)
                    continue
                for value in batch.column(0)[skip:]:
                    its = value.as_py()
                    if columns.in_struct:
                        its = its or {}
                        yield its.get("bytes"), its.get("path")
                    else:
                        yield its, None
                skip = 0
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _unreadable(file.path, error) from error
