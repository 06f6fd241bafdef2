// mla_prefill: checks what memory safety asks for, fills the params by name, launches on the caller's stream.
// What the arguments mean to each other is checked in dscoder.ops; outputs and scratch come in allocated.
#include "attention/mla_prefill.h"

#include "bind/mla_prefill_operands.h"
#include "bind/mla_prefill_tiling.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

void mla_prefill_plan(py::handle cu_seqlens_q, py::handle cu_seqlens_k, py::handle plan, int64_t num_queries,
                      int64_t num_keys, const std::string& side, int tile_rows, int block_rows, bool causal) {
    constexpr const char* kOp = "mla_prefill_plan";
    Call call(kOp);
    const PrefillEnds ends = read_ends(call, kOp, cu_seqlens_q, cu_seqlens_k);
    const PrefillTiling tiling = prefill_tiling(kOp, side, tile_rows, block_rows, causal);
    const int64_t num_rows = tiling.side == PrefillSide::kQueries ? num_queries : num_keys;
    const int64_t most = most_prefill_tiles(num_rows, ends.num_sequences, tile_rows);
    const MlaPrefillPlanParams params{
        .cu_seqlens_q = ends.q,
        .cu_seqlens_k = ends.k,
        .plan = read_plan(call, kOp, plan, 2 * (1 + most) + ends.num_sequences),
        .num_queries = num_queries,
        .num_keys = num_keys,
        .num_sequences = ends.num_sequences,
        .tiling = tiling,
    };
    call.launch([&](cudaStream_t stream) { launch_mla_prefill_plan(params, stream); });
}

PrefillArch prefill_arch(const char* op, const std::string& arch) {
    if (arch == "auto") return PrefillArch::kAuto;
    if (arch == "sm80") return PrefillArch::kSm80;
    if (arch == "sm80 32 keys") return PrefillArch::kSm80Keys32;
    if (arch == "sm80 64 keys") return PrefillArch::kSm80Keys64;
    if (arch == "sm90 one stage") return PrefillArch::kSm90OneStage;
    if (arch == "sm90 one tile") return PrefillArch::kSm90OneTile;
    if (arch == "sm90 without turns") return PrefillArch::kSm90WithoutTurns;
    DSC_CHECK(arch == "sm90", op, ": arch must be auto, sm80 or sm90, got ", arch);
    return PrefillArch::kSm90;
}

void mla_prefill_forward(py::handle q, py::handle k, py::handle v, py::handle cu_seqlens_q,
                         py::handle cu_seqlens_k, py::handle plan, py::handle out, py::handle lse,
                         float scale, bool causal, const std::string& arch) {
    constexpr const char* kOp = "mla_prefill";
    Call call(kOp);
    const FloatType type = call.float_type_of("q", q);
    DSC_CHECK_TYPE(type != FloatType::kFloat32, kOp, ": q must be bfloat16 or float16, got float32");
    const HeadArray q_THd = read_heads(call, kOp, "q", q, type, {kAnySize, kAnySize, kAnySize});
    const auto [num_queries, num_heads, width] = q_THd.shape;
    const HeadArray k_THd = read_heads(call, kOp, "k", k, type, {kAnySize, kAnySize, width});
    const auto [num_keys, num_key_heads, key_width] = k_THd.shape;
    const HeadArray v_THv = read_heads(call, kOp, "v", v, type, {num_keys, num_key_heads, kAnySize});
    const int64_t value_width = v_THv.shape[2];
    for (const int64_t size : {num_heads, num_key_heads, width, value_width}) {
        check_int(kOp, "heads and widths", size);
    }
    const PrefillEnds ends = read_ends(call, kOp, cu_seqlens_q, cu_seqlens_k);
    const auto out_THv = call.read<3>("out", out, dtype_of(type), {num_queries, num_heads, value_width});
    check_multiple(kOp, "out", out_THv.data, 16);
    const MlaPrefillParams params{
        .q = q_THd.rows,
        .k = k_THd.rows,
        .v = v_THv.rows,
        .cu_seqlens_q = ends.q,
        .cu_seqlens_k = ends.k,
        .plan = read_plan(call, kOp, plan, prefill_plan_size(num_queries, ends.num_sequences)),
        .out = out_THv.data,
        .lse = call.read<2>("lse", lse, kFloat32, {num_queries, num_heads}).as<float>(),
        .num_queries = num_queries,
        .num_keys = num_keys,
        .num_sequences = ends.num_sequences,
        .num_heads = static_cast<int>(num_heads),
        .num_key_heads = static_cast<int>(num_key_heads),
        .width = static_cast<int>(width),
        .value_width = static_cast<int>(value_width),
        .scale = scale,
        .causal = causal,
        .dtype = type,
    };
    const PrefillArch wanted = prefill_arch(kOp, arch);
    call.launch([&](cudaStream_t stream) { launch_mla_prefill(params, wanted, stream); });
}

}  // namespace
}  // namespace bind

void register_mla_prefill(py::module_& module) {
    module.def("mla_prefill_plan", bind::mla_prefill_plan, py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"),
               py::arg("plan"), py::arg("num_queries"), py::arg("num_keys"), py::arg("side"),
               py::arg("tile_rows"), py::arg("block_rows"), py::arg("causal"));
    module.def("mla_prefill_forward", bind::mla_prefill_forward, py::arg("q"), py::arg("k"), py::arg("v"),
               py::arg("cu_seqlens_q"), py::arg("cu_seqlens_k"), py::arg("plan"), py::arg("out"),
               py::arg("lse"), py::arg("scale"), py::arg("causal"), py::arg("arch"));
}

}  // namespace dsc
