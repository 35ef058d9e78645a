"""Sentences that every Python has, and their tokens.

The client tokenizes. The server loads no code from a bundle, and so an answer stays a function of
numbers in the request and numbers in the bundle.
"""

import functools
import pydoc_data.topics
import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from examples.sentences.weights import model_file

SHORTEST, LONGEST = 40, 160


@functools.cache
def sentences() -> dict[str, str]:
    """The prose sentences of Python's language reference, each with the topic it is from."""
    found: dict[str, str] = {}
    for topic, text in pydoc_data.topics.topics.items():
        for paragraph in text.split("\n\n"):
            # What is indented or has a grammar's `::=` is code.
            if re.search(r"^\s|::=", paragraph):
                continue
            for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(paragraph.split())):
                if SHORTEST <= len(sentence) <= LONGEST and sentence.endswith("."):
                    found.setdefault(sentence, topic)
    return found


def tokenize(texts: Sequence[str], length: int) -> dict[str, np.ndarray]:
    """`input_ids` and `attention_mask`, int32 (rows, length): cut or padded to `length` tokens."""
    # The first and the last token mark both ends, and are not cut by the tokenizer.
    tokenizer = _tokenizer(max(length, 2))
    encodings = tokenizer.encode_batch(list(texts))
    return {
        "input_ids": np.array([e.ids[:length] for e in encodings], np.int32),
        "attention_mask": np.array([e.attention_mask[:length] for e in encodings], np.int32),
    }


@functools.cache
def _tokenizer(length: int) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(model_file("tokenizer.json")))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=0, pad_token="[PAD]")
    return tokenizer
