"""The contract of formats: their declarations, and that their runtime computes the saved model."""

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
"""Largest error of logits, relative to the largest logit: in fp32, and with the default settings of a runtime."""
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
    """A temporary folder that is deleted when the process ends."""
    return TemporaryDirectory(prefix="gyroquant-check-format-")


def _folder(name: str) -> Path:
    return Path(_scratch().name) / name


@cache
def saved(number: int = 0) -> Path:
    """The folder of a tiny Llama that gyroquant saved, with weights that many runtimes support."""
    out = _folder(f"saved-{number}")
    weights = {"group_size": 32, "scale": "minmax", "solver": "rtn"} | _WEIGHTS[number]
    calibration = {"nsamples": 2, "seqlen": 32, "dtype": "float32"}
    recipe = {"name": "check", "weights": weights, "calibration": calibration, "proof": {"seqlen": 32}}
    model = tiny_model(hidden_size=128, intermediate_size=256)
    gq.quantize(model, recipe, [prose(300)], out, tokenizer=tokenizer(), options=gq.OutputOptions(save_dtype="float32"))
    return out


@cache
def _logits(folder: Path) -> list[Tensor]:
    """Our own logits for the prompt and the shorter text."""
    model = gq.load(folder, dtype="float32")
    with torch.no_grad():
        return [model(ids[None]).logits[0] for ids in _texts()]


def _texts() -> tuple[Tensor, Tensor]:
    return tokens(tiny_model(), 1)[0], torch.tensor(SHORTER)


_exports: dict[type[Format], tuple[Path, Path]] = {}


def exported(format_: Format) -> tuple[Path, Path]:
    """The folders of a saved tiny model and of its export, which is written once per format.

    Raises SkipTest if a package is not installed, and AssertionError if the format supports none of the tiny models.
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
        f"it supports no tiny Llama with integer weights of 2, 4 or 8 bits in groups of 32: {'; '.join(reasons)}"
    )


def _runtimes(format_: Format) -> Iterator[tuple[Runtime, list[Tensor]]]:
    """The runtime of a format, in fp32 and with its default settings, each with our own logits."""
    source, destination = exported(format_)
    for exact in (True, False):
        try:
            runtime = open_runtime(format_.name, destination, exact)
        except InputError as error:
            raise SkipTest(str(error)) from error
        yield runtime, _logits(source)


def _limit(runtime: Runtime) -> float:
    return EXACT if runtime.exact else BY_DEFAULT


def _require_close(runtime: Runtime, logits: Tensor, ours: Tensor, text: str) -> None:
    error, mode = relative_error(logits, ours), "in fp32" if runtime.exact else "with its default settings"
    require(error < _limit(runtime), f"{runtime.title} {mode} gives other logits for {text}: the error is {error:.1e}")


@FORMAT.check()
def check_it_says_what_it_is(format_: Format) -> None:
    """It has a title, capabilities and a runtime. If it has an extra, it names the packages of the extra."""
    require(bool(format_.title), "it has no title: set title to the name of the format")
    declared = format_.capabilities
    require(isinstance(declared, FormatCapabilities), "its capabilities are not a FormatCapabilities")
    require(
        bool(declared.weights or declared.dense or declared.any_grid),
        "it supports no weights: declare them in its capabilities",
    )
    require(not format_.extra or bool(format_.packages), f"the extra {format_.extra} has no packages: set packages")
    require(format_.runtime is not None, "it names no runtime, so no export can be checked: set runtime")
    require(Runtime.registry.get(format_.name) is format_.runtime, "another class has registered its runtime")


@FORMAT.check()
def check_it_says_why_a_model_does_not_fit(format_: Format) -> None:
    """`incompatibilities` returns sentences, and does not raise an error for any model."""
    layer = Layer("model.layers.0.mlp.down_proj.weight", IntegerGrid(bits=7, group_size=48), 96)
    odd = ModelRequirements("no_such_architecture", (layer,))
    reasons = format_.incompatibilities(odd)
    strings = isinstance(reasons, list) and all(isinstance(reason, str) for reason in reasons)
    require(strings, f"incompatibilities returns {reasons!r}, not a list of sentences")
    if format_.capabilities.model_types is not None:
        require(bool(reasons), "it accepts an architecture that is not among its model_types")


@FORMAT.check()
def check_it_notes_what_it_did_as_data(format_: Format) -> None:
    """An export has a manifest with its size in bytes and the facts that `write` returned."""
    _, destination = exported(format_)
    facts = read_manifest(destination)
    require(facts["bytes"] > 0, "the export is empty")
    require(isinstance(facts["facts"], Mapping), "write does not return a mapping of facts")


@FORMAT.check()
def check_its_program_reads_a_text_whole_in_pieces_and_token_by_token(format_: Format) -> None:
    """The logits equal ours for every way to read a text, and do not depend on texts that were read before."""
    prompt, _ = _texts()
    for runtime, ours in _runtimes(format_):
        whole = runtime.logits(prompt)
        require(whole.shape[0] == len(prompt), f"logits returns {len(whole)} rows for {len(prompt)} tokens")
        require(whole.dtype == torch.float32, f"logits returns {whole.dtype}, not float32")
        _require_close(runtime, whole, ours[0], "a text in one call")
        _require_close(runtime, read_in_pieces(runtime, prompt), ours[0], "a text in pieces")
        runtime.start()
        parts = [runtime.feed(part[None]) for part in (prompt[:20], *prompt[20:].split(1))]
        _require_close(runtime, torch.cat(parts), ours[0], "single tokens after a text")
        require(torch.equal(runtime.logits(prompt), whole), "start does not discard the text that was read before")


@FORMAT.check()
def check_its_program_takes_the_likeliest_tokens(format_: Format) -> None:
    """`greedy` returns the most likely next token, one after another."""
    prompt, _ = _texts()
    for runtime, _ours in _runtimes(format_):
        chosen = runtime.greedy(prompt, 4)
        rows = runtime.logits(torch.cat((prompt, torch.tensor(chosen[:-1]))))[len(prompt) - 1 :]
        logits = rows.gather(1, torch.tensor(chosen)[:, None])[:, 0]
        near = bool(((rows.max(-1).values - logits) <= 2 * BY_DEFAULT * rows.abs().max()).all())
        require(near, f"{runtime.title} takes tokens that are not the most likely ones")
        same = not runtime.exact or rows.argmax(-1).tolist() == chosen
        require(same, f"{runtime.title} in fp32 takes tokens that are not the most likely ones")


@FORMAT.check()
def check_its_program_reads_a_padded_batch_or_says_why_not(format_: Format) -> None:
    """Texts of different length, padded on the left, give the same logits as alone, or `unpadded` states why not."""
    prompt, shorter = _texts()
    for runtime, ours in _runtimes(format_):
        whole = runtime.logits(prompt)
        if runtime.unpadded:
            refuses(lambda r=runtime: r.padded([prompt, shorter]), InputError, "unpadded is set.", runtime.unpadded)  # type: ignore[misc]
            continue
        for logits, expected in zip(runtime.padded([prompt, shorter]), ours, strict=True):
            _require_close(runtime, logits, expected, "a padded batch")
        require(torch.equal(runtime.feed(prompt[None]), whole), "padded does not discard the batch")


def check_format(format_: Format | type[Format]) -> None:
    """Checks the declarations of a format, exports a tiny model, and compares the logits of its runtime with ours.

    Raises AssertionError, which names the class, what is wrong and what to do. Raises unittest.SkipTest if a package is
    not installed.
    """
    FORMAT.run(format_)
