"""`python -m perf`: sweep, compile, plot, report, compare, log, doctor, gpu, step."""

import argparse
import importlib
import sys
import types
from typing import NoReturn

from perf.errors import Help, PerfError

COMMANDS = {
    "sweep": "time every tile and every peer on the GPU here (with none: compile and predict)",
    "compile": "compile every tile for GPUs that need not be here; tabulate and predict",
    "step": "count what a training step launches, moves and keeps (with a GPU: time it, too)",
    "plot": "draw results files",
    "report": "make one HTML page of results files",
    "compare": "say what became faster or slower between two results files",
    "log": "keep a line for each set of shapes: predicted, measured, against the best peer",
    "doctor": "say what is here, how fast it is, and what is missing",
    "gpu": "do all that needs a GPU, in order of value, in the time there is",
}
MODULES = {
    "gpu": "programme",
    "step": "train_step",
}  # of commands that are not called as their module


class Parser(argparse.ArgumentParser):
    """One line for wrong input, as for every other error; the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing and exiting."""
        raise PerfError(f"{message} ({self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status: 2 for wrong input."""
    parser = Parser(prog="python -m perf", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    argv = sys.argv[1:] if argv is None else argv
    named = next((a for a in argv if not a.startswith("-")), None)
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == named:  # importing the others would take seconds for nothing
            _module(name).add_arguments(command)
    try:
        args = parser.parse_args(argv)
        return _module(args.command).run(args)
    except Help as e:
        print(e)
        return 0
    except PerfError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = ": what was finished is in the results file" if named in ("sweep", "compile") else ""
        print(f"interrupted{kept}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # of `| head`
        sys.stderr.close()
        return 0


def _module(command: str) -> types.ModuleType:
    return importlib.import_module(f"perf.{MODULES.get(command, command)}")


if __name__ == "__main__":
    sys.exit(main())
