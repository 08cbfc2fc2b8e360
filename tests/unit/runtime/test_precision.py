"""A graph declared int8 is int8 through and through."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper
from skerry_runtime import precision
from skerry_runtime.errors import Rejected


def check(data):
    precision.check_int8(onnx.load_model_from_string(data))


def refusal(data):
    with pytest.raises(Rejected) as caught:
        check(data)
    assert caught.value.code == "not_quantized"
    return caught.value.detail


def edited(models, change):
    model = onnx.load_model_from_string(models.onnx_bytes("int8"))
    change(model.graph)
    return model.SerializeToString()


def test_static_quantization_passes(models):
    check(models.onnx_bytes("int8"))


def test_a_float_graph_is_refused_with_the_node(models):
    assert "Gemm 'h' takes float 'x'" in refusal(models.onnx_bytes("float-as-int8"))


def test_dynamic_quantization_is_refused(models):
    assert "DynamicQuantizeLinear" in refusal(models.onnx_bytes("dynamic-as-int8"))


def test_a_graph_without_products_is_not_called_int8(models):
    assert "no quantized matrix product" in refusal(models.onnx_bytes("identity"))


def test_activations_left_float_are_refused(models):
    # What static quantization does when a scaler stays in the graph: weights int8, activations float, one log line.
    def skip(graph):
        next(node for node in graph.node if node.op_type == "Gemm").input[0] = "x"

    assert "takes float 'x'" in refusal(edited(models, skip))


def test_weights_left_float_are_refused(models):
    def float_weight(graph):
        graph.initializer.append(numpy_helper.from_array(np.zeros((8, 3), np.float32), "wf"))
        [node for node in graph.node if node.op_type == "Gemm"][1].input[1] = "wf"

    assert "takes float 'wf'" in refusal(edited(models, float_weight))


def test_a_scale_computed_at_run_time_is_dynamic_quantization_by_hand(models):
    def compute(graph):
        graph.node.insert(0, h.make_node("ReduceMax", ["x"], ["peak"], keepdims=0))
        for node in graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] == "xd_scale":
                node.input[1] = "peak"

    assert "'peak', computed at run time" in refusal(edited(models, compute))


def test_sixteen_bits_are_not_eight(models):
    def widen(graph):
        graph.initializer.append(numpy_helper.from_array(np.array(0, np.int16), "zero16"))
        for node in graph.node:
            if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] == "xd_scale":
                node.input[2] = "zero16"

    assert "takes float 'xd'" in refusal(edited(models, widen))


def test_a_product_hidden_in_a_branch_is_found(models):
    def hide(graph):
        out = h.make_tensor_value_info("o", T.FLOAT, None)
        graph.initializer.append(numpy_helper.from_array(np.zeros((3, 3), np.float32), "wf"))
        graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
        branch = h.make_graph([h.make_node("MatMul", ["ld", "wf"], ["o"])], "then", [], [out])
        other = h.make_graph([h.make_node("Identity", ["ld"], ["o"])], "else", [], [out])
        graph.node[-1].input[0] = "chosen"
        graph.node.insert(
            len(graph.node) - 1, h.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=other)
        )

    assert "MatMul" in refusal(edited(models, hide))


def test_a_product_hidden_in_a_function_is_found(models, tmp_path):
    model = onnx.load_model_from_string(models.onnx_bytes("int8"))
    opset = [h.make_opsetid("", 17)]
    body = [h.make_node("Transpose", ["a"], ["at"]), h.make_node("MatMul", ["a", "at"], ["b"])]
    model.functions.append(h.make_function("hidden", "Square", ["a"], ["b"], body, opset))
    model.opset_import.append(h.make_opsetid("hidden", 1))
    model.graph.node.append(h.make_node("Square", ["x"], ["unused"], domain="hidden"))
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(Rejected, match="takes float 'x'"):
        precision.check_int8(precision.read_model(tmp_path / "m.onnx"))


def test_a_layout_step_between_does_not_matter(models):
    def flatten(graph):
        nodes = list(graph.node)
        at = next(i for i, node in enumerate(nodes) if node.op_type == "Gemm")
        nodes[at].input[0] = "flat"
        graph.node.insert(at, h.make_node("Flatten", ["xd"], ["flat"]))

    check(edited(models, flatten))


def test_files_that_the_graph_refers_to_are_listed(models, tmp_path):
    model = onnx.load_model_from_string(models.onnx_bytes("classifier"))
    onnx.save(model, str(tmp_path / "m.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0)
    assert precision.external_files(precision.read_model(tmp_path / "m.onnx")) == {"w.bin"}


@pytest.mark.parametrize("data", [b"", b"junk" * 100])
def test_a_file_that_is_no_graph_is_refused(tmp_path, data):
    (tmp_path / "m.onnx").write_bytes(data)
    with pytest.raises(Rejected, match="model_damaged"):
        precision.read_model(tmp_path / "m.onnx")
