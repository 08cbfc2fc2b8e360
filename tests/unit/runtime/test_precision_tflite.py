"""A TFLite graph declared int8 computes in integers between its edges."""

import pytest
from skerry_runtime import precision_tflite as p
from skerry_runtime.errors import Rejected

pytest.importorskip("ai_edge_litert", reason="the extra litert is not installed")
from ai_edge_litert import schema_py_generated as schema


def tensor(name, kind, *, scaled=None):
    return p.Tensor(name=name, type=kind, scaled=kind in ("INT8", "UINT8") if scaled is None else scaled)


def network(**changes):
    """float in -> QUANTIZE -> dense -> DEQUANTIZE -> float out, with tensors replaced by name."""
    tensors = {
        "in": tensor("in", "FLOAT32"),
        "x": tensor("x", "INT8"),
        "w": tensor("w", "INT8"),
        "b": tensor("b", "INT32"),
        "y": tensor("y", "INT8"),
        "out": tensor("out", "FLOAT32"),
    } | changes
    at = {name: i for i, name in enumerate(tensors)}

    def operator(kind, inputs, outputs):
        return p.Operator(kind=kind, inputs=tuple(at[i] for i in inputs), outputs=tuple(at[o] for o in outputs))

    return p.Graph(
        tensors=tuple(tensors.values()),
        operators=(
            operator("QUANTIZE", ["in"], ["x"]),
            operator("FULLY_CONNECTED", ["x", "w", "b"], ["y"]),
            operator("DEQUANTIZE", ["y"], ["out"]),
        ),
        inputs=(at["in"],),
        outputs=(at["out"],),
    )


def with_operators(graph, *operators):
    return p.Graph(tensors=graph.tensors, operators=operators, inputs=graph.inputs, outputs=graph.outputs)


def check(*graphs):
    p.check_int8(p.Model(graphs=graphs, external_files=frozenset()))


def refusal(*graphs):
    with pytest.raises(Rejected) as caught:
        check(*graphs)
    assert caught.value.code == "not_quantized"
    return caught.value.detail


def test_float_at_the_edges_and_integers_between_pass():
    check(network())


def test_integer_edges_pass():
    graph = network()
    check(p.Graph(tensors=graph.tensors, operators=graph.operators[1:2], inputs=(1,), outputs=(4,)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"x": tensor("x", "FLOAT32")}, "computes in float: 'x' is FLOAT32"),
        ({"w": tensor("w", "FLOAT16")}, "computes in float: 'w' is FLOAT16"),
        ({"y": tensor("y", "FLOAT32")}, "computes in float: 'y' is FLOAT32"),
        ({"x": tensor("x", "INT16")}, "takes 'x', which is INT16 and not 8 bits"),
        ({"w": tensor("w", "INT4")}, "takes 'w', which is INT4 and not 8 bits"),
        ({"w": tensor("w", "INT8", scaled=False)}, "has no scale for 'w'"),
        ({"x": tensor("x", "INT8", scaled=False)}, "has no scale for 'x'"),
    ],
)
def test_what_is_not_eight_bits_is_refused_by_name(changes, told):
    assert told in refusal(network(**changes))


def test_weights_only_quantization_is_refused():
    # "Dynamic range": int8 weights beside float activations, quantized again for each batch.
    detail = refusal(network(x=tensor("x", "FLOAT32"), y=tensor("y", "FLOAT32")))
    assert "FULLY_CONNECTED" in detail


def test_dequantizing_within_the_graph_is_refused():
    graph = network()
    back = p.Operator(kind="DEQUANTIZE", inputs=(1,), outputs=(5,))
    again = p.Operator(kind="QUANTIZE", inputs=(5,), outputs=(4,))
    detail = refusal(with_operators(graph, graph.operators[0], back, again))
    assert "DEQUANTIZE 'out' gives float 'out' to the graph" in detail
    assert "QUANTIZE 'y' takes float 'out' from within the graph" in detail


def test_float_in_a_branch_is_found():
    assert "'x' is FLOAT32" in refusal(network(), network(x=tensor("x", "FLOAT32")))


def test_a_graph_without_a_matrix_product_is_not_an_int8_model():
    graph = network()
    passing = p.Operator(kind="RESHAPE", inputs=(1,), outputs=(4,))
    assert "no quantized matrix product" in refusal(
        with_operators(graph, graph.operators[0], passing, graph.operators[2])
    )


def test_the_shape_operand_of_a_transposed_convolution_is_no_factor():
    tensors = (tensor("shape", "INT32"), tensor("w", "INT8"), tensor("x", "INT8"), tensor("y", "INT8"))
    operator = p.Operator(kind="TRANSPOSE_CONV", inputs=(0, 1, 2), outputs=(3,))
    check(p.Graph(tensors=tensors, operators=(operator,), inputs=(2,), outputs=(3,)))
    wide = (*tensors[:2], tensor("x", "INT16"), tensors[3])
    assert "'x', which is INT16" in refusal(p.Graph(tensors=wide, operators=(operator,), inputs=(2,), outputs=(3,)))


def written(change=lambda model: None):
    flatbuffers = pytest.importorskip("flatbuffers", reason="the extra litert is not installed")
    model = schema.ModelT()
    model.version, model.buffers = 3, [schema.BufferT()]
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.RELU
    graph = schema.SubGraphT()
    graph.tensors = []
    for name in ("x", "y"):
        made = schema.TensorT()
        made.name, made.type, made.shape = name.encode(), schema.TensorType.FLOAT32, [1]
        graph.tensors.append(made)
    operator = schema.OperatorT()
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0], [1]
    graph.operators, graph.inputs, graph.outputs = [operator], [0], [1]
    model.operatorCodes, model.subgraphs = [code], [graph]
    change(model)
    builder = flatbuffers.Builder(0)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def test_a_file_is_read_as_it_was_written(tmp_path):
    (tmp_path / "m.tflite").write_bytes(written())
    (graph,) = p.read_model(tmp_path / "m.tflite").graphs
    assert graph == p.Graph(
        tensors=(tensor("x", "FLOAT32"), tensor("y", "FLOAT32")),
        operators=(p.Operator(kind="RELU", inputs=(0,), outputs=(1,)),),
        inputs=(0,),
        outputs=(1,),
    )


def test_weights_in_other_files_are_named(tmp_path):
    def outside(model):
        group = schema.ExternalBufferGroupT()
        group.name = "../weights.bin"
        model.externalBufferGroups = [group]

    (tmp_path / "m.tflite").write_bytes(written(outside))
    assert p.read_model(tmp_path / "m.tflite").external_files == {"../weights.bin"}


def unplaced(model):
    model.subgraphs[0].operators[0].inputs = [7]


@pytest.mark.parametrize(
    "data",
    [b"", b"junk" * 50, written()[:60], written(unplaced), written(lambda model: setattr(model, "subgraphs", []))],
)
def test_a_damaged_file_is_refused(tmp_path, data):
    (tmp_path / "m.tflite").write_bytes(data)
    with pytest.raises(Rejected, match="model_damaged"):
        p.read_model(tmp_path / "m.tflite")


def test_any_cut_or_flipped_byte_is_a_refusal_and_no_crash(tmp_path):
    good = written()
    path = tmp_path / "m.tflite"
    codes = set()
    for at in range(len(good)):
        for data in (good[:at], good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :]):
            path.write_bytes(data)
            with pytest.raises(Rejected) as caught:
                p.check_int8(p.read_model(path))
            codes.add(caught.value.code)
    assert codes == {"model_damaged", "not_quantized"}
