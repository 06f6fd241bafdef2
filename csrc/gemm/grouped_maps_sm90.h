// The tensor maps of the sm_90a products, in the order of dimensions that their boxes count on.
#pragma once

#include "core/tensor_map.h"
#include "gemm/warpgroup_tile_sm90.cuh"

namespace dsc {

// x [num_rows, width], by rows or by depth.
template <typename Boxes>
TensorMapSpec rows_map(const char* name, const void* x, FloatType type, int64_t num_rows, int64_t width) {
    return map_spec<2>("grouped_gemm", name, x, type, {width, num_rows}, {width}, {kTileK, Boxes::kBoxLines});
}

// w [E, num_lines, width], a line per n and k contiguous, or a line per k.
template <typename Boxes>
TensorMapSpec weights_map(const void* w, FloatType type, int64_t num_experts, int64_t num_lines,
                          int64_t width) {
    return map_spec<3>("grouped_gemm", "w", w, type, {width, num_lines, num_experts},
                       {width, num_lines * width}, {kTileK, Boxes::kBoxLines, 1});
}

// w [E, 2, F, K], eight rows of gate and eight of up in turn.
template <typename Boxes>
TensorMapSpec gate_up_map(const void* w, FloatType type, int64_t num_experts, int64_t width, int64_t depth) {
    return map_spec<5>("grouped_gemm", "w", w, type, {depth, 8, 2, width / 8, num_experts},
                       {depth, width * depth, 8 * depth, 2 * width * depth},
                       {kTileK, 8, 2, Boxes::kBoxLines / 16, 1});
}

}  // namespace dsc
