"""The command `tilelab`, which is `python -m tilelab` too."""

import argparse
import importlib
import sys
import types
from typing import NoReturn

import tilelab
from tilelab.perf.errors import Help, PerfError

# name: the module that has `add_arguments(parser)` and `run(args)`, and what it does
COMMANDS = {
    "train": ("nets.train", "train a network on images, and draw what it learned"),
    "sweep": ("perf.commands.sweep", "time every tile and peer; with no GPU compile, predict"),
    "compile": ("perf.commands.compile", "compile every tile for GPUs that need not be here"),
    "plot": ("perf.report.plot", "draw results files"),
    "report": ("perf.report.html_page", "make one HTML page of results files"),
    "compare": ("perf.report.compare", "say what became faster or slower between two files"),
    "validate": ("perf.commands.validate", "hold the prediction to measured times"),
    "log": ("perf.report.history", "keep a line for each set of shapes of results files"),
    "step": (
        "perf.commands.training_step",
        "count what a training step launches, moves and keeps",
    ),
    "gpu": ("perf.commands.gpu_programme", "do all that needs a GPU, within a time budget"),
    "run-ptx": ("perf.commands.run_ptx", "run a file's kernels with no GPU, find faults"),
    "doctor": ("perf.commands.doctor", "say what is installed, how fast it is, what is missing"),
}
KEPT = {  # what an interrupted command leaves
    "sweep": ": what was finished is in the results file",
    "compile": ": what was finished is in the results file",
}


class Parser(argparse.ArgumentParser):
    """One line for wrong input, as for every other error; the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise PerfError(f"{message} ({self.prog} --help)")


def build_parser(*needed: str) -> Parser:
    """Make the parser; only the `needed` commands get their arguments.

    To import the modules of all commands takes seconds, which only shell completion is worth.
    """
    parser = Parser(prog="tilelab", description=tilelab.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"tilelab {tilelab.__version__}")
    parser.add_argument(
        "--completion", choices=("bash", "zsh", "tcsh"), help="print the shell's completion script"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in needed:
            _load(module).add_arguments(command)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status: 2 for wrong input, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    if hasattr(sys.stdout, "reconfigure"):  # a file or a pipe gets each line when it is printed
        sys.stdout.reconfigure(line_buffering=True)
    named = next((word for word in argv if not word.startswith("-")), "")
    try:
        parser = build_parser(named)
        args = parser.parse_args(argv)
        if args.completion:
            print(_completion(args.completion))
            return 0
        if args.command is None:
            parser.print_help()
            return 2
        return _load(COMMANDS[args.command][0]).run(args)
    except Help as e:
        print(e)
        return 0
    except PerfError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted{KEPT.get(named, '')}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `| head`
        sys.stderr.close()
        return 0


def _completion(shell: str) -> str:
    try:
        import shtab  # a checkout with nothing installed may lack it
    except ImportError:
        raise PerfError("--completion needs shtab: pip install shtab") from None
    return shtab.complete(build_parser(*COMMANDS), shell)


def _load(module: str) -> types.ModuleType:
    return importlib.import_module(f"tilelab.{module}")


if __name__ == "__main__":
    sys.exit(main())
