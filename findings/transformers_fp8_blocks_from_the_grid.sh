#!/usr/bin/env bash
# transformers 5.23.0 and compressed-tensors 0.20.0 with torch 2.13.0 on a CPU: checkpoints of quant_method "fp8" with
# weight_block_size [128, 128], DeepSeek-V3's layout, opened dequantized (what transformers does by itself without a GPU).
# One would guess: a scale belongs to 128 rows and 128 columns, the last block of a matrix being cut off where 128 does
# not divide it: so it is in DeepSeek's own kernel and in compressed-tensors' converter, and config.json says the size. Really: transformers takes no notice of weight_block_size and divides the matrix by the number of its
# scales. Where that does not divide (DeepSeek-V3's kv_a_proj_with_mqa has 576 rows and 5 scales, SmolLM2-135M 576 too)
# the model does not load. Where it does (960 rows and 8 scales, as in SmolLM2-360M; 192 and 2; 448 and 4) it loads
# without a word, in blocks of 120 rows: all weights between the two borders get their neighbour block's scale.
# Where users meet it: reading an fp8 checkpoint on a CPU, or merging, evaluating and quantizing anew from one, in sizes
# that are no multiple of 128. Round widths (DeepSeek's and Qwen's other layers) are right.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install -q torch==2.13.0
"$place/venv/bin/pip" install -q transformers==5.23.0 accelerate==1.15.0 compressed-tensors==0.20.0 safetensors==0.8.0
cat > "$place/show.py" <<'PY'
import json, sys
from pathlib import Path

import compressed_tensors, torch, transformers
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
print("transformers", transformers.__version__, "compressed-tensors", compressed_tensors.__version__, "torch", torch.__version__)
torch.manual_seed(0)


def opened(hidden, place):
    """Relative errors of (transformers, compressed-tensors) on an up_proj (128, hidden) and a down_proj (hidden, 128)."""
    sizes = dict(hidden_size=hidden, intermediate_size=128, num_hidden_layers=1, vocab_size=64)
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=4, head_dim=32, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(place)
    tensors, meant = load_file(place / "model.safetensors"), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        codes = (40 * torch.randn(rows, columns)).to(torch.float8_e4m3fn)
        scales = 10 ** (-3 * torch.rand(-(-rows // 128), -(-columns // 128)))
        spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        tensors[name], tensors[name + "_scale_inv"], meant[name] = codes, scales, codes.float() * spread
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((place / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (place / "config.json").write_text(json.dumps(settings))
    spared = ["lm_head", "re:.*embed_tokens"]
    other = FP8BlockDequantizer(ignore=spared, weight_block_size=(128, 128), dtype=torch.float32).process(dict(tensors))
    worst = lambda found: max(float((found[n].float() - m).norm() / m.norm()) for n, m in meant.items())
    try:
        asked = FineGrainedFP8Config(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, quantization_config=asked)
    except (RuntimeError, ValueError) as error:
        return type(error).__name__, worst(other)
    return worst(model.state_dict()), worst(other)


found = {}
for hidden in (256, 576, 960):
    found[hidden] = opened(hidden, Path(sys.argv[1]) / str(hidden))
    print(f"hidden {hidden}: transformers {found[hidden][0]}, compressed-tensors {found[hidden][1]:.1e}")
assert all(other < 1e-6 for _, other in found.values())
assert found[256][0] < 1e-6, "multiples of 128 were right"
assert isinstance(found[576][0], str), "576 did not load"
assert found[960][0] > 0.1, "960 was wrong in silence"
PY
"$place/venv/bin/python" "$place/show.py" "$place" 2>&1 | grep -v -e "^$" -e "model shards" -e "Loading weights" -e UserWarning -e "warnings.warn"
# Seen on 28 November 2026:
# hidden 256: transformers 0.0, compressed-tensors 0.0e+00
# hidden 576: transformers RuntimeError, compressed-tensors 0.0e+00
# hidden 960: transformers 0.8323700428009033, compressed-tensors 0.0e+00
