"""ONNX Runtime: dynamic int8 quantization, as its own quantizer writes it."""

from pathlib import Path

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from protocol import THREADS, work


def layer(arrays, *, rows):
    """`DynamicQuantizeLinear` of the whole batch to uint8, and `MatMulInteger`: fused into one."""
    weights = {
        "w": arrays["qvalue"],
        "zero": np.zeros(len(arrays["scale"]), np.int8),
        "scale": arrays["scale"],
    }
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"]),
        helper.make_node("MatMulInteger", ["xq", "w", "xz", "zero"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["xs", "scale"], ["both"]),
        helper.make_node("Mul", ["float", "both"], ["y"]),
    ]
    model = _model(nodes, weights, TensorProto.FLOAT, TensorProto.FLOAT)
    return _call(model, {"x": arrays["x"][:rows]})


def product(arrays, *, rows):
    nodes = [helper.make_node("MatMulInteger", ["x", "w"], ["y"])]
    model = _model(nodes, {"w": arrays["qvalue"]}, TensorProto.UINT8, TensorProto.INT32)
    return _call(model, {"x": arrays["xq"][:rows].astype(np.uint8)})


def encoder(arrays, *, exported, folder):
    """The exported graph, fused by `onnxruntime.transformers`, then quantized dynamically."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer
    from onnxruntime.transformers.fusion_options import FusionOptions

    quantized = Path(folder, "onnxruntime_int8.onnx")
    if not quantized.exists():
        fused = Path(folder, "onnxruntime_fused.onnx")
        # Level 0: what its session rewrites by itself is left to the session, below.
        model = optimizer.optimize_model(
            exported,
            "bert",
            num_heads=12,
            hidden_size=384,
            opt_level=0,
            optimization_options=FusionOptions("bert"),
        )
        model.save_model_to_file(str(fused))
        quantize_dynamic(
            fused,
            quantized,
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Of the fused operators' results, whose type its shape inference does not know.
            extra_options={"DefaultTensorType": TensorProto.FLOAT},
        )
    inputs = {name: arrays[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    return _call(quantized.read_bytes(), inputs)


def _model(nodes, weights, taken, given) -> bytes:
    contracted, width = weights["w"].shape
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", taken, ["rows", contracted])],
        [helper.make_tensor_value_info("y", given, ["rows", width])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def _call(model: bytes, inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    # Where its instructions saturate sums of products (x86 without VNNI), others that do not.
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)[0]


if __name__ == "__main__":
    work({"layer": layer, "product": product, "encoder": encoder})
