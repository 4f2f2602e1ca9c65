"""A run in MLflow: settings as parameters, scalars as metrics.

MLflow's own environment variables say where: MLFLOW_TRACKING_URI (else MLflow's default, a local
database), MLFLOW_EXPERIMENT_NAME [hvd_lbt], and those with which one logs in.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from hvd_lbt.log.loggers import RunInfo, Scalars

METRICS, PARAMS = 1000, 100  # of one request
LONGEST = 500  # characters of a parameter's value, in all versions of the server
STATUS = {"finished": "FINISHED", "stopped": "KILLED"}  # an interrupted run is still running


class MLflowLogger:
    """A run of this name; a resumed one has the same id and is continued."""

    def __init__(self, run: RunInfo):
        self._run, self._id = run, run.run_id
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # tables of its database, and such

    def begin(self) -> str:
        """Continue the run, or make one with the settings as its parameters."""
        self._client = MlflowClient()
        if self._id is not None and self._is_there(self._id):
            self._client.update_run(self._id, status="RUNNING")
            return self._id
        made = self._client.create_run(self._experiment(), run_name=self._run.name)
        self._id = made.info.run_id
        params = [Param(key, str(value)[:LONGEST]) for key, value in _flat(self._run.recipe)]
        for start in range(0, len(params), PARAMS):
            self._client.log_batch(self._id, params=params[start : start + PARAMS])
        tags = [RunTag("hvd_lbt.folder", str(self._run.folder))]
        self._client.log_batch(self._id, tags=tags)
        return self._id

    def log(self, records: Sequence[Scalars]) -> None:
        """One metric a value, its step the update."""
        metrics = [
            Metric(key, value, int(1000 * record.time), record.update)
            for record in records
            for key, value in record.values.items()
        ]
        for start in range(0, len(metrics), METRICS):
            self._client.log_batch(str(self._id), metrics=metrics[start : start + METRICS])

    def close(self, reason: str) -> None:
        """Set the run's status."""
        if reason in STATUS:
            self._client.set_terminated(str(self._id), STATUS[reason])

    def _is_there(self, run_id: str) -> bool:
        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "hvd_lbt")
        found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id if found else self._client.create_experiment(name))


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted keys and values."""
    flat: list[tuple[str, Any]] = []
    for key, value in settings.items():
        inside = isinstance(value, Mapping)
        flat += _flat(value, f"{prefix}{key}.") if inside else [(f"{prefix}{key}", value)]
    return flat
