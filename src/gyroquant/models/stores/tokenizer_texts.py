"""Texts on which different tokenizers are likely to differ: added tokens and their surroundings, spaces, scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_MAX_ADDED = 24  # added tokens without special rules; some models reserve hundreds
TEXTS: Mapping[str, str] = {
    "the empty text": "",
    "prose": "The quick brown fox jumps over the lazy dog, and it's 7 o'clock: time to go home.",
    "a leading space": " leading and",
    "a trailing space": "trailing ",
    "several spaces": "a  b   c    d",
    "line ends": "one\ntwo\n\nthree\r\n\r\n four\n  five\n",
    "tabs": "\tif x:\n\t\treturn\t1",
    "digits": "1 12 123 1234 12345 3.14159 2026-11-28 1,000,000",
    "contractions": "don't I'll we've they're it's he'd I'm DON'T WE'LL",
    "letters beside digits": "abc123def x2 H2O 4th",
    "punctuation": "Hello!!! (what?) -- \"quoted\" 'single' ... [x] {y} <z> a/b\\c #1 @me $5 50%",
    "code": "def f(x):\n    return x**2 + 1  # comment\n\nfor (int i = 0; i < n; ++i) { a[i] += b->c; }",
    "accents": "Ünïcödé é ŝ naïve café Ångström",
    "combining accents": "e\u0301 a\u0308 n\u0303",
    "Chinese": "你好、世界。今天天气很好",
    "Japanese": "こんにちは世界、カタカナ",
    "Russian": "Привет, мир! Как дела?",
    "Arabic": "مرحبا بالعالم",
    "Hindi": "नमस्ते दुनिया",
    "Korean": "안녕하세요 세계",
    "emoji": "ok 🙂👍🏽 👩‍👩‍👧",
    "spaces of other widths": "a\u00a0b\u2003c\u3000d",
    "zero bytes and controls": "a\u0001b\u200bc",
}
_CONTEXTS = ("{}", "a{}b", "a {} b", "{} b", "a {}", " {}", "{}{}", "{} {}", "a\n{}\nb", "x  {}  y", "1{}2")


def added_tokens(tokenizer: Any) -> Iterator[Any]:
    """The added tokens of a tokenizer, in the order of their ids: first those with rules, then some of the others."""
    tokens = [token for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    yield from [token for token in tokens if rules(token)]
    yield from [token for token in tokens if not rules(token)][:_MAX_ADDED]


def rules(token: Any) -> list[str]:
    """The rules that change how an added token is matched, besides its characters."""
    return [rule for rule in ("lstrip", "rstrip", "single_word") if getattr(token, rule)]


def texts(tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Pairs of a description and a text: first `TEXTS`, then texts with each added token."""
    yield from TEXTS.items()
    for token in added_tokens(tokenizer):
        for context in _CONTEXTS:
            yield f"the added token {token.content}", context.replace("{}", token.content)
