#!/usr/bin/env bash
# onnxruntime 1.32.0, InferenceSession.io_binding() with some outputs bound before others, IOBinding.get_outputs().
#
# One would guess: the outputs come in the order of the graph, as run() returns them and get_outputs() of the session lists
# them.
#
# What really happens: they come in the order in which their names were bound first. To bind a name again keeps its place.
#
# Who meets it: whoever writes tokens with keys and values in buffers of their own, which are bound once, and binds the logits
# anew for every call. The first result is then a layer's keys. It is a tensor of numbers like any other: no error.
#
# Seen: the graph has (logits, present). After bind_output("present"), bind_output("logits"), get_outputs() gives
# (present, logits), and after another bind_output("present") the same.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy
cd "$place"
"$place/venv/bin/python" - <<'PYTHON'
import sys

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

nodes = [helper.make_node("Add", ["x", "one"], ["logits"]), helper.make_node("Mul", ["x", "ten"], ["present"])]
values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "logits", "present")}
numbers = [helper.make_tensor(name, TensorProto.FLOAT, [1], [value]) for name, value in (("one", 1), ("ten", 10))]
graph = helper.make_graph(nodes, "graph", [values["x"]], [values["logits"], values["present"]], numbers)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
x = np.array([1, 2], np.float32)
binding = session.io_binding()
binding.bind_cpu_input("x", x)


def bound(*names):
    """The outputs of the binding after these were bound, in its order."""
    for name in names:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    return [value.numpy().tolist() for value in binding.get_outputs()]


plain = [value.tolist() for value in session.run(None, {"x": x})]
first, again = bound("present", "logits"), bound("present")
print("onnxruntime", ort.__version__)
print("the session:", [output.name for output in session.get_outputs()], plain)
print("the binding:", first, "and after present was bound again:", again)
same = first == again == plain[::-1]
print("behaves as described" if same else "the behaviour has changed")
sys.exit(not same)
PYTHON
