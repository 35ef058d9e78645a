"""Faster int8 contractions on a CPU, behind XLA's own, which are the reference and the fallback.

`library` has the compiled kernel, `packing` its layout of weights, `contraction` the product as a
JAX function, `substitution` the pass that puts it into a graph.
"""
