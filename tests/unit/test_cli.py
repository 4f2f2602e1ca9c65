"""The command line: what is listed, what each word costs to import, and how errors read."""

import json
import subprocess
import sys

import pytest
import yaml

from hvd_lbt import cli
from hvd_lbt.cli import main
from hvd_lbt.errors import UserError
from hvd_lbt.recipe import load_recipe, recipe_of, shipped_recipes
from hvd_lbt.terminal import printable

HEAVY = ("torch", "horovod", "nvidia", "mpi4py", "matplotlib", "sklearn", "scipy", "tensorboard")


def run_without(packages, *words):
    """Run `hvd_lbt WORDS` where importing any of `packages` is an ImportError."""
    program = f"""
import sys
for name in {packages!r}:
    sys.modules[name] = None
from hvd_lbt.cli import main
sys.exit(main({list(words)!r}))
"""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)


def test_help_lists_the_commands_and_imports_none_of_them():
    done = run_without((*HEAVY, "numpy", "rich", "yaml", "pydantic"), "--help")
    assert done.returncode == 0, done.stderr
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("    ")}
    names = {name.split()[0] for name in cli.COMMANDS}
    assert names <= listed
    assert cli.STUDY_WORKER not in done.stdout


@pytest.mark.parametrize(
    "words", [("plan", "digits"), ("recipes",), ("recipes", "digits"), ("plan", "--help")]
)
def test_planning_needs_neither_torch_nor_horovod(words):
    done = run_without(HEAVY, *words)
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout or "--workers" in done.stdout


def test_what_cannot_be_imported_is_named_with_what_to_run():
    done = run_without(("torch",), "evaluate", "x.pt")
    assert done.returncode == 2
    assert done.stderr.startswith("hvd_lbt: hvd_lbt evaluate needs what cannot be imported here (")
    assert "launch/setup" in done.stderr


@pytest.mark.parametrize("group", sorted(cli.GROUPS))
def test_a_group_lists_its_commands(group, capsys):
    assert main([group, "--help"]) == 0
    listed = capsys.readouterr().out
    own = [name.split()[1] for name in cli.COMMANDS if name.startswith(f"{group} ")]
    assert own
    assert all(f"    {name}" in listed for name in own)
    assert main([group]) == 2


@pytest.mark.parametrize("name", sorted({**cli.COMMANDS, **cli.HIDDEN}))
def test_each_command_prints_its_help(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: hvd_lbt {name} ")


def test_no_command_prints_the_list(capsys):
    assert main([]) == 0
    assert "usage: hvd_lbt" in capsys.readouterr().out


def test_the_version(capsys):
    assert main(["--version"]) == 0
    name, version = capsys.readouterr().out.split()
    assert name == "hvd_lbt"
    assert version[0].isdigit()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tran"], "hvd_lbt: argument COMMAND: invalid choice: 'tran' (choose from 'train', "),
        (["bench", "updat"], "hvd_lbt bench: argument COMMAND: invalid choice: 'updat'"),
        (["plan"], "hvd_lbt plan: the following arguments are required: recipe"),
        (["plan", "digits", "--nothing"], "hvd_lbt plan: unknown arguments: --nothing"),
        (["plan", "digits", "--work", "3"], "hvd_lbt plan: unknown arguments: --work 3"),
        (["plan", "digits", "--workers", "0"], "hvd_lbt plan: argument --workers: 0 is not "),
        (["plan", "digits", "--workers", "1.5"], "hvd_lbt plan: argument --workers: 1.5 is not "),
        (["plan", "digits", "--workers", "9" * 5000], "hvd_lbt plan: argument --workers: 9999"),
        (["plan", "digits", "--images-per-second", "nan"], "hvd_lbt plan: argument --images-per-"),
        (["plan", "x\x1b[31m\n[/b]"], "hvd_lbt: Recipe x\\x1b[31m\\n[/b]: there is no shipped"),
        (["plan", "digits", "\x1b]0;x\x07"], "hvd_lbt plan: unknown arguments: \\x1b]0;x\\x07"),
        (["plan", "digits", "--set", "\udcff=1"], "hvd_lbt: --set \\udcff=1: it must read"),
        (["plan", "a\0b"], "hvd_lbt: Recipe a\\x00b: "),
        (["recipes", "nothing"], "hvd_lbt: Recipe nothing: there is no shipped recipe"),
        (["study", "nothing"], "hvd_lbt study: argument NAME: invalid choice: 'nothing'"),
        (["study-trainings", "/nowhere.json"], "hvd_lbt: /nowhere.json is no list of trainings"),
        (["data", "digits", "--out", "/dev/null/x"], "hvd_lbt: --out /dev/null/x: "),
    ],
)
def test_errors_are_one_paragraph_that_names_the_argument(words, message, capsys):
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(message)
    assert said.err.count("\n") == 1
    assert said.err.rstrip("\n").isprintable()


def test_an_option_may_be_joined_to_its_value(capsys):
    assert main(["plan", "--workers=2", "digits", "--set=schedule.lr=0.2"]) == 0
    assert "0.2" in capsys.readouterr().out


def test_a_reader_that_goes_is_no_traceback():
    program = (
        "import sys; from hvd_lbt.cli import main; sys.stdin.readline(); "
        "sys.exit(main(['recipes']))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None  # its other end is what the program writes to
    _, said = process.communicate("\n")
    assert said == ""
    assert process.returncode == 1


def test_another_encoding_is_no_traceback(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "hvd_lbt", "plan", "digits"],
        capture_output=True,
        env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin"},
    )
    assert done.returncode == 0, done.stderr
    assert b"digits: 426 updates" in done.stdout


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_recipe_is_printed_as_a_whole(name, capsys):
    assert main(["recipes", name]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert recipe_of(settings, name) == load_recipe(name)
    assert settings["run"]["seed"] == 0  # a default


def test_a_printed_recipe_is_a_recipe(tmp_path, capsys):
    assert main(["recipes", "cifar10_cosine", "--set", "name='1e5'"]) == 0
    file = tmp_path / "mine.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_recipe(file) == load_recipe("cifar10_cosine", ["name='1e5'"])


def test_recipes_are_listed_with_one_line_each(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == shipped_recipes()
    assert all(len(line.split()) > 4 for line in lines)


def test_a_list_of_trainings_that_is_none(tmp_path, capsys):
    file = tmp_path / "tasks.json"
    for content in ("[" * 100_000, "3", "[3]", json.dumps([{"recipe": 3}]), "\udcff"):
        file.write_text(content, errors="surrogateescape")
        assert main(["study-trainings", str(file)]) == 2
        assert "is no list of trainings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain – × ε, [/b] :smile: $x$", "plain – × ε, [/b] :smile: $x$"),
        ("\x1b[2J\r\n\t\0\x9b", "\\x1b[2J\\r\\n\\t\\x00\\x9b"),
        ("\u202egnp.exe\u2066\u200b\ufeff", "\\u202egnp.exe\\u2066\\u200b\\ufeff"),
        ("\udcff", "\\udcff"),
        (Exception("a\nb"), "a\\nb"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "hvd_lbt: there is not enough memory for this: a smaller layout."),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried\n1e15 bytes"),
            "hvd_lbt: there is not enough memory for this: a smaller layout.",
        ),
        (OSError(28, "No space left on device", "/x/y\x1b"), "hvd_lbt: /x/y\\x1b: No space left"),
        (PermissionError(13, "Permission denied", "/x"), "hvd_lbt: /x: Permission denied"),
    ],
)
def test_errors_of_the_machine_are_one_paragraph(monkeypatch, capsys, error, message):
    def fails(args):
        raise error

    monkeypatch.setattr("hvd_lbt.show_plan.main", fails)
    assert main(["plan", "digits"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def fails(args):
        raise KeyError("x")

    monkeypatch.setattr("hvd_lbt.show_plan.main", fails)
    with pytest.raises(KeyError):
        main(["plan", "digits"])


def test_an_unknown_option_with_a_space_is_no_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "digits", "--no-such-option={a: 1}"]) == 2
    assert "unknown arguments: --no-such-option={a: 1}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("alone", [True, False])
def test_a_rank_that_alone_meets_an_error_prints_it(monkeypatch, capsys, alone):
    """Rank 0 ends the others of an error that all meet; who is still there has met it alone."""
    monkeypatch.setenv("HOROVOD_RANK", "1")
    monkeypatch.setattr(cli, "SECONDS_TO_TELL", 0.0)
    monkeypatch.setattr(cli, "_world_is_up", lambda: object() if alone else None)
    cli._tell(UserError("no module here"))
    said = capsys.readouterr().err
    assert ("rank 1 on" in said and "alone: no module here" in said) if alone else said == ""
