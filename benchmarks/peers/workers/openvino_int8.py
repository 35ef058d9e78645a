"""OpenVINO: int8 by static scales, and by dynamic quantization of each row."""

from pathlib import Path

import numpy as np
import openvino
from openvino import opset13 as ops
from protocol import THREADS, work


def layer(arrays, *, rows, static):
    """With `static`, one scale for all activations, which takes no time to find.

    Else compressed weights and a scale for each row, which the plugin finds.
    """
    x = ops.parameter([-1, len(arrays["qvalue"])], np.float32, name="x")
    integers = ops.constant(np.ascontiguousarray(arrays["qvalue"].T))
    w = ops.multiply(ops.convert(integers, np.float32), ops.constant(arrays["scale"][:, None]))
    taken = x
    if static:
        high = np.float32(np.abs(arrays["x"]).max())
        low, high = ops.constant(-high * np.float32(128 / 127)), ops.constant(high)
        taken = ops.fake_quantize(x, low, high, low, high, 256)
    model = openvino.Model([ops.matmul(taken, w, False, True)], [x])
    group = {} if static else {"DYNAMIC_QUANTIZATION_GROUP_SIZE": len(arrays["qvalue"])}
    return _call(model, [arrays["x"][:rows]], group)


def encoder(arrays, *, exported, folder):
    """The exported graph with NNCF's int8 quantization for transformers: static scales."""
    quantized = Path(folder, "openvino_int8.xml")
    names = ("input_ids", "attention_mask")
    if not quantized.exists():
        import nncf

        samples = [
            {name: arrays[f"typical_{name}"][i : i + 1].astype(np.int64) for name in names}
            for i in range(len(arrays["typical_input_ids"]))
        ]
        model = nncf.quantize(
            openvino.Core().read_model(exported),
            nncf.Dataset(samples),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(samples),
        )
        openvino.save_model(model, quantized, compress_to_fp16=False)
    model = openvino.Core().read_model(quantized)
    return _call(model, {name: arrays[name].astype(np.int64) for name in names}, {})


def _call(model, inputs, properties):
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": THREADS,
            "NUM_STREAMS": 1,
            **properties,
        },
    )
    request = compiled.create_infer_request()
    return lambda: request.infer(inputs)[0]


if __name__ == "__main__":
    work({"layer": layer, "encoder": encoder})
