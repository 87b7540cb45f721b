#!/usr/bin/env bash
# mlx-lm 0.32.2 (mlx 0.32.4) on a Gemma 2 checkpoint as transformers 5.23.0 saves it.
#
# One would guess: every second layer attends to the last `sliding_window` tokens, as config.json says and transformers does.
#
# What really happens: all layers attend to the whole text. The setting is not read. Tokens inside the first window are right,
# those behind it are not, and nothing is said.
#
# Who meets it: Gemma 2 on texts of more than 4,096 tokens. A comparison on short prompts finds no difference, long documents and
# perplexities of long windows do.
#
# Seen: random weights, 32 tokens. With a window of 64 the logits differ by 6e-7 of the largest. With a window of 8, they
# differ by 2e-7 on the first 8 tokens and by 0.37 behind them.
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
from transformers import AutoModelForCausalLM, Gemma2Config

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


wide = differences(Gemma2Config(**SIZES, sliding_window=64, query_pre_attn_scalar=16))
narrow = differences(Gemma2Config(**SIZES, sliding_window=8, query_pre_attn_scalar=16))
print("mlx-lm", mlx_lm.__version__, "mlx", mx.__version__)
print("a window of 64:", wide, "of 8:", narrow)
same = max(wide) < 1e-5 and narrow[0] < 1e-5 and narrow[1] > 0.1
print("behaves as described" if same else "the behaviour has changed")
sys.exit(not same)
PYTHON
