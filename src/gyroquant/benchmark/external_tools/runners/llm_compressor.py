"""Quantizes a model with a recipe of LLM Compressor, saves it as compressed-tensors, and loads it with transformers.

python llm_compressor.py MODEL TOKENS OUT --bits 4 --group-size 64 --seed 0 --settings '{"transform": "SpinQuant"}'
    --report FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent / "shared"))  # python -I does not search the folder of a script

import torch
from compressed_tensors.transform import TransformBase, TransformConfig, apply_transform_config
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.transform import QuIPModifier, SpinQuantModifier
from reloading import Work, by_identity
from transformers import AutoConfig, AutoModelForCausalLM, CompressedTensorsConfig

TRANSFORMS = {"SpinQuant": SpinQuantModifier, "QuIP": QuIPModifier}


def recipe(given: Any) -> list[Any]:
    """The modifiers of a variant, in the order in which they run."""
    weights = {
        "num_bits": given.bits,
        "type": "int",
        "symmetric": given.symmetric,
        "strategy": "channel" if given.group_size == -1 else "group",
        "group_size": None if given.group_size == -1 else given.group_size,
    }
    group = {"targets": ["Linear"], "weights": weights}
    chain = [GPTQModifier(config_groups={"group_0": group}, ignore=["lm_head"])]
    settings = dict(given.settings)
    if "transform" in settings:
        chain.insert(0, TRANSFORMS[settings.pop("transform")](**settings))
    return chain


def attach_online(model: Any, config: Any, stored: dict[str, torch.Tensor]) -> None:
    """Attaches the online transforms to a reloaded model, with the weights from the files.

    transformers reads these transforms and does not apply them. compressed-tensors applies them with random weights,
    which are replaced here.
    """
    schemes = TransformConfig.model_validate(config.quantization_config["transform_config"] or {"config_groups": {}})
    for scheme in schemes.config_groups.values():
        scheme.apply = [place for place in scheme.apply if place.is_online()]  # the others are folded into the weights
    apply_transform_config(model, schemes)
    parameters = dict(model.named_parameters())  # shared parameters are listed once, as in the files
    for name, module in model.named_modules():
        if isinstance(module, TransformBase) and f"{name}.weight" in parameters:
            parameters[f"{name}.weight"].data.copy_(stored[f"{name}.weight"])


def main() -> None:
    """Quantizes, saves, reloads, reports."""
    work = Work(__doc__, ("llmcompressor", "compressed-tensors"))
    given, tokens = work.given, work.tokens
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        processor=work.tokenizer,
        dataset=Dataset.from_dict(rows),
        recipe=recipe(given),
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    work.set_reference(model, "in memory")
    # LLM Compressor computes in fp32; users save 16 bits, and a scale in fp32 would count twice as much
    model.half().save_pretrained(work.files, save_compressed=True)
    work.tokenizer.save_pretrained(work.files)
    work.stop_clock()
    del model

    reloaded = AutoModelForCausalLM.from_pretrained(
        work.files, dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    ).eval()
    attach_online(reloaded, AutoConfig.from_pretrained(work.files), work.stored())
    layers = {}
    for name, layer in reloaded.named_modules():
        if getattr(layer, "quantization_scheme", None):
            layers[name] = by_identity(layer, layer.in_features, layer.bias), layer.bias
    work.finish(reloaded, layers)


if __name__ == "__main__":
    main()
