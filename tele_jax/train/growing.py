"""Growth of a checkpoint as a stage of a run, and behind `tele grow`: plan, grow on the mesh, verify."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tele_jax import growth
from tele_jax.axes import map_param_subtrees
from tele_jax.config import ModelConfig
from tele_jax.errors import FailedError
from tele_jax.growth.layers import distances
from tele_jax.model.spec import spec
from tele_jax.run import GrowStage
from tele_jax.sharding import param_shardings, replicated


def plan_of(src: ModelConfig, dst: ModelConfig, stage: GrowStage, *, layers=None, scores=None) -> growth.Plan:
    """The plan that a growth stage asks for; raises UserError as growth.plan."""
    how = stage.layers if layers is None else layers
    return growth.plan(src, dst, policy=stage.policy, layers=how, seed=stage.seed, scores=scores, epsilon=stage.epsilon)


def grow(
    cfg: ModelConfig, params: Any, opt_state: Any, stage: GrowStage, mesh: Mesh, tokens: np.ndarray, where: str
) -> tuple[growth.Plan, Any, Any, dict[str, Any]]:
    """(plan, grown parameters, grown optimizer state, receipt); verified on tokens int32[B, S].

    `opt_state` may be None. `where` names the stage in messages.

    Raises:
      UserError: the config asks for something that growth cannot do.
      FailedError: a preserving policy did not preserve, or left units that cannot learn.
    """
    scores = None
    if stage.layers == "distance":
        scores = distances(cfg, params, tokens)
    plan = plan_of(cfg, cfg.replace_from(stage.model, f"{where}.model"), stage, scores=scores)
    shardings = param_shardings(spec(plan.dst_cfg), mesh)
    with jax.set_mesh(mesh):
        big = jax.jit(lambda p: growth.apply(plan, p), out_shardings=shardings)(params)
        grown_state = None
        if opt_state is not None and stage.optimizer_state:
            grow_state = lambda state: growth.apply_opt(plan, state)  # noqa: E731
            shape = jax.eval_shape(grow_state, opt_state)
            out = map_param_subtrees(
                lambda path, tree: shardings, shape, spec(plan.dst_cfg), lambda *_: replicated(mesh)
            )
            grown_state = jax.jit(grow_state, out_shardings=out)(opt_state)
        report = growth.verify(plan, params, big, tokens)
    receipt = report.to_json() | {
        "seed": plan.seed,
        "layers": plan.maps["layers"].index.tolist(),
        "layer_scores": scores,
        "src_cfg": plan.to_json()["src_cfg"],
        "dst_cfg": plan.to_json()["dst_cfg"],
        "optimizer_state": grown_state is not None,
        "absolute_tolerance": stage.tolerance,
    }
    if not report.ok:
        raise FailedError(f"{where}: the growth failed its verification and was not written: {report}")
    if report.preserving and stage.tolerance is not None and report.max_abs > stage.tolerance:
        raise FailedError(
            f"{where}: the logits moved by {report.max_abs:.3g}, more than tolerance={stage.tolerance:g}; "
            "nothing was written"
        )
    return plan, big, grown_state, receipt


def provenance_entry(name: str, plan: growth.Plan, receipt: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of the growth that made it. mask: where the masks stand, None where there are none."""
    entry = {"stage": name, "kind": "grow", "policy": plan.policy, "seed": plan.seed, "plan": plan.digest}
    return entry | {"max_abs": receipt["max_abs"], "mask": 0.0 if plan.masked else None}
