// The grouped products of sm_90a, planned already. In a build without machine code for sm_90a (the host
// executor is one) a call throws; has_gemm_sm90() asks first.
#pragma once

#include "gemm/gemm.h"

namespace dsc {

template <typename Params>
void launch_without_sm90(const Params&) {
    throw std::runtime_error("grouped_gemm: this build has no kernels of arch sm90");
}

#ifdef DSC_HOST_EXECUTOR

inline bool has_gemm_sm90() {
    return false;
}
inline void launch_grouped_gemm_sm90(const GroupedGemmParams& p, const GemmPlan&, cudaStream_t) {
    launch_without_sm90(p);
}
inline void launch_grouped_swiglu_sm90(const GroupedSwigluParams& p, const GemmPlan&, cudaStream_t) {
    launch_without_sm90(p);
}
inline void launch_grouped_swiglu_backward_sm90(const GroupedSwigluBackwardParams& p, const GemmPlan&,
                                                cudaStream_t) {
    launch_without_sm90(p);
}
inline void launch_grouped_weight_gradient_sm90(const GroupedWeightGradientParams& p, const GemmPlan&,
                                                cudaStream_t) {
    launch_without_sm90(p);
}

#else

bool has_gemm_sm90();
void launch_grouped_gemm_sm90(const GroupedGemmParams& p, const GemmPlan& plan, cudaStream_t stream);
void launch_grouped_swiglu_sm90(const GroupedSwigluParams& p, const GemmPlan& plan, cudaStream_t stream);
void launch_grouped_swiglu_backward_sm90(const GroupedSwigluBackwardParams& p, const GemmPlan& plan,
                                         cudaStream_t stream);
void launch_grouped_weight_gradient_sm90(const GroupedWeightGradientParams& p, const GemmPlan& plan,
                                         cudaStream_t stream);

#endif

}  // namespace dsc
