// The copy engine of sm_90, played on the CPU: one box of a tensor map into a ring in memory.
#pragma once

#include "core/lines_sm90.cuh"
#include "core/tensor_map.h"

namespace dsc::tests {

// cp.async.bulk.tensor with the 128-byte swizzle: 16-byte chunk c of line l lands at c ^ (l % swizzle_lines),
// which is 8; zeros for what lies outside the tensor. `ring` begins at a multiple of 1024 bytes.
inline void play_box(const TensorMapSpec& map, const BoxPlace& place, char* ring, size_t target,
                     size_t swizzle_lines = 8) {
    size_t num_elements = 1;
    for (int d = 0; d < map.rank; ++d) num_elements *= map.box[d];
    for (size_t i = 0; i < num_elements; ++i) {
        size_t rest = i;
        const char* source = static_cast<const char*>(map.base);
        bool is_inside = true;
        for (int d = 0; d < map.rank; ++d) {
            const int64_t at = place.at[d] + static_cast<int64_t>(rest % map.box[d]);
            rest /= map.box[d];
            is_inside = is_inside and at >= 0 and at < static_cast<int64_t>(map.sizes[d]);
            if (is_inside) source += at * static_cast<int64_t>(d == 0 ? 2 : map.strides[d - 1]);
        }
        const size_t byte = target + 2 * i;
        const size_t swizzled = byte ^ (byte / kLineBytes % swizzle_lines * kWordBytes);
        *reinterpret_cast<uint16_t*>(ring + swizzled) =
            is_inside ? *reinterpret_cast<const uint16_t*>(source) : 0;
    }
}

}  // namespace dsc::tests
