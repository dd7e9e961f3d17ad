"""What every test stands on: the CPU, eight simulated devices, reproducible examples."""

import os
from pathlib import Path

# Before jax is imported. Tests that want one device take jax.devices()[:1].
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest

# Most of the time of a test is XLA's: what was compiled once is read back, with the same bits (26 s of processor time
# become 5 in the float32 tests of the decoder). Set here and not by environment variable: processes that a test starts,
# and perhaps kills, compile for themselves. In CI everything is compiled afresh.
if not os.environ.get("CI"):
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[1] / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# No deadline: the first example of a test pays for its compilation.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def x64():
    """Float64 and int64 for one test, in every thread of it."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
