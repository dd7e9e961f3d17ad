"""A process that computes rewards for rewards.py; it runs as a script and imports nothing of tele_jax.

The first line of its input says what computes them, {"path": sys.path, "function": "module:name"} or {"path": ...,
"verifier": name}; it answers {}, or {"error": text}. Each further line is a list of positional arguments of one call,
and the seed of the module `random` for it; the answer is {"reward": what the call returned} or {"error": text}.
"""

import functools
import importlib
import json
import os
import random
import select
import signal
import sys
import threading
import traceback


def opened(request):
    """The function (prompt, reply, record) that a request names."""
    sys.path[:] = request["path"]
    if "verifier" in request:
        return verifier(request["verifier"])
    module, _, name = request["function"].partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{name} is no function")
    return found


def verifier(name):
    """The verifier of a generator of reasoning_gym, or of that which a record's metadata names (of_record)."""
    find = functools.cache(importlib.import_module("reasoning_gym").get_score_answer_fn)
    if name != "of_record":
        find(name)  # raises where there is none

    def verify(prompt, reply, record):
        if isinstance(record.get("metadata"), str):  # of a seqio Task, see gym.py
            record = {**record, "metadata": json.loads(record["metadata"])}
        generator = record["metadata"]["source_dataset"] if name == "of_record" else name
        return find(generator)(reply.strip(), record)

    return verify


def described(error):
    """Names an exception, and the line of a user's module or a library that raised it."""
    ours = (__file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours and f.filename[0] != "<"]
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    said = (str(error).splitlines() or [""])[0][:300]
    return f"{type(error).__name__}: {said}{place}" if said else f"{type(error).__name__}{place}"


def plain(value):
    """A number, text or list as JSON has it, also those of numpy and the like; the text of anything else."""
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value if value is None or isinstance(value, int | float | str) else repr(value)


def answer(make):
    """Writes what make() returns, or the error, as a line."""
    try:
        line = json.dumps(make())
    except SystemExit:  # ends the process, as the caller is told
        raise
    except BaseException as error:
        line = json.dumps({"error": described(error)})
    answers.write(line + "\n")
    answers.flush()


def end_with_run():
    """Waits until nobody can hand over requests, as after a kill of the run; kills this process and what it started."""
    closed = select.poll()
    closed.register(requests, 0)  # no event but that the other end is closed
    closed.poll()
    os.killpg(0, signal.SIGKILL)


def serve():
    """Answers every line of the input until its end."""
    functions = []
    answer(lambda: functions.append(opened(json.loads(requests.readline()))) or {})
    for line in requests:
        arguments, seed = json.loads(line)
        random.seed(seed)
        answer(lambda arguments=arguments: {"reward": plain(functions[0](*arguments))})


if __name__ == "__main__":
    # What a function prints goes to standard error, and not between the answers; what it reads is no request.
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    threading.Thread(target=end_with_run, daemon=True).start()
    serve()
