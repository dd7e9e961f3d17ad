"""What `tele merge` makes of small Llamas, against mergekit's results from the same files.

    pip install --no-deps mergekit==0.1.5 immutables
    JAX_PLATFORMS=cpu python benchmarks/merge_mergekit.py [--dir DIR]

Three Llamas of random numbers (4 layers, embed 96, 6 heads over 2 keys; float32): a base, and two that differ from it
everywhere. Both programs read the same releases. Prints, as JSON, the largest difference of an entry for each method,
as a share of the largest entry, and the number of entries that differ by more than 1e-5 of it: in TIES an entry at the
threshold may be kept by one and not by the other. Norms are far from parallel: where the cosine of two tensors is above
0.9995, mergekit's SLERP takes a line instead of the arc. Needs the extra [hf].
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tele_jax.cli.main import main as tele

METHODS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "linear": (dict(weights=(2.0, 1.0)), ["--weights", "2,1"]),
    "slerp": (dict(parameters={"t": 0.3}, base_model="a"), ["--t", "0.3"]),
    "task_arithmetic": (
        dict(weights=(1.0, 0.5), parameters={"lambda": 0.4}, base_model="base"),
        ["--weights", "1,0.5", "--scale", "0.4"],
    ),
    "ties": (
        dict(weights=(1.0, 0.5), density=0.2, base_model="base", parameters={"lambda": 0.7}),
        ["--weights", "1,0.5", "--density", "0.2", "--scale", "0.7"],
    ),
    "passthrough": (dict(slices=((0, 0, 3), (1, 1, 4))), ["--slices", "0:0-3,1:1-4"]),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="where the files go; a temporary directory by default")
    with tempfile.TemporaryDirectory(prefix="merge_", dir=parser.parse_args().dir) as directory:
        found = measure(Path(directory))
    print(json.dumps(found, indent=2))
    return 0 if all(figures["entries_that_differ"] == 0 for figures in found["methods"].values()) else 1


def measure(work: Path) -> dict[str, Any]:
    import mergekit.merge
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    for seed, name in enumerate(("base", "a", "b")):
        save(work / name, seed)
        run("import", "--format", "llama", work / name, work / f"{name}.tele")
    found: dict[str, Any] = {"mergekit": mergekit_version(), "methods": {}}
    for method, (theirs, words) in METHODS.items():
        config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(describe(work, method, **theirs))))
        options = MergeOptions(copy_tokenizer=False, quiet=True)
        mergekit.merge.run_merge(config, str(work / f"{method}.theirs"), options=options)
        base = ["--base", work / "base.tele"] if theirs.get("base_model") == "base" else []
        run("merge", "--method", method, *words, *base, work / "a.tele", work / "b.tele", work / f"{method}.tele")
        run("export", "--format", "llama", "--dtype", "float32", work / f"{method}.tele", work / f"{method}.ours")
        found["methods"][method] = compare(read(work / f"{method}.theirs"), read(work / f"{method}.ours"))
    return found


def save(path: Path, seed: int) -> None:
    """Writes a release whose entries, those of norms included, are random; a and b lie near the base."""
    import torch
    import transformers

    sizes = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=6)
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=512, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config)
    drawn, apart = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn(value.shape, generator=drawn) * 0.05 + (value.ndim == 1))
            value.add_(torch.randn(value.shape, generator=apart) * (seed and (0.3 if value.ndim == 1 else 0.02)))
    model.save_pretrained(path)


def describe(work: Path, method: str, weights=(), density=None, slices=(), base_model=None, parameters=None) -> Any:
    """A configuration of mergekit."""
    names = [str(work / name) for name in "ab"]
    config: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
    if slices:
        config["slices"] = [{"sources": [{"model": names[i], "layer_range": [a, b]}]} for i, a, b in slices]
        return config
    own = {"density": density} if density else {}
    weighted = [own | {"weight": weight} for weight in weights] or [{}, {}]
    config["models"] = [{"model": name, "parameters": how} for name, how in zip(names, weighted, strict=True)]
    config |= {"base_model": str(work / base_model)} if base_model else {}
    return config | ({"parameters": parameters} if parameters else {})


def run(*words: Any) -> None:
    if code := tele(list(map(str, words))):
        raise SystemExit(code)


def read(directory: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def compare(theirs: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> dict[str, Any]:
    assert theirs.keys() == ours.keys(), sorted(theirs.keys() ^ ours.keys())
    shares = np.concatenate([np.abs(theirs[n] - ours[n]).ravel() / np.abs(theirs[n]).max() for n in theirs])
    return {
        "entries": shares.size,
        "largest_difference": float(shares.max()),
        "entries_that_differ": int((shares > 1e-5).sum()),
    }


def mergekit_version() -> str:
    from importlib.metadata import version

    return version("mergekit")


if __name__ == "__main__":
    raise SystemExit(main())
