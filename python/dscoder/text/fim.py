"""Fill-in-the-middle: documents cut in three and rearranged before packing (DeepSeek-Coder, section 3.1.2).

    PSM  <begin> prefix <hole> suffix <end> middle
    SPM  <begin> <hole> suffix <end> prefix middle

PSM is the order of v1 and Coder-V2-Lite. Neither paper prints SPM in tokens; this is the order of Bavarian et
al. (arXiv 2207.14255, appendix D, "SPM variant 2", with PRE, SUF and MID for begin, hole and end). The three
parts are encoded one by one, in training as in a prompt, and the sentinels are placed as ids: no text can
imitate them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from hashlib import blake2b
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from dscoder.config.text import FimConfig
from dscoder.runtime.native import _C
from dscoder.text.flavors import FIM_SENTINELS
from dscoder.text.tokenizer import Tokenizer


class FimOrder(IntEnum):
    """How a document is laid out. The numbers are those of csrc/text/text.h."""

    PLAIN = 0  # not drawn
    PSM = 1
    SPM = 2
    SENTINEL = 3  # drawn, but it holds a sentinel string: left as it is, and counted


@dataclass(frozen=True, kw_only=True, slots=True)
class FimDocument:
    """A document in its parts, in text order: prefix + middle + suffix is the document.

    One that is not rearranged is all prefix.
    """

    order: FimOrder
    prefix: str
    middle: str = ""
    suffix: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class FimPlan:
    """What happens to each of N documents, as arrays."""

    order_N: NDArray[np.uint8]  # FimOrder
    middle_N2: NDArray[
        np.int64
    ]  # begin and end of the middle, in characters; zeros where nothing is rearranged

    def counts(self) -> dict[str, int]:
        """Documents per order, by name."""
        found = np.bincount(self.order_N, minlength=len(FimOrder))
        return {order.name.lower(): int(found[order]) for order in FimOrder}


def plan_fim(
    texts: Sequence[str],
    *,
    document_ids: Sequence[int | str],
    config: FimConfig,
    seed: int,
    sentinels: Sequence[str] = FIM_SENTINELS,
) -> FimPlan:
    """Draw which documents are rearranged, how, and where they are cut.

    The outcome for a document depends on its text, its id, the config and the seed alone: not on the other
    documents of the call, on their order or on the number of workers. An id is an int in [0, 2**64) or a
    string. An empty document is plain. The GIL is released while the texts are read.
    """
    keys = np.fromiter((_key(i) for i in document_ids), dtype=np.uint64)
    order_N, middle_N2 = _C.fim_plan(
        tuple(texts), keys, list(sentinels), config.rate, config.spm_share, config.cut == "line", seed % 2**64
    )
    return FimPlan(order_N=order_N, middle_N2=middle_N2)


def apply_fim(
    texts: Sequence[str],
    *,
    document_ids: Sequence[int | str],
    config: FimConfig,
    seed: int,
    sentinels: Sequence[str] = FIM_SENTINELS,
) -> list[FimDocument]:
    """The documents of `plan_fim`, cut into their parts."""
    plan = plan_fim(texts, document_ids=document_ids, config=config, seed=seed, sentinels=sentinels)
    documents = []
    for text, number, (begin, end) in zip(texts, plan.order_N.tolist(), plan.middle_N2.tolist(), strict=True):
        order = FimOrder(number)
        if order in (FimOrder.PSM, FimOrder.SPM):
            parts = FimDocument(order=order, prefix=text[:begin], middle=text[begin:end], suffix=text[end:])
        else:
            parts = FimDocument(order=order, prefix=text)
        documents.append(parts)
    return documents


def encode_fim(documents: Sequence[FimDocument], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each document with its sentinels in place, without bos and eos; parallel over documents."""
    is_split = [document.order in (FimOrder.PSM, FimOrder.SPM) for document in documents]
    sentinels = _sentinel_ids(tokenizer) if any(is_split) else (-1, -1, -1)
    texts: list[str] = []
    for document, split in zip(documents, is_split, strict=True):
        texts += (document.prefix, document.suffix, document.middle) if split else (document.prefix,)
    encoded = iter(tokenizer.encode_batch(texts))
    rows = []
    for document, split in zip(documents, is_split, strict=True):
        if split:
            prefix, suffix, middle = islice(encoded, 3)
            rows.append(arrange(document.order, prefix, suffix, sentinels) + middle)
        else:
            rows.append(next(encoded))
    return rows


def fim_prompt(
    prefix: str,
    suffix: str,
    *,
    tokenizer: Tokenizer,
    order: FimOrder = FimOrder.PSM,
    add_bos: bool = True,
) -> list[int]:
    """The prompt after which a model writes the middle between prefix and suffix, then eos."""
    if order not in (FimOrder.PSM, FimOrder.SPM):
        raise ValueError(f"fim_prompt: order must be PSM or SPM, got {FimOrder(order).name}")
    bos = [tokenizer.require_id("bos")] if add_bos else []
    parts = tokenizer.encode_batch([prefix, suffix])
    return bos + arrange(order, parts[0], parts[1], _sentinel_ids(tokenizer))


def arrange(
    order: FimOrder, prefix: Sequence[int], suffix: Sequence[int], sentinels: tuple[int, int, int]
) -> list[int]:
    """All that stands before the middle; `sentinels` are the ids of fim-begin, fim-hole and fim-end."""
    begin, hole, end = sentinels
    if order is FimOrder.PSM:
        return [begin, *prefix, hole, *suffix, end]
    return [begin, hole, *suffix, end, *prefix]


def _sentinel_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    begin, hole, end = (tokenizer.require_id(name) for name in ("fim_begin", "fim_hole", "fim_end"))
    return begin, hole, end


def _key(document_id: int | str) -> int:
    if isinstance(document_id, str):
        return int.from_bytes(blake2b(document_id.encode("utf-8"), digest_size=8).digest(), "little")
    if not 0 <= document_id < 2**64:
        raise ValueError(f"apply_fim: document_ids must be in [0, 2**64), got {document_id}")
    return document_id
