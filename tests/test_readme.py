"""The README's Python runs as it is printed."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

import tele_jax as tele

README = Path(__file__).parent.parent / "README.md"


def test_the_growth_example_grows_and_preserves():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(code, names)
    tokens = jax.random.randint(jax.random.key(1), (2, 16), 0, 512)
    plan, small, params, big = (names[name] for name in ("plan", "small", "params", "big"))
    before, after = tele.forward(small, params, tokens), tele.forward(plan.dst_cfg, big, tokens)
    assert float(jnp.abs(before - after).max()) <= 2e-5 * float(jnp.abs(before).max())
    report = tele.growth.verify(plan, params, big, tokens)
    assert report.ok, report
