// Prefill attention (mla_prefill.h), the forward pass: the plan's kernel, then that of the device's
// generation over its tiles.
#include "attention/mla_prefill.h"

#include <limits>

#include "attention/mla_prefill_sm80.cuh"
#include "attention/mla_prefill_sm90.h"
#include "core/check.h"
#include "core/launch.h"

namespace dsc {
namespace {

struct PrefillDevice {
    int shared_per_sm, shared_per_block;  // bytes
    bool is_sm90;
};

// The host executor is an A100.
PrefillDevice current_prefill_device() {
#ifdef DSC_HOST_EXECUTOR
    return {.shared_per_sm = 164 * 1024, .shared_per_block = 163 * 1024, .is_sm90 = false};
#else
    const int device = current_device();
    return {.shared_per_sm = device_attribute<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(device),
            .shared_per_block = device_attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device),
            .is_sm90 = device_attribute<cudaDevAttrComputeCapabilityMajor>(device) == 9};
#endif
}

template <typename S>
void launch_tiles(const MlaPrefillParams& p, cudaStream_t stream) {
    const PrefillTiling tiling{
        .side = PrefillSide::kQueries, .tile_rows = S::kRows, .block_rows = S::kKeys, .causal = p.causal};
    const int64_t num_blocks = most_prefill_tiles(p.num_queries, p.num_sequences, S::kRows) * p.num_heads;
    DSC_CHECK(num_blocks <= std::numeric_limits<int>::max(),
              "mla_prefill: tiles of queries times heads must fit an int32, got ", num_blocks);
    launch_mla_prefill_plan({.cu_seqlens_q = p.cu_seqlens_q,
                             .cu_seqlens_k = p.cu_seqlens_k,
                             .plan = p.plan,
                             .num_queries = p.num_queries,
                             .num_keys = p.num_keys,
                             .num_sequences = p.num_sequences,
                             .tiling = tiling},
                            stream);
    constexpr int kSharedBytes = prefill_sm80_bytes(S::kWidth, S::kValueWidth, S::kKeys);
    launch_overlapped(prefill::mla_prefill_sm80_kernel<S>, dim3(static_cast<unsigned>(num_blocks)),
                      dim3(kPrefillSm80Threads), kSharedBytes, stream, p);
}

// Keys in a block, with as many blocks of the grid on an SM as it has room for.
int num_block_keys(const MlaPrefillParams& p, PrefillArch arch) {
    if (arch == PrefillArch::kSm80Keys32) return 32;
    if (arch == PrefillArch::kSm80Keys64) return 64;
    const PrefillDevice device = current_prefill_device();
    return plan_prefill_sm80(p.width, p.value_width, device.shared_per_sm, device.shared_per_block).num_keys;
}

template <typename T, int kWidth, int kValueWidth>
void launch_sm80(const MlaPrefillParams& p, PrefillArch arch, cudaStream_t stream) {
    if (num_block_keys(p, arch) == 64)
        return launch_tiles<prefill::Shape<T, kWidth, kValueWidth, 64>>(p, stream);
    launch_tiles<prefill::Shape<T, kWidth, kValueWidth, 32>>(p, stream);
}

template <typename T>
void launch_widths(const MlaPrefillParams& p, PrefillArch arch, cudaStream_t stream) {
    if (p.width == 192) return launch_sm80<T, 192, 128>(p, arch, stream);
    launch_sm80<T, 128, 128>(p, arch, stream);
}

// Whether the kernel of sm_90a is asked for, or kAuto takes it.
bool takes_sm90(PrefillArch arch) {
    const bool is_asked_for = arch >= PrefillArch::kSm90;
    if (not is_asked_for and (arch != PrefillArch::kAuto or not kMlaPrefillSm90IsProven)) return false;
    const bool can_run = has_mla_prefill_sm90() and current_prefill_device().is_sm90;
    DSC_CHECK(can_run or not is_asked_for,
              "mla_prefill: arch sm90 needs compute capability 9.0 and a build with kernels for it");
    return can_run;
}

}  // namespace

void launch_mla_prefill(const MlaPrefillParams& p, PrefillArch arch, cudaStream_t stream) {
    DSC_CHECK((p.width == 192 or p.width == 128) and p.value_width == 128,
              "mla_prefill: widths of keys and values must be 192 and 128, or 128 and 128, got ", p.width,
              " and ", p.value_width);
    DSC_CHECK(p.num_key_heads > 0 ? p.num_heads % p.num_key_heads == 0 : p.num_heads == 0,
              "mla_prefill: heads of q must be a multiple of those of k, got ", p.num_heads, " and ",
              p.num_key_heads);
    const bool is_sm90 = takes_sm90(arch);
    if (p.num_queries == 0 or p.num_sequences == 0 or p.num_heads == 0) return;
    if (is_sm90) return launch_mla_prefill_sm90(p, arch, stream);
    if (p.dtype == FloatType::kBfloat16) return launch_widths<__nv_bfloat16>(p, arch, stream);
    launch_widths<__half>(p, arch, stream);
}

}  // namespace dsc
