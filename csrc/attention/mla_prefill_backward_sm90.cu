// The gradients of prefill attention on sm_90a: which kernel a call gets, how many blocks, and its tensor
// maps.
#include "attention/mla_prefill_backward_sm90.h"

#include "core/launch.h"

#ifdef DSC_NO_DEVICE_CODE

namespace dsc {

bool has_mla_prefill_backward_sm90() {
    return false;
}

void launch_mla_prefill_backward_sm90(const MlaPrefillBackwardParams&, PrefillArch, cudaStream_t) {
    throw std::runtime_error("mla_prefill backward: this build has no kernel of arch sm90");
}

}  // namespace dsc

#else

#include "attention/mla_prefill_backward_sm90.cuh"

namespace dsc {

bool has_mla_prefill_backward_sm90() {
    return true;
}

namespace {

template <typename T, int kWidth>
void launch_kernel(const MlaPrefillBackwardParams& p, const prefill_backward_sm90::Options& options,
                   unsigned num_blocks, cudaStream_t stream) {
    using S = prefill_backward_sm90::Shape<T, kWidth>;
    const prefill_backward_sm90::MapSpecs specs = prefill_backward_sm90::map_specs(p);
    const prefill_backward_sm90::Maps maps{.keys = encode_tensor_map(specs.keys),
                                           .values = encode_tensor_map(specs.values),
                                           .queries = encode_tensor_map(specs.queries),
                                           .grad_out = encode_tensor_map(specs.grad_out)};
    launch_overlapped(prefill_backward_sm90::mla_prefill_backward_sm90_kernel<S>, dim3(num_blocks),
                      dim3(prefill_backward_sm90::kThreads), S::kSharedBytes, stream, maps, p, options);
}

}  // namespace

void launch_mla_prefill_backward_sm90(const MlaPrefillBackwardParams& p, PrefillArch arch,
                                      cudaStream_t stream) {
    const PrefillTiling tiling = prefill_backward_sm90::tiling_of(p.causal);
    const int64_t num_blocks =
        p.num_key_heads * most_prefill_tiles(p.num_keys, p.num_sequences, tiling.tile_rows);
    DSC_CHECK(num_blocks <= std::numeric_limits<int>::max(),
              "mla_prefill backward: too many tiles to be numbered, ", num_blocks);
    launch_mla_prefill_plan({.cu_seqlens_q = p.cu_seqlens_q,
                             .cu_seqlens_k = p.cu_seqlens_k,
                             .plan = p.plan,
                             .num_queries = p.num_queries,
                             .num_keys = p.num_keys,
                             .num_sequences = p.num_sequences,
                             .tiling = tiling},
                            stream);
    const prefill_backward_sm90::Options options = prefill_backward_sm90::options_of(arch);
    const auto launch_typed = [&]<typename T>() {
        const auto num = static_cast<unsigned>(num_blocks);
        if (p.width == 192) return launch_kernel<T, 192>(p, options, num, stream);
        launch_kernel<T, 128>(p, options, num, stream);
    };
    if (p.dtype == FloatType::kBfloat16) return launch_typed.template operator()<__nv_bfloat16>();
    launch_typed.template operator()<__half>();
}

}  // namespace dsc

#endif
