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
SAVED = ("state.json", "dataset_dict.json")  # of `save_to_disk`


@dataclass(frozen=True)
class StoredImage:
    """An image in a data set, read from there when it is asked for, as from a file.

    Attributes:
        column: the data set's column with the image or images.
        row: its row.
        index: which image of a list, None where the column holds only one.
    """

    column: Any
    row: int
    index: int | None = None

    def read(self) -> bytes:
        """The bytes of the image's file."""
        found = self.column[self.row]
        data: bytes = (found if self.index is None else found[self.index])["bytes"]
        return data


def is_hub_name(source: str | Path, path: Path) -> bool:
    """Whether a data set is one of `datasets`: saved in the folder `path`, or a name on the Hub."""
    if path.is_dir():
        return any((path / name).is_file() for name in SAVED)
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
        if path.is_dir():
            found = datasets.load_from_disk(str(path))
            if isinstance(found, dict):
                found = found[split or "train"]
        else:
            found = datasets.load_dataset(str(source), subset, split=split or "train")
    except Exception as error:  # of the library and of all that it reads with
        raise ValueError(
            f"The data set {shown(str(source))} can't be read: {reason(error)}."
        ) from None
    return _records(found, str(source))


def _records(found: Any, source: str) -> Iterator[Record | BadRow]:
    found, columns = _undecoded(found)
    name = source.rstrip("/").rpartition("/")[2]
    stored = {column: found.select_columns([column]).with_format(None) for column in columns}
    for number, row in enumerate(found):
        for column, dataset in stored.items():
            row[column] = _kept(_Column(dataset, column), number, row[column])
        yield Record(row, f"{name}, row {number + 1}", f"{name}-{number + 1}", Path())


@dataclass(frozen=True)
class _Column:
    dataset: Any
    name: str

    def __getitem__(self, row: int) -> Any:
        return self.dataset[row][self.name]


def _undecoded(found: Any) -> tuple[Any, list[str]]:
    """The data set with its images as files, and the columns that hold some."""
    import datasets

    features, columns = found.features.copy(), []
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature[0] if isinstance(feature, list) else None)
        if isinstance(feature, datasets.Image):
            features[name] = datasets.Image(decode=False)
        elif isinstance(inner, datasets.Image):
            features[name] = [datasets.Image(decode=False)]
        else:
            continue
        columns.append(name)
    return found.cast(features) if columns else found, columns


def _kept(column: _Column, row: int, value: Any) -> Any:
    """Images as `StoredImage` where their bytes are in the data set, as paths otherwise."""
    if isinstance(value, list):
        return [_one(StoredImage(column, row, index), image) for index, image in enumerate(value)]
    return None if value is None else _one(StoredImage(column, row), value)


def _one(stored: StoredImage, image: dict[str, Any]) -> Any:
    return image["path"] if image["bytes"] is None else stored
