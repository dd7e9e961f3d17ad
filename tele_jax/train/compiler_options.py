"""Options of the TPU compiler that a step of training is compiled with: named sets for each generation, as data.

    options_of("TPU v6 lite")                    # the first set of v6e, which training and `tele plan` take
    options_of("TPU v6 lite", "offload")         # collectives on the SparseCores

They are handed to the compiler with the program, so that one process may compile programs with different ones; what
LIBTPU_INIT_ARGS says of the same options is overridden.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping

import jax

from tele_jax.config import nearest
from tele_jax.errors import UserError
from tele_jax.published import find_generation

Options = Mapping[str, bool | int | str]

# Collectives run on the SparseCores, beside the matrix units, and not merged with products on the TensorCore. Names as
# in MaxText's flags for it (its xla_flags_library, ENABLE_SPARSECORE_OFFLOADING_FOR_RS_AG_AR), but for those
# that only write traces, and for two that libtpu 0.0.42.1 takes for a whole process alone.
_SPARSE_CORES: Options = {
    **{
        f"xla_tpu_enable_sparse_core_collective_offload_{kind}": True
        for kind in ("all_gather", "reduce_scatter", "all_reduce")
    },
    **{
        f"xla_tpu_enable_async_collective_fusion_fuse_{kind}": False
        for kind in ("all_gather", "reduce_scatter", "all_reduce")
    },
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_disable_megacore_partitioning": True,
    "xla_sc_enable_instruction_fusion": False,
}
# Products whose operand is gathered are not cut into a loop of parts (a windowed einsum, "collective matmul"): gathers
# then are single collectives, which can be offloaded. Google's recipes for Llama on v6e have the same value
# (github.com/AI-Hypercomputer/tpu-recipes, training/trillium/Llama3.1-8B-MaxText).
_WHOLE_PRODUCTS: Options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000}
# What Google's recipes for tpu7x add (training/ironwood/llama3.1-70b/8k-bf16-tpu7x-4x4x4 there).
_TPU7X: Options = {
    "xla_tpu_enable_sparse_core_reduce_scatter_v2": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_use_single_sparse_core_for_all_gather_offload": True,
    "xla_enable_async_all_gather": True,
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
}
_OFFLOAD = {**_SPARSE_CORES, **_WHOLE_PRODUCTS}

# By generation; the set that is taken stands first. That is the compiler's own everywhere: libtpu 0.0.42.1 took each of
# the others by itself, in a small program for v5p and v6e; the step of a whole model was not compiled with them.
SETS: Mapping[str, Mapping[str, Options]] = {
    "v4": {"none": {}},
    "v5e": {"none": {}},
    "v5p": {"none": {}, "offload": _OFFLOAD},
    "v6e": {"none": {}, "offload": _OFFLOAD},
    "tpu7x": {"none": {}, "offload": {**_OFFLOAD, **_TPU7X}},
}


def options_of(device_kind: str, name: str | None = None) -> Options:
    """The options of one set for the generation of a device (jax.Device.device_kind); none for what is no known TPU.

    name: of the set; None: the first of its generation.

    >>> options_of("cpu")
    {}

    Raises:
      UserError: the generation has no such set.
    """
    generation = find_generation(device_kind)
    sets = {"none": {}} if generation is None else SETS[generation.name]
    if name is not None and name not in sets:
        raise UserError(f"compiler options {name!r}: {nearest(name, sets, 'known')}")
    return next(iter(sets.values())) if name is None else sets[name]


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """Turns the compiler's refusal of an option, or of its value, into a UserError that names it."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        unknown = re.search(r"No such compile option: '([^']*)'", str(error))
        value = re.search(r"While setting option (\w+), ([^\n]*)", str(error))
        if unknown is not None:
            raise UserError(
                f"compiler_options.{unknown[1]}: this compiler does not take it ({jax.default_backend()}, jax "
                f"{jax.__version__}); leave it out, or give the option in LIBTPU_INIT_ARGS"
            ) from None
        if value is not None:
            reason = value[2].rstrip(".")
            raise UserError(f"compiler_options.{value[1]}: {reason} for this compiler; correct the value") from None
        raise
