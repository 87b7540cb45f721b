"""Tables of embeddings stay codes in OpenVINO's files and in its memory."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path

import pytest
import tiny_models
import torch
from saved_models import our_logits
from selection import some
from tiny_runs import run

import gyroquant as gq
from gyroquant.formats.export import export
from gyroquant.formats.openvino.layout import MODEL
from gyroquant.formats.openvino.runtime import OpenVinoRuntime, exact_settings

ov = pytest.importorskip("openvino", reason="OpenVINO is not installed")
WORDS, WIDTH = 96, 128
IDS = torch.randint(3, 90, (20,), generator=torch.Generator().manual_seed(1))


def exported(
    name: str, corpus: Path, folder: Path, *settings: str, recipe: str = "gsr-w4", **settings_of_model: str
) -> Path:
    """A tiny model with rounded tables as OpenVINO runs it."""
    model = tiny_models.build(name, hidden_size=WIDTH, intermediate_size=64, **settings_of_model)
    common = ("weights.bits=8", "weights.group_size=32", "embeddings.group_size=32")
    run(model, folder / "out", recipe, corpus, *common, *settings)
    export(folder / "out", "openvino", folder / "ir", check=False)
    return folder / "ir"


def constants(folder: Path, exact: bool) -> Counter[str]:
    """How many numbers of each type the compiled model keeps of the table, in whatever shape."""
    compiled = OpenVinoRuntime(folder, exact)._request.get_compiled_model()
    found: Counter[str] = Counter()
    for op in compiled.get_runtime_model().get_ops():
        kind = op.get_rt_info()["layerType"]
        shape = list(op.get_output_shape(0)) if (kind if isinstance(kind, str) else kind.value) == "Const" else []
        if shape[:1] == [WORDS] and prod(shape) >= WORDS * WIDTH // 4:
            found[op.get_output_element_type(0).get_type_name()] += prod(shape)
    return found


def stored(folder: Path) -> list[tuple[str, int]]:
    """The types of the constants in the file that hold the table, and how many operations read each."""
    graph = ov.Core().read_model(str(folder / MODEL))
    return sorted(
        (op.get_element_type().get_type_name(), len(op.output(0).get_target_inputs()))
        for op in graph.get_ops()
        if op.get_type_name() == "Constant"
        and list(op.get_output_shape(0))[:1] == [WORDS]
        and prod(op.get_output_shape(0)) >= WORDS * WIDTH // 4
    )


def error(folder: Path) -> float:
    """The relative error of the logits: a prompt, then single tokens."""
    ours = our_logits(folder.parent / "out", IDS.tolist())
    runtime = OpenVinoRuntime(folder, exact=True)
    found = torch.cat([runtime.feed(part[None]) for part in (IDS[:16], *IDS[16:].split(1))])
    return float((found - ours).abs().max() / ours.abs().max())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("bits", "symmetric", "kind"),
    some(
        [(4, "true", "i4"), (3, "false", "u4"), (8, "true", "i8"), (6, "true", "i8"), (8, "false", "u8")],
        [(4, "true", "i4"), (3, "false", "u4"), (8, "true", "i8")],
    ),
)
def test_a_tied_table_is_one_constant_and_is_never_decoded(
    bits: int, symmetric: str, kind: str, exact: bool, corpus: Path, tmp_path: Path
) -> None:
    settings = (f"embeddings.bits={bits}", f"embeddings.symmetric={symmetric}", "keep_ties=true")
    folder = exported("llama_tied", corpus, tmp_path, *settings)
    assert stored(folder) == [(kind, 1)]
    assert constants(folder, exact) == {kind: 2 * WORDS * WIDTH}  # the lookup, and the product in its own layout
    assert error(folder) < 1e-5


@pytest.mark.parametrize("symmetric", ["true", "false"])
def test_a_tied_table_of_2_bits_is_stored_once(symmetric: str, corpus: Path, tmp_path: Path) -> None:
    """A lookup of u2 constants would be decoded, and the product with it. The same bytes are the lookup's table."""
    settings = ("embeddings.bits=2", f"embeddings.symmetric={symmetric}", "keep_ties=true")
    folder = exported("llama_tied", corpus, tmp_path, *settings)
    assert stored(folder) == [("u2", 1), ("u8", 1)]
    assert constants(folder, exact=True) == {"u2": WORDS * WIDTH, "u8": WORDS * WIDTH // 4}
    assert error(folder) < 1e-5
    file = (folder / MODEL).with_suffix(".bin").read_bytes()
    constants_ = [op for op in ov.Core().read_model(str(folder / MODEL)).get_ops() if op.get_type_name() == "Constant"]
    (table,) = (op.get_data() for op in constants_ if list(op.get_output_shape(0)) == [WORDS, WIDTH // 4])
    assert file.count(table.tobytes()) == 1


def test_a_table_and_a_head_of_their_own(corpus: Path, tmp_path: Path) -> None:
    """Only products of few bits need careful settings, and a table that no head is tied to is no product."""
    settings = ("embeddings.bits=2", "weights.ignore=[]", "weights.symmetric=true")
    folder = exported("llama", corpus, tmp_path, *settings)
    assert constants(folder, exact=True) == {"i8": WORDS * WIDTH, "u8": WORDS * WIDTH // 4}
    assert error(folder) < 1e-5
    assert not ov.Core().read_model(str(folder / MODEL)).has_rt_info(["runtime_options"])


@pytest.mark.parametrize("bits", some([2, 4], [2]))
def test_openvino_genai_runs_it(bits: int, corpus: Path, tmp_path: Path) -> None:
    genai = pytest.importorskip("openvino_genai", reason="OpenVINO GenAI is not installed")
    settings = (f"embeddings.bits={bits}", "embeddings.symmetric=true", "keep_ties=true")
    folder = exported("llama_tied", corpus, tmp_path, *settings)
    ids = IDS[None, :6]
    wanted = gq.load(tmp_path / "out", dtype="float32").generate(ids, max_new_tokens=8, eos_token_id=None)
    chosen = genai.GenerationConfig()
    chosen.max_new_tokens, chosen.do_sample, chosen.ignore_eos = 8, False, True
    given = genai.TokenizedInputs(ov.Tensor(ids.numpy()), ov.Tensor(torch.ones_like(ids).numpy()))
    for backend in ("SDPA", "PA"):
        pipeline = genai.LLMPipeline(str(folder), "CPU", **exact_settings(), ATTENTION_BACKEND=backend)
        assert pipeline.generate(given, chosen).tokens[0] == wanted[0, 6:].tolist()


@pytest.mark.parametrize(
    ("name", "recipe", "activation"),
    [("llama_tied", "gsr-w4", "hidden_act"), ("gemma3", "rtn-w4", "hidden_activation")],
)
@pytest.mark.parametrize("bits", some([2, 4], [2]))
def test_a_tied_table_that_is_traced(
    bits: int, name: str, recipe: str, activation: str, corpus: Path, tmp_path: Path
) -> None:
    """Gemma's class of embeddings scales the rows."""
    settings = (f"embeddings.bits={bits}", "embeddings.symmetric=true", "keep_ties=true")
    folder = exported(name, corpus, tmp_path, *settings, recipe=recipe, **{activation: "relu"})
    wanted = {2: {"u2": WORDS * WIDTH, "u8": WORDS * WIDTH // 4}, 4: {"i4": 2 * WORDS * WIDTH}}
    assert constants(folder, exact=True) == wanted[bits]
    assert error(folder) < 1e-5
