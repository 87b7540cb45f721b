"""Verdicts follow from the windows: paired tests, Pareto front, and words that may say not to rotate."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest

from gyroquant.benchmark.sizes import ALIKE, ROOM
from gyroquant.benchmark.verdict import verdict

BASE = [2.0, 2.4, 1.8, 2.2, 2.1, 2.3, 1.9, 2.5]


def run(name: str, gaps: float | Sequence[float], bits: float = 2.25, **changes: Any) -> dict[str, Any]:
    """A run that is so many nats above the original: in every window, give or take a little, or in each."""
    each = [gaps + 0.001 * (i % 3) for i in range(len(BASE))] if isinstance(gaps, (int, float)) else gaps
    losses = [loss + gap for loss, gap in zip(BASE, each, strict=False)]
    mean = sum(losses) / len(losses)
    score = {"loss": mean, "perplexity": math.exp(mean), "perplexity_interval": [1.0, 2.0], "window_losses": losses}
    plain = {"kind": "recipe", "bits": 2, "group_size": 64, "symmetric": False, "seed": 0, "status": "done"}
    size = {"true_bits": bits, "weight_bytes": {"total": round(bits * 1e6)}}
    rest = {"key": name, "name": name, "command": f"run {name}", "tests": {"text": score}} | size
    return plain | rest | {"rotated": name not in ("rtn", "gptq")} | changes


def program(name: str, gaps: float | Sequence[float], bits: float = 2.25, **changes: Any) -> dict[str, Any]:
    """A run of another program, which does not rotate unless it is said to."""
    return run(name, gaps, bits, **{"kind": "opponent", "rotated": False} | changes)


ORIGINAL = {"text": {"loss": sum(BASE) / len(BASE), "window_losses": BASE}}
NOISY = [-0.6, 0.9, -0.5, 0.8, -0.7, -0.4, 0.6, -0.3]


def judge(*runs: dict[str, Any], windows: int = len(BASE)) -> dict[str, Any]:
    (judged,) = verdict(runs, {"text": {"loss": 2.2, "window_losses": BASE[:windows]}})
    return judged


def test_rotating_is_recommended_only_where_it_is_significantly_better() -> None:
    judged = judge(run("gptq", 0.5), run("gsr", 0.2))
    assert judged["best"] == judged["recommended"] == "gsr"
    assert judged["command"] == "run gsr"
    assert "times lower" in judged["text"]
    assert judged["rotation"] == {
        "rotated": "gsr",
        "plain": "gptq",
        "factor": pytest.approx(math.exp(0.3)),
        "p": 2 / 2**8,
        "significant": True,
        "pays": True,
        "equal_bytes": True,
    }
    assert "\nRotating pays: gsr" in judged["text"]
    judged = judge(run("gptq", 0.5), run("gsr", 0.6))
    assert judged["recommended"] == judged["best"] == "gptq"
    assert not judged["rotation"]["pays"]
    assert judged["rotation"]["factor"] == pytest.approx(math.exp(-0.1))
    assert "1.11 times higher" in judged["text"]
    judged = judge(run("gptq", 0.5), run("gsr", [0.49 + gap for gap in NOISY]))
    assert judged["best"] == "gsr"
    assert judged["recommended"] == "gptq"
    assert "Do not rotate, or measure on more text: gsr" in judged["text"]


def test_a_noisy_lowest_mean_hides_nobody_who_is_significantly_better() -> None:
    judged = judge(run("gptq", 0.5), run("gsr", 0.3), run("wild", [0.25 + gap for gap in NOISY]))
    assert judged["best"] == "wild"
    assert judged["recommended"] == "gsr"
    assert "The lowest perplexity is that of wild" in judged["text"]
    assert "not significantly lower than that of gptq" in judged["text"]


def test_a_program_that_does_not_rotate_may_win_and_then_rotating_does_not_pay() -> None:
    judged = judge(run("gptq", 0.5), run("gsr", 0.4), program("auto-round", 0.1, home="some/where"))
    assert judged["recommended"] == "auto-round"
    assert judged["home"] == "some/where"
    assert "Best of our recipes: gsr" in judged["text"]
    assert "significantly worse" in judged["text"]
    assert judged["baseline"] == "gptq"  # never another program's
    assert (judged["rotation"]["rotated"], judged["rotation"]["plain"]) == ("gsr", "auto-round")
    assert not judged["rotation"]["pays"]
    assert judged["rotation"]["significant"]
    assert "\nDo not rotate: gsr" in judged["text"]


def test_a_program_may_be_what_rotates() -> None:
    older = program("old", 0.6)
    del older["rotated"]
    judged = judge(run("gptq", 0.5), program("spin", 0.1, rotated=True), older)
    assert judged["rotation"]["rotated"] == "spin"
    assert judged["rotation"]["pays"]


def test_what_pays_among_those_that_rotate_alone_is_said_to_pay_narrowly() -> None:
    chance = random.Random(4)
    others = [program(f"p{i}", [0.5 + chance.gauss(0.2, 0.3) for _ in BASE]) for i in range(12)]
    ours = run("gsr", [0.46, 0.45, 0.47, 0.44, 0.46, 0.49, 0.51, 0.47])
    judged = judge(run("gptq", [0.5] * len(BASE)), ours, *others)
    assert judged["rotation"]["pays"]
    assert judged["recommended"] == "gptq"
    assert "Rotating pays, narrowly: gsr" in judged["text"]


def test_what_rotates_and_beats_ours_is_not_said_to_pay_where_a_program_does_as_well_without() -> None:
    judged = judge(run("gptq", 0.9), run("gsr", 0.1), program("auto-round", [0.12 + 0.1 * gap for gap in NOISY]))
    assert judged["recommended"] == "gsr"
    assert not judged["rotation"]["pays"]
    assert "Do not rotate if you can use auto-round, or measure on more text" in judged["text"]


def test_without_either_side_nothing_is_said_of_rotating() -> None:
    judged = judge(run("gptq", 0.5), program("auto-round", 0.1))
    assert judged["rotation"] is None
    assert judged["text"].endswith("there is no result that rotates.")
    judged = judge(run("gsr", 0.5))
    assert judged["recommended"] == "gsr"
    assert judged["baseline"] is judged["limit"] is judged["rows"][0]["against_baseline"] is None
    assert judged["text"].endswith("there is no result that does not rotate.")


def test_what_is_larger_than_the_budget_is_shown_and_neither_best_nor_recommended() -> None:
    near, beyond = 2.25 * (1 + 0.9 * ROOM), 2.25 * (1 + 1.1 * ROOM)
    runs = [run("gptq", 0.5), run("gsr", 0.2, near), program("Q4_1", 0.05, beyond)]
    judged = judge(*runs)
    assert judged["limit"] == pytest.approx(2.25e6 * (1 + ROOM))
    assert judged["unit"] == "weight_bytes"
    assert judged["best"] == judged["recommended"] == "gsr"
    assert judged["over"] == ["Q4_1"]
    assert judged["front"] == ["gptq", "gsr", "Q4_1"]
    assert [row["key"] for row in judged["rows"]] == ["Q4_1", "gsr", "gptq"]
    assert "over the budget of 2.3 MB: Q4_1" in judged["text"]
    wider = judge(*runs, run("gptq", 0.6, 2.5, key="gptq32", group_size=32))
    assert wider["recommended"] == "Q4_1"  # the budget is that of the finest scales
    assert wider["over"] == []


def test_bytes_decide_and_not_bits() -> None:
    """A head that R1 unties has the bits of the layers, and more bytes."""
    untied = run("gsr", 0.1, weight_bytes={"total": 3_900_000})
    judged = judge(run("gptq", 0.5), untied)
    assert judged["over"] == ["gsr"]
    assert judged["recommended"] == "gptq"
    assert "every result that rotates is over the budget" in judged["text"]
    assert "keep_ties=true" in judged["text"]


def test_results_without_bytes_of_weights_are_compared_by_their_files() -> None:
    old = [
        {**one, "weight_bytes": None, "bytes": size} for one, size in ((run("gptq", 0.5), 90), (run("gsr", 0.1), 99))
    ]
    judged = judge(*old)
    assert judged["unit"] == "bytes"
    assert judged["over"] == ["gsr"]
    assert judge(old[0], {**run("gsr", 0.1), "bytes": 90})["unit"] == "bytes"  # one of them is enough


def test_rotating_is_judged_at_equal_bytes() -> None:
    """The best result without rotation is larger: it is not what a smaller rotated one is measured by."""
    ours, large = run("gsr", 0.3, 2.0), program("Q4_1", 0.1, 2.25)
    judged = judge(run("gptq", 0.5), ours, large)
    assert judged["recommended"] == "Q4_1"
    assert "significantly worse at 11 % fewer bytes" in judged["text"]
    assert judged["rotation"]["equal_bytes"] is judged["rotation"]["pays"] is False
    assert "Whether rotating pays at equal bytes is not known: Q4_1 has 1.22 times lower" in judged["text"]
    small = {**program("Q3", 0.6, 1.9), "bits": 3}
    for one in verdict([run("gptq", 0.5), ours, large, small], ORIGINAL)[:1]:
        assert (one["rotation"]["rotated"], one["rotation"]["plain"]) == ("gsr", "Q3")
        assert one["rotation"]["pays"]
        assert one["rotation"]["equal_bytes"]
        assert "Rotating pays at equal bytes: gsr" in one["text"]
        assert "of all with at most 2.0 MB" in one["text"]


def dominated(*runs: dict[str, Any], windows: int = len(BASE)) -> dict[str, str | None]:
    verdicts = verdict(runs, {"text": {"loss": 2.2, "window_losses": BASE[:windows]}})
    return {row["key"]: row["dominated_by"] for judged in verdicts for row in judged["rows"]}


def test_a_result_is_dominated_by_a_smaller_one_that_is_no_worse() -> None:
    assert dominated(run("gptq", 0.5, 2.0), run("gsr", 0.5, 2.5)) == {"gptq": None, "gsr": "gptq"}
    noisy = run("gsr", [0.45 + gap for gap in NOISY], 2.5)  # lower by chance
    assert dominated(run("gptq", 0.5, 2.0), noisy)["gsr"] == "gptq"
    assert dominated(run("gptq", 0.5, 2.0), run("gsr", 0.4, 2.5)) == {"gptq": None, "gsr": None}


def test_at_equal_bytes_a_result_is_dominated_by_one_that_is_significantly_better() -> None:
    close = 2.25 * (1 + 0.5 * ALIKE)
    assert dominated(run("gptq", 0.5), run("gsr", 0.4, close)) == {"gptq": "gsr", "gsr": None}
    chance = [0.45 + gap for gap in NOISY]
    assert dominated(run("gptq", 0.5), run("gsr", chance, close)) == {"gptq": None, "gsr": None}


def test_bits_do_not_protect_from_being_dominated() -> None:
    four = {**run("rtn", 0.6, 4.25), "bits": 4}
    assert dominated(run("gptq", 0.5, 3.0), four) == {"gptq": None, "rtn": "gptq"}
    judged = verdict([run("gptq", 0.5, 3.0), four], ORIGINAL)[1]
    assert "But gptq (" in judged["text"]
    assert "of W2, is smaller and has a lower perplexity" in judged["text"]


def test_nothing_is_dominated_where_nothing_can_be_significant() -> None:
    runs = run("gptq", [0.5] * 5, 2.0), run("gsr", [0.5] * 5, 2.5)
    assert set(dominated(*runs, windows=5).values()) == {None}


def test_p_is_adjusted_for_having_chosen() -> None:
    chance = random.Random(10)
    many = [run(f"r{i}", [0.5 + chance.gauss(0, 0.1) for _ in BASE]) for i in range(25)]
    judged = judge(run("gptq", 0.5), *many)
    rows = {row["key"]: row for row in judged["rows"]}
    best = rows[judged["best"]]
    assert best["against_baseline"]["p"] < 0.05 < best["adjusted_p"]
    assert judged["recommended"] == "gptq"
    assert rows["gptq"]["adjusted_p"] is None
    assert not judged["rotation"]["pays"]
    judged = judge(run("gptq", 0.5), *many, run("gsr", 0.1))
    assert judged["recommended"] == "gsr"
    assert "adjusted for 26 candidates" in judged["text"]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_lost_model_is_never_best(loss: float) -> None:
    lost = run("x", [loss, *[-1.0] * 7])
    judged = judge(run("gptq", 0.5), run("gsr", 0.2), lost)
    assert judged["recommended"] == "gsr"
    assert [row["key"] for row in judged["rows"]] == ["gsr", "gptq"]
    assert "Left out, because their losses are not finite: x." in judged["text"]
    assert verdict([lost], ORIGINAL) == []
    original = {"text": {"loss": loss, "window_losses": [loss] * 8}}
    assert verdict([run("gptq", 0.5)], original)[0]["rows"][0]["gap"] is None


def test_too_few_windows_are_said_to_be() -> None:
    judged = judge(run("gptq", [0.5] * 5), run("gsr", [0.1] * 5), windows=5)
    assert judged["recommended"] == "gptq"
    assert "so few windows (5)" in judged["text"]
    judged = judge(run("gptq", [0.5] * 6), run("gsr", [0.1] * 6), windows=6)
    assert "so few windows" not in judged["text"]


def test_seeds_are_one_row_with_their_spread_and_what_is_not_done_is_none() -> None:
    other = run("gsr", 0.3, key="gsr1", seed=1)
    judged = judge(run("gptq", 0.5), other, run("gsr", 0.2), {**run("x", 0.0), "status": "failed"})
    assert [row["key"] for row in judged["rows"]] == ["gsr", "gptq"]
    low, high = judged["rows"][0]["spread"]
    assert high / low == pytest.approx(math.exp(0.1))
    assert judged["rows"][1]["spread"] is None


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (0.3, 0.5, "gsr is lower at each seed"),
        (
            0.55,
            0.6,
            "gsr is lower at each seed",
        ),  # though it has been higher on other windows: they are compared in pairs
        (0.6, 0.5, "gsr is lower at 1 only, so chance decides the order"),
    ],
)
def test_the_words_tell_what_seeds_do_to_the_answer(ours: float, theirs: float, said: str) -> None:
    seeds = run("gsr", ours, key="gsr1", seed=1), run("gptq", theirs, key="gptq1", seed=1)
    text = judge(run("gptq", 0.5), run("gsr", 0.2), *seeds)["text"]
    spans = re.findall(r"Over 2 seeds: gsr [\d.]+ to [\d.]+, gptq [\d.]+(?: to [\d.]+)?; ([^.]*)\.", text)
    assert spans == [said]  # what to use and whether to rotate are the same contest here


def test_what_has_one_seed_is_held_against_every_seed_of_the_other() -> None:
    fixed, rotated, again = program("Q4_0", 0.4), run("gsr", 0.2), run("gsr", 0.6, key="gsr1", seed=1)
    text = judge(run("gptq", 0.5), fixed, rotated, again)["text"]
    assert len(re.findall(r"gsr [\d.]+ to [\d.]+, Q4_0 [\d.]+; gsr is lower at 1 only, so chance", text)) == 1
    assert "Over" not in judge(run("gptq", 0.5), fixed, rotated)["text"]


def test_the_best_of_the_other_programs_is_compared_over_the_seeds_as_well() -> None:
    runs = run("gptq", 0.5), run("gsr", 0.2), program("spin", 0.3, rotated=True), program("nncf", 0.6)
    twice = [{**one, "key": f"{one['key']}1", "seed": 1} for one in runs]
    text = judge(*runs, *twice)["text"]
    assert [line.split()[0] for line in text.split(", ") if "gsr is lower" in line] == ["gptq", "spin"]


def test_budgets_and_texts_are_judged_apart() -> None:
    four = run("gsr4", 0.1, bits=4.25) | {"bits": 4}
    assert [(one["bits"], one["best"]) for one in verdict([run("gsr", 0.2), four], ORIGINAL)] == [
        (2, "gsr"),
        (4, "gsr4"),
    ]
    elsewhere = ORIGINAL | {"other": ORIGINAL["text"]}
    assert [one["test"] for one in verdict([run("gsr", 0.2)], elsewhere)] == ["text"]


def test_a_budget_of_bytes_is_its_own_limit_and_is_judged_apart_from_bits() -> None:
    cost = {"measured": {"seconds": 120.0}, "max_bytes": 2_300_000}
    speed = {"runtime": "a runtime", "decode_tokens_per_second": 8.0, "original_decode_tokens_per_second": 10.0}
    runs = [
        run("gptq", 0.5, 2.1, **cost, speed=speed | {"online_maps": 0}),
        run("gsr", 0.2, 2.2, **cost, speed=speed | {"online_maps": 1}),
        run("rtn", 0.1, 2.31, **cost),
        program("auto-round", 0.05, 2.4, **cost),
        run("quarot", 0.3),
    ]
    of_bits, judged = verdict(runs, ORIGINAL)
    assert (of_bits["bits"], of_bits.get("max_bytes")) == (2, None)
    assert [row["key"] for row in of_bits["rows"]] == ["quarot"]
    assert (judged["bits"], judged["max_bytes"], judged["limit"]) == (None, 2_300_000, 2_300_000)
    assert judged["over"] == ["auto-round", "rtn"]
    assert (judged["recommended"], judged["baseline"]) == ("gsr", "gptq")
    assert "Time to quantize: gsr 2.0 minutes, gptq 2.0 minutes." in judged["text"]
    assert "in a runtime: gsr 8.0 with 1 online map (0.80 times the original's), gptq 8.0 with no onl" in judged["text"]
    assert "Time to quantize" not in of_bits["text"]


def test_without_a_baseline_within_a_budget_of_bytes_there_is_the_lowest() -> None:
    judged = judge(run("gsr", 0.2, 2.2, measured={"seconds": 60.0}, max_bytes=2_300_000))
    assert judged["baseline"] is None
    assert "so there is no baseline." in judged["text"]
