// How the backward kernels of mla_prefill on mma.sync are launched: which tile, and a block for each tile of
// the plan and each head.
#pragma once

#include <limits>

#include "attention/mla_prefill_scores_sm80.cuh"
#include "core/check.h"
#include "core/launch.h"

namespace dsc::prefill_backward {

constexpr int kLargeTile = 128, kSmallTile = 64;  // rows of queries

// Bytes of shared memory that a block may have. The host executor is an A100.
inline int shared_bytes_of_device() {
#ifdef DSC_HOST_EXECUTOR
    return 163 * 1024;
#else
    return device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(current_device());
#endif
}

// The smaller tile moves more through shared memory for its products; but sequences of up to 64 queries fill
// it, and it fits where a block may have 99 KiB (compute capability 8.6 and 8.9).
inline bool wants_small_tile(const MlaPrefillBackwardParams& p, int large_bytes) {
    return p.num_queries <= int64_t{kSmallTile} * p.num_sequences or large_bytes > shared_bytes_of_device();
}

template <typename Function>
void with_tile(const MlaPrefillBackwardParams& p, const Function& function) {
    const auto with_type = [&]<typename T, int kWidth>() {
        using Large = Tile<T, kWidth, 128, kLargeTile>;
        using Small = Tile<T, kWidth, 128, kSmallTile>;
        if (wants_small_tile(p, Large::kSharedBytes)) return function.template operator()<Small>();
        function.template operator()<Large>();
    };
    const auto with_width = [&]<typename T>() {
        if (p.width == 192) return with_type.template operator()<T, 192>();
        with_type.template operator()<T, 128>();
    };
    if (p.dtype == FloatType::kBfloat16) return with_width.template operator()<__nv_bfloat16>();
    with_width.template operator()<__half>();
}

// The plan of one side's tiles, and a block for each of them and each head.
inline void launch_tiles(const MlaPrefillBackwardParams& p, const PrefillTiling& tiling, int num_heads,
                         void (*kernel)(MlaPrefillBackwardParams), int shared_bytes, cudaStream_t stream) {
    const bool has_queries = tiling.side == PrefillSide::kQueries;
    const int64_t num_blocks = num_heads * most_prefill_tiles(has_queries ? p.num_queries : p.num_keys,
                                                              p.num_sequences, tiling.tile_rows);
    DSC_CHECK(num_blocks <= std::numeric_limits<int>::max(),
              "mla_prefill backward: too many tiles to be numbered, ", num_blocks);
    launch_mla_prefill_plan({.cu_seqlens_q = p.cu_seqlens_q,
                             .cu_seqlens_k = p.cu_seqlens_k,
                             .plan = p.plan,
                             .num_queries = p.num_queries,
                             .num_keys = p.num_keys,
                             .num_sequences = p.num_sequences,
                             .tiling = tiling},
                            stream);
    launch_overlapped(kernel, dim3(static_cast<unsigned>(num_blocks)), dim3(kNumThreads),
                      static_cast<size_t>(shared_bytes), stream, p);
}

// dQ by its own kernel, for the same bits every time.
void launch_grad_query(const MlaPrefillBackwardParams& p, cudaStream_t stream);

}  // namespace dsc::prefill_backward
