"""Has llama.cpp's quantizer round a GGUF file, with the mean squares of every layer's inputs if asked.

Run with the interpreter of llama.cpp's environment: python -I llama_cpp.py --model FOLDER --tokens FILE --plain FILE
--kind TYPE [--imatrix] --out FILE --dense FILE --report FILE. Never imports gyroquant.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

START = time.perf_counter()
CHECKED = 32  # tokens that what is read back is compared on


def arguments() -> argparse.Namespace:
    """What the script was told."""
    parser = argparse.ArgumentParser()
    for name in ("model", "tokens", "plain", "out", "dense", "report"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--kind", required=True)
    parser.add_argument("--imatrix", action="store_true")
    return parser.parse_args()


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def squares(folder: Path, tokens: Any) -> dict[str, Any]:
    """The mean square of every input of the blocks' linear layers over all tokens, by llama.cpp's names of weights."""
    import gguf
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    sums: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, inputs: Any) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

        return hook

    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(watch(names.get_name(f"{name}.weight", (".weight",))))
    with torch.no_grad():
        for row in tokens:
            model.model(row[None], use_cache=False)
    return {name: (total / tokens.numel()).float().numpy() for name, total in sums.items()}


def matrix(library: Any, found: dict[str, Any]) -> Any:
    """Arrays by name as llama.h has them: a list that ends with a nameless one. Holds the arrays' memory."""
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [(name.encode(), one.ctypes.data_as(pointer), one.size) for name, one in found.items()]
    return (library.llama_model_imatrix_data * (len(entries) + 1))(*entries)


def rewrite(library: Any, complaints: list[str], source: Path, target: Path, kind: str, data: Any = None) -> None:
    """Writes a GGUF file again with its blocks in another type; embedding and head stay plain."""
    settings = library.llama_model_quantize_default_params()
    settings.ftype = 0 if kind == "F32" else getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.allow_requantize = True
    settings.token_embedding_type = settings.output_tensor_type = library.GGML_TYPE_F32
    if data is not None:
        settings.imatrix = data
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp does not write {kind}: {' '.join(complaints)}")


def listen(library: Any) -> tuple[list[str], Any]:
    """Collects what llama.cpp complains of, and prints everything that it says into the log."""
    complaints: list[str] = []

    def said(level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace")
        if level == 4:
            complaints.append(line.strip())
        sys.stdout.write(line)

    callback = library.llama_log_callback(said)
    library.llama_log_set(callback, ctypes.c_void_p(0))
    return complaints, callback


def reload_error(library: Any, path: Path, tokens: Any) -> float:
    """The relative error of logits between transformers and llama.cpp, both in fp32 with the weights of `path`."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = tokens[0, :CHECKED]
    plain = {"type_k": library.GGML_TYPE_F32, "type_v": library.GGML_TYPE_F32, "flash_attn": False}
    ours = library.Llama(str(path), n_ctx=CHECKED, logits_all=True, n_gpu_layers=0, verbose=True, **plain)
    ours.eval(ids.tolist())
    expected = torch.from_numpy(ours.scores[: len(ids)]).double()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        found = model(ids[None]).logits[0].double()
    return float((found - expected).norm() / expected.norm())


def main() -> None:
    """Quantizes, decodes, compares, reports."""
    given = arguments()
    import llama_cpp as library
    from safetensors.torch import load_file

    tokens = load_file(given.tokens)["tokens"]
    complaints, _callback = listen(library)
    library.llama_backend_init()
    found = squares(given.model, tokens) if given.imatrix else {}
    data = matrix(library, found) if found else None
    rewrite(library, complaints, given.plain, given.out, given.kind, data)
    seconds, peak = time.perf_counter() - START, peak_memory()
    rewrite(library, complaints, given.out, given.dense, "F32")
    versions = {name: version(name) for name in ("llama-cpp-python", "gguf", "torch", "transformers")}
    report = {
        "seconds": seconds,
        "peak_memory_bytes": peak,
        "reload_error": reload_error(library, given.dense, tokens),
        "versions": versions | {"python": platform.python_version()},
    }
    given.report.write_text(json.dumps(report))


if __name__ == "__main__":
    main()
