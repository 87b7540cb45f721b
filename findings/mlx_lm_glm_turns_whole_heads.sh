#!/usr/bin/env bash
# mlx-lm 0.32.2 (mlx 0.32.4) on a GLM checkpoint (model type "glm") as transformers 5.23.0 saves it.
#
# One would guess: RoPE turns the share of every head that `partial_rotary_factor` says, which is half of it by
# default in transformers. The model type "glm4" of mlx-lm reads this setting.
#
# What really happens: the model type "glm" turns whole heads, with frequencies for whole heads. Logits are wrong among the first
# tokens already, and nothing is said.
#
# Who meets it: checkpoints of the type "glm" that do not set the factor to 1, converted to MLX. They load without complaint.
# Quantization is the first suspect.
#
# Seen: random weights, 32 tokens. With a factor of 1.0 the logits differ by 2e-6 of the largest, with 0.5 by 0.76 on the
# first 8 tokens.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.13.0
"$place/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" mlx-lm==0.32.2 transformers==5.23.0
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM, GlmConfig

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def differences(config):
    """How far mlx-lm's logits are from transformers', relative to the largest: on the first 8 of 32 tokens, and on all."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    ids = torch.randint(1, 96, (1, 32))
    with torch.no_grad():
        expected = model(ids).logits[0]
    model.save_pretrained("model")
    path = Path("model/config.json")
    settings = json.loads(path.read_text())
    settings |= settings["rope_parameters"]  # mlx-lm reads them at the top level
    path.write_text(json.dumps(settings))
    other, _ = load_model(Path("model"))
    logits = other(mx.array(ids.numpy()))[0].astype(mx.float32)
    error = (torch.from_numpy(np.array(logits)) - expected).abs().amax(1) / expected.abs().max()
    return float(error[:8].max()), float(error.max())


found = {}
for share in (1.0, 0.5):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": share}
    found[share] = differences(GlmConfig(**SIZES, rope_parameters=rope))
print("mlx-lm", mlx_lm.__version__, "mlx", mx.__version__)
print("by the share of a head that is turned:", found)
same = max(found[1.0]) < 1e-5 and found[0.5][0] > 0.1
print("behaves as described" if same else "the behaviour has changed")
sys.exit(not same)
PYTHON
