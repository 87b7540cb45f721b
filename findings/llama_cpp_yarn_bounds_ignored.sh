#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (llama.cpp of October 2026, prebuilt), gguf 0.19.0 to write the files.
# One would guess: llama.cpp's converter writes YaRN's beta_fast, beta_slow and attention_factor of a model into keys of
# their own (rope.scaling.yarn_beta_fast, yarn_beta_slow, yarn_attn_factor), so llama.cpp reads them: a Llama, Qwen2 or
# Qwen3 whose config.json sets them runs as it was trained.
# Really: two architectures read these keys (mistral3 and grok). For llama, qwen2 and qwen3 the file loads without a word,
# and YaRN runs between 32 and 1 turns with an attention factor of 1 + 0.1 ln(factor), whatever the keys say: logits are
# the same to the last digit. rope.scaling.attn_factor, which the converter writes for LongRoPE only, is read by all.
# Who meets it: checkpoints whose rope_parameters give beta_fast, beta_slow or attention_factor: the converted file is
# right on nothing but its name, and who reads it back by the keys gets a third model.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0 2> /dev/null
cat > "$place/it.py" <<'PYTHON'
import json
import subprocess
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np

YARN = {"rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 0.25, "rope.scaling.yarn_attn_factor": 0.5}


def write(path, name, more):
    rng = np.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    writer = gguf.GGUFWriter(path, name)
    for key, value in {"context_length": 512, "embedding_length": 128, "block_count": 2, "feed_forward_length": 128,
                       "head_count": 2, "head_count_kv": 2, "key_length": 64, "value_length": 64}.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(8.0)
    writer.add_rope_scaling_orig_ctx_len(64)
    for key, value in more.items():
        writer.add_float32(f"{name}.{key}", value)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3, *[6] * 256])
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_tensor("token_embd.weight", rng.normal(size=(len(tokens), 128)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(128, np.float32))
    for block in ("blk.0", "blk.1"):
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}.{part}.weight", np.ones(128, np.float32))
        if name == "qwen3":
            for part in ("attn_q_norm", "attn_k_norm"):
                writer.add_tensor(f"{block}.{part}.weight", np.ones(64, np.float32))
        for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
            writer.add_tensor(f"{block}.{part}.weight", rng.normal(size=(128, 128)).astype(np.float32) / 11)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if len(sys.argv) > 1:  # in a process of its own: the most likely next tokens with their log probabilities
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = sys.argv[1]
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.n_gpu_layers = 512, 1, False, 0
    server = xllamacpp.Server(settings)
    prompt = np.random.default_rng(1).integers(3, 259, 200).tolist()
    body = {"prompt": prompt, "n_predict": 1, "n_probs": 50, "temperature": 1.0, "seed": 1, "cache_prompt": False}
    asked = urllib.request.Request(
        server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    top = json.loads(urllib.request.urlopen(asked).read())["completion_probabilities"][0]["top_logprobs"]
    print("FOUND", json.dumps({str(one["id"]): one["logprob"] for one in top}), flush=True)
    sys.exit()

print({name: version(name) for name in ("xllamacpp", "gguf")})
ok = True
for name in ("llama", "qwen3"):
    found = {}
    for label, more in (("plain", {}), ("keys of YaRN", YARN), ("attn_factor", {"rope.scaling.attn_factor": 0.5})):
        path = Path(__file__).with_name("m.gguf")
        write(path, name, more)
        run = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, timeout=120)
        (line,) = [line for line in run.stdout.splitlines() if line.startswith("FOUND")]
        found[label] = json.loads(line[6:])
    for label in ("keys of YaRN", "attn_factor"):
        shared = found["plain"].keys() & found[label].keys()
        largest = max(abs(found["plain"][key] - found[label][key]) for key in shared)
        print(f"{name}, {label}: log probabilities differ by {largest:.2g} from those without ({len(shared)} shared)")
        ok &= (largest == 0 and len(shared) == 50) == (label == "keys of YaRN")
sys.exit(not ok)
PYTHON
"$place/venv/bin/python" "$place/it.py"
