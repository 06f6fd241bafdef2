"""The build contract's rows of prefill attention and of its gradients."""

from dscoder.testing.contract import Kernel

_HALVES = (("__nv_bfloat16", "HMMA.16816.F32.BF16"), ("__half", "HMMA.16816.F32"))


def _forward(width: int, keys: int) -> dict[str, Kernel]:
    """A tile of 128 queries over blocks of so many keys on mma.sync, for both types.

    A warp's 32 rows: scores a line of 64 elements of the depth after the other, then 128 columns of values.
    Copies are started ahead of the loop, of queries and keys, and in it, of keys and values.
    """
    wants = {
        "LDSM.16.M88.4": 4 * (2 + keys // 16),
        "LDSM.16.MT88.4": keys // 16 * 8,
        "LDGSTS.E.BYPASS.LTC128B.128": (128 + 2 * keys) * width // 8 // 128 + keys * 128 // 8 // 128,
        "MUFU.EX2": keys + 4,
        "STG.E.128": 16,
    }
    products = 4 * 2 * (keys // 8) + keys // 16 * 16 * 2
    return {
        f"mla_prefill_sm80_kernel<Shape<{dtype}, {width}, 128, {keys}>>": Kernel(
            registers=255, shared=128, wants={product: products, **wants}
        )
        for dtype, product in _HALVES
    }


def _backward(width: int, queries: int) -> dict[str, Kernel]:
    """The gradients of a tile of so many queries and 64 keys on mma.sync, for both types.

    Products of 16 x 8 x 16 of each of 8 warps: scores over keys' and values' width, three gradients over
    queries or keys. Copies are started ahead of the loop and in it, of what stays ahead of it alone. Sums of
    grad_q leave by a reduction each, 8 for a block of 16 x 16.
    """
    scores = queries * 64 * (width + 128)
    grad_q, grad_k, grad_v = (queries * 64 * n for n in (width, width, 128))
    query_words, key_words = (n * (width + 128) // 8 // 256 for n in (queries, 64))
    plain = (width + 128) // 16 * (queries // 64 + 2) + 8
    turned = width * queries // 1024  # of keys, for grad_q

    def row(name: str, dtype: str, products: int, copies: int, wants: dict[str, int]) -> dict[str, Kernel]:
        product = dict(_HALVES)[dtype]
        wants = {product: products // 2048 // 8, "LDGSTS.E.BYPASS.LTC128B.128": copies, **wants}
        return {f"{name}<Tile<{dtype}, {width}, 128, {queries}>>": Kernel(registers=255, wants=wants)}

    kernels: dict[str, Kernel] = {}
    for dtype, _ in _HALVES:
        kernels |= row(
            "mla_prefill_backward_sm80_kernel",
            dtype,
            scores + grad_q + grad_k + grad_v,
            key_words + 2 * query_words,
            {
                "LDSM.16.M88.4": plain,
                "LDSM.16.MT88.4": turned + queries // 16 * (6 + width // 64),
                "RED": queries * width // 256,
                "STG.E.128": 64 * (width + 128) // 8 // 256,
            },
        )
        kernels |= row(
            "mla_prefill_grad_query_sm80_kernel",
            dtype,
            scores + grad_q,
            query_words + 2 * key_words,
            {
                "LDSM.16.M88.4": plain,
                "LDSM.16.MT88.4": turned,
                "STG.E.128": queries * width // 8 // 256,
            },
        )
    return kernels


def _forward_sm90(width: int) -> dict[str, Kernel]:
    """A tile of 128 queries over blocks of 128 keys on wgmma, for both types.

    Scores ahead of the loop and in it, values in it and behind it; copies of queries, of a tile's first keys
    and of the next ones, of values. Registers are those of the launch, which the warpgroups then divide anew.
    """
    products = 2 * (width // 16) + 2 * (128 // 16)
    wants = {"UTMALDG.3D": 3 * (width // 64) + 2, "USETMAXREG.TRY_ALLOC": 1, "USETMAXREG.DEALLOC": 1}
    return {
        f"mla_prefill_sm90_kernel<Shape<{dtype}, {width}>>": Kernel(
            registers=168,
            shared=1024,
            archs=("sm_90a",),
            wants={f"HGMMA.64x128x16.F32{suffix}": products, **wants, "ATOMG": 1, "STG.E.128": 8},
            weighs=64,
        )
        for dtype, suffix in (("__nv_bfloat16", ".BF16"), ("__half", ""))
    }


# A lane reads 16 bytes of four rows at a time; sums come as two words for each that goes.
_ROW_KERNELS = {
    name: kernel
    for dtype, _ in _HALVES
    for name, kernel in (
        (
            f"mla_prefill_row_values_kernel<{dtype}>",
            Kernel(registers=64, shared=2304, wants={"LDG.E.128": 8, "SHFL.BFLY": 16, "STG.E.128": 1}),
        ),
        *(
            (
                f"mla_prefill_round_sums_kernel<{dtype}, {width}>",
                Kernel(registers=64, wants={"LDG.E.128": width // 8, "STG.E.128": width // 16}),
            )
            for width in (128, 192)
        ),
    )
}
PREFILL_KERNELS = {
    "mla_prefill_plan_kernel": Kernel(
        registers=48, shared=32896, wants={"MATCH.ANY": 2, "SHFL.UP": 20, "STG.E.64": 2}
    ),
    **{
        name: kernel
        for width in (128, 192)
        for keys in (32, 64)
        for name, kernel in _forward(width, keys).items()
    },
    **_forward_sm90(128),
    **_forward_sm90(192),
    **_ROW_KERNELS,
    **{
        name: kernel
        for width in (128, 192)
        for queries in (64, 128)
        for name, kernel in _backward(width, queries).items()
    },
}
