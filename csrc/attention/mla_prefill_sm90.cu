// Prefill attention on sm_90a: which kernel a call gets, how many blocks, and its tensor maps.
#include "attention/mla_prefill_sm90.h"

#include "core/launch.h"

#ifdef DSC_NO_DEVICE_CODE

namespace dsc {

bool has_mla_prefill_sm90() {
    return false;
}

void launch_mla_prefill_sm90(const MlaPrefillParams&, PrefillArch, cudaStream_t) {
    throw std::runtime_error("mla_prefill: this build has no kernel of arch sm90");
}

}  // namespace dsc

#else

#include <algorithm>

#include "attention/mla_prefill_sm90.cuh"

namespace dsc {

bool has_mla_prefill_sm90() {
    return true;
}

namespace {

template <typename T, int kWidth>
void launch_kernel(const MlaPrefillParams& p, const prefill_sm90::Options& options, int num_blocks,
                   cudaStream_t stream) {
    using S = prefill_sm90::Shape<T, kWidth>;
    const prefill_sm90::MapSpecs specs = prefill_sm90::map_specs(p);
    const prefill_sm90::Maps maps{.queries = encode_tensor_map(specs.queries),
                                  .keys = encode_tensor_map(specs.keys),
                                  .values = encode_tensor_map(specs.values)};
    launch_overlapped(prefill_sm90::mla_prefill_sm90_kernel<S>, dim3(static_cast<unsigned>(num_blocks)),
                      dim3(prefill_sm90::kThreads), S::kSharedBytes, stream, maps, p, options);
}

}  // namespace

void launch_mla_prefill_sm90(const MlaPrefillParams& p, PrefillArch arch, cudaStream_t stream) {
    const int64_t most_works = prefill_sm90::most_works(p);
    DSC_CHECK(most_works <= std::numeric_limits<int>::max() / 2,
              "mla_prefill: tiles of queries times heads must be <= 2^30 - 1, got ", most_works);
    launch_mla_prefill_plan({.cu_seqlens_q = p.cu_seqlens_q,
                             .cu_seqlens_k = p.cu_seqlens_k,
                             .plan = p.plan,
                             .num_queries = p.num_queries,
                             .num_keys = p.num_keys,
                             .num_sequences = p.num_sequences,
                             .tiling = prefill_sm90::tiling_of(p.causal)},
                            stream);
    const prefill_sm90::Options options = prefill_sm90::options_of(arch);
    const int64_t num_sms = device_attribute<cudaDevAttrMultiProcessorCount>(current_device());
    const int num_blocks =
        static_cast<int>(options.keeps_blocks ? std::min(most_works, num_sms) : most_works);
    const auto launch_typed = [&]<typename T>() {
        if (p.width == 192) return launch_kernel<T, 192>(p, options, num_blocks, stream);
        launch_kernel<T, 128>(p, options, num_blocks, stream);
    };
    if (p.dtype == FloatType::kBfloat16) return launch_typed.template operator()<__nv_bfloat16>();
    launch_typed.template operator()<__half>();
}

}  // namespace dsc

#endif
