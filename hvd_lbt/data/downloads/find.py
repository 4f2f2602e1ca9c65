"""What a downloaded data set is, by its files, and opening it."""

from pathlib import Path

from hvd_lbt.data.downloads.cifar import find_cifar, open_cifar
from hvd_lbt.data.downloads.common import Download
from hvd_lbt.data.downloads.imagenet import find_imagenet, open_imagenet
from hvd_lbt.data.downloads.mnist import find_mnist, open_mnist
from hvd_lbt.data.downloads.parquet import find_parquet, open_parquet
from hvd_lbt.data.downloads.tiny_imagenet import find_tiny, open_tiny
from hvd_lbt.errors import UserError
from hvd_lbt.terminal import printable


def find_tree(source: Path) -> Download | None:
    """tiny-ImageNet or ImageNet as they are downloaded, opened; None if SOURCE is neither.

    They are looked for before class folders and shards: their archives and folders look like these.
    """
    if not source.is_dir():
        return None
    if (tiny := find_tiny(source)) is not None:
        return open_tiny(tiny)
    if (imagenet := find_imagenet(source)) is not None:
        return open_imagenet(imagenet)
    return None


def find_files(source: Path, label_column: str | None = None) -> Download | None:
    """CIFAR, MNIST or Parquet files, opened; None if SOURCE has none.

    label_column: of Parquet files with several.
    """
    if (small := open_small(source)) is not None:
        return small
    if (files := find_parquet(source)) is not None:
        return open_parquet(source, files, label_column)
    if source.is_file():
        raise UserError(
            f"{printable(source)} is a file, and none that is read alone: CIFAR's archives under "
            "their own names and .parquet files are. Give the folder that it lies in."
        )
    return None


def open_small(source: Path) -> Download | None:
    """CIFAR or MNIST, whole in memory; None if SOURCE has none of their files."""
    if (cifar := find_cifar(source)) is not None:
        return open_cifar(*cifar)
    if (mnist := find_mnist(source)) is not None:
        return open_mnist(mnist)
    return None
