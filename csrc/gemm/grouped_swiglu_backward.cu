// The gradients of gate and up, in the epilogue of the product that makes the gradient of `hidden`, which
// never goes to memory: it is rounded to the elements' type, as if it had.
#include "gemm/grouped_gemm_launch.cuh"
#include "gemm/swiglu.cuh"

namespace dsc {
namespace {

template <typename S>
struct SwigluBackward : RowJob<S, GroupedSwigluBackwardParams, S::kN> {
    using T = typename S::T;
    static constexpr int kBatch = 4;  // words that a thread reads before it needs the first

    __device__ __forceinline__ auto operands(const RowTile& tile) const {
        const GroupedSwigluBackwardParams& p = this->p;
        const T* const w = static_cast<const T*>(p.w) + tile.group * int64_t{p.width} * p.depth;
        using Map = CopyMap<Major::kK, S::kM, S::kNumThreads>;
        const auto rows = strided_rows<T, S::kM, S::kNumThreads>(static_cast<const T*>(p.grad),
                                                                 tile.row + Map::row(threadIdx.x),
                                                                 tile.end_row, Map::kRowStep, p.depth);
        return operands_of<S>(
            rows, depth_rows<T, S::kN, S::kNumThreads>(w, this->first_column(tile), p.width, p.depth));
    }

    __device__ __forceinline__ void store(T* staged, const RowTile& tile) const {
        const StagedWords<S, 1> words{staged};
        static_assert(words.kItems % kBatch == 0);
        const int f = this->first_column(tile) + words.column();
        if (f >= this->p.width) return;
        for (int item = 0; item < words.kItems; item += kBatch) store_batch(words, tile, item, f);
    }

    __device__ __forceinline__ void store_batch(const StagedWords<S, 1>& words, const RowTile& tile, int item,
                                                int f) const {
        const GroupedSwigluBackwardParams& p = this->p;
        // Rows of no expert have no gate and up to read: zeros give zeros.
        const int num_rows = this->num_rows(tile), num_read = tile.group < p.num_experts ? num_rows : 0;
        Word gate[kBatch]{}, up[kBatch]{};
        DSC_UNROLL
        for (int i = 0; i < kBatch; ++i) {
            const int row = words.row(item + i);
            if (row >= num_read) continue;
            gate[i] = word_at<T>(p.gate_up, (int64_t{tile.row} + row) * 2 * p.width + f);
            up[i] = word_at<T>(p.gate_up, ((int64_t{tile.row} + row) * 2 + 1) * p.width + f);
        }
        DSC_UNROLL
        for (int i = 0; i < kBatch; ++i) {
            const int row = words.row(item + i);
            if (row >= num_rows) continue;
            swiglu_backward<T>(words.word(item + i, 0), gate[i], up[i]);
            word_at<T>(p.grad_gate_up, (int64_t{tile.row} + row) * 2 * p.width + f) = gate[i];
            word_at<T>(p.grad_gate_up, ((int64_t{tile.row} + row) * 2 + 1) * p.width + f) = up[i];
        }
    }
};

}  // namespace

void launch_grouped_swiglu_backward(const GroupedSwigluBackwardParams& p, const GemmChoice& choice,
                                    cudaStream_t stream) {
    constexpr GemmStep kStep = GemmStep::kSwigluBackward;
    const GemmPlan plan = plan_gemm({.step = kStep,
                                     .num_rows = p.num_rows,
                                     .num_experts = p.num_experts,
                                     .num_columns = p.width,
                                     .depth = p.depth},
                                    current_gemm_device(), choice);
    if (plan.arch == GemmArch::kSm90) return launch_grouped_swiglu_backward_sm90(p, plan, stream);
    with_shape<kStep, Major::kK, Major::kMN>(plan, p.type, [&]<typename S>() {
        launch_job(plan, SwigluBackward<S>{{.p = p, .num_columns = p.width}}, stream);
    });
}

}  // namespace dsc
