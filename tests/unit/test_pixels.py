"""Every mode and format: PIL's pixels from DALI and from the device's memory, or a reason."""

import base64
import io
import os
import socket
import stat
import struct
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_sets import encoded as picture
from PIL import Image

from hvd_lbt.cli import main
from hvd_lbt.data import on_device, pipeline
from hvd_lbt.data.pixels import MAX_PIXELS, encoded, plain_jpeg
from hvd_lbt.data.reading import read_regular
from hvd_lbt.data.store import open_train_split
from hvd_lbt.errors import ReadError, SampleError
from hvd_lbt.recipe import DataRecipe

CPU = torch.device("cpu")
SIDE = 24
# libjpeg-turbo is on both sides: its integer transform is exact to 1 in each of Y, Cb and Cr, and
# blue adds 1.772 Cb to Y (T.871): 1 + 1.772 < 3. Seen: 0.
JPEG_BOUND = 3


def image(mode: str) -> Image.Image:
    """Smooth noise in any of PIL's modes; deep modes beyond 255."""
    base = Image.open(io.BytesIO(picture("PNG", 1, (SIDE, SIDE)))).convert("RGB")
    grey = np.asarray(base.convert("L"))
    if mode in ("RGBA", "LA", "PA"):
        made = base.convert({"RGBA": "RGB", "LA": "L", "PA": "P"}[mode]).convert(mode)
        made.putalpha(base.convert("L").rotate(90))
        return made
    if mode == "I;16B":
        return Image.frombytes(mode, base.size, (grey.astype(">u2") * 257).tobytes())
    deep = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
    if mode in deep:
        return Image.fromarray(grey.astype(deep[mode]) * deep[mode](257))
    return base.convert(mode)


def saved(mode: str, form: str, **options) -> bytes:
    file = io.BytesIO()
    image(mode).save(file, form, **options)
    return file.getvalue()


def without_adobe(data: bytes) -> bytes:
    start = data.index(b"\xff\xee")
    return data[:start] + data[start + 2 + int.from_bytes(data[start + 2 : start + 4], "big") :]


def with_adobe(data: bytes, transform: int) -> bytes:
    """The marker in JFIF's place."""
    rest = data[20:] if data[2:4] == b"\xff\xe0" else data[2:]
    return data[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0" + bytes([transform]) + rest


def png(depth: int, colour: int) -> bytes:
    """A PNG of 8 or 16 bits in grey (0), RGB (2), grey and alpha (4) or RGBA (6), noise."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    noise = np.random.default_rng(colour).bytes(SIDE * (SIDE * channels * depth // 8))
    width = len(noise) // SIDE
    rows = b"".join(b"\0" + noise[at : at + width] for at in range(0, len(noise), width))

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def turned(form: str, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved("RGB", form, exif=exif, **options)


def several(form: str, **options) -> bytes:
    return saved("RGB", form, save_all=True, append_images=[image("RGB").rotate(90)], **options)


MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "WEBP": ("L", "LA", "P", "RGB", "RGBA", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"),
    "JPEG": ("1", "L", "RGB", "CMYK", "YCbCr"),
}
TAKEN = {f"{form} {mode}": saved(mode, form) for form, modes in MODES.items() for mode in modes}
TAKEN |= {
    f"TIFF {mode} {way}": saved(mode, "TIFF", compression=way)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
    for way in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma")
}
TAKEN |= {
    "TIFF 1 group4": saved("1", "TIFF", compression="group4"),
    "TIFF RGB jpeg": saved("RGB", "TIFF", compression="jpeg"),
    "TIFF of two pages": several("TIFF"),
    "TIFF turned": turned("TIFF"),
    "PNG turned": turned("PNG"),
    "WEBP turned": turned("WEBP"),
    "WEBP lossless, turned": turned("WEBP", lossless=True),
    "WEBP animated": several("WEBP"),
    "APNG": several("PNG"),
    "MPO": several("MPO"),
    "PNG P transparent bytes": saved("P", "PNG", transparency=bytes(range(256))),
    "PNG RGB transparent": saved("RGB", "PNG", transparency=(1, 2, 3)),
    "PNG of 16 bits RGB": png(16, 2),
    "PNG of 16 bits RGBA": png(16, 6),
    "JPEG progressive": saved("RGB", "JPEG", progressive=True),
    "JPEG 4:4:4": saved("RGB", "JPEG", subsampling=0),
    "JPEG 4:2:2": saved("RGB", "JPEG", subsampling=1),
    "JPEG turned": turned("JPEG"),
    "JPEG of RGB": saved("RGB", "JPEG", keep_rgb=True),
    "JPEG of RGB without Adobe": without_adobe(saved("RGB", "JPEG", keep_rgb=True)),
    "JPEG with bytes behind": saved("RGB", "JPEG") + b"trailing",
    "JPEG CMYK without Adobe": without_adobe(saved("CMYK", "JPEG")),
    "JPEG YCCK": with_adobe(without_adobe(saved("CMYK", "JPEG")), 2),
    "JPEG RGB by Adobe": with_adobe(saved("RGB", "JPEG"), 0),
    "JPEG YCbCr by Adobe": with_adobe(saved("RGB", "JPEG"), 1),
    "JPEG Adobe 9": with_adobe(saved("RGB", "JPEG"), 9),
}


def twelve_bits() -> bytes:
    data = bytearray(saved("RGB", "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    return bytes(data)


def huge(data: bytes, side: int = 20_000) -> bytes:
    """The JPEG says that it has side × side pixels."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", side, side) + data[at + 4 :]


def huge_png() -> bytes:
    data = png(8, 2)
    head = b"IHDR" + struct.pack(">II", 40_000, 40_000) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


EIGHT_BITS = r"more than 8 bits .*, which PIL would clip to white: convert it to 8 bits"
REFUSED = {
    "empty": (b"", "the file is empty"),
    "text": (b"hello world" * 20, "it cannot be identified"),
    "PNG of 16 bits grey": (png(16, 0), EIGHT_BITS),
    "TIFF I;16": (saved("I;16", "TIFF"), EIGHT_BITS),
    "TIFF I;16B": (saved("I;16B", "TIFF"), EIGHT_BITS),
    "TIFF I": (saved("I", "TIFF"), EIGHT_BITS),
    "TIFF F": (saved("F", "TIFF"), EIGHT_BITS),
    "GIF": (saved("P", "GIF"), "it is GIF, allowed are BMP, JPEG, MPO, PNG, TIFF, WEBP"),
    "JPEG 2000": (saved("RGB", "JPEG2000"), "it is JPEG2000, allowed are"),
    "EPS": (saved("RGB", "EPS"), "it is EPS, allowed are"),  # PIL would start Ghostscript
    "PPM": (saved("RGB", "PPM"), "it is PPM, allowed are"),
    "PNG head": (saved("RGB", "PNG")[:60], "truncated"),
    "PNG cut": (saved("RGB", "PNG")[:-40], "truncated"),
    "TIFF cut": (saved("RGB", "TIFF")[:-400], "not enough image data|truncated|-2"),
    "BMP cut": (saved("RGB", "BMP")[:-400], "truncated"),
    "WEBP cut": (saved("RGB", "WEBP")[:-100], "."),
    "JPEG cut": (saved("RGB", "JPEG")[:700], "the JPEG is cut off"),
    "JPEG head": (saved("RGB", "JPEG")[:100], "Truncated File Read|cut off"),
    "JPEG of 12 bits": (twelve_bits(), "."),
    "JPEG of 20,000²": (
        huge(saved("RGB", "JPEG")),
        r"says 20,000×20,000 .* MAX_PIXELS = 89,478,485",
    ),
    "JPEG of 10,000²": (huge(saved("RGB", "JPEG"), 10_000), "MAX_PIXELS = 89,478,485"),
    "JPEG of 0²": (huge(saved("RGB", "JPEG"), 0), "."),
    "CMYK of 20,000²": (huge(saved("CMYK", "JPEG")), "MAX_PIXELS = 89,478,485"),
    "PNG of 40,000²": (huge_png(), "MAX_PIXELS = 89,478,485"),
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    (folder / "train/x").mkdir(parents=True)
    for number, data in enumerate(files.values()):
        (folder / f"train/x/{number:03}.png").write_bytes(data)
    return folder


def by_pil(data: bytes) -> np.ndarray:
    with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data)) as opened:
        return np.asarray(opened.convert("RGB"))


@pytest.fixture(scope="module")
def decoded(tmp_path_factory) -> dict[str, list[np.ndarray]]:
    """Each of TAKEN by DALI for evaluation, by DALI's decoder of crops, and from memory: int."""
    store = open_train_split(write(tmp_path_factory.mktemp("pixels"), TAKEN))
    base = {"image_size": SIDE, "mean": (0, 0, 0), "std": (1, 1, 1)}
    whole = DataRecipe(augment="none", **base)
    options = {"micro_batch": len(store), "device": CPU}
    evaluated = [
        next(module.evaluation_batches(store, whole, [(0, len(store))], **options)).images
        for module in (pipeline, on_device)
    ]
    arrays = [each.permute(0, 2, 3, 1).numpy().round().astype(int) for each in evaluated]
    return {name: [each[place] for each in arrays] for place, name in enumerate(TAKEN)}


@pytest.mark.parametrize("name", TAKEN)
def test_all_decoders_give_the_pixels_of_pil(name, decoded):
    expected = by_pil(TAKEN[name])
    assert expected.shape == (SIDE, SIDE, 3)
    bound = JPEG_BOUND if plain_jpeg(TAKEN[name]) else 0
    for found in decoded[name]:
        assert np.abs(found - expected).max() <= bound


def test_only_plain_jpegs_reach_the_decoder_as_they_are():
    as_they_are = {name for name, data in TAKEN.items() if plain_jpeg(data)}
    assert as_they_are == {
        *(f"JPEG {mode}" for mode in ("1", "L", "RGB", "YCbCr", "progressive", "turned")),
        *("JPEG 4:4:4", "JPEG 4:2:2", "JPEG with bytes behind", "JPEG YCbCr by Adobe", "MPO"),
    }


def test_crops_of_what_pil_decoded_are_those_of_png(tmp_path):
    names = [name for name in TAKEN if not plain_jpeg(TAKEN[name])]
    same = {name: io.BytesIO() for name in names}
    for name, file in same.items():
        Image.fromarray(by_pil(TAKEN[name])).save(file, "PNG")
    data = DataRecipe(
        image_size=16, augment="random_resized_crop", flip=True, mean=(0, 0, 0), std=(1, 1, 1)
    )
    made = []
    for folder, files in (
        ("one", {name: TAKEN[name] for name in names}),
        ("other", {name: file.getvalue() for name, file in same.items()}),
    ):
        store = open_train_split(write(tmp_path / folder, files))
        ranges = [(0, len(store), len(store))]
        batches = pipeline.train_batches(
            store, data, ranges, seed=0, micro_batch=len(store), device=CPU
        )
        made.append(next(batches).images)
    assert torch.equal(*made)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_taken_is_refused_with_the_reason(name):
    data, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        encoded(data)


ARITHMETIC = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4R"
    "DgsLEBYQERMUFRUVDA8XGBYUGBIUFRT/2wBDAQMEBAUEBQkFBQkUDQsNFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQU"
    "FBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBT/yQARCAAIAAgDASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIR"
    "AxEAPwD/AHgOpMnvtYoQgsnlF54toKCqSzT0M9PYOMAT/9k="
)


def test_arithmetic_coding_is_pils():
    assert plain_jpeg(ARITHMETIC) is None
    found = encoded(ARITHMETIC)
    assert np.array_equal(by_pil(found.data.tobytes()), by_pil(ARITHMETIC))


@pytest.mark.filterwarnings("ignore")  # PIL's of damaged TIFF files
def test_damaged_files_are_taken_as_pil_takes_them_or_refused():
    generator = np.random.default_rng(0)
    sources = [TAKEN[name] for name in ("JPEG RGB", "JPEG CMYK", "PNG P", "TIFF LA", "WEBP RGBA")]
    for number in range(600):
        data = bytearray(sources[number % len(sources)])
        for at in generator.integers(0, min(len(data), 700), 3):
            data[at] = generator.integers(256)
        try:
            found = encoded(bytes(data))
        except ValueError:
            continue
        assert found.height * found.width <= MAX_PIXELS
        if not plain_jpeg(bytes(data)):
            assert np.array_equal(by_pil(found.data.tobytes()), by_pil(bytes(data)))


def test_what_is_no_file_is_refused_at_once(tmp_path, capsys, monkeypatch):
    """A FIFO that nobody writes, a socket, a device and a folder in an image's place."""
    data = write(tmp_path, {"image": TAKEN["PNG RGB"], **dict.fromkeys("abcd", TAKEN["PNG L"])})
    store = open_train_split(data)
    files = [Path(store.name(index)) for index in range(1, 5)]
    for file in files:
        file.unlink()
    os.mkfifo(files[0])
    server = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(files[1].parent)  # a socket's path is short
    server.bind(files[1].name)
    files[2].symlink_to("/dev/zero")
    files[3].mkdir()
    with server:
        for index, file in enumerate(files, 1):
            with pytest.raises(SampleError, match=f"{file.name} cannot be read") as caught:
                store.image(index)
            assert not isinstance(caught.value, ReadError)
        assert main(["data", "check", str(data)]) in (1, 2)  # no hang
    assert files[0].name in capsys.readouterr().out


def test_a_file_whose_size_changes_while_it_is_read_is_the_storages_fault(tmp_path, monkeypatch):
    store = open_train_split(write(tmp_path, {"one": TAKEN["PNG RGB"]}))
    real = os.fstat
    for shift in (-5, 5):
        told = SimpleNamespace(st_mode=stat.S_IFREG, st_size=len(TAKEN["PNG RGB"]) + shift)
        monkeypatch.setattr("hvd_lbt.data.reading.os.fstat", lambda _, told=told: told)
        with pytest.raises(ReadError, match="its size changed while it was read"):
            store.image(0)
        monkeypatch.setattr("hvd_lbt.data.reading.os.fstat", real)
    assert read_regular(store.name(0)) == TAKEN["PNG RGB"]
