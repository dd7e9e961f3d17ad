"""The real layer of Tele-FLM 52B, grown to that of 102B at full width: the function of the layer stays.

0.8 and 1.3 billion parameters, none of which is held: the source is synthetic, the grown layer is computed where it is
read. The whole series, embedding and head included, is in benchmarks/full_width.py.
"""

import tele_jax as tele
from tele_jax import growth
from tele_jax.axes import flatten
from tele_jax.growth.verify import parts as layerwise
from tests.growth import synthetic

VOCAB = dict(vocab_size=512, padded_vocab_size=512)  # layers are looked at here


def test_a_layer_of_52b_grown_to_102b_does_what_it_did():
    src = tele.get_model("tele_flm_52b").replace(num_layers=2, **VOCAB)
    plan = growth.plan(src, tele.get_model("tele_flm_102b").replace(num_layers=3, **VOCAB), layers=[0, 0, 1])
    assert (plan.src_cfg.embed_dim, plan.dst_cfg.embed_dim, plan.dst_cfg.mlp_dim) == (8_192, 10_240, 27_264)
    params = synthetic.tree(src)
    old, new = flatten(params), flatten(growth.lazy(plan, params))
    parts = layerwise.parts(plan, old, new, 0) | layerwise.parts(plan, old, new, None)
    # Norm scales are rounded to float32 once; everything else is float64.
    assert parts["layers[0]"] <= 5e-7 and parts["embed"] == 0.0


def test_the_same_layer_with_the_published_epsilon_does_not():
    """Activations of 1e-3, as the check has them beside usual ones, show an epsilon of 1e-5 that should be 8e-6."""
    src = tele.get_model("tele_flm_52b").replace(num_layers=2, num_heads=8, mlp_dim=64, **VOCAB)
    dst = tele.get_model("tele_flm_102b").replace(num_layers=2, num_heads=10, mlp_dim=80, **VOCAB)
    plan = growth.plan(src, dst)
    wrong = plan.replace(dst_cfg=plan.dst_cfg.replace(rms_eps=1e-5))
    params = synthetic.tree(src)
    for made, low, high in ((plan, 0.0, 5e-7), (wrong, 1e-2, 1.0)):
        parts = layerwise.parts(made, flatten(params), flatten(growth.lazy(made, params)), 1)
        assert low <= parts["layers[1]"] <= high
