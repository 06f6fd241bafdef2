// Latent decoding on sm_90a: the pieces of a plan, each to its result or its slot; the kernel that adds up
// the slots is launched behind it by launch_mla_decode. In a build without machine code for sm_90a (the host
// executor is one) a call throws; has_mla_decode_sm90() asks first.
#pragma once

#include <stdexcept>

#include "attention/attention.h"

namespace dsc {

inline bool has_mla_decode_sm90() {
    return false;
}
inline void launch_mla_decode_sm90(const MlaDecodeParams&, cudaStream_t) {
    throw std::runtime_error("mla_decode: this build has no kernel of arch sm90");
}

}  // namespace dsc
