"""Structured output: whatever a model of random weights wants, the text has the asked form."""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bitllm
from bitllm import LLM, AsyncLLM, ConfigError, SamplingParams
from bitllm.engine.loading import load
from bitllm.engine.request import ModelDefaults
from byte_tokenizer import END, byte_tokenizer
from cli_model import write_model
from fake_decoder import FakeDecoder, fake_spec

CONTEXT = 2048


def make_llm(blocks: int = 64, vocab: int = 258) -> LLM:
    return LLM(
        FakeDecoder(blocks=blocks, spec=fake_spec(vocab, CONTEXT)),
        byte_tokenizer(),
        name="fake",
        context=CONTEXT,
        max_batch_tokens=64,
        defaults=ModelDefaults(stop_ids=frozenset({END})),
    )


@pytest.fixture(scope="module")
def fake() -> LLM:
    return make_llm()


@pytest.fixture(scope="module", params=["cpu", "reference"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    model = write_model(tmp_path_factory.mktemp("models") / "tiny")
    with load(str(model), device=request.param, context=256) as loaded:
        yield loaded


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_of_a_real_decoder(llm: LLM, temperature: float) -> None:
    for seed in range(5):
        result = llm.generate(
            "hello", json_schema=PERSON, temperature=temperature, seed=seed, max_tokens=200
        )
        assert result.finish_reason == "stop"
        jsonschema.validate(json.loads(result.text), PERSON)
        assert (
            result.text
            == json.dumps(json.loads(result.text), separators=(",", ":"), ensure_ascii=False)
            or "\\" in result.text
        )
    assert llm.free_blocks == 8


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=4)
    leaves = st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.tuples(st.integers(-50, 50), st.integers(0, 200)).map(
            lambda pair: {"type": "integer", "minimum": pair[0], "maximum": pair[0] + pair[1]}
        ),
        st.integers(0, 5).map(lambda n: {"type": "string", "maxLength": n}),
        st.sampled_from(["[a-c]{1,3}", "x+y?", "(ab|cd)e"]).map(
            lambda pattern: {"type": "string", "pattern": f"^{pattern}$", "maxLength": 12}
        ),
        st.lists(
            st.one_of(texts, st.integers(-(2**53), 2**53), st.none()), min_size=1, max_size=3
        ).map(lambda values: {"enum": values}),
        texts.map(lambda value: {"const": value}),
        st.just({"type": "string", "format": "date"}),
    )

    def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        arrays = st.builds(
            lambda items, low, more: {
                "type": "array",
                "items": items,
                "minItems": low,
                "maxItems": low + more,
            },
            inner,
            st.integers(0, 2),
            st.integers(0, 2),
        )
        objects = st.builds(
            lambda fields, needed: {
                "type": "object",
                "properties": fields,
                "required": list(fields)[:needed],
                "additionalProperties": False,
            },
            st.dictionaries(texts, inner, max_size=3),
            st.integers(0, 3),
        )
        either = st.lists(inner, min_size=1, max_size=3).map(lambda some: {"anyOf": some})
        return st.one_of(arrays, objects, either)

    return st.recursive(leaves, nested, max_leaves=5)


ended = {"stop": 0, "length": 0}


@settings(max_examples=150, deadline=None)
@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_every_text_that_ends_is_valid_json(fake: LLM, schema: dict[str, Any], seed: int) -> None:
    result = fake.generate(
        "x",
        json_schema=schema,
        temperature=1.0,
        seed=seed,
        max_tokens=400,
        ignore_eos=seed % 2 == 0,
    )
    ended[result.finish_reason] += 1
    if result.finish_reason == "stop":
        jsonschema.validate(json.loads(result.text), schema)
    assert fake.free_blocks == 64


def test_most_texts_end() -> None:
    assert ended["stop"] > 10 * ended["length"]


@pytest.mark.parametrize(
    "pattern",
    [
        "[0-9]{4}-[0-9]{2}",
        "(yes|no)( indeed)?",
        "a{2,5}b",
        "é+ß",
        "[^x]{3}",
        r"[0-9]\.[0-9]",
        "ab*c/d",
    ],
)
def test_a_regex_matches_the_whole_text(fake: LLM, pattern: str) -> None:
    for seed in range(10):
        for ignore_eos in (False, True):
            result = fake.generate(
                "x", regex=pattern, temperature=1, seed=seed, ignore_eos=ignore_eos, max_tokens=150
            )
            if result.finish_reason == "stop":
                assert re.fullmatch(pattern, result.text), result.text


@settings(max_examples=60, deadline=None)
@given(
    choice=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    ),
    seed=st.integers(0, 99),
    stops=st.booleans(),
)
def test_a_choice_is_one_of_its_texts(fake: LLM, choice: list[str], seed: int, stops: bool) -> None:
    result = fake.generate(
        "x", choice=choice, temperature=1.0, seed=seed, ignore_eos=not stops, max_tokens=60
    )
    assert result.finish_reason == "stop"
    assert result.text in choice


def test_every_choice_can_be_taken(fake: LLM) -> None:
    choice = ["yes", "no", "ye", "[a-z]+", "a|b"]
    taken = {
        fake.generate(f"x{seed}", choice=choice, temperature=1.0, seed=seed, max_tokens=20).text
        for seed in range(60)
    }
    assert taken == set(choice)


LARK = 'start: greeting " " NAME\ngreeting: "hello" | "bye"\nNAME: /[A-Z][a-z]{1,3}/'
GBNF = 'root ::= ("hello" | "bye") " " name\nname ::= [A-Z] [a-z] [a-z]'


@pytest.mark.parametrize(("grammar", "longest"), [(LARK, 3), (GBNF, 2)])
def test_grammars_of_both_kinds(fake: LLM, grammar: str, longest: int) -> None:
    for seed in range(10):
        text = fake.generate("x", grammar=grammar, temperature=1.0, seed=seed, max_tokens=30).text
        assert re.fullmatch(rf"(hello|bye) [A-Z][a-z]{{1,{longest}}}", text)


def test_a_complete_text_ends_without_another_step(fake: LLM) -> None:
    before = len(fake.engine._decoder.steps)  # type: ignore[attr-defined]
    result = fake.generate("x", choice=["abc"], max_tokens=50)
    assert (result.text, result.token_ids) == ("abc", tuple(b"abc"))
    assert len(fake.engine._decoder.steps) - before == 3  # type: ignore[attr-defined]


def test_a_text_that_may_go_on_ends_by_a_stop_id(fake: LLM) -> None:
    result = fake.generate("x", regex="a+", logit_bias={END: 100.0}, max_tokens=50)
    assert result.token_ids == (97, END)
    assert result.text == "a"
    longer = fake.generate("x", regex="a+", logit_bias={END: 100.0}, min_tokens=5, max_tokens=50)
    assert longer.token_ids == (97,) * 5 + (END,)
    endless = fake.generate("x", regex="a+", ignore_eos=True, max_tokens=50)
    assert (endless.text, endless.finish_reason) == ("a" * 50, "length")
    short = fake.generate("x", choice=["ab"], min_tokens=9, max_tokens=50)
    assert (short.text, short.finish_reason) == ("ab", "stop")


def test_own_stops_still_count(fake: LLM) -> None:
    exact = fake.generate("x", regex="[a-c]{3}", ignore_eos=True, max_tokens=3)
    assert (len(exact.token_ids), exact.finish_reason) == (3, "stop")  # complete, not cut off
    cut = fake.generate("x", regex="[a-c]{30}", stop="b", temperature=1.0, seed=1, max_tokens=40)
    assert re.fullmatch("[ac]*", cut.text)
    by_id = fake.generate("x", regex="[a-c]{30}", stop_token_ids=[98], temperature=1.0, seed=1)
    assert by_id.token_ids[-1] == 98


def test_a_batch_of_forms_is_as_one_by_one() -> None:
    llm = make_llm(blocks=64)
    forms: list[dict[str, Any]] = [
        {"json_schema": PERSON},
        {"regex": "[a-z]{5,20}"},
        {},
        {"choice": ["left", "right"]},
        {"grammar": LARK},
        {"regex": "[a-z]{5,20}", "presence_penalty": 2.0, "logprobs": 2},
    ]
    asked = [
        SamplingParams(temperature=1.0, seed=n, max_tokens=40, **form)
        for n, form in enumerate(forms)
    ]
    alone = [llm.generate("x" * n, params=each).token_ids for n, each in enumerate(asked, 1)]
    for blocks in (64, 6):  # the second with preemption
        small = make_llm(blocks=blocks)
        sequences = [
            small.engine.add(small.prepare("x" * n, each)) for n, each in enumerate(asked, 1)
        ]
        for sequence in sequences:
            small.engine.finish(sequence)
        assert [each.completion().token_ids for each in sequences] == alone
    streamed = "".join(map(str, llm.stream("xx", params=asked[1])))
    assert streamed == llm.decode(alone[1])


def test_each_choice_has_the_form() -> None:
    llm = make_llm()
    result = llm.generate("x", n=5, json_schema=PERSON, temperature=1.0, seed=3, max_tokens=300)
    assert len({each.text for each in result.choices}) == 5
    for each in result.choices:
        jsonschema.validate(json.loads(each.text), PERSON)
    assert llm.free_blocks == 64


def test_async_gives_the_same() -> None:
    params = SamplingParams(temperature=1.0, seed=3, json_schema=PERSON, max_tokens=200)
    expected = make_llm().generate("x", params=params).text

    async def test() -> list[str]:
        async with AsyncLLM(make_llm()) as llm:
            results = await asyncio.gather(*(llm.generate("x", params=params) for _ in range(3)))
            return [each.text for each in results]

    assert asyncio.run(test()) == [expected] * 3


@pytest.mark.parametrize("vocab", [258, 256 + 32, 400])
def test_ids_without_a_token_are_never_drawn(vocab: int) -> None:
    llm = make_llm(vocab=vocab)
    for seed in range(5):
        result = llm.generate("x", regex="[a-z]{9}", temperature=50.0, seed=seed, max_tokens=12)
        assert re.fullmatch("[a-z]{9}", result.text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"regex": "("}, "regex cannot be compiled: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": ""}, "regex must be a text that is not empty"),
        ({"regex": 5}, "regex must be a text"),
        ({"regex": "(|)"}, "no text but the empty one"),
        ({"regex": "[^\\x00-\\U0010ffff]"}, "allows no token"),
        ({"json_schema": "{"}, "json_schema is no JSON"),
        ({"json_schema": "[]"}, "must be a JSON object"),
        ({"json_schema": True}, "must be a JSON object"),
        ({"json_schema": {"type": {1, 2}}}, "json_schema is no JSON"),
        ({"json_schema": {"type": "nope"}}, "json_schema cannot be compiled"),
        ({"json_schema": {"$ref": "https://example.com/schema"}}, "json_schema cannot be compiled"),
        ({"json_schema": {"enum": []}}, "Unsatisfiable"),
        ({"json_schema": {"not": {"type": "object"}}}, "Unimplemented keys"),
        ({"json_schema": {"type": "string", "pattern": "("}}, "unclosed group"),
        ({"json_schema": {"const": 2**63}}, "9223372036854775808; 9007199254740992 is the larg"),
        ({"json_schema": {"maximum": float("inf")}}, "json_schema is no JSON"),
        ({"grammar": "start: x"}, "grammar cannot be compiled: .*unknown name"),
        ({"grammar": "root ::= ("}, "grammar is no valid GBNF"),
        ({"choice": []}, "choice must be a list of strings"),
        ({"choice": "yes"}, "choice must be a list of strings"),
        ({"choice": ["yes", ""]}, "not empty"),
        ({"regex": "a", "choice": ["b"]}, "regex and choice cannot be asked for together"),
    ],
)
def test_forms_that_cannot_be(fake: LLM, options: dict[str, Any], says: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        fake.generate("x", **options)
    assert time.monotonic() - begin < 5
    assert fake.free_blocks == 64


HOSTILE = {
    "nested_repeats": {"regex": "((a{1,1000}){1,1000}){1,1000}"},
    "many_states": {"regex": "(.*a.{200})"},
    "long_choice": {"choice": ["x" * n for n in range(1, 1500)]},
    "wide_schema": {
        "json_schema": {
            "type": "object",
            "properties": {f"field{n}": {"type": "integer"} for n in range(2000)},
        }
    },
    "recursive": {
        "json_schema": {
            "$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}},
            "$ref": "#/$defs/t",
        }
    },
    "many_references": {
        "json_schema": {
            "$defs": {
                **{f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(5000)},
                "d5000": {"type": "null"},
            },
            "$ref": "#/$defs/d0",
        }
    },
    "references": {
        "json_schema": {
            "$defs": {
                **{f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(490)},
                "d490": {"type": "null"},
            },
            "$ref": "#/$defs/d0",
        }
    },
    "many_rules": {"grammar": "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(20000))},
    "rules": {
        "grammar": "start: r0\n" + "".join(f"r{n}: r{n + 1}\n" for n in range(990)) + 'r990: "a"'
    },
    "large_number": {"json_schema": {"enum": [-(2**63) + 1]}},
    "large_float": {"json_schema": {"enum": [-9.3e18]}},
    "number_in_grammar": {"grammar": 'start: %json {"enum":[-9223372036854775807]}'},
    "float_in_grammar": {"grammar": 'start: %json {"enum":[-9.3e18]}'},
    "parentheses": {"grammar": "start: " + "(" * 50000 + '"a"' + ")" * 50000},
    "deep": {"json_schema": '{"items":' * 900 + "{}" + "}" * 900},
    "left_recursive": {"grammar": 'start: start "a" | "b"'},
    "ambiguous": {"grammar": 'start: s\ns: s s | "a" |'},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_forms_end_soon(fake: LLM, name: str) -> None:
    begin = time.monotonic()
    said = ""
    try:
        fake.generate("x", **HOSTILE[name], temperature=1.0, seed=1, max_tokens=40)
    except ConfigError as error:
        said = str(error)
    assert "Parser:" not in said  # the state of the library helps nobody
    assert time.monotonic() - begin < 30
    assert fake.free_blocks == 64


def test_a_regex_that_is_too_large_is_named() -> None:
    """Not the weights, which the engine suspects where no token may be drawn."""
    with bitllm.load() as llm:
        for regex in ["a{1000000}", "(a{1000}){1000}", "a" * 1_000_000] * 2:
            with pytest.raises(ConfigError, match="regex is too complex"):
                llm.generate("The list", regex=regex, max_tokens=2)
        assert not llm._grammars._compiled


def test_white_space_is_not_written_for_ever(fake: LLM) -> None:
    eager = dict.fromkeys(b" \n\t", 100.0)
    result = fake.generate("x", json_schema=PERSON, logit_bias=eager, max_tokens=200)
    assert result.finish_reason == "stop"
    jsonschema.validate(json.loads(result.text), PERSON)


def test_a_grammar_is_compiled_once(fake: LLM) -> None:
    params = SamplingParams(regex="[a-z]{3}x")
    first = fake.prepare("x", params).grammar
    assert fake.prepare("y", params).grammar is first
    for n in range(70):
        fake.prepare("x", SamplingParams(regex=f"a{{{n + 1}}}"))
    assert fake.prepare("x", params).grammar is not first
    assert len(fake._grammars._compiled) == 16


def test_without_the_library_it_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    llm = make_llm()
    with pytest.raises(ConfigError, match="not installed") as caught:
        llm.generate("x", regex="a")
    assert "pip install" in str(caught.value.hint)
    assert llm.generate("x", max_tokens=2).token_ids


def test_it_is_imported_only_when_used(tmp_path: Path) -> None:
    import subprocess

    program = "import bitllm, sys; bitllm.LLM; print('llguidance' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"
