"""The build contract's rows of the gradients of prefill attention on sm_90a."""

from dscoder.testing.contract import Kernel


def _backward(width: int) -> dict[str, Kernel]:
    """A tile of 96 keys over blocks of 64 queries on wgmma, for both types.

    Products with a warpgroup's 48 keys: scores along both widths, dV and dK by strips of 64 columns. Where
    a strip of dQ changes hands, dK is there twice, with dQ of one strip and of two. P, dS, dK and dV are
    turned three times each for 64 rows. Registers are the launch's, which warpgroups then divide anew.
    """
    strips, values = width // 64, 2
    paths = 2 if strips > 2 else 1
    products = 4 * strips + 4 * values + 4 * values + paths * 4 * strips
    wants = {
        "HGMMA.64x64x16.F32": 6,
        **({"HGMMA.64x128x16.F32": 6} if paths == 2 else {}),
        "MUFU.EX2": 24,
        "STSM.16.MT88.4": 3 * (2 + strips + values),
        "UBLKRED.G.S.ADD.F32.RN": 1,
        "FENCE.VIEW.ASYNC": 5,
        "UTMALDG.3D": 2 * (strips + values),
        **{"USETMAXREG.TRY_ALLOC": 1, "USETMAXREG.DEALLOC": 1},
        "STG.E.128": 3 * (strips + values),
    }
    return {
        f"mla_prefill_backward_sm90_kernel<Shape<{dtype}, {width}>>": Kernel(
            registers=168,
            shared=1024,
            archs=("sm_90a",),
            wants={f"HGMMA.64x48x16.F32{suffix}": products, **wants},
            turns=4 + paths,  # two operands' zeros, P, dS, and sums of dQ
        )
        for dtype, suffix in (("__nv_bfloat16", ".BF16"), ("__half", ""))
    }


PREFILL_BACKWARD_SM90 = {**_backward(128), **_backward(192)}
