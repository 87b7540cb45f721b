"""Our files in other versions of the programs that read them: one table, environment by environment.

    python benchmarks/versions_matrix.py                       # makes the environments first, about 8 GB in all
    python benchmarks/versions_matrix.py --envs DIR --only newest --json FILE

Every environment that can run gyroquant quantizes tiny random models (Llama with Llama 3's RoPE, Qwen2 with biases,
Gemma 3) and writes every format; every environment then opens what it wrote itself and what `pinned` wrote. A cell is
the relative difference of the logits from our own in fp32, the largest over the models, or the error. Formats of others
are opened in processes that have no gyroquant, but ONNX and OpenVINO, which our thin wrappers run in fp32. llama.cpp
rounds activations to 8 bits, GPTQModel computes in fp16. PyTorch is 2.13.0 for CPUs throughout.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TORCH = "torch==2.13.0"
OURS = ("scipy", "pydantic>=2.10,<3", "typer", "rich", "pyyaml", "filelock", "accelerate", "numpy>=2")
SHOWN = (
    *("transformers", "torch", "safetensors", "gguf", "compressed-tensors", "onnx", "onnxruntime", "openvino"),
    *("xllamacpp", "mlx", "mlx-lm", "gptqmodel"),
)


@dataclass(frozen=True)
class Environment:
    """Packages, whether gyroquant runs there and writes, and which columns it opens."""

    requirements: tuple[str, ...]
    writes: bool
    reads: tuple[str, ...]
    constrained: bool = False


_RUN = ("packed", "refusal", "dense", "compressed-tensors", "onnx", "openvino")
ENVIRONMENTS = {
    "pinned": Environment(
        (*OURS, "transformers", "gguf", "compressed-tensors", "onnx", "onnxruntime", "openvino", "openvino-tokenizers"),
        writes=True,
        reads=_RUN,
        constrained=True,
    ),
    "oldest": Environment(
        (
            *(*OURS[:-2], "accelerate==1.10.0", "numpy==2.*", "transformers==5.20.0", "gguf==0.17.1"),
            *("compressed-tensors==0.20.0", "onnx==1.19.1", "onnxruntime==1.31.0"),
            *("openvino==2026.2.0", "openvino-tokenizers==2026.2.0.0"),
        ),
        writes=True,
        reads=_RUN,
    ),
    "newest": Environment(
        (
            *(*OURS, "transformers==5.24.0", "gguf==0.19.0", "compressed-tensors==0.20.1", "onnx==1.23.2"),
            *("onnxruntime==1.32.0", "openvino==2026.4.1", "openvino-tokenizers", "xllamacpp==2026.10.11549"),
            *("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2"),
        ),
        writes=True,
        reads=(*_RUN, "gguf", "mlx"),
    ),
    "transformers 4": Environment(
        ("transformers==4.57.3", "accelerate", "compressed-tensors==0.17.1"),
        writes=False,
        reads=("refusal", "dense", "compressed-tensors"),
    ),
    "gptqmodel": Environment(("transformers==5.24.0", "gptqmodel==7.6.0"), writes=False, reads=("gptq",)),
}
_NOTE = 300  # letters of an error
VARIANTS = {f"w{bits}{kind}": (bits, kind == "s") for bits in (4, 3, 2) for kind in "sa"}
COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_hidden_layers": 2, "tie_word_embeddings": False, "rope_parameters": LLAMA3}),
    "qwen2": (
        "Qwen2Config",
        {"num_hidden_layers": 2, "tie_word_embeddings": True}
        | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e5}},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {"num_hidden_layers": 6, "query_pre_attn_scalar": 32, "sliding_window": 16, "tie_word_embeddings": True}
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            }
        },
    ),
}
COLUMNS = {  # column -> format, variants and the way in which it is opened
    "packed": ("packed", tuple(VARIANTS), "packed"),
    "packed, no gyroquant": ("packed", ("w4s",), "refusal"),
    "dense": ("dense", ("w4s",), "dense"),
    **{f"ct {name}": ("compressed-tensors", (name,), "compressed-tensors") for name in VARIANTS},
    "gptq w4s": ("gptq", ("w4s",), "gptq"),
    "gptq w3a": ("gptq", ("w3a",), "gptq"),
    "onnx": ("onnx", ("w4s", "w3a", "w2a"), "onnx"),
    "openvino": ("openvino", ("w4s", "w3a", "w2a"), "openvino"),
    "gguf": ("gguf", ("w4s", "w3a"), "gguf"),
    "mlx: dense": ("dense", ("w4s",), "mlx"),
    "mlx: gptq w4s": ("gptq", ("w4s",), "mlx"),
    "mlx: ct w4s": ("compressed-tensors", ("w4s",), "mlx"),
    "mlx: packed": ("packed", ("w4s",), "mlx"),
}


# --- in the environments -------------------------------------------------------------------------------------------


def write(place: Path) -> None:
    """Quantizes the tiny models and writes every format that the columns ask for, with our own logits beside them."""
    import torch

    import gyroquant as gq
    from gyroquant.models.stores.source import open_model

    formats = {(kind, name) for kind, names, _ in COLUMNS.values() for name in names if kind != "packed"}
    for model_name in MODELS:
        folder = place / model_name
        model, tokenizer, ids = _model(model_name)
        folder.mkdir(parents=True)
        (folder / "ids.json").write_text(json.dumps(ids))
        for name, (bits, symmetric) in VARIANTS.items():
            weights = {"bits": bits, "group_size": 32, "symmetric": symmetric, "scale": "minmax", "solver": "rtn"}
            recipe = {"name": name, "weights": weights, "proof": {"seqlen": 16}}
            packed = folder / f"packed-{name}"
            gq.quantize(
                model, recipe, None, packed, tokenizer=tokenizer, options=gq.OutputOptions(save_dtype="float32")
            )
            store = open_model(packed)  # which reads without transformers' way to load a model
            plain = deepcopy(model)
            plain.load_state_dict(store.read(store.shapes), strict=False)
            with torch.no_grad():
                logits = plain(torch.tensor([ids])).logits[0]
            torch.save(logits, folder / f"{name}.pt")
            for kind, asked in sorted(formats):
                if asked == name:
                    try:
                        gq.export(packed, kind, folder / f"{kind}-{name}", check=False)
                    except Exception as error:
                        (folder / f"{kind}-{name}.refused").write_text(_line(error))


def _model(name: str) -> tuple[Any, Any, list[int]]:
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    kind, settings = MODELS[name]
    config = getattr(transformers, kind)(**(COMMON | settings))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            small = 0.3 * noise + (1.0 if "norm" in key and not name.startswith("gemma") else 0.0)
            parameter.copy_(small if parameter.dim() == 1 else noise * parameter.shape[-1] ** -0.5)
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    words = " ".join(f"{i * i}{chr(97 + i % 26)}{chr(97 + i % 7)}" for i in range(3000))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 512, "show_progress": False, "initial_alphabet": alphabet}
    raw.train_from_iterator([words], trainers.BpeTrainer(special_tokens=["<pad>", "<s>", "</s>"], **options))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    ids = torch.randint(3, 512, (48,), generator=generator).tolist()
    return model, tokenizer, ids


def _transformers(folder: Path, ids: list[int]) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ValueError("it opens with other tensors than it holds")
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0]


def _packed(folder: Path, ids: list[int]) -> Any:
    import gyroquant  # noqa: F401  (registers the quantizer)

    return _transformers(folder, ids)


def _gptqmodel(folder: Path, ids: list[int]) -> Any:
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH).model.float().eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def _through_us(kind: str) -> Callable[[Path, list[int]], Any]:
    def opened(folder: Path, ids: list[int]) -> Any:
        import torch

        from gyroquant.formats.runtime import open_runtime

        return open_runtime(kind, folder, True).logits(torch.tensor(ids))

    return opened


def _mlx(folder: Path, ids: list[int]) -> Any:
    import mlx.core as mx
    import torch
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return torch.tensor(model(mx.array([ids]))[0].tolist())


def _llama_cpp(folder: Path, ids: list[int]) -> Any:
    """Log-probabilities of the token after the last one."""
    import torch
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.n_ctx, params.n_batch, params.n_ubatch, params.warmup = 512, 64, 1, False
    params.n_parallel, params.cpuparams.n_threads, params.verbosity = 1, 1, 0
    words = COMMON["vocab_size"]
    asked = {"prompt": ids, "n_predict": 1, "n_probs": words, "logprobs": words, "temperature": 1.0, "samplers": []}
    server, found = xllamacpp.Server(params), torch.full((words,), float("nan"))
    for seed in range(8):  # a token that ends the text comes without them
        answer = server.handle_completions(asked | {"cache_prompt": False, "seed": seed})
        if answer["choices"][0]["logprobs"] is not None:
            break
    for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[entry["id"]] = entry["logprob"]
    return found


READERS: dict[str, Callable[[Path, list[int]], Any]] = {
    **{"packed": _packed, "refusal": _transformers, "dense": _transformers, "compressed-tensors": _transformers},
    **{"gptq": _gptqmodel, "onnx": _through_us("onnx"), "openvino": _through_us("openvino")},
    **{"gguf": _llama_cpp, "mlx": _mlx},
}


def read(way: str, place: Path, out: Path) -> None:
    """Opens every folder that the columns of this way name; writes what came of each, by column and model."""
    import torch

    found: dict[str, dict[str, Any]] = {}
    for column, (kind, names, opened) in COLUMNS.items():
        if opened != way:
            continue
        for model in MODELS:
            for name in names:
                folder = place / model / f"{kind}-{name}"
                refused = folder.with_name(f"{folder.name}.refused")
                if refused.exists():
                    found.setdefault(column, {})[f"{model} {name}"] = {"refused": refused.read_text()}
                    out.write_text(json.dumps(found))
                    continue
                ids = json.loads((place / model / "ids.json").read_text())
                expected = torch.load(place / model / f"{name}.pt")
                try:
                    logits = READERS[way](folder, ids)
                    if logits.dim() == 1:
                        expected = expected[-1].log_softmax(-1)
                    error = float((logits.float() - expected).norm() / expected.norm())
                    entry: dict[str, Any] = {"difference": error}
                except Exception as error:
                    entry = {"error": _line(error)}
                found.setdefault(column, {})[f"{model} {name}"] = entry
                out.write_text(json.dumps(found))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]


# --- around them ---------------------------------------------------------------------------------------------------


def make(name: str, envs: Path) -> Path:
    """The interpreter of an environment, made where it is missing or of other requirements."""
    environment, place = ENVIRONMENTS[name], envs / name.replace(" ", "-")
    python, ready = place / "bin" / "python", place / "ready"
    wanted = "\n".join([TORCH, *environment.requirements])
    if environment.constrained:
        wanted += "\n" + (ROOT / "constraints.txt").read_text()
    if ready.exists() and ready.read_text() == wanted:
        return python
    print(f"making {place}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", place], check=True)
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, TORCH, "setuptools", "wheel"], check=True)
    limits = ["-c", ROOT / "constraints.txt"] if environment.constrained else []
    subprocess.run([*install, TORCH, *environment.requirements, *limits], check=True)
    ready.write_text(wanted)
    return python


def work(python: Path, *command: str, ours: bool, limit: int = 1800) -> str | None:
    """Runs a part of this file in an environment; returns the end of what it said when it failed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if ours:
        environment["PYTHONPATH"] = str(ROOT / "src")
    done = subprocess.run(
        [python, __file__, *command], env=environment, capture_output=True, text=True, errors="replace", timeout=limit
    )
    return None if done.returncode == 0 else f"status {done.returncode}: {done.stderr.strip()[-500:]}"


def versions(python: Path) -> dict[str, str]:
    """The installed versions of what matters here."""
    code = "import importlib.metadata as m, json; print(json.dumps({d.metadata['Name'].lower().replace('_', '-'): "
    code += "d.version for d in m.distributions()}))"
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {name: found[name] for name in SHOWN if name in found}


def opened(python: Path, reader: str, place: Path) -> dict[str, Any]:
    """What came of each column in an environment, with the files of a place."""
    found: dict[str, Any] = {}
    for way in ENVIRONMENTS[reader].reads:
        out = place / f"{reader.replace(' ', '-')}-{way}.json"
        out.unlink(missing_ok=True)
        died = work(python, "--read", way, str(place), str(out), ours=way in ("packed", "onnx", "openvino"))
        part = json.loads(out.read_text()) if out.exists() else {}
        for column in (column for column, (_, _, through) in COLUMNS.items() if through == way):
            found[column] = part.get(column, {}) | ({"process": {"error": died}} if died else {})
        print(f"{reader}: {way}", file=sys.stderr, flush=True)
    return found


def cell(column: str, entries: dict[str, Any] | None, notes: list[str]) -> str:
    """A column's entries as one word; what does not fit into it goes among the notes."""
    if entries is None:
        return ""
    differences = [one["difference"] for one in entries.values() if "difference" in one]
    said = [f"{max(differences):.0e}"] if differences else []
    for state in ("refused", "error"):
        why: dict[str, list[tuple[str, str]]] = {}
        for name, one in entries.items():
            if state in one:
                why.setdefault(one[state].partition(":")[0], []).append((name, one[state]))
        for found in why.values():  # errors of one kind differ in the names of layers: the first stands for them
            text = found[0][1] if len(found[0][1]) < _NOTE else f"{found[0][1][:_NOTE]} ..."
            note = f"`{column}`, {', '.join(name for name, _ in found)}: {text}"
            if note not in notes:
                notes.append(note)
            said.append(f"{'not written' if state == 'refused' else 'stops'} [{notes.index(note) + 1}]")
    return ", ".join(said) or "-"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Columns one below the other, environments side by side, notes behind."""
    notes: list[str] = []
    lines = ["| | " + " | ".join(rows) + " |", "|---|" + "--:|" * len(rows)]
    for column in COLUMNS:
        cells = [cell(column, row.get(column), notes) for row in rows.values()]
        lines.append(f"| {column} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {note}" for i, note in enumerate(notes, 1))])


def run(names: Iterable[str], envs: Path, scratch: Path) -> dict[str, Any]:
    """Makes, writes and opens; returns the versions and what came of everything."""
    pythons = {name: make(name, envs) for name in names}
    result: dict[str, Any] = {"versions": {name: versions(python) for name, python in pythons.items()}, "opened": {}}
    for name, python in pythons.items():
        if ENVIRONMENTS[name].writes:
            failed = work(python, "--write", str(scratch / name), ours=True)
            if failed:
                raise SystemExit(f"{name} cannot write: {failed}")
            print(f"{name} has written", file=sys.stderr, flush=True)
    for reader, python in pythons.items():
        for writer in dict.fromkeys((reader, "pinned")):
            if (scratch / writer).exists():
                title = reader if writer == reader else f"{reader} ← {writer}"
                result["opened"][title] = opened(python, reader, scratch / writer)
    return result


def main() -> None:
    """Prints the table and the versions."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "gyroquant" / "versions")
    parser.add_argument(
        "--only", nargs="*", choices=ENVIRONMENTS, help="these environments, `pinned` always among them"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--read", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.write is not None:
        write(asked.write)
    elif asked.read is not None:
        read(asked.read[0], Path(asked.read[1]), Path(asked.read[2]))
    else:
        names = [name for name in ENVIRONMENTS if name in {"pinned", *(asked.only or ENVIRONMENTS)}]
        with tempfile.TemporaryDirectory() as scratch:
            result = run(names, asked.envs.expanduser().absolute(), Path(scratch))
        print(table(result["opened"]) + "\n")
        for name, found in result["versions"].items():
            print(f"- {name}: Python {platform.python_version()}, " + ", ".join(f"{k} {v}" for k, v in found.items()))
        if asked.json is not None:
            asked.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
