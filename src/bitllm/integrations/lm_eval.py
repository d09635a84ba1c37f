"""bitllm as a model of lm-eval, EleutherAI's evaluation harness: `--model bitllm`.

lm-eval knows models by name once their module is imported, and has no entry points. So there are
three ways to use this one:

    bitllm eval ./my-model --tasks hellaswag
    python -m bitllm.integrations.lm_eval run --model bitllm --model_args pretrained=./my-model ...
    lm_eval.simple_evaluate(model=BitllmLM("./my-model"), tasks=["hellaswag"])

Texts are cut and encoded as lm-eval's own class for transformers does it, so figures of both can be
compared: the context is cut on the left, and `loglikelihood_rolling` scores the start token of a
text as one of its tokens.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from bitllm.config import SamplingParams
from bitllm.engine.llm import LLM
from bitllm.engine.loading import load
from bitllm.errors import ChatTemplateError, ConfigError, ContextOverflowError, TokenizerError

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import (
        get_rolling_token_windows,
        make_disjoint_window,
        simple_parse_args_string,
    )
    from tqdm import tqdm
except ImportError as error:
    raise ConfigError(
        f"evaluation by tasks needs lm-eval, which cannot be imported: {error}",
        hint="install it with `pip install 'bitllm[eval]'`",
    ) from error

__all__ = ["BitllmLM"]

T = TypeVar("T")
Pair = tuple[Any, list[int], list[int]]  # what lm-eval calls it, context, continuation

_AT_ONCE = 64  # requests between two moves of the progress bar
_MOST_WRITTEN = 256  # tokens, where a task says nothing
_UNSAID_DEVICE = "cuda:0"  # what lm-eval's command passes where nobody named a device
_SEED = 1234  # that of lm-eval
# A task says how it samples; what the model's authors suggest for chats is not part of it.
_NEUTRAL = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@register_model("bitllm")
class BitllmLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A model of bitllm that answers the requests of lm-eval's tasks.

    Args:
        pretrained: a reference as `bitllm.load` takes it, or a model that is loaded.
        batch_size: ignored: the engine puts together what fits into its KV cache (`kv_tokens`).
        max_batch_size: ignored likewise.
        device: as in `EngineOptions`; "cuda:0", lm-eval's default, is "auto" here.
        progress: draw bars on stderr.
        **options: fields of `EngineOptions`, for a model that is to be loaded.

    Raises:
        BitllmError: as `bitllm.load`.
        ConfigError: options for a model that is loaded already.
    """

    def __init__(
        self,
        pretrained: str | LLM | None = None,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        progress: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self._silent = not progress
        if device not in (None, _UNSAID_DEVICE):
            options["device"] = device
        if not isinstance(pretrained, LLM):
            self.llm = load(pretrained, **options)
        elif options:
            raise ConfigError(f"{', '.join(options)}: the model is loaded already")
        else:
            self.llm = pretrained
        self.tokenizer = self.llm.tokenizer

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> BitllmLM:
        """Return a model by lm-eval's `--model_args`, which win over options of their own."""
        return cls(**{**(additional_config or {}), **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> BitllmLM:
        """Return the same by `key=value,key=value`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @property
    def max_length(self) -> int:
        """Most tokens of a text."""
        return self.llm.context

    @property
    def eot_token_id(self) -> int:
        """A token that ends a text: the lowest of those that the model stops at."""
        return min(self.llm.defaults.stop_ids, default=-1)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing comes before: start of text, or else its end.

        Raises:
            TokenizerError: the model has neither.
        """
        start = self.tokenizer.bos_id
        if start is None and self.eot_token_id < 0:
            raise TokenizerError("the model has no token that a text could begin or end with")
        return self.eot_token_id if start is None else start

    @property
    def tokenizer_name(self) -> str:
        """What prepared prompts are filed under."""
        return self.llm.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Return what lm-eval writes beside its results."""
        info = self.llm.info
        return {"model": self.llm.name, "backend": info.backend, "kernel": info.kernel}

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the token ids of a text.

        Args:
            string: the text.
            add_special_tokens: whether to begin with the start token; None = if the text does not
                begin with it already, as prompts of chat templates may.
        """
        if add_special_tokens is None:
            bare: list[int] = self.tokenizer.encode(string, add_bos=False)
            begun = self.tokenizer.bos_id is not None and bare[:1] == [self.tokenizer.bos_id]
            return bare if begun else self.tokenizer.encode(string)
        return self.tokenizer.encode(string, add_bos=add_special_tokens)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log-likelihood of each continuation, and whether greedy decoding writes it."""
        silent = disable_tqdm or self._silent
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=silent)
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, of any length, read in disjoint windows."""
        texts = [request.args[0] for request in requests]
        windows = [self._windows(text) for text in texts]
        pairs = [pair for each in windows for pair in each]
        scores = iter(self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm))
        totals = []
        for text, each in zip(texts, windows, strict=True):
            totals.append(sum(score for score, _ in itertools.islice(scores, len(each))))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _windows(self, text: str) -> list[Pair]:
        windows = get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(None, *make_disjoint_window(window)) for window in windows]

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        """Return the same for token ids."""
        found: list[tuple[float, bool]] = []
        for group in _shown(requests, disable_tqdm or self._silent, "loglikelihood"):
            cut = [self._cut(context, continuation) for _, context, continuation in group]
            scores = self.llm.score([before for before, _ in cut], [after for _, after in cut])
            for (name, _, _), score in zip(group, scores, strict=True):
                found.append((score.logprob, score.greedy))
                if name is not None:
                    self.cache_hook.add_partial("loglikelihood", name, found[-1])
        return found

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """Take from the left of a context what does not fit; the last token is not read."""
        if len(continuation) > self.max_length:
            raise ContextOverflowError(
                f"an answer of a task has {len(continuation)} tokens, but the context holds"
                f" {self.max_length}",
                hint="load the model with a larger context",
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes for each request, up to a stop string of its own."""
        asked: list[tuple[int, str, dict[str, Any]]] = []
        seen: Counter[str] = Counter()
        for index, request in enumerate(requests):
            context, options = request.args
            key = json.dumps([context, options], sort_keys=True, default=str)
            asked.append((index, context, self._params(options, seen[key])))
            seen[key] += 1

        def kind(item: tuple[int, str, dict[str, Any]]) -> str:
            return json.dumps(item[2], sort_keys=True)

        texts: dict[int, str] = {}
        groups = itertools.groupby(sorted(asked, key=kind), key=kind)
        for _, group in groups:
            for part in _shown(list(group), disable_tqdm or self._silent, "generate_until"):
                texts |= self._written(part)
        for index, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[index])
        return [texts[index] for index in range(len(texts))]

    def _written(self, part: Sequence[tuple[int, str, dict[str, Any]]]) -> dict[int, str]:
        params = SamplingParams.from_options(part[0][2])
        room = self.max_length - (params.max_tokens or 0)
        prompts = [self.tok_encode(context)[-room:] for _, context, _ in part]
        completions = self.llm.generate(prompts, params=params)
        return {item[0]: each.text for item, each in zip(part, completions, strict=True)}

    def _params(self, options: Mapping[str, Any], time: int) -> dict[str, Any]:
        """Return the sampling options of a request that is made for the `time`-th time.

        Raises:
            ConfigError: an option that bitllm does not have.
            ContextOverflowError: more tokens are asked for than the context holds.
        """
        most = min(_MOST_WRITTEN, self.max_length // 2)
        given: dict[str, Any] = dict(normalize_gen_kwargs(dict(options), most))
        stops, count = given.pop("until"), int(given.pop("max_gen_toks"))
        if count >= self.max_length:
            raise ContextOverflowError(
                f"a task asks for {count} tokens, but the context holds {self.max_length}",
                hint="load the model with a larger context, or set max_gen_toks",
            )
        if not given.pop("do_sample"):
            given["temperature"] = 0.0
        seed = int(given.pop("seed", _SEED)) + time
        params = {**_NEUTRAL, **given, "max_tokens": count, "seed": seed}
        if params["temperature"] == 0:
            del params["seed"]
        SamplingParams.from_options(params)  # refuses what it does not know before any work
        return {**params, "stop": [stop for stop in stops if stop]}

    def apply_chat_template(
        self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return messages as the model's template writes them.

        Without `add_generation_prompt` the last message is one that the model is to continue: the
        text ends where that message does.
        """
        text = self.tokenizer.apply_chat_template(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].lstrip()
        start = text.rfind(last.rstrip())
        if start < 0:
            raise ChatTemplateError("the chat template does not show the message to be continued")
        kept = last if text.startswith(last, start) else last.rstrip()  # templates may strip it
        return text[: start + len(kept)]


def _shown(items: Sequence[T], disabled: bool, label: str) -> Iterator[Sequence[T]]:
    """Yield items a few at a time, with a bar that counts them."""
    with tqdm(total=len(items), disable=disabled, desc=f"Running {label} requests") as bar:
        for start in range(0, len(items), _AT_ONCE):
            part = items[start : start + _AT_ONCE]
            yield part
            bar.update(len(part))


def main() -> None:
    """Run lm-eval's own command line, in which `--model bitllm` is known."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
