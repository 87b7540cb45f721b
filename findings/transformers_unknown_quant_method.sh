#!/usr/bin/env bash
# transformers 5.24.0 and 4.57.3 (torch 2.13.0, CPU): a folder whose config.json names a quantization method that this
# installation does not know. One would guess: from_pretrained refuses it, as vLLM and llama.cpp's converter do, since it
# cannot read the weights. Really: it warns ("Hence, we will skip the quantization"), takes the packed tensors for
# unexpected ones, fills every quantized layer with fresh random numbers and returns the model; two loads differ. The
# warning advises to delete quantization_config, which changes nothing but that the warning is gone. What does stop it is
# `transformers_weights` in config.json naming no .safetensors file: a ValueError that quotes it. Where users meet it:
# checkpoints of quantizers that register themselves on import (HfQuantizer of another package), of methods newer than the
# installed transformers, or of methods that it has dropped: the model loads and talks nonsense, and a script that only
# looks for exceptions goes on with it.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
cat > "$place/run.py" <<'PY'
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

folder = Path(sys.argv[1])
torch.manual_seed(0)
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(folder)
tensors = load_file(folder / "model.safetensors")
packed = {}
for name, tensor in tensors.items():
    if name.endswith("proj.weight"):
        packed[name + "_codes"] = (tensor * 1000).to(torch.int8)
    else:
        packed[name] = tensor
save_file(packed, folder / "model.safetensors", {"format": "pt"})
config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "of-tomorrow"}}
(folder / "config.json").write_text(json.dumps(config))

print("transformers", transformers.__version__, "torch", torch.__version__)
ids, found = torch.arange(8)[None], []
for seed in (1, 2):
    torch.manual_seed(seed)
    with torch.no_grad():
        found.append(AutoModelForCausalLM.from_pretrained(folder).eval()(ids).logits)
difference = float((found[0] - found[1]).norm() / found[0].norm())
print(f"two loads of one folder differ by {difference:.2f} of the logits; no exception")
(folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "read this first"}))
try:
    AutoModelForCausalLM.from_pretrained(folder)
    stopped = ""
except ValueError as error:
    stopped = str(error)
print("with transformers_weights:", stopped)
sys.exit(0 if difference > 0.1 and stopped.endswith("read this first") else 1)
PY
for version in 5.24.0 4.57.3; do
    python3 -m venv "$place/$version"
    "$place/$version/bin/pip" install -q --disable-pip-version-check torch==2.13.0
    "$place/$version/bin/pip" install -q --disable-pip-version-check "transformers==$version" "numpy<3"
    HF_HUB_OFFLINE=1 "$place/$version/bin/python" "$place/run.py" "$place/folder-$version"
done
