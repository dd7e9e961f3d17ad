"""Our training step against MaxText's, both compiled for the same slice by the same compiler, counted by one counter.

    python benchmarks/aot_vs_maxtext.py --maxtext-python ENV/bin/python [--cases 52b 1t] [--write FILE]

ENV is an environment with Python 3.12, `pip install 'maxtext[tpu]==0.2.5'` and the libtpu of its jax; MAXTEXT_PYTHON
may name its python instead. Both programs are compiled in it, so that jax and libtpu are the same. At MaxText's own
settings: the same dimensions, slice, mesh and batch, full remat, flash attention, AdamW, float32 parameters, bfloat16
products; MaxText once with its other settings as they are by default, and once tuned (TUNED). Prints JSON, and exits
with 1 where a figure is above its bound over MaxText's defaults.
Compiled programs are kept beside those of `tele plan`, so that a second run is quick.
"""

import argparse
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MAXTEXT = "0.2.5"
# model, slice and MaxText's name for it, mesh, sequences of 4,096 tokens
CASES = {
    "52b": ("tele_flm_52b", "v5p:4x4x8", "v5p-256", {"fsdp": 64, "tensor": 2}, 64),
    "1t": ("tele_flm_1t", "v5p:8x16x16", "v5p-4096", {"fsdp": 512, "tensor": 4}, 512),
}
SEQ_LEN = 4096
# What MaxText's own recipes for dense models on TPUs change (its tuned settings for v5p and v6e): embedding by a matrix
# product, blocks of attention as large as fit without other flags, one kernel for its backward pass.
TUNED = {
    "use_iota_embed": True,
    **{f"sa_block_{name}": 1024 for name in ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute")},
    "sa_use_fused_bwd_kernel": True,
}
# Ours over MaxText's, at most. Temporaries are those of the fullest moment, beyond parameters and optimizer state; what
# the compiler sets aside for them in all, which is more, is printed beside it.
BOUNDS = {"temporary_bytes": 0.95, "flops": 1.0, "matmul_flops": 1.0, "hbm_bytes": 1.0, "collective_bytes": 1.0}


# ------------------------------------------------------------------------------------------- in MaxText's environment


def ours(case: str) -> dict:
    import dataclasses

    import jax

    jax.config.update("jax_platforms", "cpu")
    import tele_jax as tele
    from tele_jax.aot import topology
    from tele_jax.aot.compile import compile_job
    from tele_jax.aot.jobs import TrainJob
    from tele_jax.settings import MeshConfig

    model, slice_name, _, mesh, batch = CASES[case]
    cfg = dataclasses.replace(tele.get_model(model), remat="full")
    job = TrainJob(
        cfg=cfg, slice=topology.find_slice(slice_name), mesh=MeshConfig(**mesh), batch_size=batch, seq_len=SEQ_LEN
    )
    program = compile_job(job)
    return summary(program.counts, program.temporary_bytes, program.allocated_temporary_bytes)


def maxtext_arguments(case: str, tuned: bool) -> list[str]:
    import tele_jax as tele

    model, _, topology_name, mesh, batch = CASES[case]
    cfg = tele.get_model(model)
    settings = {
        "compile_topology": topology_name,
        "compile_topology_num_slices": 1,
        "decoder_block": "llama2",
        "base_num_decoder_layers": cfg.num_layers,
        "base_emb_dim": cfg.embed_dim,
        "base_num_query_heads": cfg.num_heads,
        "base_num_kv_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "base_mlp_dim": cfg.mlp_dim,
        "vocab_size": cfg.padded_vocab_size,
        "max_target_length": SEQ_LEN,
        "per_device_batch_size": batch / (mesh["fsdp"] * mesh["tensor"]),
        "ici_fsdp_parallelism": mesh["fsdp"],
        "ici_tensor_parallelism": mesh["tensor"],
        "remat_policy": "full",
        "attention": "flash",
        "enable_checkpointing": False,
        "allow_split_physical_axes": True,  # both meshes take a part of an axis of the torus for tensor
        "run_name": "comparison",
        **(TUNED if tuned else {}),
    }
    return [f"{key}={value}" for key, value in settings.items()]


def theirs(case: str, tuned: bool = False) -> dict:
    import maxtext
    from maxtext.trainers.pre_train import train_compile

    from tele_jax.aot import counts, hlo
    from tele_jax.aot.compile import cache_directory

    arguments = maxtext_arguments(case, tuned)
    key = hashlib.sha256(json.dumps([arguments, versions()]).encode()).hexdigest()[:32]
    directory = cache_directory() / f"maxtext-{key}"
    text, size = directory / "program.hlo.gz", directory / "memory.json"  # fullest moment, set aside
    if not size.exists():
        compile_step, found = train_compile.jit_and_compile, []
        train_compile.jit_and_compile = lambda *args: found.append(compile_step(*args)) or found[0]
        page = Path(maxtext.__file__).parent / "configs" / "base.yml"
        train_compile.main(["train_compile", str(page), *arguments])
        directory.mkdir(parents=True, exist_ok=True)
        # The code of Pallas kernels is most of the text, and nothing is read from it.
        text.write_bytes(gzip.compress(re.sub(r'"body":"[^"]*"', '"body":""', found[0].as_text()).encode(), 6))
        memory = found[0].memory_analysis()
        fullest = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes - memory.argument_size_in_bytes
        size.write_text(json.dumps([fullest, memory.temp_size_in_bytes]))
    counted = counts.count(hlo.parse(gzip.decompress(text.read_bytes()).decode()))
    return summary(counted, *json.loads(size.read_text())) | {"settings": arguments}


def summary(counts, temporary_bytes: int, allocated_temporary_bytes: int) -> dict:
    kinds: dict[str, float] = {}
    for c in counts.collectives:
        kinds[c.kind] = kinds.get(c.kind, 0.0) + c.times * c.result_bytes
    return {
        "temporary_bytes": temporary_bytes,
        "allocated_temporary_bytes": allocated_temporary_bytes,
        "flops": counts.flops,
        "matmul_flops": counts.matmul_flops,
        "attention_flops": counts.kernel_flops,
        "hbm_bytes": counts.hbm_bytes,
        "collective_bytes": counts.collective_bytes,
        "received_bytes": counts.received_bytes,
        "collectives": kinds,
    }


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "libtpu", "maxtext", "flax")}


# ------------------------------------------------------------------------------------------------------ the comparison


def child(python: str, which: str, case: str) -> dict:
    """What one of the two makes of a case, in a process of MaxText's environment: the last line that it prints."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": str(ROOT)}
    command = [python, __file__, "--child", which, "--cases", case]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{which} {case}: failed with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def missing(python: str | None) -> str | None:
    """Why MaxText cannot be run, or None."""
    if python is None:
        return "no --maxtext-python and no MAXTEXT_PYTHON: MaxText needs an environment of its own with Python 3.12"
    code = "import importlib.metadata as m; print(m.version('maxtext'), m.version('jax'), m.version('libtpu'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"{python}: {error}"
    if done.returncode:
        return f"{python}: {done.stderr.strip().splitlines()[-1]}"
    return None if done.stdout.split()[0] == MAXTEXT else f"{python}: MaxText {done.stdout.split()[0]}, not {MAXTEXT}"


def compare(python: str, case: str) -> dict:
    our, their, tuned = (child(python, which, case) for which in ("ours", "maxtext", "tuned"))
    model, slice_name, _, mesh, batch = CASES[case]
    ratios = {name: our[name] / their[name] for name in BOUNDS}
    return {
        "case": {"model": model, "slice": slice_name, "mesh": mesh, "sequences": batch, "tokens": SEQ_LEN},
        "versions": our.pop("versions"),
        "ours": our,
        "maxtext": {key: value for key, value in their.items() if key != "versions"},
        "tuned": {key: value for key, value in tuned.items() if key != "versions"},
        "ratios": ratios,
        "above": [name for name, ratio in ratios.items() if ratio > BOUNDS[name]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maxtext-python", default=os.environ.get("MAXTEXT_PYTHON"), metavar="FILE")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--write", type=Path, metavar="FILE", help="JSON of all cases, for a page")
    parser.add_argument("--child", choices=("ours", "maxtext", "tuned"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        found = ours(args.cases[0]) if args.child == "ours" else theirs(args.cases[0], args.child == "tuned")
        print(json.dumps(found | {"versions": versions()}))
        return
    if reason := missing(args.maxtext_python):
        print(json.dumps({"skipped": reason}))
        return
    results = {}
    for case in args.cases:
        results[case] = compare(args.maxtext_python, case)
        print(json.dumps(results[case]), flush=True)
        if args.write:
            known = json.loads(args.write.read_text()) if args.write.exists() else {}
            args.write.write_text(json.dumps(known | results, indent=2) + "\n")
    if any(result["above"] for result in results.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
