"""Dialogues: what the assistant says is learned; neighbours do not see each other."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from bitllm.errors import ConfigError
from bitllm.tokenizer import load_tokenizer
from bitllm.train.chat import PackedDialogues, encode_dialogue, read_dialogues
from bitllm.train.loop import train
from bitllm.train.model import UNTRAINED, TernaryDecoder, token_loss
from bitllm.train.pipeline import run_recipe
from bitllm.train.recipe_file import recipe_from_dict
from bitllm.train.start import teacher_model
from small_llama import write_llama, write_tokenizer

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey."}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_tokenizer(folder)


def parts(dialogue, tokenizer):
    """The text that is read, and the text that is learned."""
    read = tokenizer.decode(dialogue.ids[~dialogue.trained].tolist(), skip_special=False)
    learned = tokenizer.decode(dialogue.ids[dialogue.trained].tolist(), skip_special=False)
    return read, learned


def test_only_what_the_assistant_says_is_learned(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    dialogue = encode_dialogue("here", [system, USER, ANSWER, USER, ANSWER, USER], tokenizer)
    read, learned = parts(dialogue, tokenizer)
    assert learned == "Hey.<|end|>" * 2
    assert read == (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|><|user|>Hi<|end|><|assistant|>"
    )
    assert dialogue.answer_bytes == 8


def test_tokens_are_those_of_the_prompt_that_a_decoder_gets(tokenizer):
    dialogue = encode_dialogue("here", [USER, ANSWER], tokenizer)
    prompt = tokenizer.encode_chat([USER], True)
    assert dialogue.ids[: len(prompt)].tolist() == prompt
    assert not dialogue.trained[: len(prompt)].any()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([ANSWER], "the dialogue begins with the assistant"),
        ([USER], "the assistant says nothing"),
    ],
)
def test_dialogues_that_teach_nothing_are_refused(messages, message, tokenizer):
    with pytest.raises(ConfigError, match=message):
        encode_dialogue("here", messages, tokenizer)


def test_a_template_that_rewrites_the_past_is_refused(tmp_path):
    write_tokenizer(
        tmp_path, "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(ConfigError, match="rewrites earlier text when message 1 is added"):
        encode_dialogue("here", [USER, ANSWER], load_tokenizer(tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "data.jsonl:2: not valid JSON"),
        ("[" * 100_000, "data.jsonl:2: not valid JSON"),
        ("[]", "data.jsonl:2: no list of messages"),
        ('{"messages": []}', "data.jsonl:2: no list of messages"),
        ('{"messages": [{"role": "user"}]}', "data.jsonl:2: no message of a dialogue"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "data.jsonl:2: no message of a"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "data.jsonl:2: the dialogue b"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}, '
         '{"role": "assistant", "content": "x"}]}', "data.jsonl:2: "),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(line, message, tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": [USER, ANSWER]}) + "\n" + line + "\n")
    with pytest.raises(ConfigError, match=message):
        read_dialogues([path], tokenizer, 100)


def test_a_missing_file_is_named(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match=r"none.jsonl: cannot read this file: No such file"):
        read_dialogues([tmp_path / "none.jsonl"], tokenizer, 100)


def test_long_dialogues_are_cut_and_those_without_an_answer_left_out(tmp_path, tokenizer):
    path = tmp_path / "data.jsonl"
    long = {"role": "user", "content": "x" * 100}
    lines = [[USER, ANSWER, USER, ANSWER], [long, ANSWER]]
    path.write_text("".join(json.dumps({"messages": line}) + "\n\n" for line in lines))
    dialogues = read_dialogues([path], tokenizer, 12)
    assert [d.name.split(":")[-1] for d in dialogues] == ["1"]
    assert len(dialogues[0].ids) == 12
    assert dialogues[0].answer_bytes == 4
    with pytest.raises(ConfigError, match="no dialogue with an answer within 3 tokens"):
        read_dialogues([path], tokenizer, 3)


def some_dialogues(tokenizer, count=40):
    random = np.random.default_rng(1)

    def say(role):
        return {"role": role, "content": "ab" * int(random.integers(1, 9))}

    return [
        encode_dialogue(str(i), [say("user"), say("assistant")], tokenizer) for i in range(count)
    ]


def test_every_epoch_holds_every_dialogue_once(tokenizer):
    dialogues = some_dialogues(tokenizer)
    packed = PackedDialogues(dialogues, 64, 1, seed=3)
    count = len(packed.windows)
    assert count < len(dialogues) / 1.5
    epochs = []
    for epoch in range(2):
        batches = [packed.batch(epoch * count + i) for i in range(count)]
        found = sorted(
            batch.ids[0][batch.documents[0] == n].tolist()
            for batch in batches
            for n in range(batch.documents[0].max() + 1)
        )
        assert found == sorted(d.ids.tolist() for d in dialogues)
        assert sum(b.trained_tokens for b in batches) == sum(d.trained.sum() for d in dialogues)
        epochs.append([b.ids.tolist() for b in batches])
    assert epochs[0] != epochs[1]
    again = PackedDialogues(dialogues, 64, 1, seed=3)
    assert again.batch(count + 1).ids.tolist() == epochs[1][1]


def test_packed_dialogues_cost_what_they_cost_alone(tokenizer, tmp_path):
    write_llama(tmp_path / "dense")
    model = teacher_model("dense", tmp_path)
    dialogues = some_dialogues(tokenizer, 12)
    packed = PackedDialogues(dialogues, 96, 1, seed=5)
    assert len(packed.windows) < len(dialogues)

    def cost(ids, trained, documents=None):
        targets = ids[:, 1:].masked_fill(~trained[:, 1:], UNTRAINED)
        seen = None if documents is None else documents[:, :-1]
        return token_loss(model(ids[:, :-1], seen), targets) * (targets != UNTRAINED).sum()

    together = alone = torch.tensor(0.0)
    for number in range(len(packed.windows)):
        batch = packed.batch(number)
        parts = batch.ids, batch.trained, batch.documents
        together = together + cost(*map(torch.from_numpy, parts))
    for dialogue in dialogues:
        alone = alone + cost(*(torch.from_numpy(p)[None] for p in (dialogue.ids, dialogue.trained)))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-3)


def chat_recipe(folder, **training):
    values = {
        "name": "chat",
        "start": {"model": "dense"},
        "text": {"source": "chat", "files": ["data.jsonl"], "held_out_percent": 20.0},
        "quantization": {"warmup_steps": 8},
        "training": {
            "threads": 1, "steps": 40, "batch_size": 2, "sequence_length": 48, "warmup_steps": 2,
            "learning_rate": 1e-2, "log_every": 5, "evaluate_every": 20, **training,
        },
    }  # fmt: skip
    return dataclasses.replace(recipe_from_dict(values), folder=folder)


def write_questions(folder):
    lines = []
    for number in range(60):
        question = {"role": "user", "content": f"Say {number}."}
        lines.append({"messages": [question, {"role": "assistant", "content": "Yes, of course."}]})
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_model_learns_to_answer_and_runs_as_it_was_trained(tmp_path, capsys):
    write_llama(tmp_path / "dense")
    write_questions(tmp_path)
    recipe = chat_recipe(tmp_path)
    folder = run_recipe(recipe, tmp_path / "run")
    told = capsys.readouterr().err.splitlines()[-1]
    assert abs(float(told.split("gap ")[1].split(")")[0])) < 0.01, told
    assert float(told.split("held out: ")[1].split()[0]) < 1.5
    assert load_tokenizer(folder).has_chat_template
    resumed = train(recipe, tmp_path, tmp_path / "run", resume=True)
    assert isinstance(resumed.model, TernaryDecoder)


def test_dialogues_need_a_model():
    values = {"name": "c", "text": {"source": "chat", "files": ["x"]}, "training": {"steps": 60}}
    with pytest.raises(ConfigError, match="needs a model in"):
        recipe_from_dict(values)
