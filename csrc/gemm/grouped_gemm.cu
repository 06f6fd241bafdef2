// Grouped products: which kernel a call gets, and its launch.
#include "core/check.h"
#include "core/launch.h"
#include "gemm/gemm.h"
#include "gemm/grouped_gemm_sm80.cuh"
#include "gemm/grouped_gemm_wgrad_sm80.cuh"

namespace dsc {
namespace {

template <typename T, Major kMajorB>
using Tile128x128 = TileShape<T, 128, 128, 2, 2, 4, Major::kK, kMajorB>;

template <typename S, typename Job>
void launch_rows(const Job& job, cudaStream_t stream) {
    launch_overlapped(grouped_rows_kernel<S, Job>, dim3(132), dim3(S::kNumThreads), S::kRingBytes, stream,
                      job);
}

template <typename T, Major kMajorB>
void launch_product(const GroupedGemmParams& p, cudaStream_t stream) {
    using S = Tile128x128<T, kMajorB>;
    if (p.row_idx != nullptr) return launch_rows<S>(Product<S, true>{p}, stream);
    launch_rows<S>(Product<S, false>{p}, stream);
}

}  // namespace

void launch_grouped_gemm(const GroupedGemmParams& p, cudaStream_t stream) {
    if (p.is_w_transposed) return launch_product<__nv_bfloat16, Major::kMN>(p, stream);
    launch_product<__nv_bfloat16, Major::kK>(p, stream);
}

void launch_grouped_swiglu(const GroupedSwigluParams& p, cudaStream_t stream) {
    using S = Tile128x128<__nv_bfloat16, Major::kK>;
    launch_rows<S>(Swiglu<S, false>{p}, stream);
}

void launch_grouped_swiglu_backward(const GroupedSwigluBackwardParams& p, cudaStream_t stream) {
    using S = Tile128x128<__nv_bfloat16, Major::kMN>;
    launch_rows<S>(SwigluBackward<S>{p}, stream);
}

void launch_grouped_weight_gradient(const GroupedWeightGradientParams& p, cudaStream_t stream) {
    using S = TileShape<__nv_bfloat16, 128, 256, 2, 4, 3, Major::kMN, Major::kMN>;
    auto go = [&](auto kernel) {
        launch_overlapped(kernel, dim3(132), dim3(S::kNumThreads), S::kRingBytes, stream, p);
    };
    if (p.is_float32 or p.accumulates) {
        if (p.row_idx) return go(grouped_weight_gradient_kernel<S, true, float>);
        return go(grouped_weight_gradient_kernel<S, false, float>);
    }
    if (p.row_idx) return go(grouped_weight_gradient_kernel<S, true, __nv_bfloat16>);
    go(grouped_weight_gradient_kernel<S, false, __nv_bfloat16>);
}

}  // namespace dsc
