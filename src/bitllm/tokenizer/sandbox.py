"""Jinja's immutable sandbox with a budget: templates can neither run nor grow without end.

Importing this module imports jinja2, so it is imported only when a chat template is compiled.

Each turn of a loop, each call and each filter takes a step from the budget; each result that text
can grow by (`+`, `*`, `~`, calls, filters, captured blocks) is measured, and so is what is written
out, compared or put into a list, which may hold itself again and again.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sized
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from bitllm.errors import ChatTemplateError

__all__ = ["Budget", "ChatEnvironment"]

MAX_STEPS = 300_000
MAX_LENGTH = 8 << 20
MAX_WORK = 128 << 20
MAX_NODES = 1 << 18
MAX_INTEGER = 1 << 64
_WIDE_FIELD = re.compile(r"\d{6}")
# Of no use to chat templates, and their results cannot be foreseen.
_REFUSED_METHODS = frozenset({"encode", "to_bytes", "translate", "expandtabs", "maketrans"})
_REFUSED_FILTERS = ("urlize", "wordwrap", "xmlattr", "pprint", "random", "filesizeformat")
# Filters and methods that write out all of what they are given, and those that repeat something.
_WRITING = frozenset({"string", "join", "tojson", "escape", "e", "forceescape", "safe", "format"})
_REPEATING = frozenset({"indent", "tojson", "batch", "slice"})
_MAX_REPEATS = 1000


class Budget:
    """What one rendering may do: so many steps, so much text."""

    def __init__(self) -> None:
        self._steps_left = self._work_left = 0
        self.refill()

    def refill(self) -> None:
        """Start a new rendering."""
        self._steps_left = MAX_STEPS
        self._work_left = MAX_WORK

    def step(self) -> None:
        """Count a turn of a loop, a call or a filter."""
        self._steps_left -= 1
        if self._steps_left < 0:
            self._refuse(f"takes more than {MAX_STEPS} steps")

    def measure(self, value: Any) -> Any:
        """Refuse text, lists and numbers beyond any prompt; the value passes through."""
        if isinstance(value, bytes | bytearray):
            self._refuse("makes bytes")
        if isinstance(value, str):
            self.reserve(len(value))
            self.work(len(value))
        elif isinstance(value, list | tuple | dict | Namespace):
            self.extent(value)
        elif isinstance(value, int) and abs(value) > MAX_INTEGER:
            self._refuse("computes with huge numbers")
        return value

    def work(self, amount: int) -> None:
        """Count characters made or read; together they bound time and memory."""
        self._work_left -= amount
        if self._work_left < 0:
            self._refuse(f"handles more than {MAX_WORK} characters")

    def extent(self, value: Any) -> int:
        """Return the characters it takes to write a value out, all that it holds included.

        What holds itself twice, again and again, is small in memory and endless when written.
        """
        if isinstance(value, str):
            return len(value)
        waiting, nodes, length = [value], 0, 0
        while waiting:
            part = waiting.pop()
            nodes += 1
            if nodes > MAX_NODES:
                self._refuse(f"makes something of more than {MAX_NODES} parts")
            if isinstance(part, str):
                length += len(part)
            elif isinstance(part, list | tuple):
                waiting.extend(part[: MAX_NODES + 1])
            elif isinstance(part, Mapping):
                waiting.extend(part.keys())
                waiting.extend(part.values())
            elif isinstance(part, Namespace):
                waiting.append(part._Namespace__attrs)
        self.work(64 * nodes)  # which takes as long as so many characters
        return length + nodes

    def write(self, value: Any) -> Any:
        """Refuse to write out more than any prompt; the value passes through."""
        if not isinstance(value, str):
            self.reserve(self.extent(value))
        return value

    def reserve(self, length: int) -> None:
        """Refuse to make something of this length."""
        if length > MAX_LENGTH:
            self._refuse(f"makes more than {MAX_LENGTH} characters")

    def check_call(self, name: str, subject: Any, args: tuple[Any, ...]) -> None:
        """Refuse a call whose result would be too long, before it is made."""
        self.step()
        widest = max((value for value in args if isinstance(value, int)), default=0)
        self.reserve(widest)
        if isinstance(subject, str):
            self.work(len(subject))
        if name in _REPEATING and widest > _MAX_REPEATS:
            self._refuse(f"repeats something {widest} times")
        if name in _WRITING or isinstance(subject, str):
            length = sum(self.extent(value) for value in (subject, *args))
            self.reserve(length * max(1, widest) if name in _REPEATING else length)
        if name in ("format", "format_map"):
            self.check_format(subject)
            if not all(isinstance(value, str | int | float | None) for value in args):
                self._refuse("formats more than text and numbers")  # a width may hide in a list
        if name == "replace" and isinstance(subject, str) and len(args) >= 2:
            lengths = [len(value) for value in args if isinstance(value, str)]
            shortest, longest = min(lengths, default=1), max(lengths, default=1)
            self.reserve((len(subject) // max(1, shortest) + 1) * longest)
        if name == "join":
            parts, others = (subject, args) if not isinstance(subject, str) else (args[0], subject)
            glue = max((len(other) for other in (*others,) if isinstance(other, str)), default=0)
            glue = len(subject) if isinstance(subject, str) else glue
            count = len(parts) if isinstance(parts, Sized) else _MAX_REPEATS
            self.reserve(glue * count)
        if name == "sum" and not all(isinstance(value, str | int | float) for value in args):
            self._refuse("adds up lists")

    def check_format(self, pattern: Any) -> None:
        """Refuse format strings with a field so wide that it has six digits."""
        if isinstance(pattern, str) and _WIDE_FIELD.search(pattern):
            self._refuse("formats a field of enormous width")

    def _refuse(self, what: str) -> NoReturn:
        raise ChatTemplateError(
            f"the chat template {what}",
            hint="the conversation is extremely long, or the template is broken or hostile",
        )


class _GenerationTag(Extension):
    """`{% generation %}` marks what the assistant said, for training; here it has no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The dialect of transformers' chat templates, on a budget.

    Args:
        budget: charged by every template of this environment.
    """

    intercepted_binops = frozenset({"*", "+", "**", "%"})

    def __init__(self, budget: Budget) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols, _GenerationTag],
            optimized=False,
        )
        self._budget = budget
        self.finalize = budget.write
        del self.globals["lipsum"]
        for name in _REFUSED_FILTERS:
            del self.filters[name]
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.filters["tojson"] = _tojson
        self.filters = {
            name: _on_budget(name, function, budget) for name, function in self.filters.items()
        }

        @jinja2.pass_context
        def step(context: Any, value: Any) -> Any:
            budget.step()
            return value

        @jinja2.pass_context
        def measure(context: Any, value: Any) -> Any:
            return budget.measure(value)

        @jinja2.pass_context
        def weigh(context: Any, value: Any) -> Any:
            budget.work(budget.extent(value))
            return value

        @jinja2.pass_context
        def hold(context: Any, value: Any) -> Any:
            budget.extent(value)
            return value

        @jinja2.pass_context
        def write(context: Any, value: Any) -> Any:
            return budget.write(value)

        # No template can name these: they are no identifiers.
        self.filters["<weigh>"] = weigh
        self.filters["<hold>"] = hold
        self.filters["<write>"] = write
        self.filters["<step>"] = step
        self.filters["<measure>"] = measure

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.body.insert(0, nodes.ExprStmt(_filtered(nodes.Const(True), "<step>")))
            if loop.test is not None:
                loop.test = nodes.And(_filtered(nodes.Const(True), "<step>"), loop.test)
        for concat in list(tree.find_all(nodes.Concat)):
            # a ~ b ~ c becomes one measured concatenation of measured parts.
            inner = nodes.Concat([_filtered(part, "<write>") for part in concat.nodes])
            concat.nodes = [_filtered(inner, "<measure>")]
        for block in list(tree.find_all(nodes.AssignBlock)):
            block.filter = _filtered(block.filter, "<measure>")
        for compare in list(tree.find_all(nodes.Compare)):
            compare.expr = _filtered(compare.expr, "<weigh>")
            for operand in compare.ops:
                operand.expr = _filtered(operand.expr, "<weigh>")
        literals: list[nodes.List | nodes.Tuple] = []
        literals += tree.find_all(nodes.List)
        literals += tree.find_all(nodes.Tuple)
        for literal in literals:
            if getattr(literal, "ctx", "load") == "load":
                literal.items = [_filtered(item, "<hold>") for item in literal.items]
        for pair in list(tree.find_all(nodes.Pair)):
            pair.value = _filtered(pair.value, "<hold>")
        tree.set_environment(self)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Refuse what the sandbox refuses, and methods that templates do not need."""
        return attr not in _REFUSED_METHODS and super().is_safe_attribute(obj, attr, value)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls, if the sandbox allows it and the budget lasts."""
        # The sandbox wraps str.format; what it wraps knows its string.
        subject = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        name = getattr(__obj, "__name__", "")
        __self._budget.check_call(name, subject, (*args, *kwargs.values()))
        return __self._budget.measure(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`, refusing results beyond any prompt."""
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(other, int):
                    self._budget.reserve(len(one) * other)
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and right > 64:
            self._budget.measure(MAX_INTEGER + 1)
        if operator == "%":
            self._budget.check_call("format", left, right if isinstance(right, tuple) else (right,))
        return self._budget.measure(super().call_binop(context, operator, left, right))


def _filtered(node: nodes.Expr | None, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None)


def _on_budget(name: str, function: Callable[..., Any], budget: Budget) -> Callable[..., Any]:
    # A filter that wants the context, or the like, gets it before the value it is applied to.
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        if len(args) > first:
            budget.check_call(name, args[first], (*args[first + 1 :], *kwargs.values()))
        return budget.measure(function(*args, **kwargs))

    return filtered


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' templates expect it: Jinja's own filter would escape HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
