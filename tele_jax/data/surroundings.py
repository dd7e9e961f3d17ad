"""The knowledge that a feed may have of the stage that it feeds."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from tele_jax.axes import Params
from tele_jax.config import ModelConfig
from tele_jax.data.batches import Batches
from tele_jax.data.feed import LiveFeed, RowFeed
from tele_jax.data.order import Position
from tele_jax.sharding import local_rows, put_batch


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """The stage that a feed is opened for.

    Attributes:
      cfg: the config of the model that is trained.
      mesh: the devices.
      directory: of the stage in the work directory.
      previous: checkpoints of the model that the stage begins with; None where it is fresh.
      checkpoints: of the other models that the stage reads, by the names of its fields (TrainStage.models).
      known: positions in the data that earlier stages came to, the latest first.
      base: the parameters that stay as they are while the stage trains adapters on them; None without adapters.
      model: gives the parameters of the whole model as they are when it is called, on the mesh.
      say: prints a line.
    """

    cfg: ModelConfig
    mesh: Mesh
    directory: Path
    previous: Path | None
    checkpoints: Mapping[str, Path]
    known: Sequence[Position]
    base: Params | None
    model: Callable[[], Params]
    say: Callable[[str], None]

    def place(self, batch: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
        """Puts a host batch on the mesh; see sharding.put_batch."""
        return put_batch(batch, self.mesh, batch_size)

    def feed(self, batches: Batches, batch_size: int) -> LiveFeed | RowFeed:
        """The feed of most kinds: batches on the mesh, of which each process reads its own rows."""
        place = functools.partial(self.place, batch_size=batch_size)
        return batches.feed(rows=local_rows(self.mesh, batch_size), place=place, known=self.known)
