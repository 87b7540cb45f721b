"""The documentation is true: its table is made again, its examples run, its links lead somewhere."""

import re
from pathlib import Path
from typing import Any

import architecture_table
import pytest
import tiny
import torch
import yaml

import gyroquant as gq
from gyroquant.grids import Grid, stored_bits
from gyroquant.methods import Context, Method
from gyroquant.models.sites import find_sites
from gyroquant.models.source import open_model
from gyroquant.presets import preset_names
from gyroquant.rounding import weight_error
from gyroquant.rounding.rtn import RoundToNearest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NUMBER = re.compile(r"\d+e-\d+")


def blocks(page: Path) -> list[str]:
    """The indented code blocks of a page, without their indentation."""
    found = re.findall(r"(?:^    .*\n|^\n(?=\n*    ))+", page.read_text(), re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).strip("\n") for block in found]


def test_the_table_of_architectures_is_made_again() -> None:
    """Reasons must be the same to the letter, errors of the same size: their last digit is noise of the machine."""
    page = (ROOT / "docs" / "architectures.md").read_text()
    shown = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")
    ]
    made = architecture_table.rows()
    assert shown[0] == ["family", *architecture_table.COLUMNS]
    assert [row[0] for row in shown[1:]] == [row[0] for row in made]
    for old, new in zip(shown[1:], made, strict=True):
        for before, after in zip(old[1:], new[1:], strict=True):
            if NUMBER.fullmatch(after):
                assert float(after) < 5e-6, new[0]
                assert 0.2 < float(before) / float(after) < 5, (new[0], before, after)
            else:
                assert before == after, new[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_example_of_a_method_works() -> None:
    code = next(block for block in blocks(ROOT / "docs" / "add-a-method.md") if "class Reverse" in block)
    try:
        exec(compile(code, "example", "exec"), {"__name__": "example"})
        model = tiny.build("llama")
        ids = tiny.tokens(model)
        with torch.no_grad():
            before = model(ids).logits
            recipe = {"transform": {"R1": "reverse", "R4": "reverse"}, "weights": {"bits": 4}}
            gq.transform(model, recipe | {"proof": {"seqlen": 24}})
            assert torch.allclose(model(ids).logits, before, atol=1e-4)
        site = find_sites(open_model(model).graph, "R1")[0]
        chosen = Method.kinds["reverse"]().choose(site, Context(seed=0, group_size=16))
        assert chosen.apply(torch.arange(64.0))[0] == 63
    finally:
        Method.kinds.pop("reverse", None)


def test_the_example_of_an_architecture_is_the_real_one() -> None:
    code = next(block for block in blocks(ROOT / "docs" / "add-an-architecture.md") if "register(" in block)
    shown: list[Any] = []
    code = re.sub(r", register$", "", code, flags=re.MULTILINE).replace("register(", "keep(")
    exec(compile(code, "example", "exec"), {"keep": shown.append})
    from gyroquant.models.spec import architecture_of

    real = architecture_of(tiny.CONFIGS["phi3"]())
    assert shown[0].block == real.block
    assert shown[0].outer == real.outer


def test_the_example_of_a_recipe_is_valid() -> None:
    code = next(block for block in blocks(ROOT / "docs" / "recipes.md") if block.startswith("name: mine"))
    recipe = gq.load_recipe(yaml.safe_load(code))
    assert recipe.transform["R1"][0].method.method == "walsh"
    for setting in re.findall(r"`--set ([^`]+)`", (ROOT / "docs" / "recipes.md").read_text()):
        if setting != "KEY=VALUE":
            gq.load_recipe("gsr", [setting])


def test_the_errors_of_grids_are_measured_again() -> None:
    rows = re.findall(
        r"^\| `(.+)` \| ([\d.]+) \| ([\d.]+) % \|$", (ROOT / "docs" / "grids.md").read_text(), re.MULTILINE
    )
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    shown = {"integer"}
    for setting, bits, error in rows:
        grid = gq.load_recipe({"weights": yaml.safe_load(f"{{{setting}}}")}).weights.grid.bind(weight)
        rounded = RoundToNearest().solve(weight, grid)
        assert stored_bits(rounded.pack()) / weight.numel() == pytest.approx(float(bits), abs=6e-4), setting
        assert 100 * weight_error(weight, rounded.dequantize()) == pytest.approx(float(error), rel=5e-3), setting
        shown.add(grid.grid)
    assert shown == set(Grid.kinds)


def test_every_recipe_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert all(f"`{name}`" in text for name in preset_names())


def test_commands_in_the_readme_exist() -> None:
    from typer.main import get_command

    from gyroquant.cli import app

    commands = get_command(app).commands  # type: ignore[attr-defined]
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"^    gyroquant (\S+)(.*)$", text, re.MULTILINE)
    assert lines
    for name, rest in lines:
        known = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"(?<=\s)--[a-z-]+", rest)) <= known, name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
