// The gradients of prefill attention (mla_prefill.h): what the rows need; dK and dV over a plan of the keys'
// tiles, with dQ added to sums by atomics; dQ from the sums. Or, deterministic, dQ from its own kernel over a
// plan of the queries' tiles. The launches follow each other without the host in between. Whatever the arch,
// deterministic gradients are those of mma.sync.
#include "attention/mla_prefill_backward_launch.cuh"
#include "attention/mla_prefill_backward_sm80.cuh"
#include "attention/mla_prefill_backward_sm90.h"

namespace dsc {
namespace {

bool is_sm90_device() {
#ifdef DSC_HOST_EXECUTOR
    return false;
#else
    return device_attribute<cudaDevAttrComputeCapabilityMajor>(current_device()) == 9;
#endif
}

// Whether the kernel of sm_90a is asked for, or kAuto takes it.
bool takes_sm90(const MlaPrefillBackwardParams& p, PrefillArch arch) {
    const bool is_asked_for = arch >= PrefillArch::kSm90;
    const bool may_take = arch == PrefillArch::kAuto and kMlaPrefillBackwardSm90IsProven;
    if (not is_asked_for and not may_take) return false;
    const bool can_run = has_mla_prefill_backward_sm90() and is_sm90_device();
    DSC_CHECK(can_run or not is_asked_for,
              "mla_prefill backward: arch sm90 needs compute capability 9.0 and a build with kernels for it");
    return can_run and not p.deterministic;
}

}  // namespace

void launch_mla_prefill_backward(const MlaPrefillBackwardParams& p, PrefillArch arch, cudaStream_t stream) {
    DSC_CHECK(p.width == 192 or p.width == 128, "mla_prefill backward: keys must be 192 or 128 wide, got ",
              p.width);
    const bool is_sm90 = takes_sm90(p, arch);
    launch_mla_prefill_row_values(p, stream);
    if (p.num_sequences == 0 or p.num_heads == 0) return;
    if (p.num_keys > 0 and is_sm90) {
        launch_mla_prefill_backward_sm90(p, arch, stream);
    } else if (p.num_keys > 0) {
        prefill_backward::with_tile(p, [&]<typename S>() {
            const PrefillTiling tiling{PrefillSide::kKeys, S::kKeys, S::kQueries, p.causal};
            prefill_backward::launch_tiles(p, tiling, p.num_key_heads,
                                           prefill_backward::mla_prefill_backward_sm80_kernel<S>,
                                           S::kSharedBytes, stream);
        });
    }
    if (p.num_queries == 0) return;
    if (p.deterministic) return prefill_backward::launch_grad_query(p, stream);
    launch_mla_prefill_round_sums(p, stream);
}

}  // namespace dsc
