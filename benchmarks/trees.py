"""Copies of the package to measure: of the working tree, or of a revision of it."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SOURCES = ("gpuconst", "kernels")


def snapshot(revision: str | None, folder: Path) -> Path:
    """Copy the package into a folder from which it can be imported, whatever is installed.

    Both sides of a comparison are copies, so edits during a run change neither.

    Parameters
    ----------
    revision : str or None
        Any name of a commit that git accepts; None for the working tree.
    folder : Path
        Created here.

    Returns
    -------
    Path
        `folder`.

    Raises
    ------
    ValueError
        If git is not installed or knows no such revision, or the revision lacks the package.
    """
    folder.mkdir()
    if revision is None:
        for source in _SOURCES:
            shutil.copytree(ROOT / source, folder / source, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        if shutil.which("git") is None:
            raise ValueError(f"git is not installed, and only git knows what {revision!r} is")
        done = subprocess.run(["git", "-C", str(ROOT), "archive", revision, *_SOURCES], capture_output=True)
        if done.returncode:
            raise ValueError(f"git has no {revision!r} to compare with: {done.stderr.decode().strip()}")
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
            archive.extractall(folder, filter="data")
    (folder / "kernels").rename(folder / "gpuconst" / "kernels")
    return folder


def commit() -> str:
    """Return the short name of the working tree's commit, marked if the tree has changed since."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    if shutil.which("git") is None:
        return "unknown"
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
