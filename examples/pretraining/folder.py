"""The output folder: which files are a run's, when a new run may start there, and one process at a time in it.

Nothing but a run's own files is ever deleted.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUN_FILES = ("config.json", "metrics.jsonl", "checkpoint.pt", "result.json")
SUMMARY_FILES = ("comparison.json", "comparison.md", "loss.png", "report.html")
TEMPORARY = ".tmp"
LOCK = ".lock"


class FolderError(Exception):
    """The folder cannot be used as asked; the message says why and what to do."""


def write_atomically(path: Path, text: str) -> None:
    """Replace the file as a whole: a reader finds the old text or the new one, whenever the process is killed."""
    temporary = path.with_name(path.name + TEMPORARY)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def is_run(folder: Path) -> bool:
    """Whether the folder has a configuration that this program wrote."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and {"model", "optimizer", "steps", "corpus"} <= config.keys()


def runs_in(folder: Path) -> list[Path]:
    """The folder itself and its direct subfolders, as far as they hold runs."""
    if not folder.is_dir():
        return []
    return [path for path in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())) if is_run(path)]


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raise FolderError where a run would be destroyed or mixed with something else; changes nothing."""
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"--out {folder} is a file; give a folder")
    if runs_in(folder):
        if not (resume or overwrite):
            raise FolderError(
                f"{folder} holds a run already; continue it with --resume, delete it with --overwrite, or give another --out"
            )
    elif folder.exists() and (stranger := next(_strangers(folder), None)) is not None:
        raise FolderError(f"{folder} holds no run but other files ({stranger.name}, …); give another --out")


def _strangers(folder: Path) -> Iterator[Path]:
    """Files that no run leaves behind, not even one that was killed at its start."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from _strangers(path)
        elif path.suffix != TEMPORARY and path.name != LOCK and not path.name.startswith("bpe-"):
            yield path


def delete_runs(folder: Path) -> None:
    """Delete the files of the runs in the folder, and subfolders that are empty then."""
    for run in runs_in(folder):
        # The configuration goes last: what is left after an interruption is still known as a run.
        for name in (*SUMMARY_FILES, *reversed(RUN_FILES)):
            (run / name).unlink(missing_ok=True)
        if run != folder and not any(run.iterdir()):
            run.rmdir()
    for name in SUMMARY_FILES:
        (folder / name).unlink(missing_ok=True)


@contextmanager
def only_process(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the system lets go of it when the process ends, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / LOCK).open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FolderError(f"another process is training in {folder}; wait for it, or give another --out") from error
        yield
