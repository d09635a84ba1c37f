"""TextStream: stop strings do not depend on where the tokens end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bitllm.engine.text import TextStream


class Pieces:
    """A detokenizer whose ids are indices of given texts."""

    def __init__(self, pieces: list[str], rest: str = "") -> None:
        self._pieces = pieces
        self._rest = rest

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return self._rest


def run(pieces: list[str], stops: tuple[str, ...], rest: str = "") -> tuple[str, bool, list[str]]:
    """Return the text, whether a stop string ended it, and the chunks it came in."""
    stream = TextStream(Pieces(pieces, rest), stops)
    chunks = []
    for index in range(len(pieces)):
        stopped = stream.push(index, may_stop=True)
        chunks.append(stream.take())
        if stopped:
            break
    else:
        stopped = False
        stream.finish()
        chunks.append(stream.take())
    return stream.text, stopped, chunks


def cut(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The definition: the text before the first stop string to be completed."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


def test_without_stop_strings_text_passes_at_once() -> None:
    assert run(["a", "", "bc"], ()) == ("abc", False, ["a", "", "bc", ""])


def test_what_may_become_a_stop_string_is_held_back() -> None:
    assert run(["x<", "en", "d>", "y"], ("<end>",)) == ("x", True, ["x", "", ""])
    assert run(["x<", "en", "!", "y"], ("<end>",)) == ("x<en!y", False, ["x", "", "<en!", "y", ""])


def test_held_text_comes_out_at_the_end() -> None:
    assert run(["a<e"], ("<end>",), rest="�") == ("a<e�", False, ["a", "<e�"])


def test_the_stop_string_that_ends_first_counts() -> None:
    assert run(["abc"], ("abc", "b")) == ("a", True, ["a"])
    assert run(["abc"], ("c", "abc")) == ("", True, [""])


def test_a_stop_string_that_comes_too_early_is_text() -> None:
    stream = TextStream(Pieces(["a.b", ".", "c.d"]), (".",))
    assert not stream.push(0, may_stop=False)
    assert not stream.push(1, may_stop=False)
    assert stream.push(2, may_stop=True)
    assert stream.text == "a.b.c"


@given(
    st.lists(st.text("ab<", max_size=4), max_size=8),
    st.lists(st.text("ab<", min_size=1, max_size=4), max_size=3).map(tuple),
)
def test_stopping_does_not_depend_on_token_borders(
    pieces: list[str], stops: tuple[str, ...]
) -> None:
    text, stopped, chunks = run(pieces, stops)
    assert "".join(chunks) == text
    assert (text, stopped) == cut("".join(pieces), stops)
