"""Chat templates: Jinja text that came with a model, so code of strangers, run in a sandbox.

The dialect is that of transformers: blocks and leading spaces trimmed, `raise_exception`,
`strftime_now`, a `tojson` that does not escape HTML, `break` and `continue`, and the `generation`
tag, which has no effect here.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from bitllm.errors import ChatTemplateError

__all__ = ["ChatTemplate"]

_MAX_SOURCE = 1 << 20


class ChatTemplate:
    """A compiled chat template; rendering is safe from several threads.

    Args:
        source: the template's text.

    Raises:
        ChatTemplateError: it is not valid Jinja.
    """

    def __init__(self, source: str) -> None:
        # Jinja costs 11 MB, which those who never chat need not pay.
        import jinja2

        from bitllm.tokenizer.sandbox import Budget, ChatEnvironment

        if len(source) > _MAX_SOURCE:
            raise ChatTemplateError(f"the chat template is {len(source)} characters long")
        self._budget = Budget()
        self._lock = threading.Lock()
        try:
            self._template = ChatEnvironment(self._budget).from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
            raise ChatTemplateError(
                f"the model's chat template is broken: {error}",
                hint="report it to the model's authors, or write the prompt yourself",
            ) from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """Return the prompt.

        Args:
            variables: what the template sees: messages, tools, add_generation_prompt, bos_token...

        Raises:
            ChatTemplateError: the template refuses the messages, fails, or does not come to an end.
        """
        with self._lock:
            self._budget.refill()
            try:
                return self._generate(variables)
            except ChatTemplateError:
                raise
            # Arbitrary code over arbitrary messages: any exception may come out of it.
            except Exception as error:
                reason = str(error) or type(error).__name__
                raise ChatTemplateError(
                    f"the chat template does not accept these messages: {reason}",
                    hint="many templates want user and assistant in turn, and text as content",
                ) from error

    def _generate(self, variables: Mapping[str, Any]) -> str:
        parts: list[str] = []
        length = 0
        for part in self._template.generate(**variables):
            length += len(part)
            self._budget.reserve(length)
            parts.append(part)
        return "".join(parts)
