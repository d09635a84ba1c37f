"""Documents, tokenizer and token shards: what goes in comes out, in an order that a seed fixes."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from bitllm.errors import ConfigError, FormatError
from bitllm.tokenizer import load_tokenizer
from bitllm.train.data import ShuffledWindows, TokenShards, write_shards
from bitllm.train.documents import (
    Document,
    Turn,
    documents_sha256,
    file_documents,
    is_held_out,
)
from bitllm.train.tokenizer_training import (
    END,
    END_OF_TURN,
    SPECIAL_TOKENS,
    DocumentEncoder,
    tokenizer_config,
    train_tokenizer,
)

TEXT = "The quick brown fox jumps over the lazy dog; the dog, zoë, sleeps.\n\n    def fox(): ...\n"


def plain(name: str, text: str) -> Document:
    return Document(name, name, (Turn(None, text),))


DOCUMENTS = [plain(f"d{i}", f"{TEXT} number {i} " * (1 + i % 4)) for i in range(40)]
DIALOGUE = Document("talk", "talk", (Turn("user", " Hello fox "), Turn("assistant", "Lazy dog.")))


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(DOCUMENTS, 290).save(str(path))
    return path


@pytest.fixture(scope="module")
def encoder(tokenizer_path):
    return DocumentEncoder(tokenizer_path)


@pytest.fixture
def shards(encoder, tmp_path):
    write_shards(DOCUMENTS, encoder, tmp_path / "s", held_out_percent=20, shard_tokens=1000)
    return tmp_path / "s"


def test_the_same_text_gives_the_same_tokenizer(tokenizer_path):
    assert train_tokenizer(DOCUMENTS, 290).to_str() == train_tokenizer(DOCUMENTS, 290).to_str()


def test_special_tokens_come_first_and_the_size_is_exact(tokenizer_path):
    tokenizer = train_tokenizer(DOCUMENTS, 290)
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(6))
    assert tokenizer.get_vocab_size() == 290


def test_any_text_survives_encoding(tokenizer_path):
    (tokenizer_path.parent / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(64)))
    tokenizer = load_tokenizer(tokenizer_path.parent)
    text = "tab\there, 日本語, \x00 and 🦊  "
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_dialogues_are_trained_as_the_chat_template_writes_them(tokenizer_path, encoder):
    (tokenizer_path.parent / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(64)))
    tokenizer = load_tokenizer(tokenizer_path.parent)
    messages = [{"role": turn.role, "content": turn.text} for turn in DIALOGUE.turns]
    written = "<|begin_of_text|><|user|>Hello fox<|end_of_turn|><|assistant|>"
    assert tokenizer.apply_chat_template(messages[:1]) == written
    prompt = tokenizer.encode_chat(messages[:1])
    trained = encoder.encode(DIALOGUE)
    assert trained[: len(prompt)] == prompt
    end_of_turn, end = SPECIAL_TOKENS.index(END_OF_TURN), SPECIAL_TOKENS.index(END)
    assert trained[-2:] == [end_of_turn, end]
    assert tokenizer.decode(trained[len(prompt) :]) == "Lazy dog."


def test_a_vocabulary_that_text_cannot_fill_is_refused():
    with pytest.raises(ConfigError, match="fills a vocabulary of"):
        train_tokenizer(DOCUMENTS, 5000)


def test_a_vocabulary_below_the_bytes_is_refused():
    with pytest.raises(ConfigError, match="at least 262, got 261"):
        train_tokenizer(DOCUMENTS, 261)


def test_a_tokenizer_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot read this tokenizer"):
        DocumentEncoder(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_the_special_tokens_is_refused(tokenizer_path, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer_path.read_text().replace(END_OF_TURN, "<|other|>"))
    with pytest.raises(ConfigError, match=r"no token <\|end_of_turn\|>"):
        DocumentEncoder(path)


def test_shards_hold_every_document_once_in_its_split(shards, encoder):
    found = {split: list(TokenShards.open(shards, split).documents()) for split in SPLITS_OF}
    for split, held_out in SPLITS_OF.items():
        wanted = [encoder.encode(d) for d in DOCUMENTS if is_held_out(d.group, 20) == held_out]
        assert [ids.tolist() for ids in found[split]] == wanted
    assert all(found.values())


SPLITS_OF = {"train": False, "held_out": True}


def test_shards_count_tokens_and_bytes(shards, encoder):
    train = TokenShards.open(shards, "train")
    kept = [d for d in DOCUMENTS if not is_held_out(d.group, 20)]
    assert len(train.shards) > 1
    assert all(len(shard) == 1000 for shard in train.shards[:-1])
    assert train.tokens == sum(len(encoder.encode(d)) for d in kept)
    assert train.text_bytes == sum(len(d.turns[0].text.encode()) for d in kept)
    assert train.shards[0].dtype == np.uint16


def test_a_group_is_held_out_by_its_name_alone():
    chosen = [is_held_out(f"module{i}", 10) for i in range(2000)]
    assert 150 < sum(chosen) < 250
    assert not any(is_held_out(f"module{i}", 0) for i in range(100))


def test_a_folder_without_shards_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no token shards here"):
        TokenShards.open(tmp_path, "train")


@pytest.mark.parametrize("damage", ["truncated", "missing", "index", "split"])
def test_damaged_shards_are_refused(shards, damage):
    if damage == "truncated":
        path = shards / "train-00000.bin"
        path.write_bytes(path.read_bytes()[:-2])
    elif damage == "missing":
        (shards / "train-00001.bin").unlink()
    elif damage == "index":
        (shards / "shards.json").write_text('{"dtype": ')
    else:
        (shards / "shards.json").write_text('{"dtype": "<u2"}')
    with pytest.raises(FormatError, match="damaged token shards") as caught:
        TokenShards.open(shards, "train")
    assert "delete" in caught.value.hint


def test_an_epoch_visits_each_window_once(shards):
    windows = ShuffledWindows(TokenShards.open(shards, "train"), 16, 3, seed=7)
    ids = np.concatenate(TokenShards.open(shards, "train").shards).tolist()
    batches = [windows.batch(step) for step in range(windows.batches_per_epoch)]
    assert all(batch.shape == (3, 16) for batch in batches)
    seen = [tuple(row) for batch in batches for row in batch.tolist()]
    everywhere = {tuple(ids[i : i + 16]) for i in range(len(ids))}
    assert everywhere.issuperset(seen)
    assert len(seen) > 0.9 * len(ids) / 16 - 3


def test_order_is_a_function_of_seed_and_step(shards):
    text = TokenShards.open(shards, "train")
    one, other = ShuffledWindows(text, 16, 2, seed=7), ShuffledWindows(text, 16, 2, seed=7)
    later = one.batches_per_epoch + 3
    forward = [one.batch(step) for step in range(later + 1)]
    assert (other.batch(later) == forward[later]).all()
    assert (other.batch(2) == forward[2]).all()
    different = ShuffledWindows(text, 16, 2, seed=8).batch(2)
    assert (different != forward[2]).any()


def test_epochs_differ(shards):
    windows = ShuffledWindows(TokenShards.open(shards, "train"), 16, 2, seed=7)
    epoch = windows.batches_per_epoch
    pairs = [(windows.batch(s), windows.batch(s + epoch)) for s in range(3)]
    assert any((first != second).any() for first, second in pairs)


def test_too_little_text_for_a_batch_is_refused(shards):
    with pytest.raises(ConfigError, match="too few for a batch of 4 x 100000"):
        ShuffledWindows(TokenShards.open(shards, "train"), 100000, 4, seed=0)


def test_the_corpus_hash_sees_every_field():
    base = [plain("a", "text"), DIALOGUE]
    variants = [
        base,
        base[:1],
        base[::-1],
        [plain("b", "text"), DIALOGUE],
        [plain("a", "texts"), DIALOGUE],
        [Document("a", "other", base[0].turns), DIALOGUE],
        [Document("a", "a", (Turn("user", "text"),)), DIALOGUE],
    ]
    hashes = [documents_sha256(documents) for documents in variants]
    assert all(a != b for a, b in itertools.combinations(hashes, 2))


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    found = file_documents([tmp_path / "b.txt", tmp_path / "a.txt"])
    assert [d.turns[0].text for d in found] == ["text of a.txt", "text of b.txt"]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xfa"])
def test_files_that_are_no_text_are_refused(tmp_path, content):
    path = tmp_path / "a.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.txt: cannot read this as UTF-8 text"):
        file_documents([path])


def test_no_files_at_all_are_refused():
    with pytest.raises(ConfigError, match="names no file"):
        file_documents([])
