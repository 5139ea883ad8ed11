"""The command line: ``gpuconst info`` and ``gpuconst demo``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from . import __version__
from .environment import info

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the process.

    Returns
    -------
    int
        The exit status: 0, or 1 after one line on standard error that says what failed.
    """
    options = _parser().parse_args(arguments)
    try:
        if options.command == "info":
            found = info()
            print(json.dumps(found.asdict(), indent=2) if options.json else found)
        else:
            from . import demo

            demo.run(backend=options.backend, value=options.value, device=options.device)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader closed the pipe; leave the interpreter nothing to flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ImportError, RuntimeError, ValueError, TypeError, OverflowError, MemoryError) as error:
        print(f"gpuconst {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpuconst", description="Fill device memory with a constant, and hand it to any framework without a copy."
    )
    parser.add_argument("--version", action="version", version=f"gpuconst {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    about = commands.add_parser("info", help="list devices, backends and versions, and say why any cannot be used")
    about.add_argument("--json", action="store_true", help="print JSON instead of a table")
    demo = commands.add_parser("demo", help="build a Keras model whose weights live in memory that gpuconst filled")
    demo.add_argument(
        "--backend", choices=["tensorflow", "jax", "torch"], help="Keras backend (default: an installed one)"
    )
    demo.add_argument("--value", type=float, default=0.1, help="value of the kernels (default: 0.1)")
    demo.add_argument("--device", help="'cpu', 'cuda' or 'cuda:N' (default: where Keras puts its weights)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
