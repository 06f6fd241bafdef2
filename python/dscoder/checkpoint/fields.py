"""Reading a config.json so that no field goes unnoticed.

Every key is read by name, and what nobody read is refused at the end: a field this package does not know
may change what the model computes. null counts as absent, as it does in transformers.
"""

import sys
from collections.abc import Mapping
from typing import Any

# Keys of transformers' base class and of tools: they say how to run or label a model, not what it computes.
_INERT = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "attn_implementation",
        "auto_map",
        "chunk_size_feed_forward",
        "dtype",
        "ep_size",
        "finetuning_task",
        "id2label",
        "is_decoder",
        "is_encoder_decoder",
        "label2id",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "sep_token_id",
        "task_specific_params",
        "tf_legacy_loss",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "bad_words_ids",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
_MAX_INTEGER = 2**31 - 1  # token ids, offsets and positions are int32 in the ops
_MAX_SHOWN = 80  # characters of a refused value in an error


class _Required:
    """Marks a field that has no default."""


_REQUIRED = _Required()


class Fields:
    """One JSON object, read key by key; `finish` refuses what was not read."""

    def __init__(self, data: Mapping[str, Any], *, prefix: str = "") -> None:
        self._data = data
        self._prefix = prefix
        self._read: set[str] = set()

    def refuse(self, key: str, *, wanted: str, got: object) -> ValueError:
        """The error for a field that cannot be honoured, to be raised by the caller."""
        shown = "nothing" if got is None else repr(got)
        shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
        return ValueError(f"config_from_hf: {self._prefix}{key} must be {wanted}, got {shown}")

    def value(self, key: str) -> Any:
        """The value of `key`, None if absent."""
        self._read.add(key)
        return self._data.get(key)

    def integer(self, key: str, default: int | _Required = _REQUIRED) -> int:
        """The integer `key`, `default` if absent."""
        value = self.value(key)
        if value is None and not isinstance(default, _Required):
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refuse(key, wanted="an integer", got=value)
        if abs(value) > _MAX_INTEGER:
            raise self.refuse(key, wanted=f"at most {_MAX_INTEGER} in magnitude", got=value)
        return value

    def number(self, key: str, default: float | _Required = _REQUIRED) -> float:
        """The finite number `key`, `default` if absent."""
        value = self.value(key)
        if value is None and not isinstance(default, _Required):
            return default
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        # An integer may have more digits than any float.
        if not is_number or not abs(value) <= sys.float_info.max:
            raise self.refuse(key, wanted="a finite number", got=value)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """The boolean `key`, `default` if absent."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, wanted="true or false", got=value)
        return value

    def choice(self, key: str, wanted: tuple[str, ...], default: str | None = None) -> str:
        """The string `key`, one of `wanted`, `default` if absent."""
        value = self.value(key)
        if value is None and default is not None:
            return default
        if value not in wanted:
            raise self.refuse(key, wanted=" or ".join(repr(choice) for choice in wanted), got=value)
        return str(value)

    def expect(self, key: str, *wanted: object) -> None:
        """Refuse `key` unless it is absent or one of `wanted`."""
        value = self.value(key)
        if value is not None and value not in wanted:
            choices = " or ".join(repr(choice) for choice in wanted)
            raise self.refuse(key, wanted=f"{choices} or absent", got=value)

    def part(self, key: str) -> "Fields | None":
        """The JSON object under `key`, None if absent or empty."""
        value = self.value(key)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise self.refuse(key, wanted="an object", got=value)
        return Fields(value, prefix=f"{self._prefix}{key}.")

    def finish(self) -> None:
        """Refuse every field that nobody read, unless it is inert or says nothing."""
        for key, value in self._data.items():
            is_known = key in self._read or (not self._prefix and key in _INERT)
            if not is_known and value not in (None, False, [], {}):
                raise self.refuse(key, wanted="absent (this package does not implement it)", got=value)
