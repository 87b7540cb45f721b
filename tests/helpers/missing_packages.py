"""Packages that a test hides, as if they were not installed."""

from __future__ import annotations

import importlib.util

import pytest

LLAMA_CPP = ("llama_cpp", "xllamacpp", "ik_llama_cpp")
"""The packages with llama.cpp or its quantizer."""


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Has `importlib.util.find_spec` find none of these packages until the end of the test."""
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else known(name))
