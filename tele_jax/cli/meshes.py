"""--mesh tensor=4: the mesh of a command line, in the words of config.mesh."""

import argparse
import dataclasses
import math
from typing import Any

from tele_jax.errors import UserError


def add_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="spread the model over several devices: tensor=4, or data=2,tensor=4; axes data, fsdp, tensor as in "
        "config.mesh; default: one device",
    )


def parse(text: str) -> Any:
    """The MeshConfig that `text` describes, e.g. "fsdp=2,tensor=4".

    Raises:
      UserError: anything else.
    """
    from tele_jax.settings import MeshConfig

    axes = [field.name for field in dataclasses.fields(MeshConfig)]
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in axes or not size.isascii() or not size.isdecimal() or axis in sizes:
            raise UserError(f"--mesh {text}: {part!r} is not understood; axes are {', '.join(axes)}: --mesh tensor=4")
        sizes[axis] = int(size)
    try:
        return MeshConfig(**sizes)
    except UserError as error:
        raise UserError(f"--mesh {text}: {error}") from None


def open_mesh(text: str | None) -> Any:
    """The mesh over the first devices, as many as it takes; None for None.

    Raises:
      UserError: not understood, or more devices than there are.
    """
    if text is None:
        return None
    import jax

    from tele_jax.sharding import make_mesh

    config = parse(text)
    count = math.prod(dataclasses.asdict(config).values())
    if count > len(jax.devices()):
        raise UserError(f"--mesh {text}: takes {count} devices, but there are {len(jax.devices())}")
    return make_mesh(config, jax.devices()[:count])
