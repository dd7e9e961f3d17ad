"""Answers in what a model wrote: a letter, a number, a mathematical expression; and whether they are the right ones.

A reply in which no answer can be found is unreadable. It counts as wrong, and is counted.
"""

import re
from fractions import Fraction

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_LETTER = r"(?:(?<=\()([a-j])(?=\))|([A-J])(?![A-Za-z]))"  # a small letter without parentheses may be an article
_ANSWER = r"(?:(?i:\banswers?(?: is| should be| would be)?(?: option| choice)?)|答案应?该?(?:是|为|选)?(?:选项)?)"
_CHOSEN = r"(?:(?<!不)(?<!不应)选择?(?:选项)?(?!项))"
_OPTION = r"(?:(?i:\b(?:option|choice)(?: is)?)|选项(?:是|为)?)"
_SAID = [re.compile(before + r"\W{0,6}?" + _LETTER) for before in (_ANSWER, _CHOSEN, _OPTION)]
_ALONE = re.compile(  # not the article of "A dog"
    r"(?<![A-Za-z])(?<!\b[Nn]ot )(?<!不是)(?<!不选)" + _LETTER + r"(?!(?<=[AI]) (?!is |because )[a-z])"
)


def letter(reply: str, letters: str = "ABCD") -> str | None:
    """The letter that a reply gives as its answer.

    The last letter after `answer` or 答案 counts, or else after 选, or else after `option`, or else the first one that
    stands alone. Letters are capitals, or small ones in parentheses.

    >>> letter("So the answer is (C)."), letter("答案：B"), letter("D"), letter("I do not know")
    ('C', 'B', 'D', None)
    """
    for pattern in (*_SAID, _ALONE):
        found = [(match[1] or match[2]).upper() for match in pattern.finditer(reply)]
        if known := [one for one in found if one in letters]:
            return known[0 if pattern is _ALONE else -1]
    return None


def letter_groups(reply: str, counts: list[int]) -> list[str]:
    """The answers of a reply to several questions, each of which wants so many letters: [1, 1, 2] finds A, C and BD.

    What follows the last 【答案】 counts, where there is one.
    """
    said = reply.rsplit("【答案】", 1)[-1]
    if max(counts) == 1:
        return re.findall(r"(?<![a-z])[A-G](?![a-z])", said)
    between = r"[\s,，、]+" if len(counts) == 1 else "[,，、]"  # of the letters of one question
    joined = re.sub(rf"(?<=[A-G]){between}(?=[A-G])", "", said)
    return ["".join(sorted(set(group))) for group in re.findall(r"(?<![a-z])[A-G]+(?![a-z])", joined)]


def number_after_marks(reply: str) -> str | None:
    r"""The number after "####", as GSM8K writes its answers.

    >>> number_after_marks("3 * 4 = 12\n#### 1,012."), number_after_marks("12")
    ('1012', None)
    """
    match = re.search(r"####\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?)", reply)
    return match and _plain(match[1])


def last_number(reply: str) -> str | None:
    """The last number of a reply, without commas."""
    numbers = _NUMBER.findall(reply)
    return _plain(numbers[-1]) if numbers else None


def _plain(number: str) -> str:
    digits = number.replace(",", "")
    return re.sub(r"\.?0+$", "", digits) if "." in digits else digits


def boxed(reply: str) -> str | None:
    r"""The content of the last \boxed{...} of a solution, with balanced braces; or what \boxed stands before.

    >>> boxed(r"so $x = \boxed{\frac{1}{2}}$."), boxed(r"\boxed 7$")
    ('\\frac{1}{2}', '7')
    """
    start = reply.rfind("\\boxed")
    if start < 0:
        return None
    rest = reply[start + len("\\boxed") :].lstrip()
    if not rest.startswith("{"):
        return re.split(r"[\s$.]", rest, maxsplit=1)[0] or None
    depth = 0
    for i, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[1:i]
    return None


def final_expression(reply: str) -> str | None:
    """The answer of a mathematical reply: what is boxed, or what follows "answer is", or the last $...$."""
    if (found := boxed(reply)) is not None:
        return found
    said = re.findall(r"(?:answer is|答案[是为：:])\s*:?\s*(.+)", reply)
    if said:
        return said[-1].split("\n")[0].strip().rstrip(".。")
    formulas = re.findall(r"\$([^$]+)\$", reply)
    return formulas[-1] if formulas else last_number(reply)


_DROPPED = re.compile(r"\\left|\\right|\\!|\\,|\\;|\\ |\\\$|\$|\^\{?\\circ\}?|\\%|%|\\text\{[^}]*\}|\\mbox\{[^}]*\}|\s")


def same_expression(one: str, other: str) -> bool:
    r"""True where two LaTeX answers are one number, or written alike but for spaces, units and sizes of brackets.

    >>> same_expression(r"\dfrac12", r"\frac{1}{2}"), same_expression("x = 5", "5"), same_expression("1/2", ".5")
    (True, True, True)
    >>> same_expression(r"-\frac{3}{4}", "-0.75"), same_expression(r"\frac{1}{3}", "0.33")
    (True, False)
    """
    return _canonical(one) == _canonical(other)


def _canonical(text: str) -> str:
    kept = (
        re.sub(r"\\(?:text|mathrm|textbf)\{([^}]*)\}$", r"\1", text.strip()) if text.strip().startswith("\\") else text
    )
    kept = _DROPPED.sub("", kept).rstrip(".").replace("dfrac", "frac").replace("tfrac", "frac")
    kept = re.sub(r"^[a-zA-Z]=", "", kept)
    kept = re.sub(r"\\frac(\d)(\d)", r"\\frac{\1}{\2}", kept)
    kept = re.sub(r"\\sqrt([^{\[])", r"\\sqrt{\1}", kept)
    kept = re.sub(r"^(-?\d+)/(\d+)$", r"\\frac{\1}{\2}", kept)
    kept = re.sub(r"^(-?)\.(\d)", r"\g<1>0.\2", kept)
    if (match := re.fullmatch(r"(-?)\\frac\{(-?\d{1,99})\}\{(-?\d{1,99})\}", kept)) and int(match[3]):
        return str(Fraction(int(match[1] + "1") * int(match[2]), int(match[3])))
    if re.fullmatch(r"-?\d[\d,]*(\.\d+)?", kept) and len(kept) < 100:
        return str(Fraction(kept.replace(",", "")))
    return kept


def closing(reply: str) -> str | None:
    """The text after "answer is" in a reply, or else its first line, without the full stop; None for an empty reply."""
    match = re.search(r"answer is\s*:?\s*(.+)", reply)
    text = match[1] if match else next((line for line in reply.split("\n") if line.strip()), "")
    return text.strip().removesuffix(".") or None
