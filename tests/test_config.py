"""SamplingParams and EngineOptions: what is refused, and how."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

import numpy as np
import pytest

from bitllm.config import EngineOptions, SamplingParams, parse_size
from bitllm.errors import ConfigError


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("max_tokens", 0, "at least 1, got 0"),
        ("max_tokens", 1.5, "whole number"),
        ("max_tokens", True, "whole number"),
        ("temperature", -0.1, "at least 0"),
        ("temperature", 0.0001, "0 or at least 0.001"),
        ("temperature", 1001, "at most 1000"),
        ("temperature", float("nan"), "finite"),
        ("temperature", "hot", "must be a number"),
        ("top_k", -1, "0 to 2147483647"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("min_p", -0.5, "at least 0 and at most 1"),
        ("seed", -1, "0 to 18446744073709551615"),
        ("seed", 2**64, "0 to 18446744073709551615"),
        ("stop", 7, "string or a list of strings"),
        ("stop", ["a", 7], "string or a list of strings"),
        ("stop", "", "empty string"),
        ("stop", ["a", ""], "empty string"),
        ("stop_token_ids", "12", "list of token ids"),
        ("stop_token_ids", 12, "list of token ids"),
        ("stop_token_ids", [-1], "at least 0"),
        ("ignore_eos", 1, "True or False"),
        ("min_tokens", -1, "at least 0"),
        ("repetition_penalty", 0.0, "above 0"),
        ("frequency_penalty", float("inf"), "finite"),
        ("frequency_penalty", 10**400, "finite"),
        ("frequency_penalty", 1e39, "float32"),
        ("repetition_penalty", 1e-39, "float32"),
        ("top_p", 1e-39, "float32"),
        ("logit_bias", {1: -1e39}, "float32"),
        ("top_k", 2**31, "0 to 2147483647"),
        ("presence_penalty", None, "must be a number"),
        ("logit_bias", [1, 2], "map token ids"),
        ("logit_bias", {"a": 1.0}, "whole number"),
        ("logit_bias", {1: float("-inf")}, "finite"),
        ("logprobs", -1, "at least 0"),
        ("n", 0, "1 to 128"),
        ("n", 129, "1 to 128"),
        ("best_of", 129, "1 to 128"),
        ("priority", 1001, "-1000 to 1000"),
        ("priority", 0.5, "whole number"),
        ("timeout", 0, "above 0"),
        ("timeout", "1s", "must be a number"),
    ],
)
def test_sampling_values_that_cannot_be_meant(option: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        SamplingParams(**{option: value})
    assert option in caught.value.message


def test_min_tokens_above_max_tokens() -> None:
    with pytest.raises(ConfigError, match="min_tokens is 5, but max_tokens only 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_best_of_holds_n() -> None:
    with pytest.raises(ConfigError, match="best_of must be 3 to 128, got 2"):
        SamplingParams(n=3, best_of=2)
    assert SamplingParams(n=3).choices == SamplingParams(n=1, best_of=3).choices == 3


def test_values_at_their_bounds_are_taken() -> None:
    params = SamplingParams(temperature=0.001, top_p=1, min_p=1, top_k=0, seed=2**64 - 1)
    assert (params.temperature, params.top_p, params.seed) == (0.001, 1.0, 2**64 - 1)


def test_numpy_numbers_become_plain_ones() -> None:
    params = SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5))  # type: ignore[arg-type]
    assert type(params.max_tokens) is int
    assert type(params.temperature) is float


def test_stop_is_kept_as_a_tuple() -> None:
    assert SamplingParams(stop="end").stop_strings == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams().stop_strings == ()


def test_params_can_be_compared_hashed_and_not_changed() -> None:
    params = SamplingParams(stop="x", logit_bias={1: 2.0})
    assert params == SamplingParams(stop=["x"], logit_bias={1: 2})
    assert hash(params) == hash(SamplingParams(stop=["x"], logit_bias={1: 2}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]


def test_logit_bias_is_copied() -> None:
    bias = {1: 2.0}
    params = SamplingParams(logit_bias=bias)
    bias[1] = 3.0
    assert params.logit_bias == {1: 2.0}


def test_unknown_option_names_the_likely_one() -> None:
    with pytest.raises(ConfigError, match="no sampling option 'temprature'") as caught:
        SamplingParams.from_options({"temprature": 1.0})
    assert caught.value.hint == "did you mean 'temperature'?"


def test_unknown_option_with_nothing_like_it_lists_all() -> None:
    with pytest.raises(ConfigError, match="no engine option 'xyzzy'") as caught:
        EngineOptions.from_options({"xyzzy": 1})
    assert caught.value.hint is not None
    assert "max_batch_tokens" in caught.value.hint


def test_options_over_a_base() -> None:
    base = SamplingParams(top_k=5, seed=1)
    assert SamplingParams.from_options({}, base) is base
    assert SamplingParams.from_options({"seed": 2}, base) == SamplingParams(top_k=5, seed=2)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("device", "", "name such as 'cpu'"),
        ("device", 3, "name such as 'cpu'"),
        ("isa", "", "name such as 'avx2'"),
        ("kv_dtype", "int3", "one of bf16, fp32, int8"),
        ("threads", 0, "1 to 1024"),
        ("threads", 1025, "1 to 1024"),
        ("context", "4k", "whole number"),
        ("kv_tokens", -5, "at least 1"),
        ("max_batch_tokens", None, "whole number"),
        ("prefix_cache", 1, "True or False"),
        ("memory_limit", 1.5, "whole number"),
        ("speculation", "on", "one of auto, off"),
        ("speculation", True, "one of auto, off"),
        ("draft_tokens", 0, "1 to 64"),
        ("draft_tokens", 65, "1 to 64"),
        ("draft_model", "", "name a model"),
        ("draft_model", 3, "name a model"),
    ],
)
def test_engine_values_that_cannot_be_meant(option: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        EngineOptions(**{option: value})
    assert option in caught.value.message


def test_a_draft_model_that_would_never_be_asked() -> None:
    with pytest.raises(ConfigError, match="draft_model is given, but speculation is off"):
        EngineOptions(draft_model="org/name", speculation="off")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("800MB", 800_000_000),
        ("2.5 GB", 2_500_000_000),
        ("1GiB", 2**30),
        ("1 k", 1000),
        ("3tb", 3 * 10**12),
        ("64KiB", 65536),
    ],
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1.5.2", "10 apples", "0", "1ib", "0.2"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_size(text)


def test_keyword_lists_match_the_dataclasses() -> None:
    from bitllm.engine.llm import SamplingOptions
    from bitllm.engine.loading import EngineKeywords

    for keywords, options in ((SamplingOptions, SamplingParams), (EngineKeywords, EngineOptions)):
        fields = {item.name for item in dataclasses.fields(options)}
        assert set(get_type_hints(keywords)) == fields
