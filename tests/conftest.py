"""What every test stands on: the CPU, eight simulated devices, reproducible examples."""

import atexit
import contextlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

# Before jax is imported. Tests that want one device take jax.devices()[:1].
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

# Most of the time of a test is XLA's: what was compiled once is read back, with the same bits (a small `tele train`
# takes 16 s of processor time instead of 51). By environment, for the processes that tests start as well. In CI the
# directory is new, so that every program is compiled at least once; pytest's workers inherit that of their parent.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    if os.environ.get("CI"):
        directory = tempfile.mkdtemp(prefix="tele_jax_compiled_")
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
    else:
        directory = str(Path(__file__).parents[1] / ".cache" / "jax")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = directory
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import hypothesis
import jax
import pytest

# No deadline: the first example of a test pays for its compilation.
hypothesis.settings.register_profile("local", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


# Doctests are looked for in every file: this one is not a test, and imports what only the extra [hf] brings.
collect_ignore = [] if importlib.util.find_spec("torch") else ["convert/torch_models.py"]


@pytest.fixture
def x64():
    """Float64 and int64 for one test, in every thread of it."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@contextlib.contextmanager
def compiling(quickly: bool):
    """What was compiled before, or is meanwhile, does not serve the other."""

    def switch(quickly):
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", quickly)
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(quickly))  # for the processes that tests start

    switch(quickly)
    yield
    switch(not quickly)


@pytest.fixture(scope="module")
def quick_compilation():
    """For modules whose time is XLA's while their subject is not what XLA makes of a program: it optimises little.

    A small `tele train` takes half of the processor time.
    """
    with compiling(quickly=True):
        yield


@pytest.fixture
def usual_compilation(quick_compilation):
    """For a test of such a module that is about the accuracy a user gets."""
    with compiling(quickly=False):
        yield
