"""Writes a template with values for its $names to the standard output, each as JSON, which YAML understands.

    python launch/render.py launch/gke_jobset.yaml name=tele-52b hosts:=32 ... command -- tele train ...

NAME=TEXT is a text, NAME:=JSON any value, and NAME -- WORD ... a list of all that follows.
"""

import json
import string
import sys
from pathlib import Path


def main(template: str, *words: str) -> int:
    """Raises KeyError for a name of the template that has no value, and ValueError for what is no JSON."""
    values = {}
    if "--" in words:
        end = words.index("--")
        values[words[end - 1]] = json.dumps(words[end + 1 :])
        words = words[: end - 1]
    for word in words:
        name, _, text = word.partition("=")
        values[name.removesuffix(":")] = json.dumps(json.loads(text) if name.endswith(":") else text)
    sys.stdout.write(string.Template(Path(template).read_text(encoding="utf-8")).substitute(values))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
