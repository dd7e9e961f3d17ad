"""The keys of a config.json that change nothing about the function, and those that may only have one value.

Every other key that is set has to be read by configs.py. A key in no list is refused by name: it may mean a model that
tele_jax would run as another one without a word.
"""

from collections.abc import Mapping
from typing import Any

from tele_jax.errors import UserError


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What every config of transformers may have: names, types, ids of special tokens, defaults of generation (read from
# generation_config.json), settings of training such as dropout, and how the code computes rather than what.
_ANYWHERE = _names(
    """
    _name_or_path name_or_path architectures auto_map transformers_version model_type torch_dtype dtype license
    tokenizer_class unsloth_version unsloth_fixed _commit_hash
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id
    user_token_id bot_token_id system_token_id forced_bos_token_id forced_eos_token_id suppress_tokens
    begin_suppress_tokens max_length min_length max_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
    exponential_decay_length_penalty use_cache output_attentions output_hidden_states output_scores return_dict
    return_dict_in_generate torchscript use_bfloat16 chunk_size_feed_forward tf_legacy_loss
    id2label label2id num_labels problem_type finetuning_task task_specific_params prefix
    attn_implementation _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _flash_attn_2_enabled flash_attn use_flash_attn enable_flash_attn gradient_checkpointing pretraining_tp
    initializer_range initializer_factor attention_dropout hidden_dropout attn_dropout resid_dropout embd_dropout
    attn_pdrop resid_pdrop embd_pdrop hidden_dropout_prob attention_probs_dropout_prob max_sequence_length
    model_max_length transformers.js_config
    """
)
_BY_FORMAT: Mapping[str, frozenset[str]] = {
    "llama": frozenset(),
    "tele_flm": frozenset(),
    # Of Bloom, from whose configuration this one was made; the released code reads none of them, or for its speed only.
    "telechat": _names(
        "attention_softmax_in_fp32 bias_dropout_fusion masked_softmax_fusion offset_alibi skip_bias_add "
        "skip_bias_add_qkv slow_but_exact"
    ),
    # Of GPT-2: the heads for classification, how attention is computed, and a factor that is divided out again.
    "telechat_52b": _names(
        "reorder_and_upcast_attn rotary_xpos_scale_base scale_attn_by_inverse_layer_idx summary_activation "
        "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj"
    ),
}
# Keys that are known, of which tele_jax has one value.
_ONLY: Mapping[str, Any] = {
    "is_decoder": False,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "use_sliding_window": False,
    "is_llama_config": True,
    "rope_interleaved": False,
    "use_mrope": False,
    "use_qk_norm": False,
    "use_parallel_residual": False,
    "pruned_heads": {},
    "scale_attn_weights": True,
    "rotary_use_xpos": False,
    "activation_function": "silu",
}


def require_known(values: Mapping[str, Any], read: set[str], where: str, format: str) -> None:
    """Raises UserError for the first key that is set and neither read nor known to change nothing.

    Args:
      values: of the config.json.
      read: the names that configs.py has read.
      where: the path of the file.
      format: of the release.
    """
    for name, value in values.items():
        if value is None or name in read or name in _ANYWHERE or name in _BY_FORMAT[format]:
            continue
        if name in _ONLY:
            if value != _ONLY[name] or isinstance(value, bool) != isinstance(_ONLY[name], bool):
                raise UserError(f"{where}: {name} is {value!r}, but tele_jax has only {_ONLY[name]!r}")
            continue
        raise UserError(
            f"{where}: {name} is {_short(value)}, which tele_jax does not know in format {format}: it may describe "
            "another model; take the key out of a copy of config.json if it changes nothing"
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
