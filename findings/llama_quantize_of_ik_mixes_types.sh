#!/usr/bin/env bash
# ik-llama-cpp-python 0.1.5 (the program llama-quantize of ik_llama.cpp in a wheel) with gguf 0.19.0.
# One would guess: a file that is asked for as IQ4_XS, IQ3_M or Q5_K_M, types that llama.cpp has under the same names,
# holds types that llama.cpp reads, as the files of llama.cpp's own program do.
# Really: some tensors get types that only the fork knows. With two queries for each head of values, IQ4_XS and IQ3_M write
# every attn_v as IQ5_K (140), and IQ3_M every attn_output as IQ4_K (139). Where 256 does not divide a row, Q5_K_M falls back
# to Q6_0 (133), where llama.cpp takes Q5_1. The program ends with status 0. llama.cpp and the gguf package
# do not open such files, which say file type IQ4_XS, IQ3_M or Q5_K_M in their metadata.
# Who meets it: whoever makes GGUF files on a machine without a compiler, where this is the only quantizer in a wheel, and
# hands them to someone who runs llama.cpp.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check \
  ik-llama-cpp-python==0.1.5 gguf==0.19.0 numpy==2.4.6 2> /dev/null
cat > "$place/it.py" <<'PYTHON'
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import gguf
import ik_llama_cpp
import numpy as np

PROGRAM = Path(ik_llama_cpp.__file__).parent / "bin" / "llama-quantize"
KNOWN = {int(kind) for kind in gguf.GGMLQuantizationType}


def write(path, width):
    """A model of the architecture llama, two queries for each head of keys and values, in fp16."""
    rng, half = np.random.default_rng(0), width // 2
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"context_length": 64, "embedding_length": width, "block_count": 2, "feed_forward_length": width,
                       "head_count": 4, "head_count_kv": 2, "file_type": 1}.items():
        getattr(writer, f"add_{key}")(value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(97 + i) for i in range(26)])
    writer.add_token_types([1] * 26)
    writer.add_token_merges(["a b"])
    shapes = {"attn_q": (width, width), "attn_k": (half, width), "attn_v": (half, width), "attn_output": (width, width),
              "ffn_gate": (width, width), "ffn_up": (width, width), "ffn_down": (width, width)}
    writer.add_tensor("token_embd.weight", rng.normal(size=(26, width)).astype(np.float16))
    writer.add_tensor("output.weight", rng.normal(size=(26, width)).astype(np.float16))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for block in range(2):
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{block}.{part}.weight", np.ones(width, np.float32))
        for part, shape in shapes.items():
            writer.add_tensor(f"blk.{block}.{part}.weight", (rng.normal(size=shape) / 16).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types(path):
    """The numbers of the tensors' types, by name, read without a list of types."""
    data, at = memoryview(path.read_bytes()), 24
    def number(kind):
        nonlocal at
        size = np.dtype(kind).itemsize
        at += size
        return int(np.frombuffer(data[at - size : at], kind)[0])
    def text():
        nonlocal at
        length = number("<u8")
        at += length
        return bytes(data[at - length : at]).decode()
    sizes = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    def skip(kind):
        nonlocal at
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = number("<u4"), number("<u8")
            for _ in range(count):
                skip(inner)
        else:
            at += sizes[kind]
    tensors, keys = (int(n) for n in np.frombuffer(data[8:24], "<u8"))
    for _ in range(keys):
        text()
        skip(number("<u4"))
    found = {}
    for _ in range(tensors):
        name, dims = text(), number("<u4")
        at += 8 * dims
        found[name] = number("<u4")
        at += 8
    return found


print({name: version(name) for name in ("ik-llama-cpp-python", "gguf")})
foreign = {}
for width, kind in ((256, "IQ4_XS"), (256, "IQ3_M"), (160, "Q5_K_M"), (256, "Q4_K_M")):
    source, target = Path(f"{sys.argv[1]}/plain.gguf"), Path(f"{sys.argv[1]}/{kind}.gguf")
    write(source, width)
    subprocess.run([PROGRAM, source, target, kind], check=True, capture_output=True)
    unknown = {name.split(".")[-2]: number for name, number in types(target).items() if number not in KNOWN}
    foreign[kind] = unknown
    try:
        gguf.GGUFReader(target)
        opens = "opens"
    except ValueError as error:
        opens = f"does not open: {error}"
    print(f"{kind}, rows of {width}: status 0, types that gguf does not know {unknown}; the gguf package {opens}")
as_stated = (foreign["IQ4_XS"].get("attn_v") == 140 and foreign["IQ3_M"].get("attn_v") == 140
             and foreign["IQ3_M"].get("attn_output") == 139 and 133 in foreign["Q5_K_M"].values()
             and not foreign["Q4_K_M"])
sys.exit(not as_stated)
PYTHON
"$place/venv/bin/python" "$place/it.py" "$place"
