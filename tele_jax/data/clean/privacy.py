"""Personal identifiers, found by pattern and checksum and replaced by a mark such as <email>."""

import ipaddress
import re
from collections.abc import Callable

from tele_jax.data.clean.document import Document
from tele_jax.data.clean.settings import PrivacyConfig

_NO_DIGIT_BEFORE, _NO_DIGIT_AFTER = r"(?<![0-9A-Za-z_.+-])", r"(?![0-9A-Za-z_]|[.-][0-9])"
_PATTERNS = {
    "email": r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}"
    r"(?![A-Za-z0-9])",
    # GB 11643: region 6, date of birth 8, sequence 3, check character.
    "id": _NO_DIGIT_BEFORE
    + r"[1-8]\d{5}(?:18|19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[0-9Xx]"
    + _NO_DIGIT_AFTER,
    "card": _NO_DIGIT_BEFORE + r"[2-6](?:\d{12,18}|\d{3}(?:[ -]\d{4}){3}|\d{3}[ -]\d{6}[ -]\d{5})" + _NO_DIGIT_AFTER,
    "phone": r"(?<![0-9A-Za-z_.+-])(?:"
    r"(?:\+?86[ -]?)?1[3-9]\d(?:\d{8}|[ -]\d{4}[ -]\d{4})"  # Chinese mobile
    r"|(?:\+86[ -]?)?\(?0[1-9]\d{1,2}\)?[ -]\d{7,8}"  # Chinese landline with its area code set off
    r"|\+[1-9]\d{0,2}[ .-]\(?\d{1,4}\)?(?:[ .-]\d{2,4}){2,4}"  # international, in groups
    r"|(?:\+?1[ .-])?\(?[2-9]\d\d\)?[ .-][2-9]\d\d[.-]\d{4}"  # North American, in groups
    r")" + _NO_DIGIT_AFTER,
    "ip": r"(?<![0-9A-Za-z_.:-])(?:(?:\d{1,3}\.){3}\d{1,3}"
    r"|(?:[0-9A-Fa-f]{1,4}:){2,7}(?::|[0-9A-Fa-f]{1,4})(?::?[0-9A-Fa-f]{1,4}){0,6})"
    r"(?![0-9A-Za-z_:]|\.[0-9])",
}
# Quick to search for, and in every match: most texts have none, and are spared the pattern itself.
_HINTS = {
    "email": "@",
    "id": r"\d{17}",
    "card": r"\d{13}|\d{4}[ -]\d{4,6}[ -]\d",
    "phone": r"\d{7}|\d[ .)-]{1,2}\d\d",
    "ip": r"\.\d{1,3}\.\d|:[0-9A-Fa-f]{0,4}:",
}
_COMPILED = {kind: re.compile(pattern, re.ASCII) for kind, pattern in _PATTERNS.items()}
_HINT = {kind: re.compile(pattern, re.ASCII) for kind, pattern in _HINTS.items()}
_ORDER = ("email", "id", "card", "phone", "ip")  # an identity number's digits resemble those of cards and phones


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B.

    >>> luhn("4111111111111111"), luhn("4111111111111112")
    (True, False)
    """
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def chinese_id(number: str) -> bool:
    """ISO 7064 MOD 11-2 over 18 characters, as GB 11643 asks.

    >>> chinese_id("11010519491231002X")
    True
    """
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(number[:17]))
    return "10X98765432"[total % 11] == number[17].upper()


def _public_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    # Private, loopback and documentation addresses point at nobody; "1.2.3.4" is as often a version or a section.
    return address.is_global


_CHECKS: dict[str, Callable[[str], bool]] = {
    "email": lambda text: not text.lower().endswith(("@example.com", "@example.org", "@example.net")),
    "id": chinese_id,
    "card": lambda text: luhn(re.sub("[ -]", "", text)),
    "phone": lambda text: True,
    "ip": _public_address,
}


def mask(text: str, kinds: tuple[str, ...]) -> tuple[str, dict[str, int]]:
    """(the text with marks, how many of each kind).

    >>> mask("write to li@mail.cn or 13912345678", ("email", "phone"))
    ('write to <email> or <phone>', {'email': 1, 'phone': 1})
    """
    found: dict[str, int] = {}
    for kind in _ORDER:
        if kind not in kinds or not _HINT[kind].search(text):
            continue

        def replace(match: re.Match, kind: str = kind) -> str:
            if not _CHECKS[kind](match.group()):
                return match.group()
            found[kind] = found.get(kind, 0) + 1
            return f"<{kind}>"

        text = _COMPILED[kind].sub(replace, text)
    return text, found


def privacy(document: Document, config: PrivacyConfig) -> tuple[Document, dict[str, int]]:
    """The document with its identifiers masked, and how many of each kind."""
    if document.language in config.skip_languages:
        return document, {}
    text, found = mask(document.text, config.kinds)
    return (document.replace(text=text) if found else document), found
