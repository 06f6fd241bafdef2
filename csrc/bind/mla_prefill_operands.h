// What both directions of mla_prefill read from Python.
#pragma once

#include <limits>

#include "attention/mla_prefill.h"
#include "bind/tensor.h"

namespace dsc::bind {

inline void check_int(const char* op, const char* name, int64_t size) {
    constexpr int64_t kMostInt = std::numeric_limits<int32_t>::max();
    DSC_CHECK(size <= kMostInt, op, ": ", name, " must fit an int32, got ", size);
}

inline void check_multiple(const char* op, const char* name, const void* data, unsigned bytes) {
    const auto misaligned = reinterpret_cast<uintptr_t>(data) % bytes;
    DSC_CHECK(misaligned == 0, op, ": ", name, " must start at a multiple of ", bytes, " bytes, is ",
              misaligned, " past one");
}

// Both cu_seqlens, and how many sequences they bound.
struct PrefillEnds {
    const int32_t *q, *k;
    int num_sequences;
};

inline PrefillEnds read_ends(Call& call, const char* op, pybind11::handle cu_seqlens_q,
                             pybind11::handle cu_seqlens_k) {
    const auto ends_q = call.read<1>("cu_seqlens_q", cu_seqlens_q, kInt32);
    const int64_t num_ends = ends_q.shape[0];
    DSC_CHECK(num_ends > 0, op, ": cu_seqlens_q must have at least one element, got 0");
    check_int(op, "the number of sequences", num_ends);
    const auto ends_k = call.read<1>("cu_seqlens_k", cu_seqlens_k, kInt32, {num_ends});
    return {ends_q.as<const int32_t>(), ends_k.as<const int32_t>(), static_cast<int>(num_ends) - 1};
}

inline int32_t* read_plan(Call& call, const char* op, pybind11::handle plan, int64_t size) {
    const auto plan_N = call.read<1>("plan", plan, kInt32);
    DSC_CHECK(plan_N.shape[0] >= size, op, ": plan must have at least ", size, " elements, got ",
              plan_N.shape[0]);
    check_multiple(op, "plan", plan_N.data, 8);
    return plan_N.as<int32_t>();
}

// Rows of heads that may lie apart: 16 bytes are read at a time.
struct HeadArray {
    HeadRows rows;
    std::array<int64_t, 3> shape;  // tokens, heads, width
};

inline HeadArray read_heads(Call& call, const char* op, const char* name, pybind11::handle tensor,
                            FloatType type, const std::array<int64_t, 3>& wanted) {
    constexpr int kWordElements = 8;
    const auto array = call.read_strided<3>(name, tensor, dtype_of(type), wanted);
    const auto [token_stride, head_stride, step] = array.strides;
    DSC_CHECK(token_stride % kWordElements == 0 and head_stride % kWordElements == 0, op, ": ", name,
              " must have tokens and heads a multiple of ", kWordElements, " elements apart, got ",
              token_stride, " and ", head_stride);
    check_multiple(op, name, array.data, 16);
    return {{.data = array.data, .token_stride = token_stride, .head_stride = head_stride}, array.shape};
}

}  // namespace dsc::bind
