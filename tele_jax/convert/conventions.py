"""The way in which the code of a release generates: what ends a text, how tokens are drawn, what stands first.

It is read from generation_config.json, tokenizer_config.json, tokenizer.json and config.json at an import, and travels
in the checkpoint's provenance, through training and growth:

    "generation": {
      "eos_token_ids": [2],                      each of them ends a text
      "do_sample": False,                        whether it samples without being asked
      "sampling": {"temperature": 0.3, ...},     keywords of sampling.sampling; empty where the release says nothing
      "document_start": None                     the id before the first token of a text
    }
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tele_jax.convert.configs import Keys
from tele_jax.errors import UserError
from tele_jax.files import read_table

# Keys that choose among tokens in another way than ours; what they are when they do nothing.
_OTHER_WAYS: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0),
    "min_p": (0, 0.0),
    "typical_p": (1, 1.0),
    "epsilon_cutoff": (0, 0.0),
    "eta_cutoff": (0, 0.0),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1, 1.0),
    "bad_words_ids": (),
    "force_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "sequence_bias": (),
    "guidance_scale": (1, 1.0),
}
_DEFAULT_TOP_K = 50  # of transformers, where a model samples and the file does not say
_LLAMA_TOKENIZERS = ("LlamaTokenizer", "LlamaTokenizerFast")  # put <s> first unless told otherwise


def read(path: Path, config: Keys) -> tuple[dict[str, Any], list[str]]:
    """The conventions of the release in a directory, and a line for each key that is not followed.

    Raises:
      UserError: a file that is no table of JSON, or a value of another type; names file and key.
    """
    generation = _table(path / "generation_config.json")
    stated = generation if generation.values else config
    drawing = generation.get("do_sample", bool, False)
    sampling: dict[str, Any] = {}
    if generation.values:
        for name in ("temperature", "top_p", "repetition_penalty"):
            if (value := generation.get(name, float, None)) is not None:
                sampling[name] = value
        top_k = generation.get("top_k", int, _DEFAULT_TOP_K if drawing else None)
        if top_k:  # 0 is all of them
            sampling["top_k"] = top_k
        if drawing:
            sampling.setdefault("temperature", 1.0)
        _check(sampling, generation.where)
    notes = [
        f"generation_config.json: {name} is {value!r}, which is not followed"
        for name, value in generation.values.items()
        if name in _OTHER_WAYS and value is not None and value not in _OTHER_WAYS[name] and value not in ([], {})
    ]
    return {
        "eos_token_ids": _ids(stated, "eos_token_id"),
        "do_sample": drawing,
        "sampling": sampling,
        "document_start": _document_start(path, stated),
    }, notes


def _table(file: Path) -> Keys:
    return Keys(read_table(file) if file.exists() or file.is_symlink() else {}, str(file))


def _check(sampling: Mapping[str, Any], where: str) -> None:
    from tele_jax.inference.generate import sampling as check

    try:
        check(**sampling)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _ids(keys: Keys, name: str) -> list[int]:
    value = keys.values.get(name)
    found = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
        raise UserError(f"{keys.where}: {name} is {value!r}, expected an id or a list of ids")
    return [i for i in found if i >= 0]  # -1 is none


def _document_start(path: Path, stated: Keys) -> int | None:
    """The id that the tokenizer of the release puts before a text."""
    tokenizer = _table(path / "tokenizer_config.json")
    adds = tokenizer.get("add_bos_token", bool, None)
    if adds is None:
        by_template = _first_of_template(_table(path / "tokenizer.json"))
        if by_template is not None:
            return by_template
        adds = tokenizer.values.get("tokenizer_class") in _LLAMA_TOKENIZERS
    bos = _ids(stated, "bos_token_id") if adds else []
    return bos[0] if bos else None


def _first_of_template(document: Keys) -> int | None:
    """The id that the post-processor of a tokenizer.json puts before one text."""
    processor = document.get("post_processor", dict, {})
    parts = processor.get("processors")
    for part in parts if isinstance(parts, list) else [processor]:
        try:
            if part["type"] == "TemplateProcessing" and "SpecialToken" in part["single"][0]:
                return int(part["special_tokens"][part["single"][0]["SpecialToken"]["id"]]["ids"][0])
        except (KeyError, TypeError, IndexError, ValueError):
            continue
    return None
