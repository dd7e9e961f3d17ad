"""Two processes read their own rows of a cache, and together hold the batch that one process would."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tele_jax.data import caching, vocabulary_training
from tele_jax.settings import CacheConfig, DataConfig, MeshConfig, SourceConfig
from tele_jax.sharding import local_rows, make_mesh, put_batch
from tests.data import caches
from tests.ports import free_port

SHAPE = dict(kind="pretrain", seq_len=16, batch_size=8, seed=1)

PROCESS = """
import functools, hashlib, json, os, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax
address, number, data, mesh = json.loads(sys.argv[1])
jax.distributed.initialize(address, num_processes=2, process_id=number)
import numpy as np
from jax.experimental import multihost_utils
from tests.data import caches
from tele_jax.settings import DataConfig, MeshConfig
from tele_jax.sharding import make_mesh
from tele_jax.sharding import local_rows, put_batch
mesh = make_mesh(MeshConfig(**mesh), jax.devices())
rows = local_rows(mesh, 8)
place = functools.partial(put_batch, mesh=mesh, batch_size=8)
made = caches.open_feed(DataConfig(**data), kind="pretrain", seq_len=16, batch_size=8, seed=1, rows=rows, place=place)
digests = []
for _ in range(3):
    batch = multihost_utils.process_allgather(next(made), tiled=True)
    digests.append(hashlib.sha256(b"".join(batch[name].tobytes() for name in sorted(batch))).hexdigest())
made.close()
print(json.dumps({"rows": rows.tolist(), "digests": digests}))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("hosts")
    texts = [f"document {i}: " + " ".join(str(i * k) for k in range(1, 12)) for i in range(60)]
    trained = vocabulary_training.train_vocabulary(texts, preset="tele_flm", vocab_size=390)
    vocabulary_training.write_vocabulary(trained, directory / "t.model", preset="tele_flm")
    (directory / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = SourceConfig(files=(str(directory / "a.jsonl"),), format="jsonl")
    made = DataConfig(tokenizer=str(directory / "t.model"), sources={"a": source})
    caching.make(CacheConfig(data=made, seq_len=16), directory / "rows", runner="serial")
    return {"tokenizer": str(directory / "t.model"), "cache": str(directory / "rows")}


@pytest.mark.parametrize("mesh", [dict(data=2, fsdp=2), dict(fsdp=2, tensor=2)], ids=str)
def test_two_processes_hold_the_batch_of_one(data, mesh):
    address = f"127.0.0.1:{free_port()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, json.dumps([address, number, data, mesh])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for number in range(2)
    ]
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    whole = caches.open_feed(DataConfig(**data), **SHAPE)
    batches = [next(whole) for _ in range(3)]
    expected = [hashlib.sha256(b"".join(b[name].tobytes() for name in sorted(b))).hexdigest() for b in batches]
    assert [each["digests"] for each in found] == [expected, expected]
    assert sorted({*found[0]["rows"], *found[1]["rows"]}) == list(range(8))
    assert len(found[0]["rows"]) == 4, "each reads its half and no more"


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=4), MeshConfig(tensor=2, fsdp=2)])
def test_one_process_holds_all_rows(mesh):
    made = make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    assert local_rows(made, 16).tolist() == list(range(16))
    batch = {"tokens": np.arange(16 * 3).reshape(16, 3)}
    assert (np.asarray(put_batch(batch, made, 16)["tokens"]) == batch["tokens"]).all()
