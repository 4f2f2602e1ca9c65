"""Data sets as they are downloaded: archives, trees without class folders, Parquet, arrays.

Each is opened in place: the samples in the order that the data set has as class folders, with the
labels that torchvision gives them. Nothing is unpacked to the disk. What is no sample is counted
and named; an image without a certain label is an error.
"""

from hvd_lbt.data.downloads.common import Download
from hvd_lbt.data.downloads.find import find_files, find_tree, open_small

__all__ = ["Download", "find_files", "find_tree", "open_small"]
