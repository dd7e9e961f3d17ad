"""The prompts and training samples of the released code, from its rules, without code of ours.

`encode` is that of the bare library: SentencePiece or tokenizers. A conversation is a list of texts: question, answer,
question, ...; a prompt's last text is a question, a sample's an answer.
"""

import random

WORDS = [
    *["你好", "人工智能", "是什么？", "天地玄黄", "，", "。", "「宇宙」", "龘", "🎉", "é", "Ω", "\u3000"],
    *["Hello", "the cat", "sat on", "def f(x):", "return x + 1", "1984", "3.14", "__init__", "_", "a<b"],
    *[" ", "  ", "\n", "\t", "\n\n", "- ", "x", "?", "!", "</", "s>", "<", ">", "<_", "bot>"],
]
MARKERS = ("<_user>", "<_bot>", "<_end>", "<_start>", "</s>", "<s>")


def conversations(count, seed=0):
    """Random conversations of one to four turns, ending with a question; no text holds a marker."""
    draw = random.Random(seed)

    def text():
        while True:
            found = "".join(draw.choices(WORDS, k=draw.randint(1, 12)))
            if found.strip() and not any(marker in found for marker in MARKERS):
                return found

    return [[text() for _ in range(2 * draw.randint(1, 4) - 1)] for _ in range(count)]


def messages(texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def telechat_7b(encode, texts):
    return _apart(encode, texts, user=160130, bot=160131, end=160133)


def telechat_12b(encode, texts, user=20, bot=21):
    return _apart(encode, texts, user=user, bot=bot, end=2)


def telechat2(encode, texts, user=4, bot=5):
    return [1, *_apart(encode, texts, user=user, bot=bot, end=2)]


def _apart(encode, texts, *, user, bot, end):
    ids = []
    for i, text in enumerate(texts):
        ids += [user, *encode(text), bot] if i % 2 == 0 else [*encode(text), end]
    return ids


def chatml(encode, texts, system=None):
    """The form of SmolLM2's chat template; the library finds the markers in the text."""
    said = [] if system is None else [("system", system)]
    said += [(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    text = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said)
    return encode(f"{text}<|im_start|>assistant\n")


def telechat_52b(encode, texts):
    """models/modeling_telechat.py, chat: the history and the question are one string."""
    return encode("".join(f"<_user>{text}<_bot>" if i % 2 == 0 else f"{text}<_end>" for i, text in enumerate(texts)))


def tele_flm_instruct(encode, texts):
    """The template of the vLLM project for Tele-FLM: questions are stripped, nothing stands after an answer."""
    return encode("".join(f"<_user>{text.strip()}<_bot>" if i % 2 == 0 else text for i, text in enumerate(texts)))


def telechat_52b_sample(encode, texts):
    """deepspeed-finetune: each question with its markers is a string, each answer with its `<_end>` another."""
    ids = []
    for i in range(0, len(texts), 2):
        ids += encode(f"<_user>{texts[i]}<_bot>")
        ids += encode(texts[i + 1] + "<_end>") if i + 2 < len(texts) else [*encode(texts[i + 1]), 2]
    return ids
