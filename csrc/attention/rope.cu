// rope (attention.h): pairs of each head's elements, turned by the angles of their token (RoFormer, arXiv
// 2104.09864, eq 34), forwards or back. Queries and keys are one list of heads; how it lies on threads is
// told in rotary.cuh.
#include <algorithm>

#include "attention/rotary.cuh"

namespace dsc {
namespace {

// ---- device ----

template <typename Pairing>
__global__ void __launch_bounds__(kRotaryThreads) rope_kernel(const RopeParams p, const HeadUnits units) {
    using T = typename Pairing::Element;
    const auto source = [&](const UnitPlace& at) {
        const int k_head = at.head - p.num_q_heads;
        const T* const head =
            k_head < 0 ? static_cast<const T*>(p.q) + at.token * p.q_token_stride + at.head * p.q_head_stride
                       : static_cast<const T*>(p.k) + at.token * p.k_token_stride + k_head * p.k_head_stride;
        return head + at.unit * kPerWord<T>;
    };
    const auto target = [&](const UnitPlace& at) {
        const int k_head = at.head - p.num_q_heads;
        T* const head = k_head < 0 ? static_cast<T*>(p.q_out) + (at.token * p.num_q_heads + at.head) * p.width
                                   : static_cast<T*>(p.k_out) + (at.token * p.num_k_heads + k_head) * p.width;
        return head + at.unit * kPerWord<T>;
    };
    wait_for_previous_kernel();
    turn_units<Pairing>(angles_of(p, p.width, p.inverse), units, blockIdx.x, source, target);
}

// ---- host ----

}  // namespace

void launch_rope(const RopeParams& p, cudaStream_t stream) {
    const WordRows rows{.op = "rope", .dtype = p.dtype};
    rows.check_width("q", p.width, p.interleaved ? 1 : 2);
    for (const int64_t stride : {p.q_token_stride, p.q_head_stride}) rows.check_stride("q", stride);
    for (const int64_t stride : {p.k_token_stride, p.k_head_stride}) rows.check_stride("k", stride);
    check_aligned(rows.op, "q", p.q);
    check_aligned(rows.op, "k", p.k);
    check_aligned(rows.op, "cos", p.cos);
    check_aligned(rows.op, "sin", p.sin);
    check_aligned(rows.op, "q_out", p.q_out);
    check_aligned(rows.op, "k_out", p.k_out);
    const int num_units = p.width / rows.per_word() / (p.interleaved ? 1 : 2);
    const HeadUnits units = rows.units(p.num_tokens, p.num_q_heads + p.num_k_heads, num_units, 0);
    if (units.num_units == 0) return;
    const dim3 grid(static_cast<unsigned>(units.num_blocks()));
    with_float_type(p.dtype, [&]<typename T>() {
        const auto kernel = p.interleaved ? rope_kernel<Neighbours<T>> : rope_kernel<Halves<T>>;
        launch_overlapped(kernel, grid, dim3(kRotaryThreads), 0, stream, p, units);
    });
}

}  // namespace dsc
