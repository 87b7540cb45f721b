"""A traced OpenVINO graph is the model that we saved: every architecture that it is said of, and no other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from graph_formats import close, saved
from selection import some

import gyroquant as gq
from gyroquant.formats.base import ModelRequirements, format_named
from gyroquant.formats.decoder import MODEL_TYPES
from gyroquant.formats.export import export, open_saved
from gyroquant.formats.openvino.layout import MODEL
from gyroquant.formats.openvino.writer import TRACED, graph_of

ov = pytest.importorskip("openvino", reason="OpenVINO is not installed")
VARIANTS = ("llama_tied", "llama_bias", "granite_bias")
NAMES = [name for name in tiny_models.CONFIGS if name not in VARIANTS]


def changes(name: str) -> dict[str, Any]:
    """What the builder has no operation for, in those architectures that it knows; experts of whole groups."""
    config = tiny_models.CONFIGS[name]()
    if hasattr(config, "moe_intermediate_size"):
        shared = {"shared_expert_intermediate_size": 96} if name == "qwen2_moe" else {}
        return {"moe_intermediate_size": 96, **shared}
    key = "hidden_activation" if hasattr(config, "hidden_activation") else "hidden_act"
    return {key: "relu"} if config.model_type in MODEL_TYPES else {}


@torch.no_grad()
def ours(folder: Path, *texts: torch.Tensor) -> list[torch.Tensor]:
    """Logits of texts, each for itself, (length, words)."""
    model = gq.load(folder, dtype="float32")
    return [model(input_ids=ids[None]).logits[0] for ids in texts]


class Session:
    """The CPU plugin in fp32 with a state of its own."""

    def __init__(self, folder: Path):
        from gyroquant.formats.openvino.runtime import exact_settings

        compiled = ov.Core().compile_model(str(folder / MODEL), "CPU", exact_settings())
        self.request = compiled.create_infer_request()
        self.inputs = {next(iter(one.get_names())) for one in compiled.inputs}

    def feed(self, ids: torch.Tensor, mask: torch.Tensor, beams: list[int]) -> torch.Tensor:
        """Logits of what is new, ids of shape (batch, new); the mask, (batch, all), counts everything."""
        positions = (mask.cumsum(1) - 1).clip(0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given |= {"beam_idx": torch.tensor(beams, dtype=torch.int32)}
        found = self.request.infer({key: value.numpy() for key, value in given.items()})
        return torch.from_numpy(found[0].copy())

    def in_pieces(self, ids: torch.Tensor, *ends: int) -> torch.Tensor:
        """A text from its start, read in pieces that end there."""
        self.request.reset_state()
        mask = torch.ones(1, len(ids), dtype=torch.long)
        return torch.cat([self.feed(ids[None, a:b], mask[:, :b], [0])[0] for a, b in pairwise((0, *ends))])


def constants(folder: Path) -> dict[str, int]:
    """How many numbers of each type the constants of a graph hold."""
    found: dict[str, int] = {}
    for op in ov.Core().read_model(str(folder / MODEL)).get_ops():
        if op.get_type_name() == "Constant":
            kind = op.get_element_type().get_type_name()
            found[kind] = found.get(kind, 0) + int(np.prod(op.get_output_shape(0)))
    return found


def rounded(folder: Path) -> int:
    """How many weights are rounded."""
    store = open_saved(folder)
    return sum(int(np.prod(store.shapes[name])) for name in store.description["tensors"])


def test_the_tests_run_every_architecture_that_is_traced() -> None:
    assert {tiny_models.CONFIGS[name]().model_type for name in NAMES} == {*MODEL_TYPES, *TRACED}


@pytest.mark.parametrize("name", some(NAMES, ("gpt2", "phi3", "gpt_neox", "cohere", "gemma2", "qwen2_moe", "exaone4")))
def test_logits_are_those_of_the_saved_model(name: str, tmp_path: Path) -> None:
    """With maps online, read whole, in pieces (one token; more than a window) and beside a shorter text."""
    model = tiny_models.build(name, **changes(name))
    transform = {"R3": {"method": "hadamard"}, "R4": {"method": "hadamard", "block": 16, "random_signs": True}}
    if name in tiny_models.POST_NORM:
        transform["R1"] = {"method": "hadamard", "online": True}
    out = saved(model, tmp_path / "out", transform)
    assert export(out, "openvino", tmp_path / "ir", check=False)["facts"]["graph"] == "traced"
    ids = tiny_models.tokens(model, 2)
    whole, short = ours(out, ids[0], ids[1, 3:])
    session = Session(tmp_path / "ir")
    assert session.inputs == {"input_ids", "attention_mask", "position_ids", "beam_idx"}
    assert close(session.in_pieces(ids[0], 24), whole)
    assert close(session.in_pieces(ids[0], 5, 6, 24), whole)
    session.request.reset_state()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    batch = session.feed(ids, mask, [0, 1])
    assert close(batch[0], whole)
    assert close(batch[1, 3:], short)


def test_beams_are_reordered(tmp_path: Path) -> None:
    model = tiny_models.build("gpt2")
    out = saved(model, tmp_path / "out")
    manifest = export(out, "openvino", tmp_path / "ir")
    assert manifest["check"]["relative_logit_error"] < 1e-5
    ids, session = tiny_models.tokens(model, 2, 8), Session(tmp_path / "ir")
    session.feed(ids[:, :6], torch.ones(2, 6, dtype=torch.long), [0, 1])
    found = session.feed(ids[:, 6:], torch.ones(2, 8, dtype=torch.long), [1, 0])
    crossed = [torch.cat((ids[1 - i, :6], ids[i, 6:])) for i in (0, 1)]
    for logits, wanted in zip(found, ours(out, *crossed), strict=True):
        assert close(logits, wanted[6:])


def test_openvino_genai_runs_it(tmp_path: Path) -> None:
    genai = pytest.importorskip("openvino_genai", reason="OpenVINO GenAI is not installed")
    from gyroquant.formats.openvino.runtime import exact_settings

    model = tiny_models.build("phi3")
    out = saved(model, tmp_path / "out", {"R3": {"method": "hadamard"}})
    export(out, "openvino", tmp_path / "ir", check=False)
    ids = tiny_models.tokens(model, 1, 6)
    wanted = gq.load(out, dtype="float32").generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    settings = genai.GenerationConfig()
    settings.max_new_tokens, settings.do_sample, settings.ignore_eos = 8, False, True
    given = genai.TokenizedInputs(ov.Tensor(ids.numpy()), ov.Tensor(torch.ones_like(ids).numpy()))
    for backend in ("SDPA", "PA"):
        pipeline = genai.LLMPipeline(str(tmp_path / "ir"), "CPU", **exact_settings(), ATTENTION_BACKEND=backend)
        assert pipeline.generate(given, settings).tokens[0] == wanted[0, 6:].tolist()


@pytest.mark.parametrize(
    ("name", "bits", "kind", "dtype"),
    some(
        [("gpt2", 2, "u2", "float16"), ("phi3", 3, "i4", "bfloat16"), ("opt", 2, "u2", "float32")],
        [("gpt2", 2, "u2", "float16"), ("phi3", 3, "i4", "bfloat16")],
    ),
)
def test_weights_stay_compressed(name: str, bits: int, kind: str, dtype: str, tmp_path: Path) -> None:
    """On mid-rise grids, whose zero lies between two codes; and what is not rounded keeps its dtype."""
    sizes = {"gpt2": {"n_embd": 128}, "phi3": {"hidden_size": 128, "intermediate_size": 256}}
    model = tiny_models.build(name, **sizes.get(name, {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 256}))
    weights = {"bits": bits, "group_size": -1, "solver": "rtn", "symmetric": True, "midrise": True}
    recipe = {"weights": weights, "calibration": {"nsamples": 2, "seqlen": 32}, "proof": {"seqlen": 32}}
    out, tokenizer = tmp_path / "out", tiny_models.tokenizer()
    gq.quantize(
        model,
        recipe,
        [tiny_models.prose(3000)],
        out=out,
        tokenizer=tokenizer,
        options=gq.OutputOptions(save_dtype=dtype),
    )
    manifest = export(out, "openvino", tmp_path / "ir")
    assert manifest["check"]["relative_logit_error"] < 1e-5
    assert ("KV_CACHE_PRECISION" in manifest["facts"]["runtime_options"]) == (bits <= 3)
    assert constants(tmp_path / "ir")[kind] == rounded(out)
    held = {"u2": 2, "i4": 4}[kind] * rounded(out) // 8
    allowed = held + sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert held < (tmp_path / "ir" / MODEL).with_suffix(".bin").stat().st_size < allowed


def test_what_cannot_be_traced_is_said_before_any_work() -> None:
    one = format_named("openvino")
    config = tiny_models.CONFIGS["phi3"]()
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]}
    assert "RoPE of type longrope" in one.incompatibilities(ModelRequirements("phi3", (), (), config))[0]


def test_the_builder_comes_first() -> None:
    for name in NAMES:
        model_type = (config := tiny_models.CONFIGS[name]()).model_type
        assert graph_of(config) == ("built" if model_type in MODEL_TYPES else "traced")
