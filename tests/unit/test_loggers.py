"""run.loggers: real MLflow and W&B, loggers of one's own, and loggers that fail."""

import importlib.util
import json
import threading
import time

import psutil
import pytest
import torch

from hvd_lbt.errors import UserError
from hvd_lbt.log import loggers, run_log
from hvd_lbt.log.loggers import RunInfo, Sender, make_outputs, scalars
from hvd_lbt.log.run_log import RunLog
from hvd_lbt.no_secrets import refuse_secrets
from hvd_lbt.recipe import load_recipe
from hvd_lbt.schedule.plan import make_plan
from hvd_lbt.world import World

# of MLflow's own use of sqlalchemy
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
BLOCK, FULL, LAST = 2**15, 1, 4
REDUCER = {"wire_scale": 1.0, "underflow": 0.0, "overflows": 0, "skipped": 0}
MEASURED = {"reducer": REDUCER, "noise": torch.ones(2), "times": torch.ones(1, 4)}


def train(out, names, updates, reason, world=None):
    """What training logs of these updates, and an evaluation after the last."""
    recipe = load_recipe("digits", [f"run.loggers={names}"])
    plan = make_plan(recipe.schedule, 1000)
    log = RunLog(out, world or World(), plan, updates[0], recipe)
    for number in updates:
        sums = torch.tensor([2.0 * number, 1.0, 2.0])
        log.update(plan.at(number), sums, data_wait=0.0, **MEASURED)
    values = {"loss": 0.5, "top1": 0.25, "top5": 0.75, "samples": 4}
    log.evaluation(plan.at(updates[-1]), values)
    log.end(reason, updates[-1] + 1)
    return log


def ids(out):
    return json.loads((out / "loggers.json").read_text())


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A local database of MLflow's; making it takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def test_mlflow_continues_the_same_run_after_a_requeue(tmp_path, store, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "digits of ours")
    out = tmp_path / "run"
    train(out, "[mlflow]", range(4), "stopped")
    first, client = ids(out)["mlflow"], MlflowClient()
    assert client.get_run(first).info.status == "KILLED"
    train(out, "[mlflow]", range(4, 6), "finished")
    assert ids(out) == {"mlflow": first}
    run = client.get_run(first)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "digits"
    assert run.data.params["schedule.lr"] == "0.1"
    assert run.data.params["run.loggers"] == "['mlflow']"
    points = {point.step: point.value for point in client.get_metric_history(first, "train/loss")}
    assert points == {number: float(number) for number in range(6)}
    assert [p.step for p in client.get_metric_history(first, "test/top1")] == [4, 6]
    (experiment,) = client.search_experiments(filter_string="name = 'digits of ours'")
    assert run.info.experiment_id == experiment.experiment_id
    assert not (out / "tensorboard").exists()


def test_mlflow_begins_a_new_run_where_the_old_one_is_gone(tmp_path, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    out = tmp_path / "run"
    out.mkdir()
    (out / "loggers.json").write_text('{"mlflow": "0123456789abcdef0123456789abcdef"}')
    train(out, "[mlflow]", range(2), "finished")
    assert ids(out)["mlflow"] != "0123456789abcdef0123456789abcdef"


def points_of(file):
    """The values of each point in a file of W&B's, in order: a log of LevelDB's, 7 bytes before."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, points, parts = file.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if BLOCK - place % BLOCK < 7:  # a block's end has no room for the next header
            place += BLOCK - place % BLOCK
        if kind not in (FULL, LAST):
            continue
        record = Record.FromString(parts)
        parts = b""
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            points.append({"/".join(i.nested_key) or i.key: i.value_json for i in items})
    return points


def test_wandb_continues_the_same_run_after_a_requeue(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    out = tmp_path / "run"
    train(out, "[wandb]", range(3), "stopped")
    first = ids(out)["wandb"]
    time.sleep(1.1)  # W&B names a part by the second
    train(out, "[wandb]", range(3, 5), "finished")
    assert ids(out) == {"wandb": first}
    # its process has ended: only then it has surely written all
    assert "wandb-core" not in [child.name() for child in psutil.Process().children()]
    parts = sorted(out.glob(f"wandb/offline-run-*/run-{first}.wandb"))
    assert len(parts) == 2
    points = [point for part in parts for point in points_of(part)]
    losses = [(int(p["update"]), float(p["train/loss"])) for p in points if "train/loss" in p]
    assert losses == [(number, float(number)) for number in range(5)]


def test_wandb_without_a_key_is_an_error_at_the_start(tmp_path, monkeypatch):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match="WANDB_API_KEY or run `wandb login`, or set WANDB_MODE"):
        train(tmp_path / "run", "[wandb]", range(1), "finished")


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_what_is_not_installed_is_named_with_its_extra(tmp_path, monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package: None if package == name else find(package)
    )
    with pytest.raises(UserError, match=rf"pip install 'hvd_lbt\[{name}\]'"):
        train(tmp_path / "run", f"[{name}]", range(1), "finished")


OWN = """
class Good:
    def __init__(self, run): self.run, self.seen = run, []; MADE.append(self)
    def begin(self): return "id of mine"
    def log(self, records): self.seen += records
    def close(self, reason): self.reason = reason
class Failing(Good):
    def log(self, records): raise OSError("the server is away")
class Leaving(Good):
    def log(self, records): raise SystemExit(3)
class Deaf(Good):
    close = None
class Picky(Good):
    def __init__(self): pass
MADE = []
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_loggers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield __import__("own_loggers")
    del __import__("sys").modules["own_loggers"]


def test_a_class_of_ones_own_is_given_all_and_its_id_again(tmp_path, own):
    out = tmp_path / "run"
    train(out, "[tensorboard, 'own_loggers:Good']", range(3), "stopped")
    train(out, "[tensorboard, 'own_loggers:Good']", range(3, 4), "finished")
    first, second = own.MADE
    assert (first.run.run_id, first.run.first_update, first.reason) == (None, 0, "stopped")
    assert (second.run.run_id, second.run.first_update) == ("id of mine", 3)
    assert second.reason == "finished"
    assert first.run.folder == out
    assert first.run.recipe["schedule"]["lr"] == 0.1
    assert [record.update for record in first.seen] == [0, 1, 2, 3]
    assert first.seen[2].values["train/loss"] == 2.0
    assert first.seen[2].values["plan/global_batch"] == 32
    assert first.seen[3].values == {"test/loss": 0.5, "test/top1": 0.25, "test/top5": 0.75}
    assert (out / "tensorboard").is_dir()


def test_only_rank_0_logs(tmp_path, own):
    train(tmp_path / "run", "['own_loggers:Good']", range(3), "stopped", World(rank=1, size=2))
    assert not own.MADE
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("own_loggers:Deaf", "has no close; it must have begin(), log(records) and close(reason)"),
        ("own_loggers:Picky", "own_loggers:Picky cannot be made (TypeError: "),
        ("own_loggers:Absent", "own_loggers has no 'Absent'"),
        ("absent_module:Absent", "there is no module 'absent_module'"),
    ],
)
def test_a_class_that_cannot_be_used_is_an_error_at_the_start(tmp_path, own, name, reason):
    with pytest.raises(UserError) as raised:
        train(tmp_path / "run", f"['{name}']", range(1), "finished")
    assert "run.loggers: " in str(raised.value)
    assert reason in str(raised.value)


@pytest.mark.parametrize("kind", ["Failing", "Leaving"])
def test_a_logger_that_fails_is_said_once_and_counted(tmp_path, own, capsys, monkeypatch, kind):
    monkeypatch.setattr(run_log, "FLUSH_SECONDS", 0.0)
    train(tmp_path / "run", f"['own_loggers:{kind}']", range(20), "finished")
    said = capsys.readouterr().out
    assert said.count(f"own_loggers:{kind} failed (") == 1
    assert f"own_loggers:{kind} lacks 21 records; metrics.jsonl has all." in said
    assert "20 updates done" in said
    assert own.MADE[0].reason == "finished"


class Told:
    """A logger that fails as often as it is told to, and can be held."""

    def __init__(self, begin=0, log=0):
        self.failures, self.seen, self.calls = {"begin": begin, "log": log}, [], []
        self.go = threading.Event()
        self.go.set()

    def _fail(self, method):
        self.calls.append(method)
        if self.failures[method]:
            self.failures[method] -= 1
            raise ConnectionError("away")

    def begin(self):
        self._fail("begin")

    def log(self, records):
        self.go.wait(20)
        self._fail("log")
        self.seen += [record.update for record in records]

    def close(self, reason):
        self.calls.append(reason)


def test_a_logger_that_works_again_has_everything_once(monkeypatch):
    monkeypatch.setattr(loggers, "RETRY_SECONDS", 0.01)
    logger, said = Told(begin=1, log=2), []
    sender = Sender("mine", logger, said.append)
    for number in range(5):
        sender.add(scalars(number, {"loss": 1.0}))
    sender.flush()
    limit = time.monotonic() + 20
    while len(logger.seen) < 5 and time.monotonic() < limit:
        time.sleep(0.01)
    sender.close("finished")
    assert logger.seen == [0, 1, 2, 3, 4]
    assert said == [
        (
            "mine failed (ConnectionError: away). Training continues; what it did not take is kept "
            "and tried again."
        ),
        "mine works again after 3 failures.",
    ]
    assert logger.calls == ["begin", "begin", "log", "log", "log", "finished"]


def test_what_a_logger_cannot_take_is_dropped_from_the_oldest_and_counted(monkeypatch):
    monkeypatch.setattr(loggers, "KEPT", 10)
    logger, said = Told(log=10**9), []
    sender = Sender("mine", logger, said.append)
    for number in range(25):
        sender.add(scalars(number, {"loss": 1.0}))
    sender.close("finished")
    assert said[-1] == "mine lacks 25 records; metrics.jsonl has all."
    assert [record.update for record in sender._waiting] == list(range(15, 25))


def test_a_logger_that_hangs_is_left(monkeypatch):
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.1)
    logger, said = Told(), []
    logger.go.clear()
    sender = Sender("mine", logger, said.append)
    sender.add(scalars(0, {"loss": 1.0}))
    sender.close("finished")
    assert said == [
        (
            "mine is not done after 0 s and is left: 1 records or more are missing there. "
            "metrics.jsonl has all."
        )
    ]
    logger.go.set()
    sender._thread.join(20)


@pytest.mark.parametrize("content", ["{", "[1]", '{"mlflow": 3}', "\x00"])
def test_damaged_ids_are_said_and_replaced(tmp_path, own, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/loggers.json").write_text(content)
    said = []
    about = RunInfo(name="x", folder=tmp_path / "run", recipe={}, run_id=None, first_update=0)
    (output,) = make_outputs(["own_loggers:Good"], about, said.append)
    output.close("finished")
    assert len(said) == 1
    assert "loggers.json cannot be used (" in said[0]
    assert ids(tmp_path / "run") == {"own_loggers:Good": "id of mine"}


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("model.arguments={wandb_api_key: 0123456789abcdef}", "model.arguments.wandb_api_key"),
        ("run.password=hunter22!", "run.password"),
        ("data.classes=https://me:hidden1@host/classes.txt", "data.classes"),
        ("run.loggers=[ghp_0123456789abcdefghij0123456789abcdef]", "run.loggers[0]"),
        ("run.hf_0123456789abcdefghij0123456789=1", "run"),
    ],
)
def test_a_setting_that_looks_like_a_secret_is_refused_and_not_shown(setting, place):
    with pytest.raises(UserError) as raised:
        load_recipe("digits", [setting])
    assert f"{place} looks like a secret" in str(raised.value)
    for word in ("0123456789", "hunter22", "hidden1"):
        assert word not in str(raised.value)


def test_tokens_of_a_network_are_no_secrets():
    settings = load_recipe("digits").to_dict()
    settings["model"]["arguments"] = {"class_token": True, "global_pool": "token", "token": "mean"}
    refuse_secrets(settings, "Recipe x")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[tensorboard, tensorboard]", "each must be named once"),
        ("[tensorbord]", "each must be tensorboard, mlflow, wandb, or package.module:name"),
        ("mlflow", "it must be a list"),
        ("[3]", "it must be a valid string"),
    ],
)
def test_impossible_loggers_are_named(value, reason):
    with pytest.raises(UserError, match=r"run\.loggers") as raised:
        load_recipe("digits", [f"run.loggers={value}"])
    assert reason in str(raised.value)
