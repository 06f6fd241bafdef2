// silu(gate) * up of a grouped product, in its epilogue: a tile takes its gate and up columns of w eight by
// eight, so that both sums of an element of `hidden` meet in one thread.
#include "gemm/grouped_gemm_launch.cuh"
#include "gemm/swiglu.cuh"

namespace dsc {
namespace {

template <typename S>
struct Swiglu : RowJob<S, GroupedSwigluParams, S::kN / 2> {
    using T = typename S::T;

    // Word 2 p of the tile's columns is gate and word 2 p + 1 is up, of the same eight columns of `hidden`.
    __device__ __forceinline__ auto operands(const RowTile& tile) const {
        using Map = CopyMap<Major::kK, S::kN, S::kNumThreads>;
        static_assert(S::kMajorB == Major::kK and Map::kRowStep % (2 * kChunk) == 0);
        const GroupedSwigluParams& p = this->p;
        const int row = Map::row(threadIdx.x), word = row / kChunk;
        const T* const w =
            static_cast<const T*>(p.w) + (tile.group * int64_t{2} + word % 2) * int64_t{p.width} * p.depth;
        return operands_of<S>(this->rows_of(tile, p.x, p.row_idx, p.num_source_rows),
                              strided_rows<T, S::kN, S::kNumThreads>(
                                  w, this->first_column(tile) + word / 2 * kChunk + row % kChunk, p.width,
                                  Map::kRowStep / 2, p.depth));
    }

    __device__ __forceinline__ void store(T* staged, const RowTile& tile) const {
        const GroupedSwigluParams& p = this->p;
        const StagedWords<S, 2> words{staged};
        const int f = this->first_column(tile) + words.column() / 2;
        if (f >= p.width) return;
        DSC_UNROLL
        for (int item = 0; item < words.kItems; ++item) {
            if (words.row(item) >= this->num_rows(tile)) return;
            const int64_t m = tile.row + words.row(item);
            const Word gate = words.word(item, 0), up = words.word(item, 1);
            word_at<T>(p.hidden, m * p.width + f) = swiglu<T>(gate, up);
            if (p.gate_up == nullptr) continue;
            word_at<T>(p.gate_up, m * 2 * p.width + f) = gate;
            word_at<T>(p.gate_up, (m * 2 + 1) * p.width + f) = up;
        }
    }
};

}  // namespace

void launch_grouped_swiglu(const GroupedSwigluParams& p, const GemmChoice& choice, cudaStream_t stream) {
    constexpr GemmStep kStep = GemmStep::kSwiglu;
    const GemmPlan plan = plan_gemm({.step = kStep,
                                     .num_rows = p.num_rows,
                                     .num_experts = p.num_experts,
                                     .num_columns = p.width,
                                     .depth = p.depth,
                                     .gathers = p.row_idx != nullptr},
                                    current_gemm_device(), choice);
    if (plan.arch == GemmArch::kSm90) return launch_grouped_swiglu_sm90(p, plan, stream);
    with_shape<kStep, Major::kK, Major::kK>(plan, p.type, [&]<typename S>() {
        launch_job(plan, Swiglu<S>{{.p = p, .num_columns = p.width}}, stream);
    });
}

}  // namespace dsc
