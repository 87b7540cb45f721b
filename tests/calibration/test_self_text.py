"""Text that a model writes: token by token what transformers' own generation draws with the same seed."""

import pytest
import tiny_models
import torch
from transformers import GenerationConfig

from gyroquant.calibration.self_text import first_tokens, special_tokens, written_windows
from gyroquant.errors import InputError

LENGTH, BOS, NEVER = 20, (1,), [0, 1, 2]


def with_transformers(model: object, first: int, seed: int, certain: int) -> torch.Tensor:
    """One window by two calls of generate, as in LLM-QAT's generate_data.py: the first tokens greedily, then drawn."""
    ids = torch.tensor([[*BOS, first]])
    for length, drawn in ((len(BOS) + certain, False), (LENGTH, True)):
        settings = GenerationConfig(
            do_sample=drawn, top_k=50, max_length=length, suppress_tokens=NEVER, eos_token_id=None, pad_token_id=0
        )
        model.generation_config = settings  # type: ignore[attr-defined]
        torch.manual_seed(seed)
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)  # type: ignore[attr-defined]
    return ids[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_windows_are_those_of_transformers(name: str) -> None:
    model = tiny_models.build(name).eval()
    first, seeds = first_tokens(model.config.vocab_size, NEVER, 5, 7)
    steps = list[int]()
    ids = written_windows(model, first, seeds, LENGTH, 1, BOS, NEVER, lambda: steps.append(1))
    assert ids.shape == (5, LENGTH)
    assert len(steps) == LENGTH - len(BOS) - 1
    for i, (token, seed) in enumerate(zip(first.tolist(), seeds, strict=True)):
        assert torch.equal(ids[i], with_transformers(model, token, seed, (3, 4, 5)[(1 + i) % 3])), i
    assert not torch.isin(ids[:, len(BOS) :], torch.tensor(NEVER)).any()


def test_a_window_does_not_depend_on_the_others() -> None:
    model = tiny_models.build("llama").eval()
    first, seeds = first_tokens(model.config.vocab_size, NEVER, 4, 0)
    whole = written_windows(model, first, seeds, LENGTH, 0, BOS, NEVER)
    alone = written_windows(model, first[2:], seeds[2:], LENGTH, 2, BOS, NEVER)
    assert torch.equal(alone, whole[2:])
    assert not torch.equal(written_windows(model, first, [seed + 1 for seed in seeds], LENGTH, 0, BOS, NEVER), whole)


def test_first_tokens_go_through_the_vocabulary() -> None:
    first, seeds = first_tokens(40, {0, 1, 2}, 80, 3)
    assert sorted(first[:37].tolist()) == sorted(first[37:74].tolist()) == list(range(3, 40))
    assert torch.equal(first, first_tokens(40, {0, 1, 2}, 80, 3)[0])
    assert seeds == first_tokens(40, {0, 1, 2}, 80, 3)[1]
    assert not torch.equal(first, first_tokens(40, {0, 1, 2}, 80, 4)[0])
    assert len(set(seeds)) == 80
    with pytest.raises(InputError, match=r"all tokens .* special.*calibration.source=text"):
        first_tokens(3, {0, 1, 2}, 1, 0)
    assert special_tokens(object()) == set()
    assert {0, 1, 2} >= special_tokens(tiny_models.tokenizer())


def test_short_windows_are_cut() -> None:
    model = tiny_models.build("llama").eval()
    assert written_windows(model, torch.tensor([5, 6]), [0, 1], 2, 0, BOS, NEVER).tolist() == [[1, 5], [1, 6]]
