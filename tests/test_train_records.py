"""Records to train on: JSONL, Parquet and datasets give the same shards; what is wrong is named."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from bitllm.errors import BackendUnavailableError, ConfigError
from bitllm.train.documents import documents_sha256
from bitllm.train.pipeline import collect_documents, prepare_text
from bitllm.train.recipe import TextSettings
from tiny_training import tiny_recipe

TEXTS = [f"The cat number {i} sat on the mat; the dog {i} did not.\n" * 3 for i in range(60)]


def write_records(folder: Path) -> dict[str, TextSettings]:
    """The same records three times; the second is empty."""
    rows = [TEXTS[0], "", *TEXTS[1:]]
    lines = (json.dumps({"id": i, "body": text}) for i, text in enumerate(rows))
    (folder / "all").mkdir(parents=True)
    (folder / "all" / "text").write_text("\n\n".join(lines))
    (folder / "table").mkdir()
    table = pyarrow.table({"id": list(range(len(rows))), "body": rows})
    parquet.write_table(table, folder / "table" / "text", row_group_size=7)
    made = datasets.DatasetDict({"some": datasets.Dataset.from_dict({"body": rows})})
    made.save_to_disk(str(folder / "text"))
    return {
        "jsonl": TextSettings("jsonl", ("all/text",), "body"),
        "parquet": TextSettings("parquet", ("table/text",), "body"),
        "dataset": TextSettings("dataset", ("text",), "body", "some"),
    }


def test_every_source_gives_the_same_shards(tmp_path):
    kinds = write_records(tmp_path)
    shards = {}
    for name, text in kinds.items():
        text = dataclasses.replace(text, held_out_percent=30.0)
        recipe = dataclasses.replace(tiny_recipe(tmp_path), text=text)
        prepare_text(recipe, tmp_path / name)
        shards[name] = {p.name: p.read_bytes() for p in (tmp_path / name / "shards").iterdir()}
        documents = list(collect_documents(text, tmp_path))
        assert [d.turns[0].text for d in documents] == TEXTS
        assert len({d.group for d in documents}) == len(TEXTS)
    # Blank lines count as lines of a file, so only these two number alike.
    assert shards["parquet"] == shards["dataset"]
    index = json.loads(shards["jsonl"]["shards.json"])
    assert sum(index[s]["text_bytes"] for s in ("train", "held_out")) == sum(map(len, TEXTS))
    assert index["held_out"]["text_bytes"] > 0


def test_a_corpus_of_records_is_pinned_by_its_hash(tmp_path):
    text = write_records(tmp_path)["jsonl"]
    found = documents_sha256(collect_documents(text, tmp_path))
    pinned = dataclasses.replace(text, sha256=found)
    assert len(list(collect_documents(pinned, tmp_path))) == len(TEXTS)
    with pytest.raises(ConfigError, match="the text hashes to"):
        collect_documents(dataclasses.replace(text, sha256="0" * 64), tmp_path)


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("jsonl", b'{"text": "fine"}\n{"text": 3}', "given:2: the text is 3, not a string"),
        ("jsonl", b'{"text": null}', "the text is None, not a string"),
        ("jsonl", b'{"body": "x"}', "given:1: no object with a field 'text'"),
        ("jsonl", b"[1]", "no object with a field"),
        ("jsonl", b'{"text": "cut', "given:1: not valid JSON"),
        ("jsonl", b"[" * 100_000, "not valid JSON"),
        ("jsonl", rb'{"text": "\ud800"}', "no valid Unicode"),
        ("jsonl", b'{"text": "\xff"}', "not valid JSON"),
        ("jsonl", b'{"text": ""}\n\n', "no record with any text"),
        ("jsonl", None, "cannot read this file"),
        ("parquet", b"PAR1 and no more", "cannot read this as Parquet"),
        ("parquet", None, "cannot read this as Parquet"),
        ("dataset", b"no folder", "cannot read split 'train' of this dataset"),
    ],
)
def test_what_is_wrong_with_records_is_named(source, content, message, tmp_path):
    if content is not None:
        (tmp_path / "given").write_bytes(content)
    documents = collect_documents(TextSettings(source, ("given",)), tmp_path)
    if source == "dataset":
        assert Path(tmp_path / "given").is_file()
    with pytest.raises(ConfigError, match=message):
        list(documents)


def test_fields_and_splits_that_are_not_there_are_named(tmp_path):
    kinds = write_records(tmp_path)
    for source in "parquet", "dataset":
        text = dataclasses.replace(kinds[source], field="txt")
        with pytest.raises(ConfigError, match="there is no field 'txt'") as caught:
            list(collect_documents(text, tmp_path))
        assert "body" in caught.value.hint
    text = dataclasses.replace(kinds["dataset"], split="other")
    with pytest.raises(ConfigError, match="cannot read split 'other'"):
        list(collect_documents(text, tmp_path))


def test_numbers_in_a_column_are_no_text(tmp_path):
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "given")
    with pytest.raises(ConfigError, match="given:1: the text is 1"):
        list(collect_documents(TextSettings("parquet", ("given",)), tmp_path))


@pytest.mark.parametrize(("source", "package"), [("parquet", "pyarrow"), ("dataset", "datasets")])
def test_a_missing_package_is_named(source, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "given").mkdir()
    with pytest.raises(BackendUnavailableError, match=f"needs the package {package}") as caught:
        list(collect_documents(TextSettings(source, ("given",)), tmp_path))
    assert "bitllm[train,data]" in caught.value.hint


def test_a_dataset_is_one_name():
    with pytest.raises(ConfigError, match="takes one name"):
        TextSettings("dataset", ("one", "two"))
