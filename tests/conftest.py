"""What every test stands on: the CPU, eight simulated devices, reproducible examples."""

import os

# Before jax is imported. Tests that want one device take jax.devices()[:1].
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
if os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") != "1":
    os.environ["NPROC"] = "1"  # XLA's thread pools: the workers share the cores already

import hypothesis
import jax
import pytest

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
