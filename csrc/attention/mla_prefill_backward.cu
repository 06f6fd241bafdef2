// The gradients of prefill attention (mla_prefill.h): what the rows need; dK and dV over a plan of the keys'
// tiles, with dQ added to sums by atomics; dQ from the sums. Or, deterministic, dQ from its own kernel over a
// plan of the queries' tiles. The launches follow each other without the host in between.
#include "attention/mla_prefill_backward_launch.cuh"
#include "attention/mla_prefill_backward_sm80.cuh"

namespace dsc {

void launch_mla_prefill_backward(const MlaPrefillBackwardParams& p, PrefillArch arch, cudaStream_t stream) {
    DSC_CHECK(p.width == 192 or p.width == 128, "mla_prefill backward: keys must be 192 or 128 wide, got ",
              p.width);
    DSC_CHECK(arch != PrefillArch::kSm90, "mla_prefill backward: there is no kernel for arch sm90");
    launch_mla_prefill_row_values(p, stream);
    if (p.num_sequences == 0 or p.num_heads == 0) return;
    if (p.num_keys > 0) {
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
