// mla_decode: checks what memory safety asks for, fills the params by name, launches on the caller's stream.
// What the arguments mean to each other is checked in dscoder.ops; outputs and scratch come in allocated.
#include <limits>

#include "attention/attention.h"
#include "bind/tensor.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

constexpr int64_t kMostInt = std::numeric_limits<int32_t>::max();

DecodeArch decode_arch(const char* op, const std::string& arch) {
    if (arch == "auto") return DecodeArch::kAuto;
    if (arch == "sm80") return DecodeArch::kSm80;
    if (arch == "sm90 one buffer") return DecodeArch::kSm90OneBuffer;
    if (arch == "sm90 in order") return DecodeArch::kSm90InOrder;
    if (arch == "sm90 scores first") return DecodeArch::kSm90ScoresFirst;
    DSC_CHECK(arch == "sm90", op, ": arch must be auto, sm80 or sm90, got ", arch);
    return DecodeArch::kSm90;
}

template <int kRank>
void check_aligned(const char* op, const char* name, const Array<kRank>& array) {
    const auto misaligned = reinterpret_cast<uintptr_t>(array.data) % 16;
    DSC_CHECK(misaligned == 0, op, ": ", name, " must start at a multiple of 16 bytes, is ", misaligned,
              " past one");
}

void check_int(const char* op, const char* name, int64_t size) {
    DSC_CHECK(size <= kMostInt, op, ": ", name, " must fit an int32, got ", size);
}

// Of a plan [parts + 1 + B, 2].
int num_parts_of(const char* op, const Array<2>& plan, int64_t num_sequences) {
    const int64_t num_parts = plan.shape[0] - 1 - num_sequences;
    DSC_CHECK(num_parts > 0 and num_parts <= kMostInt, op, ": plan must have more than 1 + ", num_sequences,
              " rows, got ", plan.shape[0]);
    const auto misaligned = reinterpret_cast<uintptr_t>(plan.data) % 8;
    DSC_CHECK(misaligned == 0, op, ": plan must start at a multiple of 8 bytes, is ", misaligned,
              " past one");
    return static_cast<int>(num_parts);
}

void mla_decode_plan(py::handle seq_lens, py::handle plan, int64_t max_rows) {
    constexpr const char* kOp = "mla_decode_plan";
    Call call(kOp);
    const auto seq_lens_B = call.read<1>("seq_lens", seq_lens, kInt32);
    const int64_t num_sequences = seq_lens_B.shape[0];
    check_int(kOp, "the number of sequences", num_sequences);
    const auto plan_R2 = call.read<2>("plan", plan, kInt32, {kAnySize, 2});
    DSC_CHECK(max_rows >= 0, kOp, ": max_rows must be >= 0, got ", max_rows);
    const MlaDecodePlanParams params{.seq_lens = seq_lens_B.as<const int32_t>(),
                                     .plan = plan_R2.as<int32_t>(),
                                     .num_sequences = static_cast<int>(num_sequences),
                                     .num_parts = num_parts_of(kOp, plan_R2, num_sequences),
                                     .most_rows = max_rows};
    call.launch([&](cudaStream_t stream) { launch_mla_decode_plan(params, stream); });
}

// The paged cache, and which pages are whose.
void read_pages(Call& call, const char* op, py::handle cache, py::handle page_table,
                MlaDecodeParams& params) {
    const auto cache_PLd =
        call.read_strided<3>("cache", cache, dtype_of(params.dtype), {kAnySize, kAnySize, kCacheWidth}, 2);
    const auto [num_pages, page_size, width] = cache_PLd.shape;
    const auto table_BN =
        call.read_strided<2>("page_table", page_table, kInt32, {params.num_sequences, kAnySize});
    check_int(op, "the number of pages", num_pages);
    check_int(op, "the width of page_table", table_BN.shape[1]);
    DSC_CHECK(page_size == 16 or page_size == 32 or page_size == 64 or page_size == 128, op,
              ": cache must have pages of 16, 32, 64 or 128 rows, got ", page_size);
    DSC_CHECK(cache_PLd.strides[0] % 8 == 0, op, ": pages must lie a multiple of 16 bytes apart, got ",
              cache_PLd.strides[0], " elements");
    check_aligned(op, "cache", cache_PLd);
    params.cache = cache_PLd.data;
    params.page_stride = cache_PLd.strides[0];
    params.num_pages = static_cast<int>(num_pages);
    params.page_size = static_cast<int>(page_size);
    params.page_table = table_BN.as<const int32_t>();
    params.table_stride = table_BN.strides[0];
    params.table_width = static_cast<int>(table_BN.shape[1]);
}

void mla_decode_forward(py::handle q, py::handle cache, py::handle page_table, py::handle seq_lens,
                        py::handle plan, py::handle out, py::handle lse, py::handle partial_out,
                        py::handle partial_lse, float scale, const std::string& arch) {
    constexpr const char* kOp = "mla_decode";
    Call call(kOp);
    const FloatType type = call.float_type_of("q", q);
    DSC_CHECK_TYPE(type != FloatType::kFloat32, kOp, ": q must be bfloat16 or float16, got float32");
    const auto q_BSHd =
        call.read<4>("q", q, dtype_of(type), {kAnySize, kAnySize, kAnySize, int64_t{kCacheWidth}});
    const auto [num_sequences, num_new, num_heads, width] = q_BSHd.shape;
    for (const int64_t size : {num_sequences, num_new, num_heads}) check_int(kOp, "each size of q", size);
    const int64_t num_rows = num_new * num_heads;
    check_int(kOp, "num_new * num_heads", num_rows);
    MlaDecodeParams params{};
    params.dtype = type;
    params.num_sequences = static_cast<int>(num_sequences);
    params.num_new = static_cast<int>(num_new);
    params.num_heads = static_cast<int>(num_heads);
    params.scale = scale;
    read_pages(call, kOp, cache, page_table, params);
    const auto plan_R2 = call.read<2>("plan", plan, kInt32, {kAnySize, 2});
    params.num_parts = num_parts_of(kOp, plan_R2, num_sequences);
    const int64_t num_slots = params.num_parts > 1 ? 2 * int64_t{params.num_parts} : 0;
    const auto out_BSHC =
        call.read<4>("out", out, dtype_of(type), {num_sequences, num_new, num_heads, kLatentWidth});
    const auto partial_out_QRC =
        call.read<3>("partial_out", partial_out, kFloat32, {num_slots, num_rows, kLatentWidth});
    check_aligned(kOp, "q", q_BSHd);
    check_aligned(kOp, "out", out_BSHC);
    check_aligned(kOp, "partial_out", partial_out_QRC);
    params.q = q_BSHd.data;
    params.plan = plan_R2.as<const int32_t>();
    params.seq_lens = call.read<1>("seq_lens", seq_lens, kInt32, {num_sequences}).as<const int32_t>();
    params.out = out_BSHC.data;
    params.lse = call.read<3>("lse", lse, kFloat32, {num_sequences, num_new, num_heads}).as<float>();
    params.partial_out = partial_out_QRC.as<float>();
    params.partial_lse =
        call.read<2>("partial_lse", partial_lse, kFloat32, {num_slots, num_rows}).as<float>();
    const DecodeArch wanted = decode_arch(kOp, arch);
    call.launch([&](cudaStream_t stream) { launch_mla_decode(params, wanted, stream); });
}

}  // namespace
}  // namespace bind

void register_mla_decode(py::module_& module) {
    module.def("mla_decode_plan", bind::mla_decode_plan, py::arg("seq_lens"), py::arg("plan"),
               py::arg("max_rows"));
    module.def("mla_decode_forward", bind::mla_decode_forward, py::arg("q"), py::arg("cache"),
               py::arg("page_table"), py::arg("seq_lens"), py::arg("plan"), py::arg("out"), py::arg("lse"),
               py::arg("partial_out"), py::arg("partial_lse"), py::arg("scale"), py::arg("arch"));
}

}  // namespace dsc
