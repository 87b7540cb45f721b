"""Rounds a GGUF file with llama.cpp's quantizer, with --imatrix by the mean squares of every layer's inputs.

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
CHECKED = 32  # tokens on which the decoded weights are compared


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


def imatrix(library: Any, squares: dict[str, Any]) -> Any:
    """Arrays by name as llama.h needs them: a list that ends with an entry without a name.

    The list points into the memory of `squares`, which has to stay alive.
    """
    pointer = ctypes.POINTER(ctypes.c_float)
    entries = [(name.encode(), values.ctypes.data_as(pointer), values.size) for name, values in squares.items()]
    return (library.llama_model_imatrix_data * (len(entries) + 1))(*entries)


def rewrite(library: Any, errors: list[str], source: Path, target: Path, kind: str, data: Any = None) -> None:
    """Writes a GGUF file again with another type. Embedding and head get the types that llama.cpp's defaults say."""
    settings = library.llama_model_quantize_default_params()
    settings.ftype = 0 if kind == "F32" else getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.allow_requantize = True
    if kind == "F32":
        settings.token_embedding_type = settings.output_tensor_type = library.GGML_TYPE_F32
    if data is not None:
        settings.imatrix = data
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp cannot write {kind}: {' '.join(errors)}")


def collect_errors(library: Any) -> tuple[list[str], Any]:
    """A list to which llama.cpp adds its errors, and the callback that does it. All messages are printed, too."""
    errors: list[str] = []

    def log(level: int, text: bytes, _: Any) -> None:
        line = text.decode(errors="replace")
        if level == 4:
            errors.append(line.strip())
        sys.stdout.write(line)

    callback = library.llama_log_callback(log)
    library.llama_log_set(callback, ctypes.c_void_p(0))
    return errors, callback


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
        logits = model(ids[None]).logits[0].double()
    return float((logits - expected).norm() / expected.norm())


def main() -> None:
    """Quantizes, decodes, compares, reports."""
    given = arguments()
    import llama_cpp as library
    from safetensors.torch import load_file

    tokens = load_file(given.tokens)["tokens"]
    errors, _callback = collect_errors(library)
    library.llama_backend_init()
    squares = mean_squares(given.model, tokens) if given.imatrix else {}
    data = imatrix(library, squares) if squares else None
    rewrite(library, errors, given.plain, given.out, given.kind, data)
    seconds, peak = time.perf_counter() - START, peak_memory()
    rewrite(library, errors, given.out, given.dense, "F32")
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
