"""A run in Weights & Biases: settings as its config, scalars over the updates.

W&B's own environment variables say where: WANDB_API_KEY or `wandb login`, WANDB_PROJECT [hvd_lbt],
WANDB_ENTITY, WANDB_MODE=offline (files in RUN/wandb, for `wandb sync`).
"""

import os
import uuid
from collections.abc import Sequence
from typing import Any

import wandb

from hvd_lbt.errors import UserError
from hvd_lbt.log.loggers import RunInfo, Scalars


class WandbLogger:
    """A run of this name; a resumed one has the same id and is continued."""

    def __init__(self, run: RunInfo):
        self._online = os.environ.get("WANDB_MODE", "online") in ("online", "shared")
        if self._online and not wandb.api.api_key:  # it would ask on the terminal, or fail
            raise UserError(
                "run.loggers: wandb has no API key. Set WANDB_API_KEY or run `wandb login`, or set "
                "WANDB_MODE=offline to write files for `wandb sync`."
            )
        self._run, self._id = run, run.run_id or uuid.uuid4().hex

    def begin(self) -> str:
        """Continue the run, or make one with the settings as its config."""
        options: dict[str, Any] = {"resume": "allow"} if self._online else {}
        if "WANDB_DIR" not in os.environ:
            options["dir"] = str(self._run.folder)
        self._to = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "hvd_lbt"),
            id=self._id,
            name=self._run.name,
            config=dict(self._run.recipe),
            settings=wandb.Settings(console="off", silent=True),
            **options,
        )
        self._to.define_metric("update")
        self._to.define_metric("*", step_metric="update")
        return self._id

    def log(self, records: Sequence[Scalars]) -> None:
        """One point a record. W&B's own step only counts them: it cannot go back at a resume."""
        for record in records:
            self._to.log({"update": record.update, **record.values})

    def close(self, reason: str) -> None:
        """Upload what is left, and wait until it is in the files.

        `finish` returns some milliseconds before W&B's own process has written them, and a job
        that ends then may kill that process. It is not ended while a run of yours needs it.
        """
        self._to.finish(exit_code=0)
        if wandb.run is None:
            wandb.teardown()
