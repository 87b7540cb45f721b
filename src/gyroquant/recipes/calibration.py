"""The sections of a recipe about text: which windows a run sees, and how many of them the proof takes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_STRICT = ConfigDict(extra="forbid", frozen=True)
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]
"""The seed of a random generator."""


class Calibration(BaseModel):
    """The calibration text.

    - `text` (None): a file or a dataset, used if the caller gives no text.
    - `nsamples` (128): windows of text.
    - `seqlen` (512): tokens in a window.
    - `source` (text): text: the windows are of a text. self: the model writes them (LLM-QAT, arXiv 2305.17888).
    - `choose` (random): which windows of the text. random: by chance. coverage: those that cover the outlier channels
      of the unrotated model (COVERCAL, arXiv 2604.24008).
    - `candidates` (4): the number of windows that coverage chooses among, in multiples of `nsamples`.
    - `seed` (0): the seed of the choice of windows, or of the text that the model writes.
    - `add_bos` (true): every window begins with the tokenizer's BOS tokens. false: only the first one does.
    - `dtype` (auto): of the computation. auto: bfloat16 if the processor multiplies it natively, else float32.
    - `inputs` (rounded): the inputs of a block. rounded: outputs of the rounded blocks before it, as in GPTQ.
      original: outputs of the original blocks, as in the parallel form of AdaQuant (arXiv 2006.10518). Then blocks do
      not depend on each other's errors and can be rounded in parallel.
    - `all_experts` (false): the statistics of every expert are of all tokens, not only of those that its router sends
      there. Each expert then sees every token, so a mixture of experts takes longer.
    """

    model_config = _STRICT
    text: str | None = None
    nsamples: Annotated[int, Field(gt=0)] = 128
    seqlen: Annotated[int, Field(gt=1)] = 512
    source: Literal["text", "self"] = "text"
    choose: Literal["random", "coverage"] = "random"
    candidates: Annotated[int, Field(gt=1)] = 4
    seed: Seed = 0
    add_bos: bool = True
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    inputs: Literal["rounded", "original"] = "rounded"
    all_experts: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Calibration:
        if self.source == "self" and self.text is not None:
            raise ValueError("with source: self the model writes the text: leave text out, or set source: text")
        if self.source == "self" and self.choose != "random":
            raise ValueError("choose: coverage needs a text to choose from, and source: self has none: leave one out")
        if self.candidates != 4 and self.choose != "coverage":
            raise ValueError("candidates is for choose: coverage: leave it out, or set choose: coverage")
        return self


class ProofSettings(BaseModel):
    """Settings of the proof.

    - `threshold` (1e-4): the largest relative logit error that is accepted.
    - `nsamples` (2): at most this many windows of the calibration text.
    - `seqlen` (256): at most this many tokens of each.
    """

    model_config = _STRICT
    threshold: Annotated[float, Field(gt=0)] = 1e-4
    nsamples: Annotated[int, Field(gt=0)] = 2
    seqlen: Annotated[int, Field(gt=1)] = 256
