"""A GPTQ checkpoint in GPTQModel, beside the same weights as plain ones in transformers.

    ENVIRONMENT/bin/python benchmarks/gptq_in_gptqmodel.py DENSE GPTQ

With the interpreter of an environment that has gptqmodel; DENSE and GPTQ are exports of one folder (`gyroquant export
OUT DENSE --format dense`, and gptq). Prints the relative error of the logits on 64 tokens. GPTQModel computes in fp16.
"""

import sys

import torch
from gptqmodel import BACKEND, GPTQModel
from transformers import AutoModelForCausalLM


def main() -> None:
    """Opens both and prints how far they are from each other."""
    ids = torch.arange(1000, 1064)[None]
    plain = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
    packed = GPTQModel.load(sys.argv[2], device="cpu", backend=BACKEND.TORCH).model.float()
    with torch.no_grad():
        expected, found = (model.eval()(ids).logits.float() for model in (plain, packed))
    print(f"relative logit error {float((found - expected).norm() / expected.norm()):.1e}")


if __name__ == "__main__":
    main()
