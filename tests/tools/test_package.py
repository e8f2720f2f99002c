"""The package as a user has it: its names, the wheel, a bare checkout, the command `tilelab`."""

import importlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import tilelab
from tilelab.__main__ import COMMANDS, main

ROOT = pathlib.Path(__file__).parents[2]
FOLDERS = ("kernels", "nets", "perf")


def python(*words, cwd):
    """A process that finds packages in `cwd` first, as in a checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True
    )


@pytest.mark.core
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_bare_name_is_refused(folder):
    """Those names belong to other packages: our folder must not pass for one of them."""
    done = python("-c", f"import {folder}", cwd=ROOT)
    assert f"import that, not {folder}" in done.stderr.splitlines()[-1]
    assert f"tilelab.{folder}" in done.stderr.splitlines()[-1]


@pytest.mark.core
def test_a_bare_checkout_needs_no_installation(tmp_path):
    for folder in ("tilelab", *FOLDERS):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("results"))
    code = "import tilelab.nets.files, tilelab.perf.errors as e, tilelab; print(e.__file__)"
    done = python("-c", code, cwd=tmp_path)
    assert done.stdout.strip() == str(tmp_path / "perf" / "errors.py"), done.stderr
    done = python("-m", "tilelab.perf", "compare", "a.jsonl", "b.jsonl", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: cannot read a.jsonl: No such file or directory\n",
    )


def test_the_wheel_has_everything_and_no_name_but_its_own(tmp_path):
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="hatchling builds the wheel")
    (path,) = wheel.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(path).namelist())
    info = f"tilelab-{tilelab.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(("tilelab/", info))} == set()
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*"):
            known = file.suffix in (".py", ".npz", ".jinja", ".json") and file.is_file()
            if known and not file.is_relative_to(ROOT / "perf" / "results"):
                assert f"tilelab/{file.relative_to(ROOT).as_posix()}" in names
    assert not any(name.startswith("tilelab/perf/results") for name in names)


# --- The command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_what_is_called(name):
    module, text = COMMANDS[name]
    module = importlib.import_module(f"tilelab.{module}")
    assert callable(module.add_arguments) and callable(module.run)
    assert text and text[0].islower() and "\n" not in text


def test_help_has_a_line_for_each_command(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ended.value.code == 0 and all(
        [name, text] in lines for name, (_, text) in COMMANDS.items()
    )
    assert main([]) == 2  # and without a command it is what is printed
    assert "train" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--epochs", "many"], "invalid int value: 'many' (tilelab train --help)"),
        (["sweep"], "the following arguments are required: OP (tilelab sweep --help)"),
        (["--completion", "elvish"], "invalid choice: 'elvish'"),
    ],
)
def test_wrong_words_are_one_line(argv, message, capsys):
    assert main(argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    assert message in said.err


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"tilelab {tilelab.__version__}\n"


def test_shells_complete_commands_and_flags(capsys):
    pytest.importorskip("shtab", reason="shtab makes completion scripts")
    assert main(["--completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS) and "--save-tuned" in script


# --- The pages ------------------------------------------------------------------------------------

WITH_PAGES = ("docs", "tests", "tilelab", *FOLDERS)
PAGES = sorted([*ROOT.glob("*.md"), *(p for f in WITH_PAGES for p in (ROOT / f).rglob("*.md"))])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Files exist, and so do the headings that a link names."""
    for link in re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"', page.read_text()):
        target, _, anchor = (link[0] or link[1]).partition("#")
        if target.startswith(("http:", "https:")):
            continue
        file = (page.parent / target) if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            names = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
            assert anchor in names, f"{page.name}: {target}#{anchor}"
