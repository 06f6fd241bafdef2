// Latent decoding on sm_90a: which kernel a call gets, and its tensor maps.
#include "attention/mla_decode_sm90.h"

#include "core/launch.h"

#ifdef DSC_NO_DEVICE_CODE

namespace dsc {

bool has_mla_decode_sm90() {
    return false;
}

void launch_mla_decode_sm90(const MlaDecodeParams&, cudaStream_t, DecodeArch) {
    throw std::runtime_error("mla_decode: this build has no kernel of arch sm90");
}

}  // namespace dsc

#else

#include "attention/mla_decode_sm90.cuh"

namespace dsc {

bool has_mla_decode_sm90() {
    return true;
}

namespace {

template <typename T, bool kScoresFirst>
void launch_kernel(const MlaDecodeParams& p, const DecodeOptions& options, cudaStream_t stream) {
    const DecodeMaps maps{.queries = encode_tensor_map(decode_query_map(p)),
                          .cache = encode_tensor_map(decode_cache_map(p))};
    const int num_tiles = ceil_div(p.num_new * p.num_heads, kDecodeRows);
    const dim3 grid(static_cast<unsigned>(num_tiles), static_cast<unsigned>(p.num_parts));
    launch_overlapped(mla_decode_sm90_kernel<T, kScoresFirst>, grid, dim3(kDecodeSm90Threads),
                      kDecodeSm90SharedBytes, stream, maps, p, options);
}

}  // namespace

void launch_mla_decode_sm90(const MlaDecodeParams& p, cudaStream_t stream, DecodeArch arch) {
    const DecodeOptions options = decode_options(p, arch);
    const auto launch_typed = [&]<typename T>() {
        if (options.scores_first) return launch_kernel<T, true>(p, options, stream);
        launch_kernel<T, false>(p, options, stream);
    };
    if (p.dtype == FloatType::kBfloat16) return launch_typed.template operator()<__nv_bfloat16>();
    launch_typed.template operator()<__half>();
}

}  // namespace dsc

#endif
