"""The command line: ``python -m benchmarks [case ...]``."""

from __future__ import annotations

import argparse
import datetime
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from benchmarks import cases, machine, trees
from benchmarks.harness import METHOD, run_case
from benchmarks.plot import plot_growth, plot_ratios
from benchmarks.processes import environment
from benchmarks.results import Results, write
from benchmarks.table import document

#: Seconds for which other processes on the machine are watched before each case.
WATCHED, QUICK_WATCHED = 0.5, 0.05


def main(arguments: list[str] | None = None) -> None:
    """Run the cases, and print the results."""
    parser = _parser()
    options = parser.parse_args(arguments)
    known = cases.GPU if options.gpu else cases.CPU
    if unknown := [name for name in options.cases if name not in known]:
        kind = "--gpu" if options.gpu else "the CPU"
        parser.error(f"no case {', '.join(unknown)}; the cases of {kind} are {', '.join(known)}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            compared = {"": trees.snapshot(None, Path(folder) / "working-tree")}
            if options.against is not None:
                compared[options.against] = trees.snapshot(options.against, Path(folder) / "revision")
        except ValueError as error:
            parser.error(str(error))
        try:
            results = _run(options, options.cases or known, compared)
        except RuntimeError as error:
            sys.exit(f"benchmarks: {error}")
    print(document(results))
    if options.plot is not None:
        plot_ratios(results, options.plot)
        plot_growth(results, options.plot.with_stem(f"{options.plot.stem}-growth"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure gpuconst against its peers.")
    parser.add_argument("cases", nargs="*", metavar="case", help=f"CPU: {', '.join(cases.CPU)}; "
                        f"with --gpu: {', '.join(cases.GPU)}; default: all")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="small and few: shows that it works, not how fast")
    parser.add_argument("--gpu", action="store_true", help="the cases that need a GPU, instead of those of the CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw ratios there, and costs in FILE's stem-growth")
    parser.add_argument("--against", metavar="REV", help="compare the working tree with this revision, not with peers")
    return parser


def _run(options: argparse.Namespace, names: list[str], compared: dict[str, Path]) -> Results:
    start = time.perf_counter()
    found = machine.info(environment(compared[""], options.gpu, {}))
    if options.gpu and not found["devices"]:
        reasons = "; ".join(f"{row['name']}: {row['why_not']}" for row in found["backends"] if row["device"] == "cuda")
        raise RuntimeError(f"--gpu needs a GPU, and there is none to use: {reasons}")
    results = Results(
        {
            "machine": machine.describe(found, options.gpu),
            "versions": ", ".join(f"{name} {version}" for name, version in machine.versions().items()),
            "method": METHOD,
        }
    )
    quick = "quick, not for quoting, " if options.quick else ""
    when = f"{quick}commit {trees.commit()}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    tqdm.monitor_interval = 0  # its thread would run beside the measurement
    total = sum(len(cases.load(name).rows(options.quick)) for name in names)
    form = "{percentage:3.0f}% |{bar}| {elapsed}<{remaining} {desc}"
    with tqdm(total=total, bar_format=form, disable=None) as bar:

        def progress(rows: float, what: str) -> None:
            bar.set_description_str(what, refresh=False)
            bar.update(rows)

        for name in names:
            busy = machine.busy(QUICK_WATCHED if options.quick else WATCHED)
            results.cases[name] = run_case(
                name, compared, quick=options.quick, gpu=options.gpu, busy=busy, progress=progress
            )
            results.header["run"] = f"{when}, {time.perf_counter() - start:.0f} s"
            if options.json is not None:  # case by case: a later one may fail
                write(results, options.json)
    return results


if __name__ == "__main__":
    main()
