"""Messages of transformers that would only repeat what gyroquant says itself."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import transformers


@contextmanager
def quiet() -> Iterator[None]:
    """Turns off transformers' progress bars and its warnings about loading, for the duration of a with block."""
    log = transformers.utils.logging
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    accelerate = logging.getLogger("accelerate.big_modeling")  # it warns that blocks are on disk, which is intended
    previous = accelerate.level
    log.disable_progress_bar()
    log.set_verbosity_error()
    accelerate.setLevel(logging.ERROR)
    try:
        yield
    finally:
        accelerate.setLevel(previous)
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
