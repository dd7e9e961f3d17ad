"""Pages of training paths for `paths`: from scratch or grown, finished at several amounts of compute."""

from collections.abc import Sequence

from tele_jax.config import ModelConfig
from tele_jax.errors import require
from tele_jax.files import Table
from tele_jax.train.step import flops_per_token


def split_steps(
    models: Sequence[ModelConfig], shares: Sequence[float], flops: float, *, batch_size: int, seq_len: int
) -> list[int]:
    """Steps of each stage that share the tokens of a path as given and take so many FLOPs together.

    The steps of the first stage make up for what rounding leaves of the others.

    >>> small = ModelConfig(num_layers=1, embed_dim=8, num_heads=2, mlp_dim=16, vocab_size=32)
    >>> split_steps([small, small.replace(num_layers=2)], [3, 1], 1e8, batch_size=2, seq_len=16)
    [321, 107]
    """
    step = [flops_per_token(cfg, seq_len) * batch_size * seq_len for cfg in models]
    scale = flops / sum(share * cost for share, cost in zip(shares, step, strict=True))
    later = [max(1, round(scale * share)) for share in shares[1:]]
    rest = flops - sum(steps * cost for steps, cost in zip(later, step[1:]))
    require(rest >= step[0], f"split_steps: {flops:.3g} FLOPs leave no step for the first stage; give more")
    return [round(rest / step[0]), *later]


def path(
    model: Table,
    sizes: Sequence[Table],
    shares: Sequence[float],
    ends: Sequence[float],
    *,
    stage: Table,
    decay: float,
    warmup: int,
    cooled: float = 0.0,
    grow: Table | None = None,
    after_growth: Table | None = None,
    rewarm: int = 0,
) -> Table:
    """The page of a path through models of some sizes, finished at each of `ends`, amounts of FLOPs that rise.

    The ends share the first stage, at the full learning rate. Each leaves it where its share of the tokens is used up,
    goes through the other sizes, and ends in a linear decay of the rate to 0, whose FLOPs count.

    Args:
      model: fields of the model that stay; sizes: those of every stage. One size alone is a path from scratch.
      shares: tokens of the stages, in any unit.
      stage: settings of all training stages, without steps and schedule.
      decay: share of the steps of the last stage in which the rate falls.
      warmup: steps of the rise at the start.
      cooled: share of the steps of the first size in which the rate falls before the growth, after which it is full.
      grow: settings of the growths. after_growth: those of the stages behind them, in the place of some of `stage`.
      rewarm: steps behind every growth in which the rate of all parameters rises again.
    """
    models, page, done = [ModelConfig(**model, **size) for size in sizes], {}, 0
    rows = {"batch_size": stage["batch_size"], "seq_len": stage["seq_len"]}
    grown = stage | (after_growth or {}) if sizes[1:] else stage
    constant = lambda steps, rise=0: {"steps": steps, "schedule": {"kind": "constant", "warmup": rise}}  # noqa: E731
    for number, flops in enumerate(ends, start=1):
        first, *middle = split_steps(models, shares, flops, **rows)
        last = middle.pop() if middle else first
        fall = max(1, round(decay * last))
        cool = round(cooled * first)
        first, last = (first - cool, last) if sizes[1:] else (first - fall, fall)
        start = {"model": model | sizes[0]} if number == 1 else {"after": f"first_{number - 1}"}
        require(
            first > done, f"path: the end at {flops:.3g} FLOPs leaves no step after the one before; move them apart"
        )
        page[f"first_{number}"] = stage | start | constant(first - done, 0 if done else warmup)
        falling = {"kind": "wsd", "final": 0.0}
        if cool:
            page[f"cool_{number}"] = stage | {"steps": cool, "schedule": falling | {"decay": cool}}
        for place, size in enumerate(sizes[1:], start=2):
            page[f"grow_{number}_{place}"] = {"kind": "grow", "model": size} | (grow or {})
            if middle[place - 2 :]:
                page[f"size_{number}_{place}"] = grown | constant(middle[place - 2], rewarm)
        rise = {"warmup": rewarm} if rewarm and sizes[1:] else {}
        page[f"end_{number}"] = grown | {"steps": last, "schedule": falling | {"decay": fall} | rise}
        done = first
    return {"run": list(page)} | page
