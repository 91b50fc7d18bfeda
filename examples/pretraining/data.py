"""Text as tokens: files, the standard library's source, or a streamed dataset; bytes, or byte-level BPE.

Batches from files are a pure function of (seed, step), so a resumed run needs no data state but its step. A streamed dataset is
read in order, and a resume skips what was read before.
"""

import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from pretraining.folder import TEMPORARY

BYTE_VOCABULARY = 256
VALIDATION_EVERY = 20
"""One file in so many is held out, or, with fewer files, the last part of the text."""


class DataError(Exception):
    """The text cannot be used; the message says why and what to do."""


# Files --------------------------------------------------------------------------------------------------------------------------


def standard_library() -> list[Path]:
    """The source files of the running interpreter's standard library, without its tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    found = sorted(path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts))
    if not found:
        raise DataError(f"{root} has no source files of the standard library; give text with --text")
    return found


def text_files(paths: list[Path]) -> list[Path]:
    """The files named, and those below the folders named, in a fixed order."""
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"--text {path}: there is no such file or folder")
        found += sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    if not found:
        raise DataError(f"--text {' '.join(map(str, paths))}: there are no files in it")
    return found


@dataclass(frozen=True)
class Text:
    """Training and validation text, both in bytes."""

    train: bytes
    validation: bytes

    @property
    def digest(self) -> str:
        """Tells one text from another, so that a run is not continued on another text."""
        return sha256(sha256(self.train).digest() + sha256(self.validation).digest()).hexdigest()[:16]


def read_text(files: list[Path]) -> Text:
    """The text of the files, some of it held out."""
    try:
        contents = [path.read_bytes() for path in files]
    except OSError as error:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error
    if len(files) >= 2 * VALIDATION_EVERY:
        kept = [content for i, content in enumerate(contents, 1) if i % VALIDATION_EVERY]
        return Text(b"\n".join(kept), b"\n".join(contents[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]))
    whole = b"\n".join(contents)
    cut = len(whole) - len(whole) // VALIDATION_EVERY
    return Text(whole[:cut], whole[cut:])


# Tokens -------------------------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Bytes as they are, or byte-level BPE with a vocabulary of `size` tokens, trained on the text and kept in a file."""

    def __init__(self, size: int | None, text: Iterator[str], cache: Path) -> None:
        self.bpe = None
        self.vocabulary = BYTE_VOCABULARY
        if size is None:
            return
        try:
            from tokenizers import ByteLevelBPETokenizer
            from tokenizers import Tokenizer as Loaded
        except ImportError as error:
            raise DataError("--bpe needs the package tokenizers: pip install tokenizers") from error

        if not cache.exists():
            trainer = ByteLevelBPETokenizer()
            trainer.train_from_iterator(text, vocab_size=size, show_progress=False)
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache.with_name(cache.name + TEMPORARY)
            trainer.save(str(temporary))
            os.replace(temporary, cache)
        self.bpe = Loaded.from_file(str(cache))
        self.vocabulary = size

    def encode(self, text: bytes) -> Tensor:
        """Token ids, int32 (uint8 for bytes)."""
        if self.bpe is None:
            return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)
        lines = as_lines(text)
        # Blocks of lines are encoded in parallel.
        blocks = ["".join(lines[i : i + 500]) for i in range(0, len(lines), 500)]
        ids = [i for encoding in self.bpe.encode_batch(blocks) for i in encoding.ids]
        return torch.tensor(ids, dtype=torch.int32)


def as_lines(text: bytes) -> list[str]:
    return text.decode("utf-8", errors="replace").splitlines(keepends=True)


# Batches ------------------------------------------------------------------------------------------------------------------------


class FileBatches:
    """Random windows of a text; the windows of a step are a function of (seed, step)."""

    def __init__(self, train: Tensor, validation: Tensor, length: int, seed: int) -> None:
        for name, tokens in (("training", train), ("validation", validation)):
            if len(tokens) <= length:
                raise DataError(
                    f"the {name} text has {len(tokens)} tokens, which is not more than the sequence length {length}; "
                    "give more text with --text, or a smaller --length"
                )
        self.train, self.validation, self.length, self.seed = train, validation, length, seed

    def batch(self, step: int, size: int) -> Tensor:
        """The windows of one step, int64 (size, length)."""
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + step) % 2**63)
        starts = torch.randint(len(self.train) - self.length, (size,), generator=generator)
        return torch.stack([self.train[i : i + self.length] for i in starts.tolist()]).long()

    def validation_batches(self, count: int, size: int) -> Iterator[Tensor]:
        """`count` batches of evenly spaced windows, the same in every run."""
        starts = torch.linspace(0, len(self.validation) - self.length, count * size).long().tolist()
        for first in range(0, len(starts), size):
            yield torch.stack([self.validation[i : i + self.length] for i in starts[first : first + size]]).long()


class StreamedBatches:
    """Consecutive windows of a streamed dataset; its first windows are held out for validation."""

    def __init__(self, name: str, tokenizer: Tokenizer, length: int, held_out: int) -> None:
        self.name, self.tokenizer, self.length, self.next_step = name, tokenizer, length, 0
        self.windows = self._windows()
        self.validation = [next(self.windows) for _ in range(held_out)]

    def _windows(self) -> Iterator[Tensor]:
        rest = torch.empty(0, dtype=torch.long)
        for text in stream_text(self.name):
            rest = torch.cat([rest, self.tokenizer.encode((text + "\n").encode()).long()])
            while len(rest) >= self.length:
                yield rest[: self.length]
                rest = rest[self.length :]
        raise DataError(f"the dataset {self.name} is used up; train for fewer steps")

    def batch(self, step: int, size: int) -> Tensor:
        """The windows of one step; earlier steps are skipped, so steps must not go back."""
        if step < self.next_step:
            raise ValueError(f"step {step} was asked for after step {self.next_step - 1}; a stream cannot go back")
        while self.next_step < step:
            for _ in range(size):
                next(self.windows)
            self.next_step += 1
        self.next_step += 1
        return torch.stack([next(self.windows) for _ in range(size)])

    def validation_batches(self, count: int, size: int) -> Iterator[Tensor]:
        """The held-out windows."""
        for first in range(0, min(count * size, len(self.validation)), size):
            yield torch.stack(self.validation[first : first + size])


def stream_text(name: str) -> Iterator[str]:
    """The texts of a dataset, streamed: NAME or NAME:CONFIG on the hub (allenai/c4 takes its English part), or a local folder."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError("--dataset needs the package datasets: pip install datasets") from error

    path, _, config = name.partition(":")
    config = config or {"allenai/c4": "en"}.get(path, "")
    try:
        rows = iter(load_dataset(path, config or None, split="train", streaming=True))
    except (OSError, ValueError) as error:
        raise DataError(
            f"--dataset {name} cannot be streamed ({type(error).__name__}: {str(error)[:200]}); "
            "a dataset of the hub needs a network. Without one, use --text or the default corpus"
        ) from error
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the network libraries below share no base class
            broke_off = f"the stream of {name} broke off ({type(error).__name__}: {str(error)[:200]})"
            raise DataError(f"{broke_off}; continue with --resume") from error
        if "text" not in row:
            raise DataError(f"--dataset {name} has no column 'text'; its columns are {', '.join(row)}")
        yield row["text"]
