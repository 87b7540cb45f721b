"""The contract of formats: what they declare, and that their program sees the model that was saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import SkipTest

import torch
from torch import Tensor

import gyroquant as gq
from gyroquant.errors import InputError
from gyroquant.formats.base import Format, FormatCapabilities, Layer, ModelRequirements, requirements_of
from gyroquant.formats.export import export, open_saved, read_manifest, relative_error
from gyroquant.formats.runtime import Runtime, open_runtime
from gyroquant.formats.usage_check import read_in_pieces
from gyroquant.grids import IntegerGrid
from gyroquant.testing.contract import Contract, refuses, require
from gyroquant.testing.models import prose, tiny_model, tokenizer, tokens

FORMAT: Contract[Format] = Contract("format", Format, lambda format_: format_.name)
EXACT, BY_DEFAULT = 1e-5, 5e-2
"""What logits may be off by, relative to the largest: in fp32, and as a program runs by default."""
SHORTER = (7, 5, 31, 8, 60, 11, 2, 90, 44)
_WEIGHTS: tuple[dict[str, Any], ...] = (
    {"bits": 4, "symmetric": True},
    {"bits": 4, "symmetric": False},
    {"bits": 8, "symmetric": True},
    {"bits": 8, "symmetric": False},
    {"bits": 2, "symmetric": True},
)


@cache
def _scratch() -> TemporaryDirectory[str]:
    """A folder that lives as long as the process."""
    return TemporaryDirectory(prefix="gyroquant-check-format-")


def _folder(name: str) -> Path:
    return Path(_scratch().name) / name


@cache
def saved(number: int = 0) -> Path:
    """A tiny Llama as gyroquant saves it, with weights that many programs hold."""
    out = _folder(f"saved-{number}")
    weights = {"group_size": 32, "scale": "minmax", "solver": "rtn"} | _WEIGHTS[number]
    calibration = {"nsamples": 2, "seqlen": 32, "dtype": "float32"}
    recipe = {"name": "check", "weights": weights, "calibration": calibration, "proof": {"seqlen": 32}}
    model = tiny_model(hidden_size=128, intermediate_size=256)
    gq.quantize(model, recipe, [prose(300)], out, tokenizer=tokenizer(), options=gq.OutputOptions(save_dtype="float32"))
    return out


@cache
def _logits(folder: Path) -> list[Tensor]:
    """Our own logits of the prompt and of the shorter text."""
    model = gq.load(folder, dtype="float32")
    with torch.no_grad():
        return [model(ids[None]).logits[0] for ids in _texts()]


def _texts() -> tuple[Tensor, Tensor]:
    return tokens(tiny_model(), 1)[0], torch.tensor(SHORTER)


_exports: dict[type[Format], tuple[Path, Path]] = {}


def exported(format_: Format) -> tuple[Path, Path]:
    """A tiny model as gyroquant saved it, and its export, made once. Raises SkipTest where something is not installed,
    AssertionError where the format holds none of the tiny models.
    """
    kind = type(format_)
    if kind in _exports:
        return _exports[kind]
    try:
        format_.check_packages()
    except InputError as error:
        raise SkipTest(str(error)) from error
    reasons: list[str] = []
    for number in range(len(_WEIGHTS)):
        source = saved(number)
        reasons = format_.incompatibilities(requirements_of(open_saved(source)))
        if not reasons:
            destination = _folder(f"{format_.name}-{len(_exports)}")
            export(source, format_.name, destination, check=False)
            _exports[kind] = source, destination
            return _exports[kind]
    raise AssertionError(
        f"it holds no tiny Llama with integer weights of 2, 4 or 8 bits in groups of 32: {'; '.join(reasons)}"
    )


def _runtimes(format_: Format) -> Iterator[tuple[Runtime, list[Tensor]]]:
    """The program of a format in fp32 and as it runs by default, with our own logits."""
    source, destination = exported(format_)
    for exact in (True, False):
        try:
            runtime = open_runtime(format_.name, destination, exact)
        except InputError as error:
            raise SkipTest(str(error)) from error
        yield runtime, _logits(source)


def _limit(runtime: Runtime) -> float:
    return EXACT if runtime.exact else BY_DEFAULT


def _require_close(runtime: Runtime, found: Tensor, ours: Tensor, what: str) -> None:
    error, way = relative_error(found, ours), "in fp32" if runtime.exact else "as it runs by default"
    require(
        error < _limit(runtime), f"{runtime.title} {way} gives other logits for {what}: they are off by {error:.1e}"
    )


@FORMAT.check()
def check_it_says_what_it_is(format_: Format) -> None:
    """It has a title, capabilities and a program; an extra, if any, brings packages."""
    require(bool(format_.title), "it has no title, which is what people call it")
    held = format_.capabilities
    require(isinstance(held, FormatCapabilities), "its capabilities are not a FormatCapabilities")
    require(bool(held.weights or held.dense or held.any_grid), "it holds no weights: say which in its capabilities")
    require(not format_.extra or bool(format_.packages), f"the extra {format_.extra} brings no packages: name them")
    require(format_.runtime is not None, "it names no runtime, so no export can be checked: set runtime")
    require(Runtime.registry.get(format_.name) is format_.runtime, "another class has registered its runtime")


@FORMAT.check()
def check_it_says_why_a_model_does_not_fit(format_: Format) -> None:
    """`incompatibilities` gives sentences, and raises for no model."""
    layer = Layer("model.layers.0.mlp.down_proj.weight", IntegerGrid(bits=7, group_size=48), 96)
    odd = ModelRequirements("no_such_architecture", (layer,))
    reasons = format_.incompatibilities(odd)
    strings = isinstance(reasons, list) and all(isinstance(reason, str) for reason in reasons)
    require(strings, f"incompatibilities gives {reasons!r} and not a list of sentences")
    if format_.capabilities.model_types is not None:
        require(bool(reasons), "it takes an architecture that is not among its model_types")


@FORMAT.check()
def check_it_notes_what_it_did_as_data(format_: Format) -> None:
    """An export has a manifest, which says how large it is and what `write` returned."""
    _, destination = exported(format_)
    facts = read_manifest(destination)
    require(facts["bytes"] > 0, "the export is empty")
    require(isinstance(facts["facts"], Mapping), "write returns no mapping of facts")


@FORMAT.check()
def check_its_program_reads_a_text_whole_in_pieces_and_token_by_token(format_: Format) -> None:
    """The logits are ours, however a text is read, and what was read before is forgotten."""
    prompt, _ = _texts()
    for runtime, ours in _runtimes(format_):
        whole = runtime.logits(prompt)
        require(whole.shape[0] == len(prompt), f"logits gives {len(whole)} rows for {len(prompt)} tokens")
        require(whole.dtype == torch.float32, f"logits gives {whole.dtype}, not float32")
        _require_close(runtime, whole, ours[0], "a text in one call")
        _require_close(runtime, read_in_pieces(runtime, prompt), ours[0], "a text in pieces")
        runtime.start()
        parts = [runtime.feed(part[None]) for part in (prompt[:20], *prompt[20:].split(1))]
        _require_close(runtime, torch.cat(parts), ours[0], "single tokens after a text")
        require(torch.equal(runtime.logits(prompt), whole), "start does not forget what was read before")


@FORMAT.check()
def check_its_program_takes_the_likeliest_tokens(format_: Format) -> None:
    """`greedy` gives the likeliest tokens of the text so far."""
    prompt, _ = _texts()
    for runtime, _ours in _runtimes(format_):
        found = runtime.greedy(prompt, 4)
        rows = runtime.logits(torch.cat((prompt, torch.tensor(found[:-1]))))[len(prompt) - 1 :]
        chosen = rows.gather(1, torch.tensor(found)[:, None])[:, 0]
        near = bool(((rows.max(-1).values - chosen) <= 2 * BY_DEFAULT * rows.abs().max()).all())
        require(near, f"{runtime.title} takes tokens that are not the likeliest")
        same = not runtime.exact or rows.argmax(-1).tolist() == found
        require(same, f"{runtime.title} in fp32 takes tokens that are not the likeliest")


@FORMAT.check()
def check_its_program_reads_a_padded_batch_or_says_why_not(format_: Format) -> None:
    """Texts of different length, padded on the left, give the logits of each; or `unpadded` says why they cannot."""
    prompt, shorter = _texts()
    for runtime, ours in _runtimes(format_):
        whole = runtime.logits(prompt)
        if runtime.unpadded:
            refuses(lambda r=runtime: r.padded([prompt, shorter]), InputError, "it says unpadded.", runtime.unpadded)  # type: ignore[misc]
            continue
        for found, wanted in zip(runtime.padded([prompt, shorter]), ours, strict=True):
            _require_close(runtime, found, wanted, "a padded batch")
        require(torch.equal(runtime.feed(prompt[None]), whole), "padded does not forget the batch")


def check_format(format_: Format | type[Format]) -> None:
    """Checks what a format declares, exports a tiny model, and holds its program to our own logits.

    Raises AssertionError, naming the class, what is wrong and what to do, and unittest.SkipTest where a package is not
    installed.
    """
    FORMAT.run(format_)
