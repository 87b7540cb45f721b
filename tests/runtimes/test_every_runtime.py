"""The contract of runtimes: every one that is installed here reads texts whole, in pieces, token by token and padded,
and sees the model that was saved each time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import saving
import tiny
import torch

from gyroquant.deploy import relative_error
from gyroquant.errors import InputError
from gyroquant.export.formats import Format, format_named
from gyroquant.runtimes import Runtime, open_runtime
from gyroquant.runtimes.in_use import read_in_pieces

PROMPT, SHORTER = tiny.tokens(tiny.build("llama"), 1)[0], torch.tensor([7, 5, 31, 8, 60, 11, 2, 90, 44])
EXACT, BY_DEFAULT = 1e-5, 5e-2


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny Llama of 4 bits as gyroquant saves it."""
    model = tiny.build("llama", hidden_size=128, intermediate_size=256)
    return saving.rounded(model, tmp_path_factory.mktemp("contract") / "ours", save_dtype="float32")


@pytest.fixture(scope="module")
def wanted(saved: Any) -> list[torch.Tensor]:
    """Our own logits of both texts."""
    return [saving.our_logits(saved.folder, ids.tolist()) for ids in (PROMPT, SHORTER)]


@pytest.fixture(scope="module", params=sorted(Format.kinds))
def exported(request: pytest.FixtureRequest, saved: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a format and a folder of it; skipped where nothing runs it here."""
    try:
        format_named(request.param).check_packages()
        folder = tmp_path_factory.mktemp("exports") / request.param
        saving.written(request.param, saved, folder)
        open_runtime(request.param, folder, exact=True)
    except InputError as error:
        pytest.skip(str(error))
    return request.param, folder


@pytest.fixture(params=[True, False], ids=["exact", "default"])
def runtime(request: pytest.FixtureRequest, exported: tuple[str, Path]) -> Runtime:
    """A runtime of each kind, in fp32 and as it runs by default."""
    return open_runtime(*exported, exact=request.param)


def close(runtime: Runtime, found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether logits are the same up to what the runtime may do to them."""
    return relative_error(found, wanted) < (EXACT if runtime.exact else BY_DEFAULT)


def test_a_text_is_read_whole_in_pieces_and_token_by_token(runtime: Runtime, wanted: list[torch.Tensor]) -> None:
    whole = runtime.logits(PROMPT)
    assert whole.shape[0] == len(PROMPT)
    assert whole.dtype == torch.float32
    assert close(runtime, whole, wanted[0])
    assert close(runtime, read_in_pieces(runtime, PROMPT), wanted[0])
    runtime.start()
    assert close(
        runtime, torch.cat([runtime.feed(one[None]) for one in (PROMPT[:20], *PROMPT[20:].split(1))]), wanted[0]
    )
    assert torch.equal(runtime.logits(PROMPT), whole)  # what was read before is forgotten


def test_greedy_tokens_are_the_likeliest_of_the_text_so_far(runtime: Runtime) -> None:
    found = runtime.greedy(PROMPT, 4)
    rows = runtime.logits(torch.cat((PROMPT, torch.tensor(found[:-1]))))[len(PROMPT) - 1 :]
    best = rows.max(-1).values
    chosen = rows.gather(1, torch.tensor(found)[:, None])[:, 0]
    assert ((best - chosen) <= 2 * BY_DEFAULT * rows.abs().max()).all()
    assert not runtime.exact or rows.argmax(-1).tolist() == found


def test_texts_of_different_length_are_read_as_one_padded_batch_or_it_is_said_why_not(
    runtime: Runtime, wanted: list[torch.Tensor]
) -> None:
    whole = runtime.logits(PROMPT)
    if runtime.unpadded:
        with pytest.raises(InputError, match=f"takes no padded batch: {runtime.unpadded}"):
            runtime.padded([PROMPT, SHORTER])
        return
    for found, ours in zip(runtime.padded([PROMPT, SHORTER]), wanted, strict=True):
        assert close(runtime, found, ours)
    assert torch.equal(runtime.feed(PROMPT[None]), whole)  # the batch is forgotten
