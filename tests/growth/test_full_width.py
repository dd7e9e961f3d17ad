"""A layer at the real width of Tele-FLM 52B, grown to that of 102B: its function stays, with the right epsilon.

Few heads and units: whole layers, of 0.8 and 1.3 billion parameters, and the rest of the series are in
benchmarks/full_width.py. The source is synthetic, the grown layer is computed where it is read.
"""

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten
from tele_jax.growth.verify import parts as layerwise
from tests.growth import synthetic

VOCAB = dict(vocab_size=512, padded_vocab_size=512)  # layers are looked at here


def test_a_layer_grown_at_full_width_does_what_it_did_and_with_the_published_epsilon_does_not():
    """Activations of 1e-3, as the check has them beside usual ones, show an epsilon of 1e-5 that should be 8e-6."""
    src = tele.get_model("tele_flm_52b").replace(num_layers=2, num_heads=8, mlp_dim=64, **VOCAB)
    dst = tele.get_model("tele_flm_102b").replace(num_layers=3, num_heads=10, mlp_dim=80, **VOCAB)
    plan = growth.plan(src, dst, layers=[0, 0, 1])
    assert (plan.src_cfg.embed_dim, plan.dst_cfg.embed_dim) == (8_192, 10_240)
    params = synthetic.tree(src)
    old, new = flatten(params), flatten(growth.lazy(plan, params))
    parts = layerwise.parts(plan, old, new, 0) | layerwise.parts(plan, old, new, None)
    # Norm scales are rounded to float32 once; everything else is float64.
    assert parts["layers[0]"] <= 5e-7 and parts["embed"] == 0.0
    wrong = plan.replace(dst_cfg=plan.dst_cfg.replace(rms_eps=1e-5))
    for made, low, high in ((plan, 0.0, 5e-7), (wrong, 1e-2, 1.0)):
        parts = layerwise.parts(made, old, flatten(growth.lazy(made, params)), 2)
        assert low <= parts["layers[2]"] <= high
