"""PyTorch: its dynamically quantized linear layer, by the engine that is named."""

import warnings
from pathlib import Path

import numpy as np
import torch
from protocol import THREADS, work

torch.set_num_threads(THREADS)
torch.set_grad_enabled(False)
# The kernels are PyTorch's fastest int8 on CPUs; that their Python names will go says it each time.
warnings.filterwarnings("ignore")
# Seven bits of activations where its instructions saturate sums of products of eight: x86 without
# VNNI.
REDUCE_RANGE = "vnni" not in Path("/proc/cpuinfo").read_text()


def layer(arrays, *, rows, engine):
    """One scale and zero point for the whole batch of activations, found in each call."""
    packed = _packed(arrays["qvalue"].T, arrays["scale"], None, engine)
    x = torch.from_numpy(arrays["x"][:rows])
    return lambda: torch.ops.quantized.linear_dynamic(x, packed, REDUCE_RANGE).numpy()


def product(arrays, *, rows):
    x, w = (torch.from_numpy(arrays[name]) for name in ("xq", "qvalue"))
    x = x[:rows]
    return lambda: torch._int_mm(x, w).numpy()


def encoder(arrays, *, weights, engine):
    """The stock model with every linear layer of its blocks replaced by the quantized one."""
    model = _stock(weights)
    blocks = model.bert.encoder
    for name, linear in [
        (n, m) for n, m in blocks.named_modules() if isinstance(m, torch.nn.Linear)
    ]:
        parent, _, attribute = name.rpartition(".")
        setattr(blocks.get_submodule(parent), attribute, _Quantized(linear, engine))
    inputs = _tokens(arrays)
    return lambda: model(*inputs).numpy()


def export(arrays, *, weights, to):
    """Writes the float model as ONNX, with any number of rows and any length, and computes it."""
    model, inputs = _stock(weights), _tokens(arrays)
    names = ["input_ids", "attention_mask"]
    torch.onnx.export(
        model,
        inputs,
        to,
        input_names=names,
        output_names=["embedding"],
        dynamic_axes={name: {0: "rows", 1: "length"} for name in names},
        opset_version=17,
        dynamo=False,
    )
    return lambda: model(*inputs).numpy()


class _Quantized(torch.nn.Module):
    def __init__(self, linear, engine):
        super().__init__()
        weight = linear.weight.numpy()
        scale = np.abs(weight).max(axis=1) / np.float32(127.5)
        qvalue = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)
        self.packed = _packed(qvalue, scale, linear.bias, engine)

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic(x, self.packed, REDUCE_RANGE)


class _Sentences(torch.nn.Module):
    """The encoder, the mean of the tokens that are present, and its direction."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, input_ids, attention_mask):
        states = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        present = attention_mask[..., None].to(states.dtype)
        mean = (states * present).sum(1) / present.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=1)


def _stock(weights):
    from transformers import BertModel

    bert = BertModel.from_pretrained(
        Path(weights), add_pooling_layer=False, attn_implementation="eager"
    )
    return _Sentences(bert.float()).eval()


def _packed(qvalue, scale, bias, engine):
    """`qvalue` is (outputs, inputs), with one `scale` for each output."""
    torch.backends.quantized.engine = engine
    scales = torch.from_numpy(scale.astype(np.float64))
    zeros = torch.zeros(len(scale), dtype=torch.long)
    integers = torch.from_numpy(np.ascontiguousarray(qvalue))
    weight = torch._make_per_channel_quantized_tensor(integers, scales, zeros, 0)
    return torch.ops.quantized.linear_prepack(weight, bias)


def _tokens(arrays):
    return tuple(
        torch.from_numpy(arrays[name].astype(np.int64)) for name in ("input_ids", "attention_mask")
    )


if __name__ == "__main__":
    work({"layer": layer, "product": product, "encoder": encoder, "export": export})
