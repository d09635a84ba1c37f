"""Tokenizers: begin and stop rules, chat templates, streaming, against hand-made model files."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from bitllm.errors import ChatTemplateError, TokenizerError
from bitllm.tokenizer import (
    ChatTemplate,
    StreamDetokenizer,
    Tokenizer,
    load_tokenizer,
    token_bytes,
)
from byte_tokenizer import START, byte_tokenizer

SPECIALS = ["<s>", "</s>", "<|eot_id|>", "<pad>"]
CHATML = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEXTS = [
    "hello world",
    "naïve café 😀👩‍👩‍👧",
    "日本語と中文",
    "\x00\t\r\n",
    "",
    " two  spaces ",
    "é" * 9,
]


def byte_level_backend() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


def fallback_backend() -> tokenizers.Tokenizer:
    """As SentencePiece models are converted: spaces as U+2581, unknown characters as bytes."""
    pieces = [*SPECIALS, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"helowrd", "▁h", "▁w", "el", "▁wo"]
    merges = [("▁", "h"), ("▁", "w"), ("e", "l"), ("▁w", "o")]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: id for id, piece in enumerate(pieces)},
            merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens(SPECIALS)
    return backend


def save(directory: Path, backend: tokenizers.Tokenizer, **files: Any) -> Path:
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        if name == "chat_template_jinja":
            (directory / "chat_template.jinja").write_text(content, encoding="utf-8")
        else:
            (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def with_bos(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


NAMES = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend(), NAMES)


@pytest.fixture(scope="module")
def fallback() -> Tokenizer:
    return Tokenizer(fallback_backend(), NAMES)


class TestBegin:
    def test_the_post_processor_decides(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(
            save(tmp_path, with_bos(byte_level_backend()), tokenizer_config=NAMES)
        )
        assert tokenizer.bos_id == 0
        assert tokenizer.encode("hello")[0] == 0
        assert tokenizer.encode("hello", add_bos=False) == tokenizer.encode("hello")[1:]
        assert tokenizer.encode("") == [0]

    def test_no_post_processor_no_begin(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(save(tmp_path, byte_level_backend(), tokenizer_config=NAMES))
        assert tokenizer.encode("hello") == tokenizer.encode("hello", add_bos=False)

    @pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, True), (True, True)])
    def test_explicit_keys_overrule(self, tmp_path: Path, bos: bool, eos: bool) -> None:
        config = {**NAMES, "add_bos_token": bos, "add_eos_token": eos}
        tokenizer = load_tokenizer(
            save(tmp_path, with_bos(byte_level_backend()), tokenizer_config=config)
        )
        bare = tokenizer.encode("hello", add_bos=False)
        assert tokenizer.encode("hello") == [0] * bos + bare + [1] * eos

    def test_the_model_names_the_begin_where_the_tokenizer_does_not(self, tmp_path: Path) -> None:
        save(tmp_path, byte_level_backend(), config={"bos_token_id": 3})
        assert load_tokenizer(tmp_path).bos_id == 3


class TestStop:
    def test_union_of_all_sources(self, tmp_path: Path) -> None:
        save(
            tmp_path,
            byte_level_backend(),
            tokenizer_config={**NAMES, "chat_template": CHATML},
            config={"eos_token_id": 17},
            generation_config={"eos_token_id": [18, 19]},
        )
        assert load_tokenizer(tmp_path).stop_ids == {1, 2, 17, 18, 19}

    def test_a_turn_end_counts_only_where_the_template_writes_it(self, tmp_path: Path) -> None:
        save(tmp_path, byte_level_backend(), tokenizer_config=NAMES)
        assert load_tokenizer(tmp_path).stop_ids == {1}

    def test_nothing_said(self, tmp_path: Path) -> None:
        save(tmp_path, byte_level_backend(), config={"eos_token_id": None})
        assert load_tokenizer(tmp_path).stop_ids == frozenset()


class TestChat:
    MESSAGES = ({"role": "user", "content": " hi "},)

    def test_template_without_begin_gets_one(self, tmp_path: Path) -> None:
        config = {**NAMES, "chat_template": CHATML}
        save(tmp_path, with_bos(byte_level_backend()), tokenizer_config=config)
        tokenizer = load_tokenizer(tmp_path)
        text = tokenizer.apply_chat_template(self.MESSAGES)
        assert text == "user: hi<|eot_id|>assistant: "
        assert tokenizer.encode_chat(self.MESSAGES) == tokenizer.encode(text)
        assert tokenizer.encode_chat(self.MESSAGES).count(0) == 1

    def test_template_with_begin_gets_no_second(self, tmp_path: Path) -> None:
        config = {**NAMES, "chat_template": "{{ bos_token }}" + CHATML}
        save(tmp_path, with_bos(byte_level_backend()), tokenizer_config=config)
        ids = load_tokenizer(tmp_path).encode_chat(self.MESSAGES)
        assert ids[0] == 0
        assert ids.count(0) == 1

    def test_no_end_behind_a_generation_prompt(self, tmp_path: Path) -> None:
        config = {**NAMES, "chat_template": CHATML, "add_eos_token": True}
        save(tmp_path, byte_level_backend(), tokenizer_config=config)
        assert 1 not in load_tokenizer(tmp_path).encode_chat(self.MESSAGES)

    @pytest.mark.parametrize(
        ("files", "wanted"),
        [
            ({"tokenizer_config": {"chat_template": "config"}}, "config"),
            ({"chat_template": {"chat_template": "json"}}, "json"),
            ({"chat_template_jinja": "jinja", "tokenizer_config": {"chat_template": "x"}}, "jinja"),
            (
                {
                    "tokenizer_config": {
                        "chat_template": [
                            {"name": "rag", "template": "rag"},
                            {"name": "default", "template": "named"},
                        ]
                    }
                },
                "named",
            ),
        ],
    )
    def test_where_templates_are_found(
        self, tmp_path: Path, files: dict[str, Any], wanted: str
    ) -> None:
        tokenizer = load_tokenizer(save(tmp_path, byte_level_backend(), **files))
        assert tokenizer.has_chat_template
        assert tokenizer.apply_chat_template(self.MESSAGES) == wanted

    def test_no_template(self, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(save(tmp_path, byte_level_backend()))
        assert not tokenizer.has_chat_template
        with pytest.raises(ChatTemplateError, match="base model") as caught:
            tokenizer.apply_chat_template(self.MESSAGES)
        assert caught.value.hint

    @pytest.mark.parametrize(
        "messages", [[], "hi", {"role": "user"}, [{"content": "x"}], ["hi"], 3]
    )
    def test_messages_that_are_none(self, byte_level: Tokenizer, messages: Any) -> None:
        with pytest.raises(ChatTemplateError, match="message"):
            byte_level.apply_chat_template(messages)


class TestTemplates:
    def test_dialect(self) -> None:
        source = (
            "{%- set ns = namespace(n=0) %}\n"
            "{% for m in messages %}\n"
            "    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
            "{% set ns.n = ns.n + 1 %}\n"
            "{{ loop.index ~ m.role|upper ~ ns.n }}\n"
            "    {% generation %}{{ m.content }}{% endgeneration %}\n"
            "{% endfor %}\n"
            "{{ {'b': '<é>', 'a': [1, none]} | tojson }}{{ missing }}{{ 'x y'.split()[1] }}"
            "{{ {'k': 1} | tojson(indent=2) }}{{ '%s-%d' % ('a', 3) }}{{ '{}'.format(7) }}"
        )
        messages = [{"role": role, "content": role[0]} for role in ("user", "skip", "bot")]
        assert ChatTemplate(source).render({"messages": messages}) == (
            '1USER1\nu3BOT2\nb{"b": "<é>", "a": [1, null]}y{\n  "k": 1\n}a-37'
        )

    def test_now(self) -> None:
        assert ChatTemplate("{{ strftime_now('%Y')|length }}").render({}) == "4"

    def test_broken(self) -> None:
        with pytest.raises(ChatTemplateError, match="broken"):
            ChatTemplate("{% for %}")

    def test_refusing(self) -> None:
        with pytest.raises(ChatTemplateError, match="roles must alternate"):
            ChatTemplate("{{ raise_exception('roles must alternate') }}").render({})

    def test_a_long_conversation_is_no_attack(self) -> None:
        messages = [{"role": "user", "content": "x" * 100}] * 10_000
        assert len(ChatTemplate(CHATML).render({"messages": messages})) > 1_000_000

    def test_the_budget_is_of_one_rendering(self) -> None:
        template = ChatTemplate("{% for i in range(90000) %}{% endfor %}done")
        assert [template.render({}) for _ in range(8)] == ["done"] * 8

    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__.__mro__ }}",
            "{{ messages.append(1) }}",
            "{{ messages.__init__.__globals__ }}",
            "{{ cycler.__init__.__globals__.os }}",
            "{{ ''|attr('__class__') }}",
            "{{ raise_exception.__globals__ }}",
            "{% include '/etc/passwd' %}",
            "{% import 'os' as os %}",
        ],
    )
    def test_escapes(self, source: str) -> None:
        with pytest.raises(ChatTemplateError):
            ChatTemplate("{{ (" + source[3:-3] + ").x }}" if source[:2] == "{{" else source).render(
                {"messages": [1]}
            )

    DOUBLING = "{% set n = namespace(s='a') %}{% for i in range(60) %}@{% endfor %}{{ n.s|length }}"

    @pytest.mark.parametrize(
        "source",
        [
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "{% for i in range(99999) if false %}{% endfor %}" * 10,
            "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
            "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}",
            "{{ 'a' * 10**10 }}",
            "{{ [1] * 10**10 }}",
            "{{ 10**10**10 }}",
            "{{ 'a'.ljust(10**10) }}",
            "{{ 'a'|center(10**10) }}",
            "{{ '%10000000000d' % 3 }}",
            "{{ '%*d' % (10**10, 3) }}",
            "{{ '%10000000000d'|format(3) }}",
            "{{ '{:10000000000}'.format(3) }}",
            "{{ '{:{w}}'.format(3, w=10**10) }}",
            DOUBLING.replace("@", "{% set n.s = n.s ~ n.s %}"),
            DOUBLING.replace("@", "{% set n.s = n.s + n.s %}"),
            DOUBLING.replace("@", "{% set n.s = [n.s, n.s]|join %}"),
            DOUBLING.replace("@", "{% set n.s = ''.join([n.s, n.s]) %}"),
            DOUBLING.replace("@", "{% set n.s = n.s|replace('a', n.s ~ 'a') %}"),
            DOUBLING.replace("@", "{% set n.s = n.s.replace('a', n.s ~ 'a') %}"),
            DOUBLING.replace("@", "{% set n.s %}{{ n.s }}{{ n.s }}{% endset %}"),
            DOUBLING.replace("@", "{% set n.s = [n.s, n.s] %}").replace("|length", ""),
            DOUBLING.replace("@", "{% set n.s = {1: n.s, 2: n.s} %}"),
            "{% set n = namespace(l=[]) %}{% for i in range(9999) %}"
            "{% set n.l = n.l + [('x' ~ i) * 999999] %}{% endfor %}",
            "{% set b = 'a' * 8000000 %}{% for i in range(9999) %}{{ 'ab' in b }}{% endfor %}",
            "{{ [1]|tojson(indent=10**9) }}",
            "{{ ('x\n' * 999999)|indent(999) }}",
            "{{ [1]|batch(10**9, 'x')|list }}",
            "{{ [1]|slice(10**9)|list }}",
            "{{ '{0:{1[0]}}'.format('x', [10**9]) }}",
            "{{ range(99999)|join('x' * 999999) }}",
            "{{ ('x' * 999999).join('a' * 99999) }}",
            "{{ ('\t' * 999).expandtabs(999999) }}",
            "{{ ('x' * 999999).translate({120: 'y' * 99999}) }}",
            "{{ 'x'.encode() * 10**9 }}",
            "{{ (1).to_bytes(10**9, 'big') }}",
            "{{ ('a' * 999999)|replace(new='b' * 99999, old='a') }}",
            "{{ ([[1] * 99999] * 99999)|sum(start=[]) }}",
        ],
    )
    def test_templates_without_end(self, source: str) -> None:
        with pytest.raises(ChatTemplateError):
            ChatTemplate(source).render({})


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    stream = StreamDetokenizer(tokenizer, skip_special=skip_special)
    return [*(stream.push(id) for id in ids), stream.flush()]


class TestText:
    @pytest.mark.parametrize("text", TEXTS)
    def test_round_trip(self, byte_level: Tokenizer, text: str) -> None:
        assert byte_level.decode(byte_level.encode(text)) == text

    @pytest.mark.parametrize("text", ["hello world", "hélo 😀 w", "日本 hello"])
    def test_streaming_of_byte_fallback(self, fallback: Tokenizer, text: str) -> None:
        ids = fallback.encode(text)
        assert fallback.decode(ids) == text
        assert "".join(streamed(fallback, ids)) == text
        assert not any("\ufffd" in part for part in streamed(fallback, ids))

    @settings(max_examples=150, deadline=None)
    @given(text=st.text())
    def test_no_character_is_cut(self, byte_level: Tokenizer, text: str) -> None:
        parts = streamed(byte_level, byte_level.encode(text))
        assert "".join(parts) == text
        assert all("\ufffd" not in part for part in parts) or "\ufffd" in text

    @settings(max_examples=150, deadline=None)
    @given(ids=st.lists(st.integers(0, 340), max_size=30), skip=st.booleans())
    def test_any_ids_stream_as_they_decode(
        self, byte_level: Tokenizer, ids: list[int], skip: bool
    ) -> None:
        assert "".join(streamed(byte_level, ids, skip)) == byte_level.decode(ids, skip)

    @settings(max_examples=100, deadline=None)
    @given(text=st.text())
    def test_byte_fallback_streams_as_it_decodes(self, fallback: Tokenizer, text: str) -> None:
        ids = fallback.encode(text)
        assert "".join(streamed(fallback, ids)) == fallback.decode(ids)

    def test_invalid_bytes_do_not_stall_a_stream(self, fallback: Tokenizer) -> None:
        byte = fallback.token_to_id("<0x80>")
        assert byte is not None
        parts = streamed(fallback, [byte] * 12)
        assert sum(map(bool, parts[:-1])) >= 2
        assert set("".join(parts)) == {"\ufffd"}

    def test_an_incomplete_end_is_flushed(self, byte_level: Tokenizer) -> None:
        ids = byte_level.encode("\u0416")[:1]
        stream = StreamDetokenizer(byte_level)
        assert stream.push(ids[0]) == ""
        assert stream.flush() == "\ufffd"
        assert stream.flush() == ""

    def test_special_tokens_are_left_out_or_kept(self, byte_level: Tokenizer) -> None:
        ids = byte_level.encode("a</s>b")
        assert 1 in ids
        assert byte_level.decode(ids) == "ab" == "".join(streamed(byte_level, ids))
        kept = "".join(streamed(byte_level, ids, skip_special=False))
        assert byte_level.decode(ids, skip_special=False) == "a</s>b" == kept

    def test_added_tokens_outside_the_alphabet(self) -> None:
        backend = byte_level_backend()
        backend.add_tokens(["<tool x>", "日"])
        tokenizer = Tokenizer(backend, {})
        ids = tokenizer.encode("a<tool x>日é")
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids) == "a<tool x>日é"

    def test_what_is_no_text_and_no_ids(self, byte_level: Tokenizer) -> None:
        with pytest.raises(TokenizerError, match="surrogate"):
            byte_level.encode("a\ud800")
        with pytest.raises(TokenizerError, match="bytes"):
            byte_level.encode(b"a")  # type: ignore[arg-type]
        with pytest.raises(TokenizerError, match="token ids"):
            byte_level.decode([-1])
        assert byte_level.decode([10**6]) == ""
        assert byte_level.token(-1) is None


class TestFiles:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
            load_tokenizer(tmp_path)
        (tmp_path / "tokenizer.model").touch()
        with pytest.raises(TokenizerError, match="SentencePiece"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}'])
    def test_broken(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            load_tokenizer(tmp_path)

    def test_a_panic_of_the_library(self, tmp_path: Path) -> None:
        fields = json.loads(byte_level_backend().to_str())
        fields["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
        (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
        with pytest.raises(TokenizerError, match=r"tokenizer\.json: .*charsmap"):
            load_tokenizer(tmp_path)

    def test_text_that_no_token_stands_for(self, tmp_path: Path) -> None:
        fields = json.loads(byte_level_backend().to_str())
        fields["model"] = {"type": "Unigram", "unk_id": None, "vocab": [["q", -1.0]]}
        fields["added_tokens"] = []
        (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
        with pytest.raises(TokenizerError, match="cannot encode 'a'"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("content", ["{", "[1]", "\xff", "[" * 100_000])
    def test_broken_config(self, tmp_path: Path, content: str) -> None:
        save(tmp_path, byte_level_backend())
        (tmp_path / "tokenizer_config.json").write_text(content, encoding="latin-1")
        with pytest.raises(TokenizerError, match="tokenizer_config"):
            load_tokenizer(tmp_path)

    def test_truncation_in_the_file_is_switched_off(self, tmp_path: Path) -> None:
        backend = byte_level_backend()
        backend.enable_truncation(3)
        backend.enable_padding(length=8)
        tokenizer = load_tokenizer(save(tmp_path, backend))
        assert tokenizer.decode(tokenizer.encode("hello world")) == "hello world"

    def test_importing_and_loading_stay_light(self, tmp_path: Path) -> None:
        save(tmp_path, byte_level_backend(), tokenizer_config={"chat_template": CHATML})
        code = (
            "import sys; from bitllm.tokenizer import load_tokenizer;"
            "assert 'tokenizers' not in sys.modules;"
            f"load_tokenizer({str(tmp_path)!r}); assert 'jinja2' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def test_the_bytes_of_a_token() -> None:
    tokenizer = byte_tokenizer()
    text = "naïve ☃"
    ids = tokenizer.encode(text)
    assert ids[0] == START
    assert token_bytes(tokenizer, START) == b"<s>"
    assert b"".join(token_bytes(tokenizer, id) for id in ids[1:]) == text.encode()
    assert token_bytes(tokenizer, 99999) == b""


def test_the_bytes_of_a_token_of_sentencepiece(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(tmp_path, fallback_backend(), tokenizer_config={}))
    ids = tokenizer.encode("hello wo☃")
    assert b"".join(token_bytes(tokenizer, id) for id in ids) == " hello wo☃".encode()


def test_long_texts_are_encoded_alike_and_hold_up_nobody() -> None:
    tokenizer = byte_tokenizer()
    text = "naïve 😀 two  words " * 100_000
    expected = tokenizer._backend.encode(text, add_special_tokens=False).ids
    turns, encoded = 0, threading.Event()

    def take_turns() -> None:
        nonlocal turns
        while not encoded.wait(0.001):
            turns += 1

    other = threading.Thread(target=take_turns)
    other.start()
    found = tokenizer.encode(text, add_bos=False)
    encoded.set()
    other.join()
    assert found == expected
    assert turns > 20  # one or two while the lock is kept
    with pytest.raises(TokenizerError, match="lone surrogate"):
        tokenizer.encode(text + "\ud800")
