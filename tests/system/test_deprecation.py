"""Names of the last release still work, with a warning that points at the caller."""

from __future__ import annotations

import warnings

import pytest

from gyroquant.system.deprecation import renamed, warn_renamed


@renamed(calibration="text", max_windows="windows")
def function(text: str = "", *, windows: int = 0) -> tuple[str, int]:
    """What it was called with."""
    return text, windows


def test_new_names_give_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert function("a", windows=3) == function(text="a", windows=3) == ("a", 3)


def test_old_names_mean_the_new_ones_and_warn_where_they_are_used() -> None:
    with pytest.warns(FutureWarning) as caught:
        assert function(calibration="a", max_windows=3) == ("a", 3)  # type: ignore[call-arg]
    assert [str(one.message) for one in caught] == [
        "calibration= of function() is now text=; the next release drops the old name",
        "max_windows= of function() is now windows=; the next release drops the old name",
    ]
    assert {one.filename for one in caught} == {__file__}


def test_both_names_are_refused() -> None:
    with pytest.raises(TypeError, match=r"function\(\) got text and also calibration, its old name"):
        function(text="a", calibration="b")  # type: ignore[call-arg]


def test_a_warning_points_at_the_caller() -> None:
    with pytest.warns(FutureWarning, match="a is now b") as caught:
        warn_renamed("a", "b", stacklevel=1)
    assert caught[0].filename == __file__
