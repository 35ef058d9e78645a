"""On which devices a program computes: copies of it, and shards of their integer weights.

With several copies, each has all weights and computes its share of a batch's tiles: the same
instructions on the same shapes, so the same bits.

With several shards, the integer weights are spread over devices, and each device contracts what it
has. Only integers are ever added up across devices: every sum of an integer contraction is reduced
in int32, before it is scaled, and integer sums do not depend on their order. All that is float is
computed whole on each device, in the shapes that it has without shards; were it left to the
partitioner, it would split float sums too, a mean or a variance, and those would change in their
last bit. So the graph is told (`replication`) that both ends of each integer contraction, and
whatever turns from integers into floats, are whole on each device.
"""

import dataclasses
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aqt_engine.manifest import WeightSpec

COPIES = "copies"
SHARDS = "shards"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """`copies` of a program, each over `shards` devices.

    Raises:
      ValueError: they are not positive, or `copies` is no power of two, as buckets of tiles are.
    """

    copies: int = 1
    shards: int = 1

    def __post_init__(self):
        if self.copies < 1 or self.copies & (self.copies - 1) or self.shards < 1:
            raise ValueError(
                f"a program is laid out over a power of two of copies and at least one shard of "
                f"each, and this is {self.copies} copies of {self.shards} shards"
            )

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return self.copies * self.shards

    def mesh(self) -> Mesh:
        """The first devices of each process of JAX's, as many of each, by copy and shard.

        The shards of a copy are in as few processes as possible.

        Raises:
          ValueError: there are not as many, or they are not as many of each process.
        """
        processes = jax.process_count()
        there = [jax.local_devices(process_index=i) for i in range(processes)]
        each, left = divmod(self.devices, processes)
        if left or any(len(devices) < each for devices in there):
            counts = " and ".join(str(len(devices)) for devices in there)
            hosts = f" on {processes} hosts, as many on each" if processes > 1 else ""
            raise ValueError(
                f"{self.copies} copies of {self.shards} shards take {self.devices} devices{hosts}, "
                f"and there are {counts}: ask for {'another number' if left else 'fewer'}"
            )
        devices = np.array([devices[:each] for devices in there])
        return Mesh(devices.reshape(self.copies, self.shards), (COPIES, SHARDS))

    def of_weight(self, mesh: Mesh, weight: WeightSpec) -> NamedSharding:
        """Where a weight lies: an integer one in shards along `axis_of`, others whole."""
        axis = self.axis_of(weight)
        names = [SHARDS if i == axis else None for i in range(len(weight.shape))]
        return NamedSharding(mesh, PartitionSpec(*names))

    def axis_of(self, weight: WeightSpec) -> int | None:
        """The axis along which a weight is cut; None for one that each device holds whole.

        It is the first that its trainer named, of those that the shards divide, or else the first
        of all that they divide. Of a kernel that is the contracted one, so that each device has a
        part of every sum. Along any other each has some of the sums, whole.
        """
        if self.shards == 1 or not _in_integers(weight):
            return None
        named = [i for i, name in enumerate(weight.axes or ()) if name]
        order = (*named, *range(len(weight.shape)))
        return next((i for i in order if weight.shape[i] % self.shards == 0), None)

    def nbytes_here(self, weight: WeightSpec) -> int:
        """Bytes that a weight takes of the memory of a device.

        The devices of a CPU share theirs: of all that this process has, then.
        """
        if self.axis_of(weight) is None:
            return weight.nbytes
        on_cpu = jax.default_backend() == "cpu"
        here = min(self.shards, self.devices // jax.process_count()) if on_cpu else 1
        return weight.nbytes * here // self.shards

    def departures(self, weights: Iterable[WeightSpec]) -> list[str]:
        """What is not cut along an axis that its trainer named, and what is done instead."""
        if self.shards == 1:
            return []
        found: list[str] = []
        for weight in weights:
            named = {i: name for i, name in enumerate(weight.axes or ()) if name}
            axis = self.axis_of(weight)
            if not named or axis in named:
                continue
            names = " and ".join(f"axis {i} ({name})" for i, name in named.items())
            instead = "each device holds it whole" if axis is None else f"axis {axis} is cut"
            if not _in_integers(weight):
                why = "it is in float, whose sums depend on how they are cut"
            else:
                sizes = " and ".join(str(weight.shape[i]) for i in named)
                why = f"{self.shards} shards do not divide {sizes}"
            found.append(f"of {weight.name}, {names}: {why}, so {instead}")
        return found


def _in_integers(weight: WeightSpec) -> bool:
    return weight.role == "qvalue" and "int" in weight.dtype
