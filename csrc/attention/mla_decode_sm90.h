// Latent decoding on sm_90a: the pieces of a plan, each to its result or its slot; the kernel that adds up
// the slots is launched behind it by launch_mla_decode. In a build without machine code for sm_90a (the host
// executor is one) a call throws; has_mla_decode_sm90() asks first.
#pragma once

#include <stdexcept>

#include "attention/attention.h"

namespace dsc {

#ifdef DSC_HOST_EXECUTOR

inline bool has_mla_decode_sm90() {
    return false;
}
inline void launch_mla_decode_sm90(const MlaDecodeParams&, cudaStream_t, DecodeArch = DecodeArch::kSm90) {
    throw std::runtime_error("mla_decode: this build has no kernel of arch sm90");
}

#else

bool has_mla_decode_sm90();
// `arch`: kSm90, or one of the ways to go about it, which only tests ask for.
void launch_mla_decode_sm90(const MlaDecodeParams& p, cudaStream_t stream,
                            DecodeArch arch = DecodeArch::kSm90);

#endif

}  // namespace dsc
