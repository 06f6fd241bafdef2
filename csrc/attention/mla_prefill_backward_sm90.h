// The gradients of prefill attention on sm_90a: the plan's kernel, then the one that takes its tiles of keys.
// What the rows need comes before it and grad_q from its sums behind it (mla_prefill_rows.h). In a build
// without machine code for sm_90a (the host executor is one) a call throws; has_mla_prefill_backward_sm90()
// asks first.
#pragma once

#include <stdexcept>

#include "attention/mla_prefill.h"

namespace dsc {

// Whether a GPU has run this kernel and its tests passed: until then kAuto takes that of sm_80.
constexpr bool kMlaPrefillBackwardSm90IsProven = false;

#ifdef DSC_HOST_EXECUTOR

inline bool has_mla_prefill_backward_sm90() {
    return false;
}
inline void launch_mla_prefill_backward_sm90(const MlaPrefillBackwardParams&, PrefillArch, cudaStream_t) {
    throw std::runtime_error("mla_prefill backward: this build has no kernel of arch sm90");
}

#else

bool has_mla_prefill_backward_sm90();
// `arch`: kSm90, or kSm90OneStage, which only tests ask for.
void launch_mla_prefill_backward_sm90(const MlaPrefillBackwardParams& p, PrefillArch arch,
                                      cudaStream_t stream);

#endif

}  // namespace dsc
