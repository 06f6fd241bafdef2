// silu(gate) * up of a grouped product on sm_90a, in its epilogue.
#include "gemm/grouped_gemm_launch_sm90.cuh"

namespace dsc {

#ifdef DSC_NO_DEVICE_CODE

void launch_grouped_swiglu_sm90(const GroupedSwigluParams& p, const GemmPlan&, cudaStream_t) {
    launch_without_sm90(p);
}

#else

void launch_grouped_swiglu_sm90(const GroupedSwigluParams& p, const GemmPlan& plan, cudaStream_t stream) {
    with_warpgroup_tile<GemmStep::kSwiglu, Major::kK, Major::kK>(
        plan, p.type, [&]<typename S, bool kSwaps>() {
            using Job = SwigluSm90<S, kSwaps>;
            launch_pairs<S>(plan, rows_map<typename Job::Rows>("x", p.x, p.type, p.num_rows, p.depth),
                            gate_up_map<typename Job::Columns>(p.w, p.type, p.num_experts, p.width, p.depth),
                            Job{{.p = p}}, stream);
        });
}

#endif

}  // namespace dsc
