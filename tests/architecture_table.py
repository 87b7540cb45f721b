"""The table of docs/architectures.md: every architecture, every site, the error of the proof or why it is refused.

make architectures
"""

from __future__ import annotations

import tiny_models
import torch
import transformers

from gyroquant import maps
from gyroquant.errors import UnsupportedModelError
from gyroquant.models.execution.runner import BlockRunner
from gyroquant.models.folding.fold import FoldPlan
from gyroquant.models.folding.prove import prove
from gyroquant.models.graph.sites import Site, find_sites
from gyroquant.models.stores.source import open_model

COLUMNS = (
    "R1 fused",
    "R1 online",
    "R2",
    "attn_out",
    "qk fused",
    "qk online",
    "R3",
    "R4",
    "attn_in",
    "mlp_in",
    "R1 to R4",
)
REASONS = {"cannot pass it": "post-norm", "no site": "none", "stand between": "q/k norms"}
TITLES = {
    "llama": "Llama",
    "llama_tied": "Llama, tied head",
    "llama_bias": "Llama, biases everywhere",
    "mistral": "Mistral",
    "smollm3": "SmolLM3",
    "granite": "Granite (multipliers)",
    "granite_bias": "Granite (biases)",
    "seed_oss": "Seed-OSS (biases)",
    "ernie4_5": "ERNIE 4.5 (interleaved RoPE)",
    "helium": "Helium (interleaved RoPE)",
    "arcee": "Arcee (no gate)",
    "qwen2": "Qwen2 (q, k, v biases)",
    "qwen3": "Qwen3 (q/k norms, head_dim)",
    "qwen2_moe": "Qwen2-MoE (shared expert)",
    "qwen3_moe": "Qwen3-MoE",
    "mixtral": "Mixtral",
    "olmoe": "OLMoE",
    "phi3": "Phi-3 (fused weights)",
    "glm": "GLM-4 (partial interleaved RoPE)",
    "glm4": "GLM-4-0414",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)",
    "olmo2": "OLMo-2",
    "olmo3": "OLMo-3",
    "exaone4": "EXAONE 4",
    "cohere": "Cohere (parallel, LayerNorm)",
    "cohere2": "Cohere-2 (parallel, LayerNorm)",
    "starcoder2": "StarCoder2 (LayerNorm)",
    "nemotron": "Nemotron (LayerNorm, gain - 1)",
    "opt": "OPT (LayerNorm, positions)",
    "gpt_neox": "GPT-NeoX, parallel",
    "gpt_neox_serial": "GPT-NeoX, serial",
    "gpt2": "GPT-2 (Conv1D)",
    "llava": "Llama in LLaVA",
    "mistral3": "Mistral in Mistral 3",
    "gemma3_wrapper": "Gemma 3 with images",
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
}
HEAD = """# Architectures

`python tests/architecture_table.py > docs/architectures.md` makes this page. A test makes it again and compares.

Each cell is the proof on a tiny random model of the family, built from its own transformers configuration, with random
norm gains and biases: the larger of the relative logit error and the worst block's error, in fp32, after folding random
Hadamards (R1 to R4, qk online), random rotations of the pairs that RoPE turns (qk fused) or random scalings (attn_in,
mlp_in). A cell with a reason means that the fold is refused, before anything is changed:

- *post-norm*: a norm after attention or feed-forward multiplies what is added to the residual stream by a gain, and a
  rotation of the stream cannot pass that gain. `transform.R1.online=true` rotates the inputs of the linear layers
  instead.
- *q/k norms*: norms lie between the projections and RoPE, and a map cannot pass their gains.
  `transform.qk.online=true` turns queries and keys back before the norms.
- *none*: the architecture has no norm before those layers, so there is no such site.

The last rows are decoders inside models that also take images. Only the decoder is folded and rounded. What writes
images into its residual stream is folded with R1. Everything else is copied unchanged, and the result opens under the
class of the original.

R3 and R4 run online. OPT and GPT-2 have no RoPE, so qk takes any map. LayerNorm models (Cohere, StarCoder2,
Nemotron, OPT, GPT-NeoX, GPT-2) get rotations that keep the mean, see [sites](sites.md).

"""


def _map(site: Site, column: str, generator: torch.Generator) -> maps.Map:
    if column in ("attn_in", "mlp_in"):
        return maps.Diagonal(torch.rand(site.n, generator=generator, dtype=torch.float64) + 0.5)
    if column == "qk fused" and site.rope is not None:
        return maps.PairRotation(site.n, 3 * torch.randn(site.rope.pairs, generator=generator), site.rope.interleaved)
    return maps.random_signs(site.n, generator) @ maps.hadamard(site.n)


def _tokens(name: str, model: transformers.PreTrainedModel) -> torch.Tensor:
    """Random tokens, of which those for images have no place in a text."""
    ids = tiny_models.tokens(model)
    return ids if name in tiny_models.CONFIGS else ids % 80 + 3


def cell(name: str, column: str) -> str:
    """The error of one architecture and column, or the short reason why it is refused."""
    generator = torch.Generator().manual_seed(0)
    model = tiny_models.build(name)
    store = open_model(model)
    plan = FoldPlan(store.graph)
    post_norm = cell(name, "R1 fused") == "post-norm" if column == "R1 to R4" else False
    wanted = ("R1", "R2", "R3", "R4") if column == "R1 to R4" else (column.split()[0],)
    try:
        for site_name in wanted:
            online = True if column.endswith(" online") or (site_name == "R1" and post_norm) else None
            for site in find_sites(store.graph, site_name, online=bool(online)):
                plan.add(site, _map(site, column, generator), online)
        proof = prove(store, plan, BlockRunner(model, store.graph), _tokens(name, model), 5e-6)
    except UnsupportedModelError as error:
        return next((short for text, short in REASONS.items() if text in str(error)), f"FAILED: {error}")
    return f"{max(proof.relative_logit_error, proof.worst_block_error):.0e}"


def rows() -> list[list[str]]:
    """Every row of the table: the family's name and its cells."""
    return [[TITLES[name], *(cell(name, column) for column in COLUMNS)] for name in TITLES]


def page() -> str:
    """The whole page."""
    lines = ["| family | " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * len(COLUMNS)]
    return HEAD + "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows())]) + "\n"


if __name__ == "__main__":
    print(page(), end="")
