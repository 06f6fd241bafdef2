// Prefill attention on sm_90a, the forward pass: the plan's kernel, then the one that takes its tiles. In a
// build without machine code for sm_90a (the host executor is one) a call throws; has_mla_prefill_sm90() asks
// first.
#pragma once

#include <stdexcept>

#include "attention/mla_prefill.h"

namespace dsc {

#ifdef DSC_HOST_EXECUTOR

inline bool has_mla_prefill_sm90() {
    return false;
}
inline void launch_mla_prefill_sm90(const MlaPrefillParams&, PrefillArch, cudaStream_t) {
    throw std::runtime_error("mla_prefill: this build has no kernel of arch sm90");
}

#else

bool has_mla_prefill_sm90();
// `arch`: kSm90, or one of the ways to go about it, which only tests ask for.
void launch_mla_prefill_sm90(const MlaPrefillParams& p, PrefillArch arch, cudaStream_t stream);

#endif

}  // namespace dsc
