"""The `medattn` command: finds the subcommand, runs it, and turns what went wrong into one line and a code.

Exit codes: 0 done, or saved and stopped on SIGTERM; 1 `check` found errors in the data, `reproduce` another
result; 2 the input or the machine does not allow it, or Ctrl-C; 141 the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import sys
from collections.abc import Sequence

import medattn
from medattn.errors import InputError
from medattn_pipelines.commands import COMMANDS, Command

MACHINE_ERRORS = {
    errno.ENOSPC: "the disk is full; what was complete before is intact",
    errno.EDQUOT: "the disk quota is used up; what was complete before is intact",
    errno.EFBIG: "larger than this file system or `ulimit -f` allows; what was complete before is intact",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.EIO: "could not be written whole; look at the disk, then try again",
    errno.EROFS: "the file system is read-only",
    errno.EEXIST: "exists and is not a folder; choose another name",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another name",
    errno.EISDIR: "is a folder, expected a file; choose another name",
}
FOOTER = """\
`medattn COMMAND --help` explains a command with examples.

First steps, without data of your own:
  medattn phantom data/hn_ct
  medattn train configs/hn_ct.yaml training.max_minutes=10
  medattn predict runs/hn_ct/model data/hn_ct --output predictions
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line, by default the process's own, and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()  # a reader that went away shows here, not at interpreter exit
        return code
    except InputError as error:
        return _complain(*error.problems)
    except KeyboardInterrupt as interrupt:
        print(f"\nmedattn: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        _drop_output()
        return 141
    except Exception as error:
        if sentence := _machine_error(error):
            if isinstance(error, OSError) and not error.filename:
                _drop_output()
            return _complain(sentence)
        raise


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"medattn {medattn.__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise InputError(f"unknown command {name!r}{hint} (`medattn --help` lists all)")
    parser = parser_for(name, COMMANDS[name])
    # intermixed, so that `train CONFIG --resume a.b=c` works in any order
    return COMMANDS[name].run(parser.parse_intermixed_args(rest))


def parser_for(name: str, command: Command) -> argparse.ArgumentParser:
    """The argument parser of one command."""
    examples = "\n".join(["examples:", *(f"  {line}" for line in command.examples)])
    parser = argparse.ArgumentParser(
        prog=f"medattn {name}",
        description=command.purpose,
        epilog=f"{examples}\n\n{command.notes()}".rstrip(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.arguments(parser)
    return parser


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.purpose}" for name, command in COMMANDS.items())
    usage = "usage: medattn COMMAND ... | --help | --version"
    return f"{usage}\n\n{medattn.__doc__}\n\ncommands:\n{rows}\n\n{FOOTER}"


def _complain(*problems: str) -> int:
    for problem in problems:
        print(f"medattn: error: {problem}", file=sys.stderr)
    return 2


def _drop_output() -> None:
    """Drop what standard output still holds and cannot write; else the interpreter tries again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _machine_error(error: Exception) -> str | None:
    """A sentence for what the machine refused: memory, disk space, permission. None for a bug."""
    if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
        where = f"{error.filename}: " if error.filename else "output: "
        return where + MACHINE_ERRORS[error.errno]
    # torch reports memory as RuntimeErrors of its own, and torch is not imported here
    out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if out_of_memory or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return (
            "out of memory; lower training.batch_size, data.patch_size or data.workers for training, "
            "or free memory"
        )
    return None


if __name__ == "__main__":
    sys.exit(main())
