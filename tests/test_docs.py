"""The documentation is true: its table is made again, its examples run, its links lead somewhere."""

import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import architecture_table
import pytest
import test_house
import torch
import yaml
from pydantic import BaseModel

import gyroquant as gq
from gyroquant.grids import Grid, grid_from, stored_bits
from gyroquant.grids.error import weight_error
from gyroquant.methods import Method
from gyroquant.recipes.presets import preset_names
from gyroquant.rounding import Solver
from gyroquant.rounding.solvers.rtn import RoundToNearest

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


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        if "://" in target:
            continue
        other = page.parent / target if target else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_code_that_is_named_exists(page: Path) -> None:
    """Paths of modules and folders, and benchmarks that commands call."""
    if page.name in ("CHANGELOG.md", "glossary.md"):  # these name what was
        return
    text = page.read_text()
    named = re.findall(r"`([a-z_]+(?:/[a-z_0-9]+)*/(?:[a-z_0-9]+\.py)?)`", text)
    places = (ROOT, ROOT / "src", test_house.SOURCE, test_house.SOURCE / "models")
    for name in named + re.findall(r"python ((?:benchmarks|tests)/\S+\.py)", text):
        assert any((place / name).exists() for place in places), name


def imports_of(room: str) -> set[str]:
    """The rooms that a room imports."""
    text = "".join(path.read_text() for path in (test_house.SOURCE / room).rglob("*.py"))
    names = re.findall(r"^\s*from gyroquant import \(?([\w, \n]+)", text, re.MULTILINE)
    return set(re.findall(r"^\s*(?:from|import) gyroquant\.(\w+)", text, re.MULTILINE)) | set(
        re.findall(r"\w+", " ".join(names))
    )


def test_the_arrows_between_rooms_are_imports() -> None:
    drawing = (ROOT / "docs" / "code.md").read_text().split("```mermaid")[1].split("```")[0]
    arrows = re.findall(r"^ +([\w &]+) --> ([\w &]+)$", drawing, re.MULTILINE)
    assert len(arrows) > 10
    for above, below in arrows:
        for room in above.split(" & "):
            if (test_house.SOURCE / room).is_dir():
                assert set(below.split(" & ")) <= imports_of(room), room


def test_the_rooms_are_those_of_the_tree() -> None:
    """The table of rooms has every folder, in the order in which imports go."""
    page = (ROOT / "docs" / "code.md").read_text()
    shown = re.findall(r"^\| `([a-z]+)/` \|", page, re.MULTILINE)
    assert shown == [room for room in test_house.ROOMS if (test_house.SOURCE / room).is_dir()]


def test_the_example_of_a_recipe_is_valid() -> None:
    code = next(block for block in blocks(ROOT / "docs" / "recipes.md") if block.startswith("name: mine"))
    recipe = gq.load_recipe(yaml.safe_load(code))
    assert recipe.transform["R1"][0].method.method == "walsh"
    for setting in re.findall(r"`--set ([^`]+)`", (ROOT / "docs" / "recipes.md").read_text()):
        if setting != "KEY=VALUE":
            gq.load_recipe("gsr", [setting])


def recipe_options() -> dict[str, type[BaseModel]]:
    """Everything that has options in a recipe, as docs/recipes.md calls it."""
    sections: dict[str, type[BaseModel]] = {"recipe": gq.Recipe, "step": gq.Step, "weights.overrides": gq.Override}
    for prefix, model in (("", gq.Recipe), ("weights.", gq.Weights)):
        for name, field in model.model_fields.items():
            for kind in (field.annotation, *get_args(field.annotation)):
                kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
                if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in (Grid, Solver):
                    sections[prefix + name] = kind
    registries = {"method": Method.registry, "solver": Solver.registry, "grid": Grid.registry}
    own = {f"{kind}: {name}": item for kind, known in registries.items() for name, item in known.items()}
    return sections | {name: item for name, item in own.items() if item.__module__.startswith("gyroquant.")}


def option_tables() -> dict[str, tuple[str, dict[str, str]]]:
    """The tables of options of docs/recipes.md by title: the class in Python, and the default of each option."""
    tables: dict[str, tuple[str, dict[str, str]]] = {}
    for table in re.findall(
        r"^\| `.*\| default \|(?:.*\n)(?:\|.*\n)+", (ROOT / "docs" / "recipes.md").read_text(), re.M
    ):
        head, _, *rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
        title, python = re.findall(r"`([^`]+)`", head[0])
        assert title not in tables, title
        cells = [[cell.strip() for cell in row] for row in rows]
        assert all(len(row) == 5 and row[3] for row in cells), title
        tables[title] = python, {row[0].strip("`"): row[1] for row in cells if row[0] != "(no options)"}
    return tables


def test_every_option_of_a_recipe_is_in_a_table() -> None:
    assert set(option_tables()) == set(recipe_options())
    assert {"weights", "learn", "kv_cache", "weights.tune", "solver: gptq", "grid: nvfp4"} < set(option_tables())


@pytest.mark.parametrize("title", recipe_options())
def test_tables_of_options_say_the_real_defaults(title: str) -> None:
    model, (python, shown) = recipe_options()[title], option_tables()[title]
    place: Any = gq
    for part in python.split(".")[1:]:
        place = getattr(place, part)
    assert place is model, f"{title} is {model.__name__} in Python, not {python}"
    tag = title.partition(":")[0]
    tags = {"solver": "name", "method": "method", "grid": "grid"} if ":" in title else {}
    fields = {name: field for name, field in model.model_fields.items() if name != tags.get(tag)}
    assert set(shown) == set(fields), title
    for name, field in fields.items():
        if field.is_required():
            assert shown[name] == "required", (title, name)
        elif shown[name] == "see below":
            assert isinstance(field.get_default(call_default_factory=True), BaseModel), (title, name)
        else:
            default = field.get_default(call_default_factory=True)
            default = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
            default = list(default) if isinstance(default, tuple) else default
            said = yaml.safe_load(shown[name].strip("`"))
            assert said == default, (title, name)
            assert type(said) is type(default), (title, name)


def test_the_recipe_in_python_is_the_one_in_yaml() -> None:
    page = blocks(ROOT / "docs" / "recipes.md")
    python = next(block for block in page if block.startswith("recipe = gq.Recipe("))
    names: dict[str, Any] = {"gq": gq}
    exec(compile(python.partition("\ngq.quantize(")[0], "example", "exec"), names)
    text = next(block for block in page if block.startswith("name: mine"))
    assert names["recipe"] == gq.load_recipe(yaml.safe_load(text))


def test_the_short_examples_of_recipes_are_valid() -> None:
    short = [
        b for b in blocks(ROOT / "docs" / "recipes.md") if re.match(r"(weights|activations|learn|finetune): \{", b)
    ]
    assert len(short) >= 8
    for text in short:
        gq.load_recipe(yaml.safe_load(text))


def test_the_glossary_names_what_exists() -> None:
    """Every name in the column "in code" of the current words, whether of a class, a function, a key or a module."""
    page = (ROOT / "docs" / "glossary.md").read_text().split("## Old names")[0]
    files = [path for path in test_house.SOURCE.rglob("*") if path.suffix in (".py", ".yaml")]
    words = set(re.findall(r"\w+", " ".join(path.read_text() for path in files)))
    words |= {part for path in test_house.SOURCE.rglob("*") for part in (path.name, path.stem)}
    cells = re.findall(r"^\| [^|]+ \| [^|]+ \|([^|]*)\|$", page, re.MULTILINE)
    names = {name for cell in cells for code in re.findall(r"`([^`]+)`", cell) for name in re.findall(r"\w+", code)}
    assert len(names) > 80
    assert names <= words | {"py"}


SEARCHES = {"e8p", "float_zero", "iq", "iq_kt", "iqk", "lookup", "trellis"}
"""Grids that take seconds for a million numbers, and whose size does not depend on how many there are."""


@pytest.mark.parametrize(("rows", "tolerance"), [(256, 0.01), pytest.param(1024, 0.005, marks=pytest.mark.slow)])
def test_the_errors_of_grids_are_measured_again(rows: int, tolerance: float) -> None:
    """On all numbers, or by some grids on those of the first rows, whose error differs by chance."""
    table = re.findall(
        r"^\| `(.+)` \| ([\d.]+) \| ([\d.]+) % \|$", (ROOT / "docs" / "grids.md").read_text(), re.MULTILINE
    )
    numbers = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    shown = {"integer"}
    for setting, bits, error in table:
        grid = grid_from({"grid": "integer"} | yaml.safe_load(f"{{{setting}}}"))
        weight, limit = (numbers[:rows], tolerance) if grid.grid in SEARCHES else (numbers, 0.005)
        rounded = RoundToNearest().solve(weight, grid.with_tensor_scale(weight))
        assert stored_bits(rounded.pack()) / weight.numel() == pytest.approx(float(bits), abs=6e-4), setting
        assert 100 * weight_error(weight, rounded.dequantize()) == pytest.approx(float(error), rel=limit), setting
        shown.add(grid.grid)
    assert shown == set(Grid.registry)


def test_every_recipe_is_in_the_documentation() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    assert all(f"`{name}`" in text for name in preset_names())


def test_commands_in_the_readme_exist() -> None:
    from typer.main import get_command

    from gyroquant.cli import app

    group = get_command(app)
    context = group.make_context("gyroquant", [], resilient_parsing=True)
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"^    gyroquant (\S+)(.*)$", text, re.MULTILINE)
    assert lines
    for name, rest in lines:
        command = group.get_command(context, name)  # type: ignore[attr-defined]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert set(re.findall(r"(?<=\s)--[a-z-]+", rest)) <= known, name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
