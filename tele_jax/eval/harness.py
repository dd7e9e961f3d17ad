"""The field's harness, lm-evaluation-harness (extra [eval]), on a model of ours."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tele_jax import files
from tele_jax.errors import UserError
from tele_jax.eval.model import Leader
from tele_jax.extras import need
from tele_jax.files import Table

EXTRA = "pip install tele_jax[eval]"
BOOTSTRAP = 1000  # resamplings for the standard errors of metrics that have no formula for it
MAX_NEW_TOKENS = 256  # of a task that names no number, as in the harness's own backends


def adapter(leader: Leader, *, long: str = "cut") -> Any:
    """Returns the model as the harness calls it: an lm_eval.api.model.TemplateLM.

    Texts are encoded and cut into prompt and continuation by the harness's own rules; scores and continuations come
    from `leader`. What is done is counted in the attribute `counts`.

    Args:
      long: "cut" drops the left end of what is longer than the model's positions, as the harness does, and counts it;
        "refuse" raises UserError.
    """
    api = need("lm_eval.api.model", how=EXTRA)
    utils = need("lm_eval.utils", how=EXTRA)

    class Adapter(api.TemplateLM):
        tokenizer_name = leader.model.vocabulary.sha256

        def __init__(self) -> None:
            super().__init__()
            self.counts = {"requests": 0, "tokens": 0, "cut": 0}
            self._dialogues: dict[str, list[int]] = {}

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

        def _loglikelihood_tokens(
            self, requests, disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            pairs = []
            for _, context, continuation in requests:
                whole = self._fitted([*context, *continuation], self.max_length + 1)
                pairs.append((whole[: -len(continuation)], whole[-len(continuation) :]))
            found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
            for request, logprobs, is_likeliest in leader.score(pairs):
                answer = found[request] = float(logprobs.sum(dtype="float64")), bool(is_likeliest.all())
                self.counts["tokens"] += len(logprobs)
                if requests[request][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[request][0], answer)
            self.counts["requests"] += len(pairs)
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
            texts = [""] * len(requests)
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(repr(sorted(request.args[1].items())), []).append(i)
            for members in groups.values():
                options, how = _generation(requests[members[0]].args[1])
                room = self.max_length - options["max_new_tokens"]
                if room < 1:
                    raise UserError(
                        f"a task asks for {options['max_new_tokens']} new tokens; the model has {self.max_length}"
                    )
                prompts = [self._fitted(self.tok_encode(requests[i].args[0]), room) for i in members]

                def keep(n: int, text: str, members=members) -> None:
                    texts[members[n]] = text
                    self.cache_hook.add_partial("generate_until", requests[members[n]].args, text)

                leader.continue_texts(prompts, on_text=keep, **options, **how)
            self.counts["requests"] += len(requests)
            return texts

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
    tasks: Sequence[Any],
    manager: Any,
    *,
    out: Path,
    num_fewshot: int | None = None,
    limit: float | None = None,
    chat: bool = False,
    system: str | None = None,
    long: str = "cut",
) -> Table:
    """Runs tasks on process 0, and returns the harness's results, which it writes to `out`.

        out/results.json            as lm-eval writes it, with `counts` of requests, tokens and prompts that were cut
        out/samples_<task>.jsonl    one line an item: what was asked, what came, how it counts
        out/answers_rank0.db        answers so far: a run that was killed goes on from them

    Args:
      num_fewshot: examples before each question; None: as the task says.
      limit: most items of a task, or below 1 a share of them.
      chat: asks in the model's dialogue form, each example as a turn of its own.
    """
    lm_eval = need("lm_eval", how=EXTRA)
    model = adapter(leader, long=long)
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        system_instruction=system,
        use_cache=str(out / "answers"),
        log_samples=True,
        bootstrap_iters=BOOTSTRAP,
    )
    samples = results.pop("samples")
    results["counts"] = model.counts
    results["config"]["model"] = leader.model.path
    for task, items in samples.items():
        lines = (json.dumps(item, default=str, ensure_ascii=False) + "\n" for item in items)
        files.write_file(out / f"samples_{task}.jsonl", "".join(lines).encode())
    results = json.loads(json.dumps(results, default=str))
    files.write_json(out / "results.json", results)
    return results
