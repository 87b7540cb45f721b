"""Wrappers: models with a decoder that also take images, and their layers that write to the decoder's residual stream.

All other parameters of a wrapper are carried unchanged. Two kinds of models are left out on purpose:

- LLaVA-Next and LLaVA-OneVision put a learned vector between the rows of an image. A change of the residual stream
  would have to change this vector too.
- Gemma 3: its residual stream cannot be changed.
"""

from gyroquant.models.graph.spec import Linear, register_wrapper


def _projection(name: str) -> Linear:
    return Linear(name, "image", "residual", quantize=False)


register_wrapper(("llava", "mistral3"), _projection("model.multi_modal_projector.linear_2"))
register_wrapper(("paligemma",), _projection("model.multi_modal_projector.linear"))
register_wrapper(("qwen2_vl", "qwen2_5_vl"), _projection("model.visual.merger.mlp.2"))
register_wrapper(
    ("qwen3_vl",),
    _projection("model.visual.merger.linear_fc2"),
    _projection("model.visual.deepstack_merger_list.{e}.linear_fc2"),
)
