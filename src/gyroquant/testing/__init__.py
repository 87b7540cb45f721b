"""Public checks of the contract of every kind, for classes of any package, and the tiny models they run on.

`check_grid(MyGrid)` and the other functions raise AssertionError, which states what is wrong and what to do.
`parametrize_with_checks` makes every check a test of its own:

    @parametrize_with_checks(MyGrid, MyMethod)
    def test_contract(instance, check):
        check(instance)
"""

from gyroquant.testing.architectures import check_architecture
from gyroquant.testing.formats import check_format
from gyroquant.testing.grids import check_grid
from gyroquant.testing.maps import check_map
from gyroquant.testing.methods import CONTEXT, check_method, choose_on_random
from gyroquant.testing.observers import check_observer
from gyroquant.testing.parametrize import parametrize_with_checks
from gyroquant.testing.solvers import check_solver
from gyroquant.testing.steps import check_step

__all__ = [
    "CONTEXT",
    "check_architecture",
    "check_format",
    "check_grid",
    "check_map",
    "check_method",
    "check_observer",
    "check_solver",
    "check_step",
    "choose_on_random",
    "parametrize_with_checks",
]
