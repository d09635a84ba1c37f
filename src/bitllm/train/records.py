"""Documents that are records: lines of JSONL, rows of Parquet files and of Hugging Face datasets.

Every record is a document and a group of its own. Nothing is kept: records are read again each
time that they are gone through, a batch at a time, so a corpus may be larger than memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bitllm.errors import BackendUnavailableError, BitllmError, ConfigError
from bitllm.train.documents import Document, Turn

__all__ = ["RecordDocuments", "read_lines"]

_MOST_LINE_BYTES = 1 << 26
_BATCH_ROWS = 1024

Records = Iterator[tuple[str, object]]


class RecordDocuments:
    """Documents of one field of records; going through them raises ConfigError, naming the record.

    Args:
        source: "jsonl" and "parquet" for files, "dataset" for a dataset of Hugging Face.
        names: the files; or one folder that `save_to_disk` wrote, or name on the Hub.
        field: which field of a record is the text.
        split: of a dataset.
    """

    def __init__(self, source: str, names: Sequence[Path | str], field: str, split: str) -> None:
        read: dict[str, Callable[[Any], Records]] = {
            "jsonl": lambda path: _of_jsonl(path, field),
            "parquet": lambda path: _of_parquet(path, field),
            "dataset": lambda name: _of_dataset(name, field, split),
        }
        self._read, self._names = read[source], names

    def __iter__(self) -> Iterator[Document]:
        """Read the records that have any text, in the order of their files."""
        empty = True
        for name in self._names:
            for place, value in self._read(name):
                if value != "":
                    empty = False
                    yield _document(place, value)
        if empty:
            raise ConfigError(f"{', '.join(map(str, self._names))}: no record with any text")


def _document(name: str, value: object) -> Document:
    if not isinstance(value, str):
        raise ConfigError(
            f"{name}: the text is {value!r:.60}, not a string",
            hint="text.field names the field that holds the text",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}: the text is no valid Unicode: {error}") from error
    return Document(name, name, (Turn(None, value),))


def read_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Read a file of lines; yields the place of each line that is not blank, and its bytes.

    Raises:
        ConfigError: it cannot be read, or a line has more than 64 MiB.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(_MOST_LINE_BYTES + 1):
                number += 1
                if len(line) > _MOST_LINE_BYTES:
                    raise ConfigError(f"{path}:{number}: a line of more than 64 MiB")
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise ConfigError(f"{path}: cannot read this file: {error.strerror}") from error


def _of_jsonl(path: Path, field: str) -> Records:
    for place, line in read_lines(path):
        name = f"{path.name}:{place.rpartition(':')[2]}"  # wherever the recipe lies
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place}: not valid JSON: {error}") from error
        if not isinstance(value, dict) or field not in value:
            raise ConfigError(
                f"{place}: no object with a field {field!r}", hint="see text.field of the recipe"
            )
        yield name, value[field]


def _of_parquet(path: Path, field: str) -> Records:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise _missing("pyarrow", "parquet") from error
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_field(path, field, file.schema_arrow.names)
            for batch in file.iter_batches(_BATCH_ROWS, columns=[field]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield f"{path.name}:{row}", value
    except (OSError, ValueError, RuntimeError) as error:  # ArrowInvalid is a ValueError
        if isinstance(error, BitllmError):
            raise
        raise ConfigError(f"{path}: cannot read this as Parquet: {error}") from error


def _of_dataset(name: Path | str, field: str, split: str) -> Records:
    try:
        import datasets
    except ImportError as error:
        raise _missing("datasets", "dataset") from error
    try:
        if isinstance(name, Path):
            data = datasets.load_from_disk(str(name))
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(name, split=split, streaming=True)
        _check_field(name, field, data.column_names or (field,))
        label = name.name if isinstance(name, Path) else name
        for row, record in enumerate(data.select_columns([field]), 1):
            yield f"{label}:{row}", record[field]
    except BitllmError:
        raise
    except Exception as error:  # a library that raises whatever a file, or the network, provokes
        raise ConfigError(
            f"{name}: cannot read split {split!r} of this dataset: {error}",
            hint="text.files names a folder that save_to_disk wrote, or a dataset of the Hub",
        ) from error


def _check_field(name: object, field: str, known: Iterable[str]) -> None:
    if field not in known:
        raise ConfigError(
            f"{name}: there is no field {field!r}",
            hint=f"set text.field; there are: {', '.join(known)}",
        )


def _missing(package: str, source: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f'text.source = "{source}" needs the package {package}, which is not installed',
        hint='pip install "bitllm[train,data]"',
    )
