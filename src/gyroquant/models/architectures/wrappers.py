"""Models around a decoder that also take images: which of their layers write into the decoder's residual stream.

Everything else in them is carried unchanged. Missing on purpose: LLaVA-Next and LLaVA-OneVision put a learned vector
between the rows of an image, which a change of the residual stream would have to turn as well; in Gemma 3 the residual
stream cannot be changed at all.
"""

from gyroquant.models.spec import Linear, register_wrapper


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
