"""Data sets of the `datasets` library, on the Hub or saved in a folder → records."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checks import reason, shown
from .row_files import BadRow, Record

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ROWS_AT_ONCE = 1024
PARQUET = ".parquet"
SAVED = ("state.json", "dataset_dict.json")  # of `save_to_disk`


@dataclass(frozen=True)
class StoredImage:
    """An image in a data set, read from there when it is asked for, as from a file.

    Attributes:
        data: the data set, which gives Arrow's tables.
        column: that holds the image or images.
        row: its row.
        index: which image of a list; None where the column holds one each.
    """

    data: Any
    column: str
    row: int
    index: int | None = None

    def read(self) -> bytes:
        """The bytes of the image's file."""
        found = self.data[self.row][self.column][0]
        found = (found if self.index is None else found[self.index]).as_py()
        data: bytes | None = found["bytes"]
        return Path(found["path"]).read_bytes() if data is None else data


def is_hub_name(source: str | Path, path: Path) -> bool:
    """Whether a data set is one of `datasets`: saved in the folder `path`, in a Parquet file, or a
    name on the Hub."""
    if path.is_dir():
        return any((path / name).is_file() for name in SAVED)
    if path.suffix.lower() == PARQUET:
        return path.is_file()
    named = isinstance(source, str) and HUB_NAME.fullmatch(source)
    return bool(named) and not path.suffix and not path.exists()


def read_hub_records(
    source: str | Path, path: Path, subset: str | None, split: str | None
) -> Iterator[Record | BadRow]:
    """The rows of a data set of `datasets`; images stay in it until they are read.

    Raises:
        ImportError: `datasets` is not installed.
        ValueError: there is no such data set, subset or split, or it can't be read.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"The data set {shown(str(source))} needs datasets: pip install 'fastvlm-mlx[datasets]'"
            ", or give a file or folder."
        ) from None
    try:
        found = _open(datasets, str(source), path, subset, split or "train")
    except Exception as error:  # of the library and of all that it reads with
        raise ValueError(
            f"The data set {shown(str(source))} can't be read: {reason(error)}."
        ) from None
    return _records(found, str(source))


def _open(datasets: Any, source: str, path: Path, subset: str | None, split: str) -> Any:
    if path.is_dir():
        found = datasets.load_from_disk(str(path))
        return found[split] if isinstance(found, dict) else found
    if path.is_file():
        return datasets.Dataset.from_parquet(str(path))
    return datasets.load_dataset(source, subset, split=split)


def _records(found: Any, source: str) -> Iterator[Record | BadRow]:
    columns = _image_columns(found)
    name = source.rstrip("/").rpartition("/")[2]
    stored = [_stored(found, column, is_list) for column, is_list in columns.items()]
    others = found.remove_columns(list(columns))
    rows = iter(others) if others.column_names else iter([{}] * len(found))
    for number, row in enumerate(rows, 1):
        images = {column: next(values) for column, values in zip(columns, stored, strict=True)}
        yield Record({**row, **images}, f"{name}, row {number}", f"{name}-{number}", Path())


def _image_columns(found: Any) -> dict[str, bool]:
    """The columns that hold images, and whether each holds lists of them."""
    from datasets import Image

    columns = {}
    for name, feature in found.features.items():
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        if isinstance(feature, Image) or isinstance(inner, Image):
            columns[name] = not isinstance(feature, Image)
    return columns


def _stored(found: Any, column: str, is_list: bool) -> Iterator[Any]:
    """The image or images of each row, None where there is none; nothing is read but how many."""
    from pyarrow import compute

    data = found.select_columns([column]).with_format("arrow")
    row = 0
    for table in data.iter(ROWS_AT_ONCE):
        values = table[column]
        counts = (compute.list_value_length(values) if is_list else values.is_valid()).to_pylist()
        for count in counts:
            each = [StoredImage(data, column, row, index) for index in range(count or 0)]
            yield each if is_list else StoredImage(data, column, row) if count else None
            row += 1
