// Tensor maps: what the copy engine of sm_90 (TMA) knows of a tensor in global memory. A kernel takes one as
// a `const __grid_constant__` parameter. Wrong values often give wrong data and no error, so the rules that
// cuda.h states for these maps are checked here, by a function that any machine can run, all but one (below).
// The driver's encoder is looked up when it is first needed, so that the extension neither links the driver
// nor fails to import where there is none.
#pragma once

#include <array>
#include <cstdint>

#include "core/check.h"
#include "core/dtype.h"

#ifdef __CUDACC__
#include <cuda.h>

#include "core/launch.h"
#endif

namespace dsc {

constexpr int kMaxMapRank = 5;
constexpr int kSwizzleBytes = 128;

// A tensor of 16-bit elements, dimensions from the innermost, which is contiguous. The box is what one copy
// brings, its innermost dimension a line of the 128-byte swizzle.
//
// Strides may come in any order here, though cuda.h writes them as products that grow: each the one before
// times a size and its padding. That the driver takes others, and the copy engine follows them, is documented
// nowhere; other libraries (FlashAttention-3, to our knowledge) rest on it. So does the map of gate and up in
// gemm/grouped_maps_sm90.h, and the first GPU test of the sm_90a products asks for just that.
struct TensorMapSpec {
    const char* op;
    const char* name;
    const void* base;
    bool is_bfloat16;  // else float16
    int rank;
    std::array<uint64_t, kMaxMapRank> sizes;        // elements
    std::array<uint64_t, kMaxMapRank - 1> strides;  // bytes, of dimension i + 1
    std::array<uint32_t, kMaxMapRank> box;          // elements
};

// A tensor of `type`, dimensions from the innermost; strides and boxes in elements.
template <size_t kRank>
TensorMapSpec map_spec(const char* op, const char* name, const void* base, FloatType type,
                       const std::array<int64_t, kRank>& sizes, const std::array<int64_t, kRank - 1>& strides,
                       const std::array<int, kRank>& box) {
    TensorMapSpec spec{.op = op,
                       .name = name,
                       .base = base,
                       .is_bfloat16 = type == FloatType::kBfloat16,
                       .rank = static_cast<int>(kRank),
                       .sizes = {},
                       .strides = {},
                       .box = {}};
    for (size_t i = 0; i < kRank; ++i) {
        spec.sizes[i] = static_cast<uint64_t>(sizes[i]);
        spec.box[i] = static_cast<uint32_t>(box[i]);
        if (i + 1 < kRank) spec.strides[i] = static_cast<uint64_t>(strides[i]) * 2;
    }
    return spec;
}

inline void check_tensor_map(const TensorMapSpec& spec) {
    const auto at = [&](int i) {
        return concat(spec.op, ": the tensor map of ", spec.name, ", dimension ", i);
    };
    DSC_CHECK(spec.rank >= 2 and spec.rank <= kMaxMapRank, spec.op, ": the tensor map of ", spec.name,
              " must have 2 to ", kMaxMapRank, " dimensions, got ", spec.rank);
    DSC_CHECK(spec.base != nullptr and reinterpret_cast<uintptr_t>(spec.base) % 16 == 0, spec.op, ": ",
              spec.name, " must begin at a multiple of 16 bytes, got ", spec.base);
    DSC_CHECK(spec.box[0] * 2 == kSwizzleBytes, at(0), " must have boxes of ", kSwizzleBytes, " bytes, got ",
              spec.box[0] * 2);
    for (int i = 0; i < spec.rank; ++i) {
        DSC_CHECK(spec.sizes[i] > 0 and spec.sizes[i] <= uint64_t{1} << 32, at(i),
                  " must hold 1 to 2^32 elements, got ", spec.sizes[i]);
        DSC_CHECK(spec.box[i] > 0 and spec.box[i] <= 256, at(i),
                  " must have boxes of 1 to 256 elements, got ", spec.box[i]);
    }
    for (int i = 0; i + 1 < spec.rank; ++i) {
        DSC_CHECK(spec.strides[i] % 16 == 0 and spec.strides[i] < uint64_t{1} << 40, at(i + 1),
                  " must have a stride below 2^40 that is a multiple of 16 bytes, got ", spec.strides[i]);
    }
}

#ifndef __CUDACC__

using TensorMap = TensorMapSpec;  // as the host executor plays the copy engine

#else

using TensorMap = CUtensorMap;

// The driver's cuTensorMapEncodeTiled.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
#if CUDART_VERSION >= 12050
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
#else
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &entry, cudaEnableDefault, &found);
#endif
    check_launch(status, "cudaGetDriverEntryPoint of cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess or entry == nullptr) {
        throw std::runtime_error(
            "this driver has no cuTensorMapEncodeTiled: kernels of sm_90 need CUDA 12 or newer");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
}

// Elements outside the tensor read as zeros.
inline CUtensorMap encode_tensor_map(const TensorMapSpec& spec) {
    check_tensor_map(spec);
    static const auto encode = tensor_map_encoder();
    constexpr std::array<uint32_t, kMaxMapRank> kDense{1, 1, 1, 1, 1};
    CUtensorMap map{};
    const CUresult status =
        encode(&map, spec.is_bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
               spec.rank, const_cast<void*>(spec.base), spec.sizes.data(), spec.strides.data(),
               spec.box.data(), kDense.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error(concat(spec.op, ": cuTensorMapEncodeTiled refused the map of ", spec.name,
                                        " with CUresult ", static_cast<int>(status)));
    }
    return map;
}

#endif

}  // namespace dsc
