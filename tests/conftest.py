"""Fixtures that several tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads without work do not spin beside other processes
# Beside other test processes, a second thread only waits for a core. Processes that tests start get the same number,
# because another number of threads adds in another order.
os.environ.setdefault("OMP_NUM_THREADS", "2" if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1" else "1")

from pathlib import Path

import fake_hub
import pytest
import tiny_models
import torch
import transformers
from huggingface_hub import constants

from gyroquant.inspection import verify_export

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
gc.disable()  # while tests are collected, which leaves no garbage


def pytest_collection_finish() -> None:
    """Exempts what is imported and collected from garbage collection, which took a third of the time of the tests."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def fast_disk() -> Iterator[None]:
    """Has no test wait until files are on the disk itself: none cuts the power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return tiny_models.tokenizer()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some thousand tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(tiny_models.prose(6000), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny models, made when first asked for."""
    return tiny_models.Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has `verify_export` start no process to measure speed in."""
    monkeypatch.setattr(verify_export, "footprint", lambda *asked, exact: {})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake_hub.FakeHub]:
    """A running hub, with a token for it."""
    with fake_hub.running(fake_hub.FakeHub()) as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", fake_hub.TOKEN)
        yield running
