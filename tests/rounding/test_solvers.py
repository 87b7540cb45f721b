"""What every rounding solver must satisfy, and what is special about each. A new solver adds one line to SOLVERS."""

import pytest
import torch

from gyroquant.errors import InputError, RecipeError
from gyroquant.grids import Fp4Grid, Fp8Grid, Grid, IntegerGrid, Mxfp4Grid, Nvfp4Grid, QuantizedWeight
from gyroquant.recipe import load_recipe
from gyroquant.rounding import InputStatistics, Solver, output_error, weight_error
from gyroquant.rounding.factor import inverse_factor
from gyroquant.rounding.gptaq import Gptaq
from gyroquant.rounding.gptq import Gptq
from gyroquant.rounding.qronos import Qronos
from gyroquant.rounding.rtn import RoundToNearest

SOLVERS: dict[str, Solver] = {
    "rtn": RoundToNearest(),
    "gptq": Gptq(),
    "gptq act_order": Gptq(act_order=True),
    "gptq static": Gptq(static_groups=True),
    "gptaq": Gptaq(),
    "gptaq act_order": Gptaq(act_order=True),
    "qronos": Qronos(alpha=1e-3),  # nothing drifts here, and these inputs are nearly dependent: 1e-6 hardly damps them
    "qronos act_order": Qronos(alpha=1e-3, act_order=True),
}
GRIDS: list[Grid] = [
    IntegerGrid(bits=2, group_size=64),
    IntegerGrid(bits=3, group_size=-1),
    IntegerGrid(bits=4, group_size=32, symmetric=True),
    Mxfp4Grid(),
    Nvfp4Grid(),
    Fp4Grid(),
    Fp8Grid(),
]


def test_every_grid_is_rounded_to() -> None:
    assert {grid.grid for grid in GRIDS} == set(Grid.kinds)


def problem(rows: int = 48, columns: int = 192, tokens: int = 2000) -> tuple[torch.Tensor, InputStatistics]:
    """A weight matrix and the statistics of strongly correlated inputs."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 * torch.logspace(0.5, -0.5, columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix
    weight = 0.1 * torch.randn(rows, columns, generator=generator)
    return weight, InputStatistics(x.T @ x, tokens)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
class TestContract:
    def test_the_result_is_a_whole_matrix_on_the_grid(self, solver: Solver, grid: Grid) -> None:
        weight, statistics = problem()
        before, grid = weight.clone(), grid.bind(weight)
        rounded = solver.solve(weight, grid, statistics)
        assert rounded.codes.shape == weight.shape
        assert rounded.params.scale.shape == (48, 192 // grid.group_of(192), 1)
        assert int(rounded.codes.max()) < 2**grid.bits
        assert torch.equal(weight, before)
        codes, params = grid.unpack(rounded.pack(), (48, 192))
        assert torch.equal(QuantizedWeight(grid, codes, params).dequantize(), rounded.dequantize())

    def test_it_is_deterministic(self, solver: Solver, grid: Grid) -> None:
        weight, statistics = problem()
        grid = grid.bind(weight)
        assert torch.equal(solver.solve(weight, grid, statistics).codes, solver.solve(weight, grid, statistics).codes)

    def test_rows_are_independent(self, solver: Solver, grid: Grid) -> None:
        """Layers that read the same input may be solved together."""
        weight, statistics = problem()
        grid = grid.bind(weight)
        whole, part = solver.solve(weight, grid, statistics), solver.solve(weight[:20], grid, statistics)
        assert (whole.codes[:20] == part.codes).float().mean() > 0.999  # products of other sizes round differently

    def test_weights_on_the_grid_stay(self, solver: Solver, grid: Grid) -> None:
        weight, statistics = problem()
        if "scale" in type(grid).model_fields:  # a search has no reason to come back to the range of the group
            grid = grid.model_copy(update={"scale": "minmax"})
        on_grid = RoundToNearest().solve(weight, grid.bind(weight)).dequantize()
        again = solver.solve(on_grid, grid.bind(on_grid), statistics)
        assert weight_error(on_grid, again.dequantize()) < 1e-6

    def test_inputs_never_seen_do_no_harm(self, solver: Solver, grid: Grid) -> None:
        weight, statistics = problem()
        grid = grid.bind(weight)
        dead = statistics.gram.clone()
        dead[:, 5] = dead[5, :] = 0
        rounded = solver.solve(weight, grid, InputStatistics(dead, statistics.count)).dequantize()
        assert rounded.isfinite().all()
        nearest = RoundToNearest().solve(weight, grid).dequantize()
        assert (rounded[:, 5] - weight[:, 5]).norm() < 3 * (nearest[:, 5] - weight[:, 5]).norm() + 1e-3

    def test_no_input_at_all_rounds_to_nearest(self, solver: Solver, grid: Grid) -> None:
        weight, _ = problem()
        grid = grid.bind(weight)
        rounded = solver.solve(weight, grid, InputStatistics(torch.zeros(192, 192), 0))
        assert torch.equal(rounded.codes, RoundToNearest().solve(weight, grid).codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "rtn"])
def test_calibrated_solvers_beat_round_to_nearest(name: str, grid: Grid) -> None:
    weight, statistics = problem()
    grid = grid.bind(weight)
    calibrated = output_error(weight, SOLVERS[name].solve(weight, grid, statistics).dequantize(), statistics)
    nearest = output_error(weight, RoundToNearest().solve(weight, grid).dequantize(), statistics)
    assert calibrated < 0.75 * nearest


def test_gptq_equals_the_definition() -> None:
    """One column after another with the explicit inverse, as in the paper's equations 2 and 3."""
    weight, statistics = problem(rows=6, columns=32)
    grid = IntegerGrid(bits=3, group_size=16, scale="minmax")
    h = statistics.gram.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(32, dtype=h.dtype)
    free, codes = weight.double().clone(), torch.empty(6, 32, dtype=torch.uint8)
    for i in range(32):
        if i % 16 == 0:
            params = grid.fit(free[:, None, i : i + 16].float())
        codes[:, i] = grid.encode(free[:, i, None].float(), params[:, 0])[:, 0]
        error = free[:, i] - grid.decode(codes[:, i, None], params[:, 0])[:, 0]
        inverse = torch.linalg.inv(h[i:, i:])
        free[:, i:] -= error[:, None] * inverse[0] / inverse[0, 0]
    assert torch.equal(Gptq().solve(weight, grid, statistics).codes, codes)


def test_gptq_is_ldlq() -> None:
    """QuIP (arXiv 2307.13304), section 3.1: the errors of all earlier columns, times a column of the factor of
    ``H = (A + I) D (A + I)^T``, with A strictly upper triangular. Theirs is GPTQ with scales that are fixed before.
    """
    weight, statistics = problem(rows=6, columns=32)
    grid = IntegerGrid(bits=2, group_size=16)
    h = statistics.gram.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(32, dtype=h.dtype)
    upper = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)  # h = upper @ upper.T
    feedback = upper / upper.diagonal() - torch.eye(32)
    w, q = weight.double(), torch.zeros(6, 32, dtype=torch.float64)
    params = grid.fit(weight.view(6, 2, 16))
    for k in range(32):
        wanted = w[:, k] + (w - q)[:, :k] @ feedback[:k, k]
        group = params[:, k // 16]
        q[:, k] = grid.decode(grid.encode(wanted[:, None].float(), group), group)[:, 0].double()
    solved = Gptq(static_groups=True).solve(weight, grid, statistics)
    assert torch.equal(solved.dequantize(), q.float())


@pytest.mark.parametrize("size", [16, 32, 48, 64, 96, 192])
def test_groups_of_any_size_are_fitted_on_updated_weights(size: int) -> None:
    """The block of lazy updates must not show: one block and many give the same codes."""
    from gyroquant.rounding import gptq

    weight, statistics = problem()
    grid = IntegerGrid(bits=2, group_size=size)
    wanted = Gptq().solve(weight, grid, statistics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gptq, "_BLOCK", 10**6)
        single = Gptq().solve(weight, grid, statistics)
    assert (wanted.codes == single.codes).float().mean() > 0.995


def test_indefinite_moments_raise_the_damping_with_a_warning() -> None:
    weight, statistics = problem()
    broken = statistics.gram.clone()
    broken -= 0.05 * broken.diagonal().mean() * torch.eye(192)
    warnings: list[str] = []
    rounded = Gptq().solve(weight, GRIDS[0], InputStatistics(broken, 2000), warnings.append)
    assert rounded.dequantize().isfinite().all()
    assert warnings
    assert "damping raised to 0.1" in warnings[0]


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_moments_that_are_not_finite_are_an_error(broken: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        inverse_factor(torch.full((4, 4), broken), 0.01)
    with pytest.raises(InputError, match="not finite"):
        Qronos().solve(torch.ones(2, 64), GRIDS[0], InputStatistics(torch.full((64, 64), broken), 1))


@pytest.mark.parametrize("solver", [Gptq(), Gptaq(), Qronos()], ids=["gptq", "gptaq", "qronos"])
def test_calibrated_solvers_without_text_are_an_error(solver: Solver) -> None:
    with pytest.raises(InputError, match="needs calibration text"):
        solver.solve(problem()[0], GRIDS[0], None)


@pytest.mark.parametrize("name", ["gptq", "qronos", "gptaq"])
def test_act_order_needs_static_groups(name: str) -> None:
    with pytest.raises(RecipeError, match="static_groups"):
        load_recipe(name, ["weights.solver.act_order=true", "weights.solver.static_groups=false"])
