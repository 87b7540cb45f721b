"""The rule of the verdict."""

from typing import Any

from gyroquant.evaluation.diagnosis.verdict import verdict

START = {"relative_error": 0.01, "cosine": 1.0}


def rows(*blocks: tuple[float, float, float]) -> list[dict[str, Any]]:
    """Rows of (relative error, cosine, own cosine)."""
    names = ("relative_error", "cosine", "own_cosine")
    return [{"block": index, **dict(zip(names, block, strict=True))} for index, block in enumerate(blocks)]


def test_a_lossless_model_is_level_whatever_its_states() -> None:
    found = verdict(0.99, START, rows((9.0, 0.0, 0.0)))
    assert (found["kind"], found["block"]) == ("level", None)
    assert verdict(0.9899, START, rows((9.0, 0.0, 0.0)))["kind"] == "collapse"


def test_the_first_block_that_stops_working_is_a_collapse_at_any_depth() -> None:
    found = verdict(0.5, START, rows((0.1, 0.9, 0.9), (0.2, 0.9, 0.9), (0.9, 0.6, 0.4), (1.0, 0.1, 0.1)))
    assert (found["kind"], found["block"]) == ("collapse", 2)
    assert "block 2 adds has cosine 0.400" in found["reason"]


def test_a_lost_state_is_a_collapse_in_the_first_quarter_only() -> None:
    fine, lost = (0.3, 0.9, 0.9), (1.0, 0.4, 0.8)
    found = verdict(0.5, START, rows(fine, lost, *[fine] * 6))
    assert (found["kind"], found["block"]) == ("collapse", 1)
    assert verdict(0.5, START, rows(fine, fine, lost, *[fine] * 5))["kind"] == "degradation"


def test_degradation_names_the_block_with_the_largest_growth() -> None:
    found = verdict(0.8, START, rows((0.05, 0.99, 0.9), (0.25, 0.95, 0.8), (0.3, 0.95, 0.85)))
    assert (found["kind"], found["block"]) == ("degradation", 1)
    assert "at least 0.800" in found["reason"]
    assert "from 0.050 to 0.250" in found["reason"]


def test_without_a_basis_nothing_is_said_about_blocks() -> None:
    assert verdict(0.5, START, rows((9.0, 0.0, 0.0)), determined=False)["kind"] == "unknown"
