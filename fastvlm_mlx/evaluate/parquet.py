"""Rows of a data set's Parquet files, on this machine or from the Hub, read a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..checks import brief, reason, shown

ROWS_AT_ONCE = 16  # each with its image


def read_rows(
    files: Sequence[Path], columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of Parquet files in order.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: a file is damaged.
    """
    for file in files:
        try:
            table = _open(file)
            for batch in table.iter_batches(ROWS_AT_ONCE, columns=columns):
                yield from batch.to_pylist()
        except OSError as error:
            raise ValueError(f"{file} is not a whole Parquet file: {reason(error)}.") from None


def count_rows(files: Sequence[Path]) -> int:
    """How many rows Parquet files have, from their ends alone."""
    return sum(_open(file).metadata.num_rows for file in files)


def check_columns(files: Sequence[Path], wanted: Sequence[str]) -> None:
    """ValueError unless the first file has all of these columns."""
    found = _open(files[0]).schema_arrow.names
    missing = [name for name in wanted if name not in found]
    if missing:
        raise ValueError(
            f"{files[0]} has no column {', '.join(missing)}; it has {brief(', '.join(found))}."
        )


def _open(file: Path) -> Any:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ImportError(
            "Parquet files are read by pyarrow; install it with pip install 'fastvlm-mlx[eval]'."
        ) from None
    try:
        return ParquetFile(file)
    except pa.ArrowInvalid:
        raise ValueError(f"{file} is not a whole Parquet file.") from None


def local_files(source: Path) -> list[Path]:
    """A Parquet file, or those of a folder in the order of their names."""
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else [source]
    if not files or not files[0].exists():
        raise FileNotFoundError(f"There is no Parquet file at {shown(str(source))}.")
    return files


def hub_files(repo: str, config: str | None, split: str) -> list[Path]:
    """Download the Parquet files of a split, or take them from the Hub's cache.

    Args:
        repo: the data set's Hub id.
        config: the folder that holds it; any if None.
        split: the beginning of the files' names.

    Raises:
        FileNotFoundError: there is no such data set, or it has no such files.
        OSError: the download failed.
    """
    from huggingface_hub import HfApi, hf_hub_download

    try:
        names = HfApi().list_repo_files(repo, repo_type="dataset")
        wanted = [name for name in sorted(names) if is_of_split(name, config, split)]
        files = [Path(hf_hub_download(repo, name, repo_type="dataset")) for name in wanted]
    except Exception as error:  # without a connection the HTTP library raises types of its own
        raise OSError(f"The data set {repo} can't be downloaded: {reason(error)}.") from None
    if not files:
        place = f"{config}/{split}" if config else split
        raise FileNotFoundError(f"{repo} has no Parquet files of {place}.")
    return files


def is_of_split(name: str, config: str | None, split: str) -> bool:
    """Whether a file of a repository belongs to a split: `config/split-00000-of-00002.parquet`."""
    path = PurePosixPath(name)
    in_config = config is None or config in path.parts[:-1]
    of_split = path.stem == split or path.stem.startswith(f"{split}-")
    return path.suffix == ".parquet" and in_config and of_split


def image_bytes(value: Any) -> bytes:
    """The file of an image column's value, as the datasets library stores it."""
    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes):
        raise ValueError(f"An image column holds {shown(value)} instead of an image's bytes.")
    return data
