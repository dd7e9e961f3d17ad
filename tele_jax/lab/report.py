"""The report of a study, made from the JSON of its jobs alone: verdict, table, figure, and a page in Markdown."""

import shlex
from pathlib import Path

from tele_jax import files
from tele_jax.config import from_dict
from tele_jax.errors import DamageError, UserError
from tele_jax.files import Table
from tele_jax.lab.runner import RESULT, STUDY
from tele_jax.lab.study import Study, job_directory
from tele_jax.lab.verdict import RULE, judge, shown, together

Results = dict[str, dict[int, Table]]  # {arm: {seed: what its job found}}


def report(out: Path, page: Path | None = None) -> Table:
    """Writes OUT/report.json, and the page with its figure beside it, and returns the report.

    page: path of the page; by default OUT/page.md.

    Raises:
      UserError: OUT holds no study, or jobs are not done. DamageError: a result is damaged.
    """
    if not (out / STUDY).exists():
        raise UserError(f"{out}: holds no study (no {STUDY}); name the directory of `tele lab run`")
    try:
        study = from_dict(Study, files.read_json(out / STUDY), "study")
    except UserError as error:
        raise DamageError(f"{out / STUDY}: damaged, {error}") from None
    made = _results(study, out)
    results = {arm: {seed: result["found"] for seed, result in seeds.items()} for arm, seeds in made.items()}
    estimates = study.module.estimates(study, results)
    for criterion in study.criteria:
        if criterion.estimate not in estimates:
            raise DamageError(f"{out / STUDY}: damaged, there is no estimate {criterion.estimate!r}")
    judged = [judge(criterion, estimates[criterion.estimate]) for criterion in study.criteria]
    jobs = [result for seeds in made.values() for result in seeds.values()]
    found: Table = {
        "study": study.name,
        "budget": study.budget,
        "verdict": together([one["verdict"] for one in judged]),
        "criteria": judged,
        "date": max(job["date"] for job in jobs),
        "devices": sorted({job["device"] for job in jobs}),
        "seconds": sum(job["seconds"] for job in jobs),
    }
    files.write_json(out / "report.json", found)
    page = page or out / "page.md"
    title = f"# {study.name}: "
    own = page.suffix == ".md" and (not page.exists() or page.read_text("utf-8", "replace").startswith(title))
    if not own:
        raise UserError(f"{page}: is no page of {study.name} (a .md file), and would be overwritten; choose another")
    figure = page.with_name("figure.png" if page.name == "page.md" else f"{page.stem}.png")
    with files.writing(figure):
        figure.parent.mkdir(parents=True, exist_ok=True)
        study.module.picture(study, results).savefig(figure, dpi=100)
    files.write_file(page, _page(study, found, study.module.rows(study, results), figure.name))
    return found | {"page": str(page), "figure": str(figure)}


def _results(study: Study, out: Path) -> Results:
    """{arm: {seed: result}}; raises UserError where jobs are not done."""
    paths = {job: job_directory(out, *job) / RESULT for job in study.jobs}
    left = [f"{arm}, seed {seed}" for (arm, seed), path in paths.items() if not path.exists()]
    if left:
        raise UserError(
            f"{out}: {len(left)} of {len(paths)} jobs are not done, {left[0]} first; `tele lab run` goes on"
        )
    found: Results = {}
    for (arm, seed), path in paths.items():
        result = files.read_json(path)
        if not isinstance(result, dict) or not {"date", "device", "seconds", "found"} <= result.keys():
            raise DamageError(f"{path}: damaged, not the result of a job")
        found.setdefault(arm, {})[seed] = result
    return found


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _page(study: Study, found: Table, table: tuple[list[str], list[list[str]]], figure: str) -> str:
    criteria = [
        [one["says"], f"{one['side']} {one['threshold']:g} {one['unit']}", shown(one), f"**{one['verdict']}**"]
        for one in found["criteria"]
    ]
    seeds = ", ".join(map(str, study.seeds))
    machine = "; ".join(found["devices"])
    parts = [
        f"# {study.name}: {study.title}",
        f"After this page you know whether this holds, and how to find out yourself: {study.hypothesis}",
        f"**Verdict at the budget `{study.budget}`: {found['verdict']}.** Made by this command; "
        f"{found['date']}, {machine}, {found['seconds'] / 60:.1f} minutes of jobs, seeds {seeds}:",
        "    " + shlex.join(["tele", "lab", "run", study.name, "--budget", study.budget, *study.overrides]),
        f"Claim: {study.claim} Source: {study.source}.",
        _table(["criterion", "claimed", "mean over seeds [95% interval]", "verdict"], criteria),
        f"![{study.title}]({figure})",
        _table(*table),
        *(f"- {note}" for note in study.notes),
        f"Rule: {RULE}",
    ]
    return "\n\n".join(parts) + "\n"
