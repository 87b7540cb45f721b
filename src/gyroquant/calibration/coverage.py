"""Calibration windows that cover the outlier channels of a model (COVERCAL, arXiv 2604.24008).

Some channels of the residual stream have values many times as large as the others, and most of them only on some texts.
A choice of windows by chance may miss them. The windows are chosen so that the channels that they cover have the
largest total weight. That weight is a monotone submodular function of the set of windows, so the greedy choice has at
least 1 - 1/e of the best one's (Nemhauser, Wolsey and Fisher, 1978).

What we know of the paper says neither which channels are outliers nor how they are weighted. Here a channel of a
block's output is an outlier if its largest magnitude in all windows is at least 6 times the median of these over the
channels of that block. Its weight is this ratio. A window covers it if its own largest magnitude is at least half of
that of all windows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gyroquant.calibration.stream import Stream
from gyroquant.models.execution.online import attached
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.stores.base import WeightStore
from gyroquant.system.progress import Advance

_OUTLIER = 6.0  # times the median over channels
_COVERED = 0.5  # of the largest magnitude


def channel_peaks(
    store: WeightStore,
    tokens: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    offload: Path | None = None,
    progress: Advance = lambda: None,
) -> Tensor:
    """The largest magnitude of each channel of each block's output, shape (windows, blocks, channels), fp32.

    `tokens` are windows of shape (windows, length). Progress is reported once a block.
    """
    runner, graph = BlockRunner.of(store), store.graph
    stream = Stream(runner, tokens, store.read(graph.outer_params()), dtype, offload, device)
    stream.free_outer()
    peaks = list[Tensor]()
    for index in range(len(graph.blocks)):
        with attached(runner.model, graph.in_block(index, store.online)):
            stream.run(index, store.read(graph.block_params(index)))
        assert stream.hidden is not None
        peaks.append(torch.stack([state.float().abs().flatten(0, -2).amax(0) for state in stream.hidden]))
        progress()
    return torch.stack(peaks, 1)


def outliers(peaks: Tensor) -> tuple[Tensor, Tensor]:
    """Which outlier channels each window covers, bool of shape (windows, outliers), and their weights, (outliers,).

    `peaks` are those of `channel_peaks`.
    """
    whole = peaks.amax(0)
    ratio = whole / whole.median(-1, keepdim=True).values.clamp_min(torch.finfo(torch.float32).tiny)
    found = ratio >= _OUTLIER
    return (peaks >= _COVERED * whole)[:, found], ratio[found]


def greedy_cover(covers: Tensor, weights: Tensor, count: int) -> list[int]:
    """At most `count` windows that cover channels of large total weight, in the order of the choice.

    Each is the window whose channels that are not covered yet weigh most, the first of equals. Ends early if no window
    covers another channel. `covers` is bool of shape (windows, channels), `weights` are positive, shape (channels,).
    """
    left, chosen = weights.double().clone(), list[int]()
    inside = covers.double()
    while len(chosen) < count:
        gains = inside @ left
        best = int(gains.argmax())
        if gains[best] <= 0:
            break
        chosen.append(best)
        left[covers[best]] = 0
    return chosen


def covering_windows(covers: Tensor, weights: Tensor, count: int) -> list[int]:
    """`count` different windows, by one greedy cover after another, each of the windows that are left.

    What no cover takes, because the model has no outliers, comes in the order of the windows. Arguments as in
    `greedy_cover`; there must be `count` windows.
    """
    chosen, left = list[int](), list(range(len(covers)))
    while len(chosen) < count:
        picks = greedy_cover(covers[left], weights, count - len(chosen))
        if not picks:
            return chosen + left[: count - len(chosen)]
        chosen += [left[pick] for pick in picks]
        taken = set(chosen)
        left = [window for window in left if window not in taken]
    return chosen


def covered_share(covers: Tensor, weights: Tensor, windows: list[int]) -> float:
    """The weight of the channels that some windows cover, over that of all; 1 if there are none."""
    return float(weights[covers[windows].any(0)].sum() / weights.sum()) if len(weights) else 1.0
