"""Rounds a GGUF file with ik_llama.cpp's quantizer, with --imatrix by the mean squares of every layer's inputs.

Run with the interpreter of its environment: python -I ik_llama_cpp.py --model FOLDER --tokens FILE --plain FILE
--kind TYPE [--imatrix] --out FILE --dense FILE --report FILE. Never imports gyroquant.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import re
import resource
import struct
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

START = time.perf_counter()
CHECKED = 32  # tokens on which the decoded weights are compared
REASON = re.compile("fail|error|invalid|Please", re.IGNORECASE)  # in the lines that say why the program ends


def arguments() -> argparse.Namespace:
    """The arguments of the script."""
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "plain", "out", "dense", "report"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--imatrix", action="store_true")
    return parser.parse_args()


def peak_memory() -> int:
    """The peak resident memory of this process so far, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def peak_of_program() -> int:
    """The largest peak resident memory of the programs that this process has run, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def mean_squares(folder: Path, tokens: Any) -> dict[str, Any]:
    """The mean square of every input channel of the blocks' linear layers, by llama.cpp's names of the weights."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    sums: dict[str, Any] = {}

    def add_squares(name: str) -> Any:
        def hook(_: Any, inputs: Any) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

        return hook

    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(add_squares(names.get_name(f"{name}.weight", (".weight",))))
    with torch.no_grad():
        for row in tokens:
            model.model(row[None], use_cache=False)
    return {name: (total / tokens.numel()).float().numpy() for name, total in sums.items()}


def write_imatrix(squares: dict[str, Any], path: Path) -> None:
    """Writes mean squares as llama.cpp's tool `llama-imatrix` does: for each name the counts of runs and values."""
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(squares)))
        for name, values in squares.items():
            text = name.encode()
            file.write(struct.pack(f"<i{len(text)}sii", len(text), text, 1, values.size) + values.tobytes())


def program() -> str:
    """The program llama-quantize of the package, which is found without loading the package's library."""
    (folder,) = importlib.util.find_spec("ik_llama_cpp").submodule_search_locations
    return str(Path(folder) / "bin" / "llama-quantize")


def rewrite(source: Path, target: Path, kind: str, *options: str) -> None:
    """Writes a GGUF file again with another type. What the program says is printed.

    Embedding and head get the types that the program's defaults say.
    """
    command = [program(), "--allow-requantize", *options, str(source), str(target), kind, "1"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    print(done.stdout)
    if done.returncode:
        reasons = [line for line in done.stdout.splitlines() if REASON.search(line)]
        raise SystemExit(f"llama-quantize cannot write {kind}: {' '.join(reasons) or f'status {done.returncode}'}")


def reload_error(path: Path, tokens: Any) -> float:
    """The relative error of logits between transformers and ik_llama.cpp, both in fp32 with the weights of `path`.

    The fork's KV cache is in fp16.
    """
    import numpy as np
    import torch
    from ik_llama_cpp import _internals as library
    from transformers import AutoModelForCausalLM

    ids = tokens[0, :CHECKED]
    opened = library.IkModel(str(path))
    context = library.IkContext(opened, n_ctx=max(CHECKED, 256), n_threads=1, flash_attn=False)
    batch = library.make_batch_range(ids.tolist())
    for i in range(len(ids)):
        batch.logits[i] = 1
    if context.decode(batch):
        raise SystemExit("ik_llama.cpp does not run the decoded file")
    rows = [np.ctypeslib.as_array(context.get_logits(i), (opened.n_vocab,)).copy() for i in range(len(ids))]
    expected = torch.from_numpy(np.stack(rows)).double()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids[None]).logits[0].double()
    return float((logits - expected).norm() / expected.norm())


def main() -> None:
    """Quantizes, decodes, compares, reports."""
    given = arguments()
    from safetensors.torch import load_file

    tokens = load_file(given.tokens)["tokens"]
    options = []
    if given.imatrix:
        measured = given.report.with_name("imatrix.dat")
        write_imatrix(mean_squares(given.model, tokens), measured)
        options = ["--imatrix", str(measured), "--hide-imatrix"]
    rewrite(given.plain, given.out, given.kind, *options)
    seconds, peak = time.perf_counter() - START, max(peak_memory(), peak_of_program())
    plain = ("--token-embedding-type", "f32", "--output-tensor-type", "f32")
    rewrite(given.out, given.dense, "F32", *plain)
    versions = {name: version(name) for name in ("ik-llama-cpp-python", "gguf", "torch", "transformers")}
    report = {
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "reload_error": reload_error(given.dense, tokens),
        "versions": versions | {"python": platform.python_version()},
    }
    given.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
