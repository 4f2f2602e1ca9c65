"""A Python data set for `--data python_data:load`: the files of FOLDER, in the folder's order."""

import os
from pathlib import Path


class Files:
    """(bytes, label) of each file; with MIXED on rank 1 another order than on rank 0."""

    def __init__(self, folder: Path):
        self.classes = sorted(entry.name for entry in folder.iterdir())
        self.files = sorted(folder.glob("*/*"))
        if "MIXED" in os.environ and os.environ["OMPI_COMM_WORLD_RANK"] == "1":
            self.files.reverse()

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        file = self.files[index]
        return file.read_bytes(), self.classes.index(file.parent.name)


def load() -> tuple[Files, Files]:
    folder = Path(os.environ["FOLDER"])
    return Files(folder / "train"), Files(folder / "test")
