"""A found setting as the page of a run at another width."""

from pathlib import Path
from pprint import pformat
from textwrap import indent

from tele_jax import files
from tele_jax.config import require, to_dict
from tele_jax.files import Table
from tele_jax.lab.mup.search import found_page
from tele_jax.lab.mup.widths import at_depth, at_width, first_stage
from tele_jax.stages import run_config

PAGE = '''"""{what}, for `tele train`."""

from ml_collections import ConfigDict


def get_config():
    return ConfigDict({page})
'''
ESCAPED = str.maketrans({"\\": "\\\\", '"': '\\"'})  # a directory may be called anything


def write_page(searched: Path, width: int, path: Path, trial: int | None = None, layers: int | None = None) -> Table:
    """Writes the page of the best trial (or of one trial) of a search at another width, and returns that trial.

    Widths, heads and mlp grow together; muP carries rates, initial values and multipliers over. layers: another number
    of layers, as widths.at_depth.

    Raises:
      UserError: as search.found_page and widths.at_width and at_depth; the file exists, or is no .py file.
    """
    require(path.suffix == ".py", f"--out {path}: a page is a .py file")
    require(not path.exists(), f"--out {path}: exists, and would be overwritten; choose another")
    page, found = found_page(searched, trial)
    first = page["run"][0]
    cfg = at_width(first_stage(run_config(page))[1], width)
    given = page[first]["model"]
    sizes = to_dict(cfg)
    # Only what the width changes, and what the page had left to be derived from it.
    page[first]["model"] = given | {key: sizes[key] for key in ("embed_dim", "num_heads", "head_dim", "mlp_dim")}
    if "num_kv_heads" in given or cfg.num_kv_heads != cfg.num_heads:
        page[first]["model"]["num_kv_heads"] = cfg.num_kv_heads
    if layers is not None:
        page[first]["model"] |= dict(num_layers=layers, residual_mult=at_depth(cfg, layers).residual_mult)
    run_config(page)
    values = ", ".join(f"{key} {value:g}" for key, value in found["values"].items())
    depth = "" if layers is None else f" and {layers} layers"
    what = f"Trial {found['number']} of {searched.name} at width {width}{depth}: {values}"
    files.write_file(
        path,
        PAGE.format(
            what=what.translate(ESCAPED), page=indent(pformat(page, width=115, sort_dicts=False), "    ").strip()
        ),
    )
    return found
