"""The name of an output → the output, and where its manifest stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..checks import check_whole_number, shown
from . import tables
from .appended import AppendedTable, existing_rows, mend
from .embedded import KINDS as INSIDE
from .embedded import Embedded
from .files import check_target
from .job import SKIP, CaptionJob
from .manifest import Manifest
from .outputs import Output
from .rewritten import ParquetTable, RewrittenTable
from .shards import SHARD_SIZE, Shards
from .sidecars import Sidecars
from .sources import Source

TAR = ".tar"
KINDS = (
    "a .jsonl, .csv, .tsv, .parquet or .tar file; only a suffix such as .txt or .xmp for files "
    "beside the images; xmp for the description within JPEG, PNG and WebP images; or exif for that "
    "in ASCII, in TIFF too"
)
SIZE = "size"  # the fact how far a table was written


def is_with_images(out: str) -> bool:
    """Whether captions go into the images, or into files beside them: `.txt` is only a suffix."""
    return out in INSIDE or (out.startswith(".") and len(out) > 1 and out[1:].isalnum())


def _with_images(out: str, job: CaptionJob) -> Output:
    return Embedded(out, job.fields) if out in INSIDE else Sidecars(out, job.fields)


def check_out(out: str, sources: Sequence[Source], job: CaptionJob) -> None:
    """Refuse an output of no known kind, one that can't be written, and one that is a source.

    It needs no model, which may take long to download.

    Raises:
        ValueError, OSError: with the reason.
    """
    if is_with_images(out) and out.lower() not in (*tables.TABLES, TAR):
        _with_images(out, job)
        return
    file = Path(out)
    if file.suffix.lower() not in (*tables.TABLES, TAR):
        raise ValueError(f"Captions are written to {KINDS}, found {shown(out)}.")
    if file.suffix.lower() in tables.PARQUET:
        tables.import_parquet()
    check_target(file)
    for source in sources:
        if source.file is not None and file.exists() and file.samefile(source.file):
            raise ValueError(f"{shown(out)} is what the images are read from: choose another file.")


def manifest_of(out: str, sources: Sequence[Source]) -> Path:
    """Where the manifest stands unless another place is asked for: beside what is written."""
    if not is_with_images(out):
        return Path(out).with_name(f"{Path(out).name}.manifest")
    name = f".fastvlm-captions{out if out.startswith('.') else f'-{out}'}.manifest"
    folder = next((s.name for s in sources if Path(s.name).is_dir()), None)
    if folder is not None:
        return Path(folder, name)
    files = (item.path for source in sources for item in source.items())
    file = next(filter(None, files), None) or next((s.file for s in sources if s.file), Path())
    return file.with_name(name) if file.name else Path(name)


def open_output(
    out: str,
    job: CaptionJob,
    manifest: Manifest,
    *,
    shard_size: int = SHARD_SIZE,
    writing: bool = True,
) -> Output:
    """The output of a run.

    Args:
        out: its name, as `check_out` accepts it.
        job: what is written.
        manifest: of the run.
        shard_size: samples in each tar, where there are several.
        writing: False only to see what it has; nothing of it is changed.

    Raises:
        ValueError: it holds what can't be gone on with, or the job doesn't suit it.
    """
    if is_with_images(out):
        return _with_images(out, job)
    file = Path(out)
    kind = file.suffix.lower()
    if kind == TAR:
        check_whole_number("shard_size", shard_size)
        shards = Shards(file, job.fields, shard_size, writing=writing)
        if job.existing != SKIP and shards.found and manifest.is_empty():
            raise ValueError(f"{shown(out)} has captions, and those in a tar can only be skipped.")
        return shards
    if kind in tables.PARQUET:
        return ParquetTable(file, job.fields)
    if not writing:
        return RewrittenTable(file, job.fields)
    written = manifest.fact(SIZE)
    mend(file, None if written is None else int(written))
    existing = existing_rows(file, job.fields)
    if job.existing == SKIP and all(existing.values()):
        return AppendedTable(file, existing)
    return RewrittenTable(file, job.fields)
