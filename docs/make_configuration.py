"""Writes docs/configuration.md: every key of a config page, from the settings' own source.

    python docs/make_configuration.py            rewrites the page
    python docs/make_configuration.py --check    exit code 1 where the page is not what the source says

A key's type and default are those of its field; its meaning is the comment beside the field, or the lines of comment
right above it.
"""

import ast
import dataclasses
import inspect
import io
import re
import sys
import tokenize
import types
from pathlib import Path

from tele_jax import config, settings, stages
from tele_jax.align import pairs, rewards, rollouts
from tele_jax.clean import settings as clean_settings
from tele_jax.eval.text import BpbConfig
from tele_jax.selection import settings as selection_settings
from tele_jax.stages import dpo, grpo, ppo, reward

PAGE = Path(__file__).with_name("configuration.md")
HEAD = """# Every key of a config page

After this page you can write a config page without opening the code. A page is a Python file with `get_config()`,
which returns a ConfigDict; `--config.KEY=VALUE` on the command line changes a value of it. Examples stand in
`configs/`. A key that is unknown, missing or of another type is refused by its name.

`docs/make_configuration.py` writes this page from the settings' source; change the comments there.
"""


def _tables(module: types.ModuleType) -> tuple[type, ...]:
    """The dataclasses that a module declares, in their order."""
    declared = [value for value in vars(module).values() if dataclasses.is_dataclass(value) and isinstance(value, type)]
    return tuple(value for value in declared if value.__module__ == module.__name__)


SECTIONS = (
    ("A run: `tele train`", (stages.RunConfig, settings.MeshConfig)),
    ("A training stage: `kind=\"pretrain\"` or `kind=\"sft\"`", (settings.TrainStage, settings.OptimizerConfig,
                                                             settings.ScheduleConfig, settings.LoraConfig)),
    ("Pairs of answers: `kind=\"reward\"` and `kind=\"dpo\"`", (pairs.PairStage, reward.RewardStage, dpo.DpoStage)),
    ("Replies that are drawn and rewarded: `kind=\"grpo\"` and `kind=\"ppo\"`", (
        rollouts.RolloutStage, rewards.RewardConfig, grpo.GrpoStage, ppo.PpoStage)),
    ("A growth stage: `kind=\"grow\"`, also `tele grow`", (settings.GrowStage,)),
    ("Data", (settings.DataConfig, settings.SourceConfig)),
    ("A model", (config.ModelConfig, config.Rope, config.Ntk)),
    ("A cache of rows: `tele data cache`", (settings.CacheConfig,)),
    ("Bits per byte: `tele eval bpb`", (BpbConfig,)),
    ("Cleaning: `tele data clean`", _tables(clean_settings)),
    ("Selection: `tele sft select`", _tables(selection_settings)),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Key:
    """One row of a table."""

    name: str
    type: str
    default: str
    meaning: str


def keys(cls: type) -> list[Key]:
    """The fields of a dataclass in their order, with the comments that explain them."""
    # A field of config.Filled is filled in where it is left out as None.
    source = re.sub(r"Filled\[(\w+)\] = FILLED", r"\1 | None = None", inspect.getsource(cls))
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("# ").strip()
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.string.startswith("# fmt")
    }
    found = []
    (tree,) = ast.parse(source).body
    for node in tree.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        above, line = [], node.lineno - 1
        while line in comments and lines[line - 1].strip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        beside = [comments[n] for n in range(node.lineno, node.end_lineno + 1) if n in comments]
        below, line = [], node.end_lineno + 1
        # A comment that goes on below its field ends where the next field or an empty line begins.
        if beside:
            while line in comments and lines[line - 1].strip().startswith("#") and _goes_on(lines, line):
                below.append(comments[line])
                line += 1
        meaning = " ".join([*above, *beside, *below])
        found.append(Key(node.target.id, ast.unparse(node.annotation), _default(node.value), meaning))
    return found


def _goes_on(lines: list[str], number: int) -> bool:
    """Whether a line of comment belongs to the field above it: the next line that is no comment is empty or the end."""
    rest = lines[number - 1 :]
    after = next((line.strip() for line in rest if not line.strip().startswith("#")), "")
    return not after or after.startswith(("def ", "@"))


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    text = ast.unparse(value)
    made = re.fullmatch(r"dataclasses\.field\(default_factory=(\w+)\)", text)
    return f"`{made[1]}()`" if made else f"`{text}`"


def render() -> str:
    """The text of the page."""
    parts = [HEAD]
    for title, classes in SECTIONS:
        parts.append(f"## {title}\n")
        for cls in classes:
            if len(classes) > 1:
                parts.append(f"### {cls.__name__}\n")
            parts.append(re.split(r"\n\n(?:Raises|Attributes):|\n\n    ", inspect.getdoc(cls))[0] + "\n")
            rows = [f"| `{k.name}` | `{_cell(k.type)}` | {_cell(k.default)} | {_cell(k.meaning)} |" for k in keys(cls)]
            parts.append("\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> int:
    text = render()
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.exists() and PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
