"""The build contract's rows: one for each kernel (dscoder.testing.contract says what a row means)."""

from collections.abc import Mapping

from dscoder.testing.contract import Kernel
from dscoder.testing.contract_comm import COMM_KERNELS
from dscoder.testing.contract_prefill import PREFILL_KERNELS
from dscoder.testing.contract_prefill_backward import PREFILL_BACKWARD_SM90

# A token on 8 lanes is reduced by three shuffles each time; on 32 lanes integers are by REDUX.
ROW_OF_8 = {"SHFL.BFLY": 9, "VOTE": 1}
ROW_OF_32 = {"REDUX.MAX": 2, "SHFL.BFLY": 5, "VOTE": 1}
# Kernels that move rows: K rows a token, and the registers of moe_unpermute and of its backward pass.
ROWS = {2: (32, 56), 4: (32, 64), 6: (48, 64), 8: (64, 96), 16: (96, 168)}
ROW_KERNELS = {
    "moe_permute_count_kernel": Kernel(registers=32, shared=2048, wants={"ATOMS.POPC": 1}),
    "moe_permute_place_kernel": Kernel(registers=32, shared=32836, wants={"MATCH.ANY": 1, "LDG.E": 16}),
    **{
        f"moe_permute_kernel<{k}>": Kernel(registers=48, wants={"LDG.E.128": 2, "STG.E.EF.128": 2 * k})
        for k in ROWS
    },
    **{
        f"moe_unpermute_kernel<{dtype}, {k}>": Kernel(
            registers=registers, wants={"LDG.E.EF.128": k, "STG.E.128": 1}
        )
        for k, (registers, _) in ROWS.items()
        for dtype in ("float", "__nv_bfloat16", "__half")
    },
    **{
        f"moe_unpermute_backward_kernel<{dtype}, {k}>": Kernel(
            registers=registers,
            shared=10 * 4 * k,
            wants={"LDG.E.EF.128": k, "LDG.E.128": 1, "STG.E.EF.128": k, "SHFL.BFLY": 5 * k},
        )
        for k, (_, registers) in ROWS.items()
        for dtype in ("float", "__nv_bfloat16", "__half")
    },
}


# The rotary family: every access of heads and rows is a whole word, two units of a thread in flight, and the
# angles of a word are one word of each table (two where a unit is a pair of words; half a word in float32).
_FLOATS = ("float", "__nv_bfloat16", "__half")
ROTARY_KERNELS = {
    **{
        f"rope_kernel<Neighbours<{dtype}>>": Kernel(
            registers=48, wants={"LDG.E.128": 2 if dtype == "float" else 6, "STG.E.128": 2}
        )
        for dtype in _FLOATS
    },
    **{
        f"rope_kernel<Halves<{dtype}>>": Kernel(
            registers=80, wants={"LDG.E.128": 8 if dtype == "float" else 12, "STG.E.128": 4}
        )
        for dtype in _FLOATS
    },
    # Five blocks an SM, four in float32: loads of 32 to 40 KiB under way.
    **{
        f"{name}<{dtype}>": Kernel(
            registers=64 if dtype == "float" else 48,
            wants={"LDG.E.128": 12, "STG.E.128": 5, "SHFL.BFLY": 5},
        )
        for name in ("latent_rope_kernel", "latent_append_kernel")
        for dtype in _FLOATS
    },
    **{
        f"latent_rope_backward_kernel<{dtype}>": Kernel(
            registers=112,
            shared=16384,
            wants={"LDG.E.128": 12, "STG.E.128": 5, "SHFL.BFLY": 5, "STS.128": 4},
        )
        for dtype in _FLOATS
    },
    "latent_weight_gradient_kernel": Kernel(registers=32, shared=1024, wants={"LDG.E": 4}),
}


def _grouped_gemm(job: str, tile: int, registers: int, *, transposed: str = "") -> dict[str, Kernel]:
    """Rows of a grouped product on mma.sync, for both types; `transposed`: which operands lie with n or m
    contiguous ("a", "b").

    A warp multiplies its tile four times a stage and keeps the next fragments coming; a thread copies its
    part of a stage at three places at least: ahead of a tile, behind it, and while it multiplies.
    """
    products, a_loads, b_loads, copies = {0: (4, 1, 2, 9), 1: (16, 2, 4, 12), 2: (32, 4, 4, 12)}[tile]
    loads = {"a": 4 * a_loads, "b": 4 * b_loads}
    num_turned = sum(loads[operand] for operand in transposed)
    majors = ", ".join(f"(Major){int(operand in transposed)}" for operand in "ab")
    wants = {
        "LDSM.16.M88.4": sum(loads.values()) - num_turned,
        "LDSM.16.MT88.4": num_turned,
        "LDGSTS.E.BYPASS.LTC128B.128": 3 * copies,
        "STG.E.128": 1,
    }
    return {
        f"grouped_gemm_kernel<{job.format(f'TileShape<{dtype}, {tile}, {majors}>')}>": Kernel(
            registers=registers, shared=4224, wants={product: 4 * products, **wants}
        )
        for dtype, product in (("__nv_bfloat16", "HMMA.16816.F32.BF16"), ("__half", "HMMA.16816.F32"))
    }


GEMM_REGISTERS = {0: 128, 1: 224, 2: 255}  # as in kSm80Tiles of csrc/gemm/grouped_gemm_plan.h
GEMM_KERNELS = {
    name: kernel
    for tile, registers in GEMM_REGISTERS.items()
    for job, transposed in (
        *(("Product<{}>", ""), ("Swiglu<{}>", "")),
        *(("Product<{}>", "b"), ("SwigluBackward<{}>", "b")),
        *(("WeightGradient<{}, false>", "ab"), ("WeightGradient<{}, true>", "ab")),
    )
    if tile > 0 or not transposed  # the gradients have no tile for decoding
    for name, kernel in _grouped_gemm(job, tile, registers, transposed=transposed).items()
}


def _grouped_gemm_sm90(
    job: str, tile: tuple[int, int, int], majors: str, wants: Mapping[str, int]
) -> dict[str, Kernel]:
    """A grouped product on wgmma, for both types: a tile's lines of a and of b, and its stages.

    A warpgroup multiplies four times a stage, waits for the product ahead of it in one place and for the last
    one in another. Registers are those of the launch, which the warpgroups then divide anew.
    """
    lines_a, lines_b, stages = tile
    columns = lines_b if lines_a == 128 else lines_b // 2  # of one warpgroup
    turned = ", ".join(f"(Major){int(major == 'm')}" for major in majors)
    roles = {"USETMAXREG.TRY_ALLOC": 1, "USETMAXREG.DEALLOC": 1, "WARPGROUP.DEPBAR": 2, "UCGABAR_WAIT": 2}
    kernels = {}
    for dtype, suffix in (("__nv_bfloat16", ".BF16"), ("__half", "")):
        shape = f"WarpgroupTile<{dtype}, {lines_a}, {lines_b}, {stages}, {turned}>"
        name = f"grouped_product_kernel<{shape}, {job.format(shape, dtype)}>"
        product = f"HGMMA.64x{columns}x16.F32{suffix}"
        kernels[name] = Kernel(
            registers=168,
            shared=5120,
            archs=("sm_90a",),
            wants={product: 4, **roles, **wants},
            blanks=job.startswith("WeightGradient"),
        )
    return kernels


def _loads(rows: int, weights: int, dims: int) -> dict[str, int]:
    """Copies of a stage of x and of w, whose map has `dims` dimensions: each block its own, or both half."""
    return {
        "UTMALDG.2D.MULTICAST": rows // 2,
        f"UTMALDG.{dims}D.MULTICAST": weights // 2,
        "UTMALDG.2D": rows // 2 + rows,
        f"UTMALDG.{dims}D": weights // 2 + weights,
    }


LARGE, SMALL, FEW, FEWEST = (128, 256, 4), (64, 256, 5), (128, 64, 8), (128, 32, 10)
GEMM_SM90_KERNELS = {
    name: kernel
    for job, tile, majors, wants in (
        *(
            ("ProductSm90<{}, true>", tile, "kk", {**_loads(2, 2, 3), "STG.E.U16": tile[1] // 2})
            for tile in (FEWEST, FEW)
        ),
        *(
            ("SwigluSm90<{}, true>", tile, "kk", {**_loads(2, 2, 5), "STG.E.U16": 3 * tile[1] // 4})
            for tile in (FEWEST, FEW)
        ),
        *(
            (job, tile, majors, {**loads, "STG.E.128": tile[0] // 8 * stores // 4, "SHFL.BFLY": tile[0] // 2})
            for tile in (SMALL, LARGE)
            for job, majors, loads, stores in (
                ("ProductSm90<{}, false>", "kk", _loads(2, 2, 3), 4),
                ("ProductSm90<{}, false>", "km", _loads(2, 4, 3), 4),
                ("SwigluSm90<{}, false>", "kk", _loads(2, 2, 5), 6),
                ("SwigluBackwardSm90<{}>", "km", _loads(2, 4, 3), 8),
            )
        ),
        (
            "WeightGradientSm90<{}, {}>",
            LARGE,
            "mm",
            {"UTMALDG.2D.MULTICAST": 3, "UTMALDG.2D": 9, "STG.E.128": 16},
        ),
        ("WeightGradientSm90<{}, float>", LARGE, "mm", {"UTMALDG.2D.MULTICAST": 3, "LDG.E.64": 64}),
    )
    for name, kernel in _grouped_gemm_sm90(job, tile, majors, wants).items()
}


def _mla_decode(rows: int, registers: int) -> dict[str, Kernel]:
    """Latent decoding of a tile of so many query rows on mma.sync, for both types.

    A stage is 32 rows of the cache: nine lines of which a thread copies a chunk each, ahead of the loop and
    in it; 36 steps along the depth of the scores, shared by four or two warps; two along the values' rows,
    whose fragments are turned on their way.
    """
    fragments, depth_parts = 1 if rows == 16 else 2, 2 if rows == 64 else 4
    steps = 36 // depth_parts
    products = 2 * steps * fragments + 2 * 8 * (rows // 16)
    wants = {
        "LDGSTS.E.BYPASS.LTC128B.128": 2 * 9,
        "LDSM.16.M88.4": steps * (1 + fragments) + 2 * (rows // 16),
        "LDSM.16.MT88.4": 2 * 4,
        "VOTE.ANY": 1,
        "STG.E.128": 2 * (rows // 8),
        "STG.E.64": 7 * (rows // 8),
    }
    return {
        f"mla_decode_sm80_kernel<Tile<{dtype}, {rows}>>": Kernel(
            registers=registers, wants={product: products, **wants}
        )
        for dtype, product in (("__nv_bfloat16", "HMMA.16816.F32.BF16"), ("__half", "HMMA.16816.F32"))
    }


# A block's nine strips of scores, ahead of the loop and in it; its values, held and kept. Nine copies of
# queries; four, of smaller pages, of a strip.
MLA_DECODE_SM90 = {
    f"mla_decode_sm90_kernel<{dtype}, {scores_first}>": Kernel(
        registers=168,
        shared=2048,
        archs=("sm_90a",),
        wants={
            **{f"HGMMA.64x64x16.F32{suffix}": 2 * 36, f"HGMMA.64x256x16.F32{suffix}": 2 * 4 + 2 * 4},
            **{"UTMALDG.3D": 9 + 4, "USETMAXREG.TRY_ALLOC": 1, "USETMAXREG.DEALLOC": 1, "STG.E.128": 16},
        },
        tells=True,
    )
    for dtype, suffix in (("__nv_bfloat16", ".BF16"), ("__half", ""))
    for scores_first in ("false", "true")
}
MLA_DECODE_KERNELS = {
    **MLA_DECODE_SM90,
    **{
        name: kernel
        for rows, registers in ((16, 128), (32, 168), (64, 240))
        for name, kernel in _mla_decode(rows, registers).items()
    },
    **{
        f"mla_decode_combine_kernel<{dtype}>": Kernel(
            registers=128, shared=16384, wants={"LDG.E.128": 4 * 4, "STG.E.64": 1, "SHFL.IDX": 8}
        )
        for dtype in ("__nv_bfloat16", "__half")
    },
    "mla_decode_plan_kernel": Kernel(registers=48, shared=3136, wants={"SHFL.UP": 20, "STG.E.64": 3}),
}
KERNELS = {
    **ROW_KERNELS,
    **MLA_DECODE_KERNELS,
    **PREFILL_KERNELS,
    **PREFILL_BACKWARD_SM90,
    **ROTARY_KERNELS,
    **GEMM_KERNELS,
    **GEMM_SM90_KERNELS,
    **COMM_KERNELS,
    "moe_gate_kernel<Layout<8, 8, 8, (Groups)0>>": Kernel(registers=48, wants={"LDG.E.128": 2, **ROW_OF_8}),
    "moe_gate_kernel<Layout<8, 20, 8, (Groups)1>>": Kernel(
        registers=64, shared=5632, wants={"LDG.E.128": 5, "LDS.128": 2, **ROW_OF_8}
    ),
    "moe_gate_kernel<Layout<32, 2, 2, (Groups)0>>": Kernel(registers=32, wants=ROW_OF_32),
    "moe_gate_kernel<Layout<32, 8, 8, (Groups)0>>": Kernel(registers=40, wants=ROW_OF_32),
    "moe_gate_kernel<Layout<32, 16, 16, (Groups)0>>": Kernel(registers=56, wants=ROW_OF_32),
    "moe_gate_kernel<Layout<32, 2, 2, (Groups)2>>": Kernel(registers=40, shared=4096, wants=ROW_OF_32),
    "moe_gate_kernel<Layout<32, 8, 8, (Groups)2>>": Kernel(registers=56, shared=16384, wants=ROW_OF_32),
    "moe_gate_kernel<Layout<32, 16, 16, (Groups)2>>": Kernel(registers=88, shared=32768, wants=ROW_OF_32),
    "moe_gate_backward_kernel<Layout<8, 8, 8, (Groups)0>>": Kernel(
        registers=48, wants={"LDG.E.128": 2, "STG.E.128": 2, "SHFL.BFLY": 9}
    ),
    "moe_gate_backward_kernel<Layout<8, 20, 8, (Groups)1>>": Kernel(
        registers=64, wants={"LDG.E.128": 5, "STG.E.128": 5, "SHFL.BFLY": 9}
    ),
    "moe_gate_backward_kernel<Layout<32, 2, 2, (Groups)0>>": Kernel(registers=40, wants={"SHFL.BFLY": 15}),
    "moe_gate_backward_kernel<Layout<32, 8, 8, (Groups)0>>": Kernel(registers=48, wants={"SHFL.BFLY": 15}),
    "moe_gate_backward_kernel<Layout<32, 16, 16, (Groups)0>>": Kernel(registers=64, wants={"SHFL.BFLY": 15}),
    "moe_gate_with_balance_kernel<Layout<8, 8, 8, (Groups)0>>": Kernel(
        registers=64, shared=1792, wants={"LDG.E.128": 2, **ROW_OF_8}
    ),
    "moe_gate_with_balance_kernel<Layout<8, 20, 8, (Groups)1>>": Kernel(
        registers=96, shared=10112, wants={"LDG.E.128": 5, "LDS.128": 2, **ROW_OF_8}
    ),
    "moe_gate_with_balance_kernel<Layout<32, 2, 2, (Groups)0>>": Kernel(
        registers=40, shared=1792, wants=ROW_OF_32
    ),
    "moe_gate_with_balance_kernel<Layout<32, 8, 8, (Groups)0>>": Kernel(
        registers=64, shared=7168, wants=ROW_OF_32
    ),
    "moe_gate_with_balance_kernel<Layout<32, 16, 16, (Groups)0>>": Kernel(
        registers=96, shared=14336, wants=ROW_OF_32
    ),
    "moe_gate_with_balance_kernel<Layout<32, 2, 2, (Groups)2>>": Kernel(
        registers=40, shared=5888, wants=ROW_OF_32
    ),
    "moe_gate_with_balance_kernel<Layout<32, 8, 8, (Groups)2>>": Kernel(
        registers=72, shared=23552, wants=ROW_OF_32
    ),
    "moe_gate_with_balance_kernel<Layout<32, 16, 16, (Groups)2>>": Kernel(
        registers=112, shared=47104, wants=ROW_OF_32
    ),
    "moe_gate_with_balance_backward_kernel<Layout<8, 8, 8, (Groups)0>>": Kernel(
        registers=64, wants={"LDG.E.128": 2, "STG.E.128": 2, "SHFL.BFLY": 9}
    ),
    "moe_gate_with_balance_backward_kernel<Layout<8, 20, 8, (Groups)1>>": Kernel(
        registers=128, wants={"LDG.E.128": 5, "STG.E.128": 5, "SHFL.BFLY": 9}
    ),
    "moe_gate_with_balance_backward_kernel<Layout<32, 2, 2, (Groups)0>>": Kernel(
        registers=40, wants={"SHFL.BFLY": 15}
    ),
    "moe_gate_with_balance_backward_kernel<Layout<32, 8, 8, (Groups)0>>": Kernel(
        registers=64, wants={"SHFL.BFLY": 15}
    ),
    "moe_gate_with_balance_backward_kernel<Layout<32, 16, 16, (Groups)0>>": Kernel(
        registers=96, wants={"SHFL.BFLY": 15}
    ),
    "moe_balance_tally_kernel<float>": Kernel(registers=40, shared=8192, wants={"ATOMS": 3, "LDG.E": 16}),
    "moe_balance_tally_kernel<__nv_bfloat16>": Kernel(
        registers=40, shared=8192, wants={"ATOMS": 3, "LDG.E.U16": 8}
    ),
    "moe_balance_tally_kernel<__half>": Kernel(registers=40, shared=8192, wants={"ATOMS": 3, "LDG.E.U16": 8}),
    "moe_balance_finish_kernel": Kernel(
        registers=64, shared=4172, wants={"ATOMG": 1, "LDG.E": 18, "SHFL.BFLY": 30}
    ),
    "moe_balance_backward_kernel<float>": Kernel(registers=40),
    "moe_balance_backward_kernel<__nv_bfloat16>": Kernel(registers=40),
    "moe_balance_backward_kernel<__half>": Kernel(registers=40),
}
