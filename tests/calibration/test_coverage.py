"""Windows that cover outlier channels: the greedy choice against the best one, and what counts as covered."""

import itertools
import math

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gyroquant.calibration.coverage import channel_peaks, covered_share, covering_windows, greedy_cover, outliers
from gyroquant.models.stores.base import ModuleStore

PROBLEMS = st.integers(1, 7).flatmap(
    lambda windows: st.integers(1, 6).flatmap(
        lambda channels: st.tuples(
            st.lists(st.lists(st.booleans(), min_size=channels, max_size=channels), min_size=windows, max_size=windows),
            st.lists(st.integers(1, 9), min_size=channels, max_size=channels),
            st.integers(1, windows),
        )
    )
)


def value(covers: torch.Tensor, weights: torch.Tensor, windows: tuple[int, ...]) -> float:
    return float(weights[covers[list(windows)].any(0)].sum())


@given(PROBLEMS)
@settings(max_examples=150, deadline=None)
def test_greedy_covers_nearly_as_much_as_the_best_choice(problem: tuple[list[list[bool]], list[int], int]) -> None:
    covers, weights, count = torch.tensor(problem[0]), torch.tensor(problem[1]).float(), problem[2]
    best = max(value(covers, weights, some) for some in itertools.combinations(range(len(covers)), count))
    chosen = greedy_cover(covers, weights, count)
    assert len(set(chosen)) == len(chosen) <= count
    assert value(covers, weights, tuple(chosen)) >= (1 - 1 / math.e) * best - 1e-6
    gains = [value(covers, weights, tuple(chosen[:n])) for n in range(len(chosen) + 1)]
    for taken in range(len(chosen)):  # each step is the best one, the first of equals
        steps = [value(covers, weights, (*chosen[:taken], window)) for window in range(len(covers))]
        assert gains[taken + 1] == max(steps)
        assert chosen[taken] == steps.index(max(steps))
    whole = covering_windows(covers, weights, count)
    assert len(set(whole)) == len(whole) == count
    assert whole[: len(chosen)] == chosen


def test_greedy_takes_the_heaviest_first_and_stops() -> None:
    covers = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    weights = torch.tensor([1.0, 1.0, 5.0, 2.0])
    assert greedy_cover(covers, weights, 4) == [2]
    assert greedy_cover(covers[:2], weights, 4) == [1, 0]
    assert covering_windows(covers, weights, 4) == [2, 1, 0, 3]  # one cover, another of the rest, and the rest
    assert covered_share(covers, weights, [0, 1]) == pytest.approx(7 / 9)


def test_without_outliers_the_order_stays() -> None:
    peaks = torch.ones(5, 2, 8)
    covers, weights = outliers(peaks)
    assert weights.numel() == 0
    assert covering_windows(covers, weights, 3) == [0, 1, 2]
    assert covered_share(covers, weights, [0]) == 1.0


def test_outliers_stand_out_of_their_block_and_count_by_how_far() -> None:
    peaks = torch.ones(3, 2, 9)
    peaks[:, 1] *= 100  # a block of large numbers has no outliers for that
    peaks[1, 0, 4] = 6  # three windows, this one alone
    peaks[2, 1, 7] = 1200
    peaks[0, 1, 7] = 600  # half as large is covered too
    peaks[1, 0, 5] = 5.9  # too small
    covers, weights = outliers(peaks)
    assert weights.tolist() == [6.0, 12.0]
    assert covers.tolist() == [[False, True], [True, False], [False, True]]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peaks_are_those_of_the_hidden_states_of_transformers(name: str) -> None:
    model = tiny_models.build(name)
    tokens = torch.randint(0, model.config.vocab_size, (5, 16), generator=torch.Generator().manual_seed(0))
    peaks = channel_peaks(ModuleStore(model), tokens, torch.float32, torch.device("cpu"))
    states = model(tokens, output_hidden_states=True).hidden_states[1:-1]  # the last one comes after the final norm
    assert peaks.shape == (5, len(states) + 1, model.config.hidden_size)
    for index, state in enumerate(states):
        assert torch.allclose(peaks[:, index], state.abs().amax(1), rtol=1e-4, atol=1e-6)
