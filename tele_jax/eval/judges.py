"""Judges of dialogues: a checkpoint of ours, a chat model behind HTTP, and, without any, the overlap with a reference.

A judge is called with prompts and a function that takes (number of a prompt, its reply) as soon as there is one; a
reply of None says that the prompt is too long for the judge.
"""

import collections
import concurrent.futures
import dataclasses
import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence

from tele_jax.config import require
from tele_jax.errors import FailedError, UserError
from tele_jax.eval.model import Leader

Judge = Callable[[Sequence[str], Callable[[int, str | None], None]], None]

ORDERS, BETA = 6, 2  # of chrF
LONGEST_REPLY = 1 << 24  # bytes


def of_model(leader: Leader, max_new_tokens: int) -> Judge:
    """A checkpoint of ours as judge, which is asked in its dialogue form and takes the likeliest tokens."""

    def judge(prompts: Sequence[str], on_text: Callable[[int, str | None], None]) -> None:
        model = leader.model
        ids = [model.prompt([{"role": "user", "content": prompt}]) for prompt in prompts]
        room = float("inf") if model.cfg.rope.ntk else model.cfg.max_seq_len - max_new_tokens
        for i, prompt in enumerate(ids):
            if len(prompt) > room:
                on_text(i, None)
        fit = [i for i, prompt in enumerate(ids) if len(prompt) <= room]
        tell = lambda row, text: on_text(fit[row], text)  # noqa: E731
        if fit:
            leader.continue_texts([ids[i] for i in fit], max_new_tokens=max_new_tokens, on_text=tell, **model.greedy)

    return judge


class _Straight(urllib.request.HTTPRedirectHandler):
    """Follows no redirection, which would carry the key to another host."""

    def redirect_request(self, *args: object, **kwargs: object) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class HttpJudge:
    """A chat model behind an endpoint of OpenAI's form, POST URL/chat/completions.

    Attributes:
      url: up to and without /chat/completions, as https://host/v1.
      model: name of the model there.
      key_variable: name of the environment variable with the key, which goes nowhere else; None: no key is sent.
      parallel: requests at a time.
      timeout: seconds of silence after which a request has failed.
      retries: further tries after a timeout, a lost connection, a status of 429 or of 5xx.
      pause: seconds before the first of them, twice as long before each further one; Retry-After is heeded.
    """

    url: str
    model: str
    key_variable: str | None = None
    parallel: int = 4
    timeout: float = 300.0
    retries: int = 5
    pause: float = 2.0

    def __post_init__(self) -> None:
        require(
            self.url.startswith(("http://", "https://")), f"--judge {self.url}: must begin with http:// or https://"
        )
        named = "@" in self.url.partition("://")[2].partition("/")[0]
        require(not named, "--judge: a URL with a user name or password is not taken; give the key by --judge-key")
        require(
            _is_address(self.url), f"--judge {self.url!r}: is no URL of ASCII characters, as http://localhost:8000/v1"
        )
        if self.key_variable is not None:
            named, key = f"--judge-key {self.key_variable}", self._key
            require(bool(key), f"{named}: there is no such environment variable, or it is empty")
            require(_is_plain(key), f"{named}: its value has a space, or a character that is not printable ASCII")

    @property
    def _key(self) -> str:
        return os.environ.get(self.key_variable or "", "").strip()

    def __call__(self, prompts: Sequence[str], on_text: Callable[[int, str | None], None]) -> None:
        """Asks for all replies; raises UserError for a request that is refused, FailedError where no reply comes."""
        told: set[concurrent.futures.Future[str]] = set()
        with concurrent.futures.ThreadPoolExecutor(self.parallel) as pool:
            futures = {pool.submit(self.reply, prompt): i for i, prompt in enumerate(prompts)}
            try:
                for future in concurrent.futures.as_completed(futures):
                    on_text(futures[future], future.result())
                    told.add(future)
                return
            except (UserError, FailedError) as error:
                failed = error
            finally:
                pool.shutdown(cancel_futures=True)
        for future in futures.keys() - told:  # replies that were on their way are kept
            if not future.cancelled() and future.exception() is None:
                on_text(futures[future], future.result())
        raise failed

    def reply(self, prompt: str) -> str:
        """The reply to a prompt; errors as those of a call."""
        body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
        headers = {"Content-Type": "application/json"}
        if self.key_variable is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        address = self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST")
        problem, wait = "", self.pause
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(wait)
                wait = self.pause * 2**attempt
            try:
                with urllib.request.build_opener(_Straight).open(request, timeout=self.timeout) as response:
                    return self._content(response.read(LONGEST_REPLY))
            except urllib.error.HTTPError as error:
                problem = f"status {error.code} ({error.reason})"
                if error.code != 429 and error.code < 500:
                    raise UserError(f"the judge {self.url} refuses the request: {problem}") from None
                after = error.headers.get("Retry-After", "")
                wait = max(wait, min(float(after), 600.0)) if after.isdecimal() else wait
            except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
                problem = str(getattr(error, "reason", error)) or type(error).__name__
        tries = f"{self.retries + 1} tries" if self.retries else "1 try"
        raise FailedError(f"the judge {self.url} does not answer after {tries}: {problem}; started again, this goes on")

    def _content(self, data: bytes) -> str:
        try:
            text = json.loads(data)["choices"][0]["message"]["content"]
            if isinstance(text, str):
                return text
        except (ValueError, LookupError, TypeError, RecursionError):
            pass
        start = " ".join(data[:80].decode(errors="replace").split())
        raise FailedError(f"the judge {self.url} answers no chat completion with choices[0].message.content: {start!r}")


def _is_plain(text: str) -> bool:
    """Tells whether a text is of printable ASCII characters alone, with no space."""
    return text.isascii() and text.isprintable() and " " not in text


def _is_address(url: str) -> bool:
    """Tells whether a URL has a host and, where it has a port, a number there."""
    try:
        parts = urllib.parse.urlsplit(url)
        return _is_plain(url) and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a bracket that is not closed, or of a port
        return False


def overlap(answer: str, reference: str) -> float:
    """chrF of an answer, 0 to 1: the F score, recall twice as heavy, of n-grams of 1 to 6 characters without spaces.

    The formula is that of M. Popović, chrF (WMT 2015), with mean precision and recall over the orders that both have.

    >>> overlap("春眠不觉晓", "春眠不觉晓"), overlap("春", "秋")
    (1.0, 0.0)
    """
    precision, recall, orders = 0.0, 0.0, 0
    said, meant = ("".join(text.split()) for text in (answer, reference))
    for n in range(1, ORDERS + 1):
        first, second = (collections.Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (said, meant))
        if first and second:
            common = (first & second).total()
            precision, recall, orders = precision + common / first.total(), recall + common / second.total(), orders + 1
    if not precision:
        return 0.0
    precision, recall = precision / orders, recall / orders
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall)
