#!/usr/bin/env bash
# transformers 5.23.0 with gguf 0.19.0 and torch 2.13.0, held against xllamacpp 2026.10.11549 (llama.cpp of October 2026).
# One would guess: AutoTokenizer.from_pretrained(..., gguf_file=...) gives the tokenizer of the file: a text becomes the
# tokens that llama.cpp makes of it, or there is an error for what is not supported.
# Really: (1) sentencepiece files (tokenizer.ggml.model "llama"): llama.cpp puts a space before a text behind every special
# token, transformers only at the start. (2) Byte-level files name their way to cut out words (tokenizer.ggml.pre):
# transformers knows some of these names and cuts all others (stablelm2, glm4, chatglm-bpe, hunyuan, starcoder, smollm,
# ...) like GPT-2, without a word. (3) "llama-bpe" and "tekken" start a text with BOS unless the file says no;
# transformers puts none there unless the file says yes.
# Who meets it: quantizers and evaluations that calibrate on a GGUF file's own tokenizer, and chats: every turn behind a
# special token starts with another token than the model was trained on.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 2> /dev/null
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
  transformers==5.23.0 gguf==0.19.0 xllamacpp==2026.10.11549 2> /dev/null
cat > "$place/it.py" <<'PYTHON'
import json
import subprocess
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np

TEXTS = {
    "special": ["<think>a", "a<think>b"],
    "words": ["it's 12 IT'S\n\nx", "12345"],
}


def write(path, tokens, types, **fields):
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"context_length": 64, "embedding_length": 64, "block_count": 1, "feed_forward_length": 64,
                       "head_count": 2, "head_count_kv": 2}.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_name("it")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in fields.items():
        getattr(writer, f"add_{key}")(value)
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


def pieces(path):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", "a", "b", "\u2581a", "\u2581b"]
    types = [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1, 3]
    write(path, [*tokens, "<think>"], types, tokenizer_model="llama", tokenizer_pre="default",
          token_scores=[-float(i) for i in range(len(tokens) + 1)])


def byte_level(path, pre):
    """Merges that run across words, so that every way to cut them out shows."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [("1", "2"), ("12", "3"), ("'", "S"), ("T", "'S"), ("\u010a", "\u010a"), ("\u010a\u010a", "x"), ("4", "5")]
    tokens = ["<s>", "</s>", *letters, *(a + b for a, b in merges)]
    write(path, tokens, [3, 3, *[1] * (len(tokens) - 2)], tokenizer_model="gpt2", tokenizer_pre=pre,
          token_merges=[" ".join(pair) for pair in merges], bos_token_id=0, eos_token_id=1)


if len(sys.argv) > 1:  # in a process of its own: what llama.cpp makes of the texts
    import xllamacpp

    settings = xllamacpp.CommonParams()
    settings.model.path = sys.argv[1]
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.n_gpu_layers = 64, 1, False, 0
    server = xllamacpp.Server(settings)
    for text in json.loads(sys.argv[2]):
        body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
        asked = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
        print("TOKENS", json.dumps(json.loads(urllib.request.urlopen(asked).read())["tokens"]), flush=True)
    sys.exit()

from transformers import AutoTokenizer

print({name: version(name) for name in ("transformers", "xllamacpp", "gguf", "torch")})
path = Path(__file__).with_name("m.gguf")
differ = {}
for label in ("sentencepiece", "stablelm2", "glm4", "smollm", "llama-bpe", "gpt-2", "qwen2"):
    texts = TEXTS["special" if label == "sentencepiece" else "words"]
    pieces(path) if label == "sentencepiece" else byte_level(path, label)
    run = subprocess.run([sys.executable, __file__, str(path), json.dumps(texts)], capture_output=True, text=True)
    theirs = [json.loads(line[7:]) for line in run.stdout.splitlines() if line.startswith("TOKENS")]
    read = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    differ[label] = 0
    assert len(theirs) == len(texts), run.stderr[-2000:]
    for text, wanted in zip(texts, theirs):
        found = read(text)["input_ids"]
        if found != wanted:
            differ[label] += 1
            print(f"{label}: {text!r} is {read.convert_ids_to_tokens(wanted)} in llama.cpp, "
                  f"{read.convert_ids_to_tokens(found)} in transformers")
print(differ)
alike = {"gpt-2", "qwen2"}
sys.exit(not all((count == 0) == (label in alike) for label, count in differ.items()))
PYTHON
"$place/venv/bin/python" "$place/it.py"
