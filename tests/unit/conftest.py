"""A small data set for all unit tests."""

from pathlib import Path

import pytest
from data_sets import write_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """23 training and 7 test images in four classes. Nobody may change it."""
    return write_folder(tmp_path_factory.mktemp("data") / "folder")
