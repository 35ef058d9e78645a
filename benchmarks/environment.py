"""What a figure was measured with: machine, device and versions."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

# What decides how fast, and in which bits, a CPU multiplies matrices.
_INSTRUCTIONS = (
    *("sse4_2", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni"),
    *("amx_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve"),
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def environment() -> dict[str, Any]:
    """Machine, instructions, cores, load, device and versions, ready for JSON."""
    cpu, flags = _cpu()
    device = jax.devices()[0]
    return {
        "cpu": cpu,
        "instructions": [i for i in _INSTRUCTIONS if i in flags],
        "cores": len(os.sched_getaffinity(0)),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "device": f"{device.platform}: {device.device_kind}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def described(environment: dict[str, Any]) -> str:
    """One line for the foot of a table."""
    newest = [i for i in environment["instructions"] if "vnni" in i or "amx" in i or "i8mm" in i]
    versions = ", ".join(f"{name} {environment[name]}" for name in ("jax", "flax"))
    return (
        f"{environment['cpu']}, {environment['cores']} cores "
        f"({', '.join(newest) or 'no int8 dot-product instructions'}), "
        f"{environment['device']}, {versions}; load {environment['load_average_1min']}"
    )


def _cpu() -> tuple[str, set[str]]:
    """The model's name, and the flags of its instructions."""
    info = Path("/proc/cpuinfo")
    fields: dict[str, str] = {}
    if info.exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            fields.setdefault(name.strip(), value.strip())
    flags = fields.get("flags", fields.get("Features", ""))
    return fields.get("model name", platform.machine()), set(flags.split())
