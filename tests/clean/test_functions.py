"""The stages that look at one document, against formulas, published examples and plain Python."""

import dataclasses
import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tele_jax.clean import duplicates, hashing, screening, settings, stages
from tele_jax.clean import text as texts
from tele_jax.clean.document import Document, Drop

TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff_]+")
ENGLISH = (
    "The river rises in the hills to the north of the town and flows past the old mill, which was built by the "
    "monks that had come to the valley with their sheep. In spring its water is cold and clear; by the end of summer "
    "children can walk across it where the stones of the bridge have fallen, and nobody remembers who built that."
)
CHINESE = (
    "这条河从城北的山里流出来，经过一座老磨坊。春天河水又冷又清，到了夏末，孩子们可以在石桥倒塌的地方走过去，"
    "没有人记得桥是谁修的。"
)
CODE = '''
def area(shapes):
    """Sum of areas."""
    total = 0.0
    for shape in shapes:
        total += shape.width * shape.height
    return total


if __name__ == "__main__":
    print(area([]))
'''


def document(text, language="en", **fields):
    return Document(1, text, "s", "d", "origin", language=language, **fields)


@given(st.text(alphabet=st.sampled_from("abC dé,.模型の 9\n_-"), max_size=60))
def test_tokens_are_equal_exactly_where_words_are_equal(text):
    words = TOKEN.findall(text.lower().replace("_", " "))
    hashes = hashing.tokens(text).tolist()
    assert len(hashes) == len(words)
    assert len(set(zip(words, hashes))) == len(set(words)) == len(set(hashes))


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 6))
def test_ngrams_are_equal_exactly_where_runs_are_equal(items, n):
    hashes = hashing.ngrams(hashing.mix(np.array(items, np.uint64)), n).tolist()
    runs = [tuple(items[i : i + n]) for i in range(len(items) - n + 1)]
    assert len(hashes) == len(runs)
    assert len(set(zip(runs, hashes))) == len(set(runs)) == len(set(hashes))


def test_normalise_gives_nfc_without_what_cannot_be_seen():
    text = "re\u0301sume\u0301\r\nsoft\u00adhyphen\u200b and\u00a0space  \r\n\r\n\r\n\r\nend\x00\x07\ufeff"
    result = texts.normalise(document(text), settings.NormaliseConfig()).text
    assert result == "résumé\nsofthyphen and space\n\nend"
    assert unicodedata.is_normalized("NFC", result)


def test_normalise_leaves_the_spaces_of_code():
    text = "def f():\r\n\tx = 'e\u0301\u00a0\u200b'   \n\n\n\n\n    return x\x0c\n\x00"
    result = texts.normalise(document(text, "code"), settings.NormaliseConfig()).text
    assert result == "def f():\n\tx = 'e\u0301\u00a0\u200b'   \n\n\n\n\n    return x\x0c\n"


@given(st.text(max_size=80), st.sampled_from(["en", "code"]))
def test_normalise_changes_nothing_the_second_time(text, language):
    once = texts.normalise(document(text, language), settings.NormaliseConfig())
    assert texts.normalise(once, settings.NormaliseConfig()) == once


def test_extract_takes_the_text_and_not_the_navigation():
    pytest.importorskip("resiliparse", reason="resiliparse is not installed: extra [clean]")
    page = "<html><head><title>t</title><script>var x=1</script></head><body><nav><a href=/>Home</a><a href=/a>About us"
    page += (
        f"</a></nav><article><h1>River</h1><p>{ENGLISH}</p><p>{CHINESE}</p></article><footer>Imprint</footer></body>"
    )
    text = texts.extract(document(page, html=True), settings.ExtractConfig()).text
    assert ENGLISH in text and CHINESE in text
    assert "var x" not in text and "About us" not in text and "Imprint" not in text
    assert texts.extract(document("<p>hi", html=True), settings.ExtractConfig()).reason == "no text in page"
    plain = document("<p>no page")
    assert texts.extract(plain, settings.ExtractConfig()) is plain


@pytest.mark.parametrize("wrapper", ['div class="section"', 'div class="sidebar"', 'div id="comments"', "section"])
def test_extract_keeps_listings_wherever_they_stand(wrapper):
    pytest.importorskip("resiliparse", reason="resiliparse is not installed: extra [clean]")
    listing = "# adduser fish\n    export EDITOR=mcedit"
    inner = f"<{wrapper}><h3>Title</h3><p>A word.</p><pre class=screen>{listing}</pre></{wrapper.split()[0]}>"
    menu = "<nav><ul><li>Home</li></ul><pre>menu --all</pre></nav>"
    page = f"<html><body>{menu}<main><h1>River</h1><p>{ENGLISH * 3}</p>{inner}<p>{CHINESE * 3}</p></main></body></html>"
    text = texts.extract(document(page, html=True), settings.ExtractConfig()).text
    assert listing in text and ENGLISH in text and "menu --all" not in text


@pytest.mark.parametrize("text", [ENGLISH, "# A title\n\n" + ENGLISH + "\n\n- one\n- two"])
def test_plain_english_breaks_no_rule(text):
    assert list(stages.violations(text, "en", settings.EN)) == []


def test_rules_on_shares_of_lines_ask_for_several_lines():
    headline = "城北石桥修复工程开工 ..."
    assert list(stages.violations(headline + "\n\n" + CHINESE, "zh", settings.ZH)) == []
    assert list(stages.violations("• " + CHINESE, "zh", settings.ZH)) == []
    assert list(stages.violations("River\n" + ENGLISH + "\nRiver", "en", settings.EN)) == []
    # What is said twice is still found by its characters, however few its lines are.
    twice = [drop.reason for drop in stages.violations(CHINESE + "\n" + CHINESE, "zh", settings.ZH)]
    assert "repeated lines" in twice


def test_plain_chinese_and_code_break_no_rule():
    assert list(stages.violations(CHINESE, "zh", settings.ZH)) == []
    assert list(stages.violations(CODE, "code", settings.CODE)) == []


LINES = [f"{i} The line that is here with the number {i} and nothing else of note." for i in range(20)]


@pytest.mark.parametrize(
    ("text", "language", "reason"),
    [
        ("The end of it.", "en", "short"),
        ("短文。", "zh", "short"),
        (" ".join(["the", "of", "and"] * 40) + " a" * 400, "en", "short words"),
        (ENGLISH + " # # # # # # # # # # # # # #", "en", "symbols"),
        ("\n".join("• " + line for line in LINES), "en", "bullet lines"),
        ("\n".join(line[:-1] + "..." for line in LINES), "en", "ellipsis lines"),
        (" ".join(f"word{i} keyword{i}" for i in range(60)), "en", "few stop words"),
        ("\n".join(LINES[:10] + LINES[:6]), "en", "repeated lines"),
        ("buy the pills and " * 30, "en", "most frequent 2-gram"),
        (ENGLISH + " " + ENGLISH, "en", "repeated 5-grams"),
        (ENGLISH + "\ufffd" * 5, "en", "replacement characters"),
        (ENGLISH + " 1234567890" * 40, "en", "few letters"),
        (ENGLISH + "!?;" * 200, "en", "heavy punctuation"),
        (ENGLISH + " lorem ipsum", "en", "phrase"),
        (CHINESE + "！？；" * 40, "zh", "heavy punctuation"),
        (CHINESE * 4, "zh", "repeated 5-grams"),
        ("金木水火土" * 3 + "春夏秋冬" * 5, "zh", "few stop words"),
        (CODE + "x = '" + "a" * 2000 + "'", "code", "long line"),
        (CODE + "\n" + "%$#@!^&*(){}[]<>" * 60, "code", "few letters and digits"),
    ],
)
def test_a_rule_is_broken_by_what_it_is_about(text, language, reason):
    assert reason in [drop.reason for drop in stages.violations(text, language, getattr(settings, language.upper()))]
    result = stages.rules(document(text, language), settings.RulesConfig())
    assert isinstance(result, Drop)


def test_repeated_ngram_share_equals_the_count_by_hand():
    text = "a b c d e f g a b c d e x y z w"
    grams = hashing.ngrams(hashing.tokens(text), 5)
    # The second "a b c d e" repeats; its five of sixteen tokens are covered.
    assert stages._covered(grams, 5).tolist() == [7 <= i < 12 for i in range(16)]


# Published or computed by hand: Visa's test number; the resident number of GB 11643-1999's example.
@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mail Li.Wei+x@mail.pku.edu.cn now", "mail <email> now"),
        ("me@example.com and a@b", "me@example.com and a@b"),
        ("电话13912345678。", "电话<phone>。"),
        ("+86 139-1234-5678, 010-62751234", "<phone>, <phone>"),
        ("call (212) 555-0199 or +44 20 7946 0958", "call <phone> or <phone>"),
        ("身份证11010519491231002X，", "身份证<id>，"),
        ("wrong check 110105194912310021", "wrong check 110105194912310021"),
        ("card 4111 1111 1111 1111 or 4111111111111112", "card <card> or 4111111111111112"),
        ("from 8.8.8.8 and 2001:4860:4860::8888 to 192.168.0.1", "from <ip> and <ip> to 192.168.0.1"),
        *((t, t) for t in ("version 1.2.3, 2023-10-11 12:30:45, pi 3.14159265358979",)),
        ("x = 0x13912345678; id_13912345678", "x = 0x13912345678; id_13912345678"),
        ("-(0o17777777777)", "-(0o17777777777)"),
        ("tel:0755-86543210-801, 008613912345678", "tel:<phone>, <phone>"),
        ("021-58888888-2020-01", "021-58888888-2020-01"),
        ("sha e13912345678ab and 0.13912345678", "sha e13912345678ab and 0.13912345678"),
        # Chinese numbers with dashes and digits of another width, and with letters beside them.
        ("电话:0372—3156006，0750－3861699", "电话:<phone>，<phone>"),
        ("电话：１３９１２３４５６７８（办公）", "电话：<phone>（办公）"),
        ("手机13912345678qq:5321，tel13912345678微信", "手机<phone>qq:5321，tel<phone>微信"),
        ("传真010-85785068e-mail，热线(0539)7125818，电话:05397125818", "传真<phone>e-mail，热线<phone>，电话:<phone>"),
        ("收件人ｌｉ＠ｐｋｕ", "收件人ｌｉ＠ｐｋｕ"),
        ("（１２）和2017—20180922，2019/0217/c1002-30759189", "（１２）和2017—20180922，2019/0217/c1002-30759189"),
        # Numbers of four parts that count sections and versions, and those that are addresses.
        *((t, t) for t in ("12.6.2.1. 编译并安装", "see Section 4.5.4.1.", "LibreOffice 7.4.7.2", "kernel 5.10.0.132")),
        *((t, t) for t in ("第2.3.1.55节", "Firefox/78.0.1.12", "pkg 2.36.1.90-1+b2", "OID 1.3.6.41", "v2.6.32.71")),
        ("IP:93.184.216.34 at http://93.184.216.34:8080/x", "IP:<ip> at http://<ip>:8080/x"),
        ("服务器地址12.6.2.1，ping 12.6.2.2", "服务器地址<ip>，ping <ip>"),
    ],
)  # fmt: skip
def test_identifiers_are_masked_and_numbers_are_not(text, masked):
    assert screening.mask(text, ("email", "phone", "id", "ip", "card"))[0] == masked


@given(st.integers(0, 10**15 - 1))
def test_luhn_accepts_exactly_one_check_digit(number):
    digits = f"{number:015d}"
    # ISO/IEC 7812-1 by its other description: double every second digit from the right of the payload, add digit sums.
    total = sum(sum(divmod(int(d) * (2 if i % 2 == 0 else 1), 10)) for i, d in enumerate(reversed(digits)))
    good = (10 - total % 10) % 10
    assert [screening.luhn(digits + str(d)) for d in range(10)] == [d == good for d in range(10)]


@given(st.lists(st.integers(0, 9), min_size=17, max_size=17))
def test_chinese_id_has_the_check_character_of_the_published_weights(digits):
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)  # GB 11643-1999, table 2
    check = "10X98765432"[sum(w * d for w, d in zip(weights, digits)) % 11]
    text = "".join(map(str, digits))
    assert [screening.chinese_id(text + c) for c in "0123456789X"] == [c == check for c in "0123456789X"]


@pytest.mark.parametrize(
    "url", ["http://www.a.org/x/?b=2&a=1", "https://a.org:443/x?a=1&b=2&utm_source=q", "https://A.ORG/x/?b=2&a=1#part"]
)
def test_spellings_of_a_url_are_one(url):
    assert duplicates.canonical_url(url, settings.UrlsConfig()) == "a.org/x?a=1&b=2"


def test_other_urls_stay_apart():
    all_ = [
        "https://a.org/x?id=1",
        "https://a.org/x?id=2",
        "https://b.org/x?id=1",
        "https://a.org/y?id=1",
        "http://[bad",
    ]
    assert len({duplicates.canonical_url(url, settings.UrlsConfig()) for url in all_}) == len(all_)


def test_a_title_that_the_first_sentence_repeats_breaks_no_rule():
    text = (
        "Taiwan Strait\n\nThe Taiwan Strait is a 180-kilometer-wide strait separating the island of Taiwan and mainland"
        " Asia. It is part of the South China Sea and connects to the East China Sea to the north of the island."
    )
    config = dataclasses.replace(settings.EN, min_tokens=30)
    assert not list(stages.violations(text, "en", config))
    reasons = {broken.reason for broken in stages.violations(text + " Taiwan Strait!" * 4, "en", config)}
    assert "most frequent 4-gram" in reasons
