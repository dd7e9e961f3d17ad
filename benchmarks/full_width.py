"""Growth of the published models at their real widths, part by part: embedding, a kept layer, a copied layer, head.

    JAX_PLATFORMS=cpu python benchmarks/full_width.py [--stages 52b-102b 102b-1t] [--policies exact msg]

Prints JSON. Parameters are synthetic and never held: a layer of the 1T model has 7.7 billion. The difference of a part
is that of its output, relative to the largest value of the row, in float64; parameters are float32, so that a norm
scale that is multiplied by the root of the ratio of widths is rounded once.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten
from tele_jax.growth.verify import parts as layerwise
from tests.growth import synthetic

STAGES = {
    "52b-102b": ("tele_flm_52b", "tele_flm_102b", 80_384),
    "102b-1t": ("tele_flm_102b", "tele_flm_1t", 81_920),
}


def run(stage: str, policy: str) -> dict:
    src, dst, rows = STAGES[stage]
    # Two layers of the source, and three of the destination: the second is a copy of the first.
    src = tele.get_model(src).replace(num_layers=2, padded_vocab_size=rows)
    dst = tele.get_model(dst).replace(num_layers=3, padded_vocab_size=rows)
    plan = growth.plan(src, dst, policy=policy, layers=[0, 0, 1])
    growth.check(plan)
    params = synthetic.tree(src)
    began = time.monotonic()
    old, new = flatten(params), flatten(growth.lazy(plan, params))
    parts = {part: value for unit in (None, 0, 1) for part, value in layerwise.parts(plan, old, new, unit).items()}
    return {
        "stage": stage,
        "policy": policy,
        "parameters_of_a_layer": [
            sum(s.size // cfg.num_layers for s in growth_spec.values() if s.stack)
            for cfg, growth_spec in ((src, plan.src_spec), (dst, plan.dst_spec))
        ],
        "relative_difference": parts,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--policies", nargs="+", default=["exact", "msg"])
    args = parser.parse_args()
    runs = [run(stage, policy) for stage in args.stages for policy in args.policies]
    worst = max(difference for r in runs for difference in r["relative_difference"].values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    figures = {"worst": worst, "target": "<= 9.6e-07", "peak_gib": round(peak, 2), "runs": runs}
    print(json.dumps({"machine": machine(), **figures}, indent=2))


if __name__ == "__main__":
    main()
