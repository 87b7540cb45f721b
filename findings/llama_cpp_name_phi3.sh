#!/usr/bin/env bash
# xllamacpp 2026.10.11549 (llama.cpp of October 2026, prebuilt), gguf 0.19.0 to write the files.
# One would guess: general.name in a GGUF file is a label for people. Two files that differ in nothing but their name are
# one model, and cut text into the same tokens.
# Really: llama.cpp searches the name for "phi-3" and "phi3" (and "modern-bert"). Where it finds one, special and added
# tokens swallow all white space behind them, "<think>  a" becomes "<think>a", whatever the architecture and whatever the
# file says of its tokens; and a vocabulary without <|endoftext|> does not open at all any more ("unordered_map::at" or the
# like). With any other name the same bytes open and keep the spaces.
# Who meets it: converters put the folder's name there. A Llama fine-tuned on data called "phi3", a merge or a distillation
# with phi-3 in its name, loses the line breaks behind its chat tokens, or does not load, until it is renamed; and a real
# Phi-3 that was renamed keeps spaces which it was never trained to see.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check xllamacpp==2026.10.11549 gguf==0.19.0
cat > "$place/it.py" <<'PYTHON'
import json
import subprocess
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np


def write(path, name, end):
    rng = np.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "\u2581a", "<think>"]
    types = [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 3]
    if end:
        tokens, types = [*tokens, "<|endoftext|>"], [*types, 3]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    for key, value in {"context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64,
                       "head_count": 2, "head_count_kv": 2, "rope_dimension_count": 32}.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_tensor("token_embd.weight", rng.normal(size=(len(tokens), 64)).astype(np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    for part in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{part}.weight", np.ones(64, np.float32))
    for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        writer.add_tensor(f"blk.0.{part}.weight", rng.normal(size=(64, 64)).astype(np.float32) / 8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if len(sys.argv) > 1:  # in a process of its own: open one file and print how a text is cut
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = sys.argv[1]
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.n_gpu_layers = 64, 1, False, 0
    server = xllamacpp.Server(settings)
    body = json.dumps({"content": "<think>  a", "add_special": False, "parse_special": True}).encode()
    asked = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
    print("TOKENS", json.loads(urllib.request.urlopen(asked).read())["tokens"], flush=True)
    sys.exit()

print({name: version(name) for name in ("xllamacpp", "gguf")})
found = {}
for name, end in (("My model", True), ("My phi3 distillation", True), ("My model", False), ("My phi3 distillation", False)):
    path = Path(__file__).with_name("m.gguf")
    write(path, name, end)
    run = subprocess.run([sys.executable, __file__, str(path)], capture_output=True, text=True, timeout=120)
    lines = [line for line in run.stdout.splitlines() if line.startswith("TOKENS")]
    found[name, end] = lines[0][7:] if lines else None
    complaint = [line for line in run.stderr.splitlines() if "error loading model" in line][:1]
    print(f"name {name!r}, {'with' if end else 'without'} <|endoftext|>: {found[name, end] or 'does not open'} {complaint}")
same = found["My model", True] == found["My model", False] is not None
ok = same and found["My phi3 distillation", True] not in (None, found["My model", True])
sys.exit(not (ok and found["My phi3 distillation", False] is None))
PYTHON
"$place/venv/bin/python" "$place/it.py"
