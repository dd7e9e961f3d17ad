"""Which language: sentences written for this test, and the standard library as code."""

import sysconfig
from pathlib import Path

import pytest

from tele_jax.clean.document import Document, Drop
from tele_jax.clean.settings import LanguageConfig
from tele_jax.clean.text import identify, language, looks_like_code

pytest.importorskip("pycld2", reason="pycld2 is not installed: extra [clean]")

SENTENCES = {
    "en": "The council met on Tuesday to decide whether the bridge should be repaired before the winter.",
    "zh": "市议会星期二开会，决定是否在冬天以前修好那座桥。居民们希望早日通车。",
    "zh traditional": "市議會星期二開會，決定是否在冬天以前修好那座橋。居民們希望早日通車。",
    "zh classical": "山高水長，君子之風也。臨川而歎曰：逝者如斯，不舍晝夜。古之人不余欺也。",
    "zh with its reading": "迷踪失路（mí zōng shī lù）\n指迷失了道路。\n",
    "zh proverb with its reading": "柳树上着刀桑树上出血（liǔ shù shàng zháo dāo sāng shù shàng chū xiě）\n代人受过",
    "ja": "市議会は火曜日に会合を開き、冬までに橋を修理するかどうかを決めた。",
    "de": "Der Stadtrat beriet am Dienstag, ob die Brücke noch vor dem Winter repariert werden soll.",
    "fr": "Le conseil s'est réuni mardi pour décider si le pont devait être réparé avant l'hiver.",
    "ru": "Совет собрался во вторник, чтобы решить, нужно ли ремонтировать мост до зимы.",
    "es": "El consejo se reunió el martes para decidir si el puente debía repararse antes del invierno.",
    "ko": "시의회는 화요일에 모여 겨울 전에 다리를 고칠지 결정했다.",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_languages_are_told_apart(name):
    kind, code, share = identify(SENTENCES[name])
    assert share >= LanguageConfig().min_share
    assert kind == (name.split()[0] if name.split()[0] in ("en", "zh") else "other"), code


def test_what_is_not_wanted_goes_and_a_declared_language_is_believed():
    config = LanguageConfig(keep=("zh",))
    found = language(Document(0, SENTENCES["en"], "s", "d", "o"), config)
    assert isinstance(found, Drop) and found.reason == "language en"
    declared = Document(0, SENTENCES["en"], "s", "d", "o", language="zh")
    assert language(declared, config) is declared


def test_control_characters_and_lone_surrogates_do_not_stop_it():
    assert identify(SENTENCES["en"] + "\x00\x08\ud800\ufffe")[0] == "en"


def test_code_is_told_from_prose():
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))[:150]
    sources = [path.read_text(encoding="utf-8") for path in paths]
    sources = [source for source in sources if len(source) > 2_000]
    found = sum(map(looks_like_code, sources)) / len(sources)
    assert len(sources) > 50 and found > 0.85, found
    from pydoc_data import topics

    prose = [text for text in topics.topics.values() if len(text) > 500]
    wrong = sum(map(looks_like_code, prose)) / len(prose)
    assert len(prose) > 50 and wrong < 0.15, wrong  # chapters about the language's syntax, with examples


ITEMS = {
    "de": (
        "auth und authpriv: für die Authentifizierung",
        "daemon: betrifft einen Daemon (DNS, NTP usw.)",
        "kern: Kernel",
    ),
    "fr": (
        "fournit les services décrits à l'annexe 1 (voir page 3) ",
        "respecte les délais convenus entre les parties ",
    ),
    "en": (
        "the chair shall be elected each year (by secret ballot)",
        "fees are due in March",
        "use of the hall is free",
    ),
    "zh": ("国家机关", "事业单位（含学校）", "社会团体"),
}


@pytest.mark.parametrize("name", ITEMS)
@pytest.mark.parametrize("bullet", ["", "- ", "  • "])
def test_items_of_a_list_in_prose_are_not_code(name, bullet):
    text = SENTENCES[name] + "\n" + "".join(f"{bullet}{item};\n" for item in ITEMS[name] * 2)
    assert not looks_like_code(text) and identify(text)[0] != "code"


@pytest.mark.parametrize(
    "text",
    [
        "int total;\nfor (i = 0; i < n; i++)\n  total += a[i];\nreturn total;",
        "use strict;\nmy $x = shift;\nprint $x;\nexit;",
        'printf ("%d", x);\nfoo (bar);\nbaz->next = NULL;\nbreak;',
        "class Device;\nstatic const unsigned flags;\nnamespace a = b;\n    other, third);",
    ],
)
def test_statements_are_code(text):
    assert looks_like_code(text)
