"""The costs of results besides bytes: the time to make them, and what their online maps cost a runtime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gyroquant.benchmark.rows import rate, rate_share

Result = Mapping[str, Any]


def costs(runs: Iterable[Result]) -> list[str]:
    """Sentences on the costs of some results, each once: minutes, and tokens a second where they were measured."""
    by_key = {run["key"]: run for run in runs}
    results = list(by_key.values())
    sentences = [f"Time to quantize: {', '.join(map(_minutes, results))}."]
    measured = [run for run in results if rate(run) is not None]
    if measured:
        runtime = measured[0]["speed"]["runtime"]
        sentences.append(f"Tokens a second in {runtime}: {', '.join(map(_tokens, measured))}.")
    return sentences


def _minutes(run: Result) -> str:
    return f"{run['name']} {run['measured']['seconds'] / 60:.1f} minutes"


def _tokens(run: Result) -> str:
    maps, share = run["speed"]["online_maps"], rate_share(run)
    words = f"{maps} online map{'s' * (maps != 1)}" if maps else "no online maps"
    return f"{run['name']} {rate(run):.1f} with {words} ({share:.2f} times the original's)"


__all__ = ["costs"]
