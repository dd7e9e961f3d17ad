"""The field's harness, lm-evaluation-harness (extra [eval]), on a model of ours."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from tqdm import tqdm

from tele_jax import files
from tele_jax.errors import UserError
from tele_jax.eval.answers import Answers, claim
from tele_jax.eval.model import Leader
from tele_jax.eval.tasks import EXTRA, Found, quiet, told
from tele_jax.extras import need
from tele_jax.files import Table

BOOTSTRAP = 1000  # resamplings for the standard errors of metrics that have no formula for it
MAX_NEW_TOKENS = 256  # of a task that names no number, as in the harness's own backends


def adapter(leader: Leader, *, long: str = "cut", answers: Answers | None = None) -> Any:
    """Returns the model as the harness calls it: an lm_eval.api.model.TemplateLM.

    Texts are encoded and cut into prompt and continuation by the harness's own rules; scores and continuations come
    from `leader`, or from `answers`, whose keys are token ids. What is done is counted in the attribute `counts`:
    requests, tokens that were scored, prompts that were cut, and requests whose answer was kept from before. `asked` is
    True from the first request on.

    Args:
      long: "cut" drops the left end of what is longer than the model's positions, as the harness does, and counts it;
        "refuse" raises UserError.
    """
    api = need("lm_eval.api.model", how=EXTRA)
    utils = need("lm_eval.utils", how=EXTRA)
    kept = answers or Answers()
    terminal = sys.stderr  # the harness's own progress goes elsewhere

    def bar(what: str, total: int) -> Any:
        return tqdm(total=total, desc=what, file=terminal, disable=not terminal.isatty(), leave=False)

    class Adapter(api.TemplateLM):
        tokenizer_name = leader.model.vocabulary.sha256

        def __init__(self) -> None:
            super().__init__()
            self.counts = {"requests": 0, "tokens": 0, "cut": 0, "kept": 0}
            self.asked = False
            self._dialogues: dict[str, list[int]] = {}
            self._names: list[str] = []  # of the requests that are asked for

        @property
        def eot_token_id(self) -> int:
            return leader.model.prefix

        @property
        def max_length(self) -> int:
            return leader.model.cfg.max_seq_len

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            if string in self._dialogues:
                return self._dialogues[string]
            bare = add_special_tokens is False
            return leader.model.vocabulary.encode(string) if bare else leader.model.encode(string)

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            if context in self._dialogues:  # its markers are ids, which no text has
                return self._dialogues[context], leader.model.vocabulary.encode_continuation(continuation)
            return super()._encode_pair(context, continuation)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            if not add_generation_prompt:
                raise UserError("a task that begins the model's answer (gen_prefix) does not go with --chat")
            system, template = [m["content"] for m in chat_history if m["role"] == "system"], leader.model.template
            if system and template is not None and template.system is None:  # instructions of a task
                first, *rest = [m for m in chat_history if m["role"] != "system"]
                chat_history = [{**first, "content": f"{system[0].strip()}\n\n{first['content']}"}, *rest]
            text = "".join(f"<{message['role']}> {message['content']}\n" for message in chat_history)
            self._dialogues[text] = leader.model.prompt(chat_history)
            return text

        def chat_template(self, chat_template: bool | str = False) -> str:
            template = leader.model.template
            return "" if template is None else template.name

        def _fitted(self, ids: Sequence[int], room: int) -> list[int]:
            """The ids, without their left end where they are too many."""
            if len(ids) > room:
                if long == "refuse":
                    raise UserError(
                        f"a prompt of {len(ids)} tokens, but the model has room for {room}; --long cut cuts"
                    )
                self.counts["cut"] += 1
            return list(ids[-room:])

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self._names = [f"--tasks {request.task_name}, item {request.doc_id}" for request in requests]
            return super().loglikelihood(requests, disable_tqdm)

        def _loglikelihood_tokens(
            self, requests, disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            self.asked = True
            found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
            pairs, keys, places = [], [], []
            for i, (_, context, continuation) in enumerate(requests):
                if len(continuation) > self.max_length:
                    raise UserError(
                        f"{self._names[i]}: a choice of {len(continuation)} tokens leaves no room for its question: "
                        f"the model has {self.max_length} positions; leave out this task or shorten the choice"
                    )
                whole = self._fitted([*context, *continuation], self.max_length + 1)
                key = Answers.key("score", whole, len(continuation))
                self.counts["tokens"] += len(continuation)
                if (answer := kept.get(key, list)) is not None:
                    found[i] = answer[0], answer[1]
                    self.counts["kept"] += 1
                    continue
                pairs.append((whole[: -len(continuation)], whole[-len(continuation) :]))
                keys.append(key)
                places.append(i)
            with bar("scoring", len(pairs)) as shown:
                for request, logprobs, is_likeliest in leader.score(pairs) if pairs else ():
                    answer = float(logprobs.sum(dtype="float64")), bool(is_likeliest.all())
                    found[places[request]] = answer
                    kept.add(keys[request], list(answer))
                    shown.update()
            self.counts["requests"] += len(requests)
            return found

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            windows, owners = [], []
            for i, request in enumerate(requests):
                ids = leader.model.vocabulary.encode(request.args[0])
                how = {"prefix_token": self.eot_token_id, "max_seq_len": self.max_length, "context_len": 1}
                cut = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, **how))
                windows += [(None, *window) for window in cut]
                owners += [i] * (len(windows) - len(owners))
            totals = [0.0] * len(requests)
            for i, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                totals[i] += logprob
            return totals

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            self.asked = True
            texts = [""] * len(requests)
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
            with bar("writing", len(requests)) as shown:
                for members in groups.values():
                    self._continue(requests, members, texts, shown)
            self.counts["requests"] += len(requests)
            return texts

        def _continue(self, requests, members: list[int], texts: list[str], shown: Any) -> None:
            """Fills in the texts of requests that ask for the same kind of generation."""
            options, how = _generation(requests[members[0]].args[1])
            room = self.max_length - options["max_new_tokens"]
            if room < 1:
                raise UserError(
                    f"a task asks for {options['max_new_tokens']} new tokens; the model has {self.max_length} positions"
                )
            prompts, keys, places = [], [], []
            for i in members:
                prompt = self._fitted(self.tok_encode(requests[i].args[0]), room)
                key = Answers.key("continue", prompt, options, how) if how.get("temperature") == 0.0 else ""
                if key and (answer := kept.get(key, str)) is not None:
                    texts[i] = answer
                    self.counts["kept"] += 1
                    shown.update()
                    continue
                prompts.append(prompt)
                keys.append(key)
                places.append(i)

            def keep(n: int, text: str) -> None:
                texts[places[n]] = text
                if keys[n]:  # of samples each is another
                    kept.add(keys[n], text)
                shown.update()

            if prompts:
                leader.continue_texts(prompts, on_text=keep, **options, **how)

    return Adapter()


def _generation(asked: Table) -> tuple[Table, Table]:
    """(max_new_tokens and stop, keywords of sampling.sampling) of the harness's generation keywords."""
    asked = dict(asked)
    stop = asked.pop("until", None) or []
    lengths = [asked.pop(name, None) for name in ("max_gen_toks", "max_new_tokens")]
    length = next((n for n in lengths if n is not None), MAX_NEW_TOKENS)
    sampled = asked.pop("do_sample", asked.get("temperature", 0) > 0)
    how = {name: asked.pop(name) for name in ("temperature", "top_k", "top_p", "repetition_penalty") if name in asked}
    if asked:
        raise UserError(f"a task asks for {', '.join(asked)} in generation, which is not known here")
    if not sampled:
        how["temperature"] = 0.0
    elif how.get("temperature", 1.0) == 0:
        raise UserError("a task asks for samples at temperature 0")
    return {"max_new_tokens": length, "stop": [stop] if isinstance(stop, str) else list(stop)}, how


def evaluate(
    leader: Leader,
    found: Found,
    *,
    out: Path,
    num_fewshot: int | None = None,
    limit: float | None = None,
    chat: bool = False,
    system: str | None = None,
    long: str = "cut",
) -> Table:
    """Runs tasks on process 0, and returns the harness's results, which it writes to `out`.

        out/run.json                the model and the settings; a directory of another run is refused
        out/answers.jsonl           answers so far: a run that was killed goes on from them
        out/results.json            as lm-eval writes it, with the adapter's `counts`
        out/samples_<task>.jsonl    one line an item: what was asked, what came, how it counts

    Args:
      num_fewshot: examples before each question; None: as the task says.
      limit: most items of a task, or below 1 a share of them.
      chat: asks in the model's dialogue form, each example as a turn of its own.

    Raises:
      UserError: `out` holds something else; a task of a YAML file that the harness cannot read; a prompt that is too
        long, where `long` refuses it.
    """
    lm_eval = need("lm_eval", how=EXTRA)
    model, chat = leader.model, chat or found.chat
    if limit is not None and limit <= 0:
        raise UserError(f"--limit {limit:g}: must be above 0")
    if limit is not None and not (limit < 1 or limit % 1 == 0):
        raise UserError(f"--limit {limit:g}: must be a whole number of items, or a share of them below 1")
    if system is not None and not chat:
        raise UserError("--system: is a message of dialogues; add --chat, which asks the tasks as dialogues")
    if system is not None:  # refused now where the model's dialogues have no place for it
        model.prompt([{"role": "system", "content": system}, {"role": "user", "content": "?"}])
    asked = {"num_fewshot": num_fewshot, "limit": limit, "chat": chat, "system": system, "long": long}
    settings = {"harness": lm_eval.__version__, **_identity(leader), "tasks": found.names, **asked}
    claim(out, settings | {"items": found.digests})
    with files.held_alone(out / "answers.lock", f"{out}: another process evaluates into it"):
        answers = Answers(out / "answers.jsonl" if model.identity else None)
        with contextlib.closing(answers):
            del asked["long"]
            results = run(adapter(leader, long=long, answers=answers), found, **asked)
    samples = results.pop("samples")
    results["config"]["model"] = model.path
    for task, items in samples.items():
        lines = (json.dumps(item, default=str, ensure_ascii=False) + "\n" for item in items)
        files.write_file(out / f"samples_{task}.jsonl", "".join(lines).encode())
    results = json.loads(json.dumps(results, default=str))
    files.write_json(out / "results.json", results)
    return results


def _identity(leader: Leader) -> Table:
    """All that an answer depends on besides its question."""
    model = leader.model
    form = "" if model.template is None else repr(model.template)
    how = {"cfg": dataclasses.asdict(model.cfg), "stop_ids": model.stop_ids, "prefix": model.prefix}
    how |= {"document_start": model.document_start, "vocabulary": model.vocabulary.sha256, "template": form}
    return {"parameters": model.identity, **how}


def run(
    model: Any,
    found: Found,
    *,
    num_fewshot: int | None = None,
    limit: float | None = None,
    chat: bool = False,
    system: str | None = None,
    **how: Any,
) -> Table:
    """The harness's results of an `adapter`, with its counts. how: further keywords of lm_eval.simple_evaluate."""
    how = {"log_samples": True, "bootstrap_iters": BOOTSTRAP, "num_fewshot": num_fewshot, "limit": limit, **how}
    how |= {"apply_chat_template": chat, "fewshot_as_multiturn": chat, "system_instruction": system}
    evaluator = need("lm_eval.evaluator", how=EXTRA)
    # The harness asks git for the commit of the working directory, and git complains where that is no repository.
    without_git = mock.patch.object(evaluator, "get_git_commit_hash", lambda: None)
    try:
        with quiet(), without_git:
            results = evaluator.simple_evaluate(model=model, tasks=found.tasks, task_manager=found.manager, **how)
    except Exception as error:
        if model.asked or isinstance(error, (UserError, RuntimeError)):
            raise
        raise UserError(f"--tasks {', '.join(found.names)}: {told(error)}") from None  # a question could not be made
    return results | {"counts": model.counts}
