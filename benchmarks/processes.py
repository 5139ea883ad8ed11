"""Worker processes, started when needed, which answer one request at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.contest import MissingError
from benchmarks.trees import ROOT

_QUIET = {"TF_CPP_MIN_LOG_LEVEL": "3", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}


def environment(tree: Path, gpu: bool, extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process that imports gpuconst from a tree and the benchmarks from here."""
    path = [str(tree), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, **_QUIET, **({} if gpu else _NO_GPU), **extra, "PYTHONPATH": os.pathsep.join(path)}


class Worker:
    """One process of `benchmarks.worker`."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the worker
        # -P: never the working directory's gpuconst, whatever PYTHONPATH says.
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=dict(environment),
            text=True,
        )

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send the worker a request, and return its answer.

        Raises
        ------
        MissingError
            If a contender cannot take part.
        RuntimeError
            If the worker failed; the first line of the message says why, and its output follows.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise RuntimeError(
                f"the worker ended with status {self._process.wait()}\nduring {arguments}:\n{self._log.read()[-4000:]}"
            )
        reply = json.loads(line)
        if "missing" in reply:
            raise MissingError(reply["missing"])
        if "error" in reply:
            raise RuntimeError(f"{reply['error']}during {arguments}")
        return reply["value"]

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()  # its memory is freed at once; nothing in it needs an orderly end
        self._process.communicate()
        self._log.close()
