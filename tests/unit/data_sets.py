"""Small data sets of real image files, and the same in every format."""

import io
import struct
import tarfile
from pathlib import Path

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

from hvd_lbt.data.formats import RECORDIO_MAGIC


def encoded(form: str, number: int = 0, size: tuple[int, int] = (48, 48), **options) -> bytes:
    """A picture of smooth noise, its own for each number; size is (width, height)."""
    noise = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, form, **options)
    return file.getvalue()


def write_folder(data: Path, train: int = 23, test: int = 7, classes: int = 4) -> Path:
    """DATA/{train,test}/CLASS/FILE; names that sort otherwise than they are made."""
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            name = f"{split}/class {number * 7 % classes}/img-{number * 13 % 101}.a é.JPEG"
            (data / name).parent.mkdir(parents=True, exist_ok=True)
            (data / name).write_bytes(encoded("JPEG", number))
    return data


def _example_class():
    """tf.train.Example, from its definition in tensorflow/core/example (proto3)."""
    fields = {
        "BytesList": [("value", 1, "bytes", True)],
        "Int64List": [("value", 1, "int64", True)],
        "Feature": [("bytes_list", 1, "BytesList", False), ("int64_list", 3, "Int64List", False)],
        "Entry": [("key", 1, "string", False), ("value", 2, "Feature", False)],
        "Features": [("feature", 1, "Entry", True)],
        "Example": [("features", 1, "Features", False)],
    }
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto
    for message, its in fields.items():
        about = file.message_type.add(name=message)
        for name, number, kind, repeated in its:
            field = about.field.add(name=name, number=number)
            field.label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            field.type = getattr(kinds, f"TYPE_{kind.upper()}", kinds.TYPE_MESSAGE)
            if field.type == kinds.TYPE_MESSAGE:
                field.type_name = f".t.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = _example_class()


def example(image: bytes, label: int, number: int) -> bytes:
    """A serialised tf.train.Example with ImageNet's keys, the image first, last or in between."""
    message = Example()
    keys = ["image/encoded", "image/class/label", "image/height", "image/filename"]
    for key in keys[number % 4 :] + keys[: number % 4]:
        value = message.features.feature.add(key=key).value
        if key == "image/encoded":
            value.bytes_list.value.append(image)
        elif key == "image/filename":
            value.bytes_list.value.append(f"{number}.JPEG".encode())
        else:
            value.int64_list.value.append(label)
    return message.SerializeToString()


def recordio(image: bytes, label: int, number: int) -> bytes:
    """One record as MXNet's recordio.pack and dmlc-core's writer make it, cut at the magic
    number.
    """
    payload = struct.pack("<IfQQ", 0, float(label), number, 0) + image
    places = [at for at in range(0, len(payload) - 3, 4) if payload[at : at + 4] == RECORDIO_MAGIC]
    parts, start = [], 0
    for place in places:
        parts.append(payload[start:place])
        start = place + 4
    parts.append(payload[start:])
    record = b""
    for place, part in enumerate(parts):
        first, last = place == 0, place == len(parts) - 1
        kind = 0 if first and last else 1 if first else 3 if last else 2
        record += RECORDIO_MAGIC + struct.pack("<I", kind << 29 | len(part)) + part
        record += bytes(-len(part) % 4)
    return record


def write_shards(kind: str, folder: Path, samples: list[tuple[bytes, int]], shards: int) -> None:
    """Write (image, label) samples as `shards` files, in order, as each format's own tools do."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        part = range(len(samples) * shard // shards, len(samples) * (shard + 1) // shards)
        if kind == "webdataset":
            with tarfile.open(folder / f"{shard:03}.tar", "w") as archive:
                for number in part:
                    image, label = samples[number]
                    members = {"jpg": image, "cls": str(label).encode()}
                    # the label may come first as well as last
                    for suffix in sorted(members, reverse=bool(number % 2)):
                        about = tarfile.TarInfo(f"{number:06}.{suffix}")
                        about.size = len(members[suffix])
                        archive.addfile(about, io.BytesIO(members[suffix]))
        elif kind == "tfrecord":
            with (folder / f"part-{shard:05}-of-{shards:05}").open("wb") as stream:
                for number in part:
                    RecordWriter(stream).write(example(*samples[number], number))
        else:
            records = [recordio(*samples[number], number) for number in part]
            (folder / f"part{shard}.rec").write_bytes(b"".join(records))
            (folder / f"part{shard}.idx").write_text("0\t0\n")  # what is no shard is passed over
