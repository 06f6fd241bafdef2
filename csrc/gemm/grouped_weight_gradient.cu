// The weight gradient: for every expert, grad^T x over its rows. The rows are the depth of the product here,
// and both operands lie with it outermost, so ldmatrix transposes both; every expert has the same tiles, of
// unequal depth, none of it zero-padded in memory.
#include "gemm/grouped_gemm_launch.cuh"

namespace dsc {
namespace {

struct ExpertTile {
    int idx;
    int first_row, depth;  // the expert's rows
};

struct ExpertPlace {
    int expert, row, column;
};

template <typename T>
__device__ __forceinline__ float2 sum_of(float2 old, float2 sum) {
    return make_float2(old.x + sum.x, old.y + sum.y);
}
template <typename T>
__device__ __forceinline__ uint32_t sum_of(uint32_t old, float2 sum) {
    const float2 both = sum_of<T>(floats_of<T>(old), sum);
    return rounded_pair<T>(both.x, both.y);
}

// A thread's pairs of one row, onto what is there or not; all that is there is read before the first of it is
// needed. Pair: two neighbours of the result.
template <typename S, typename Pair>
__device__ __forceinline__ void add_row(Pair* row, const RowSums<S>& sums, int num_columns,
                                        bool accumulates) {
    Pair old[S::kFragmentsN]{};
    DSC_UNROLL
    for (int j = 0; j < S::kFragmentsN; ++j) {
        if (accumulates and 8 * j < num_columns) old[j] = row[4 * j];
    }
    DSC_UNROLL
    for (int j = 0; j < S::kFragmentsN; ++j) {
        if (8 * j < num_columns) row[4 * j] = sum_of<typename S::T>(old[j], sums[j]);
    }
}

// The result of the elements' type that is not accumulated goes through shared memory in words; float32 and
// sums onto what is there go straight from registers, four lanes a sector.
template <typename S_, bool kGathers>
struct WeightGradient {
    using S = S_;
    using T = typename S::T;
    GroupedWeightGradientParams p;

    __device__ __forceinline__ int num_tiles(const GroupTable&) const {
        return p.num_experts * ceil_div(p.num_columns, S::kM) * ceil_div(p.depth, S::kN);
    }

    // Computed anew where it is used: kept over the product, it would take registers that are not there.
    __device__ __forceinline__ ExpertPlace place_of(const ExpertTile& tile) const {
        const int idx = unhoisted(tile.idx), num_row_tiles = ceil_div(p.num_columns, S::kM);
        const int num_expert_tiles = num_row_tiles * ceil_div(p.depth, S::kN);
        const int expert = idx / num_expert_tiles, place = idx - expert * num_expert_tiles;
        return {
            .expert = expert, .row = place % num_row_tiles * S::kM, .column = place / num_row_tiles * S::kN};
    }

    __device__ __forceinline__ ExpertTile find(const GroupTable& table, int idx) const {
        const int expert = idx / (ceil_div(p.num_columns, S::kM) * ceil_div(p.depth, S::kN));
        const int first_row = table.first_row[expert];
        return {.idx = idx, .first_row = first_row, .depth = table.first_row[expert + 1] - first_row};
    }

    __device__ __forceinline__ int depth_of(const ExpertTile& tile) const { return tile.depth; }

    __device__ __forceinline__ auto operands(const ExpertTile& tile) const {
        const ExpertPlace place = place_of(tile);
        const T* const grad = static_cast<const T*>(p.grad) + int64_t{tile.first_row} * p.num_columns;
        const auto rows = depth_rows<T, S::kM, S::kNumThreads>(grad, place.row, p.num_columns, tile.depth);
        const T* const x = static_cast<const T*>(p.x);
        if constexpr (kGathers) {
            using Map = CopyMap<Major::kMN, S::kN, S::kNumThreads>;
            const int first = place.column + Map::chunk(threadIdx.x) * kChunk;
            NumberedDepthRows<T, S::kN, S::kNumThreads> columns{
                .source = first < p.depth ? x + first : x,
                .row_idx = p.row_idx + tile.first_row,
                .num_source_rows = first < p.depth ? p.num_source_rows : 0,
                .row_bytes = p.depth * kElementBytes,
                .depth = tile.depth,
                .coming = -1};
            columns.fetch(0);
            return operands_of<S>(rows, columns);
        } else {
            return operands_of<S>(rows,
                                  depth_rows<T, S::kN, S::kNumThreads>(x + int64_t{tile.first_row} * p.depth,
                                                                       place.column, p.depth, tile.depth));
        }
    }

    __device__ __forceinline__ bool is_staged() const { return not p.is_float32 and not p.accumulates; }

    __device__ __forceinline__ int64_t first_element(const ExpertPlace& place) const {
        return (int64_t{place.expert} * p.num_columns + place.row) * p.depth + place.column;
    }

    __device__ __forceinline__ void stage(T* staged, const Accumulators<S>& acc,
                                          const ExpertTile& tile) const {
        if (is_staged()) return stage_sums<S>(staged, acc);
        if (p.accumulates and tile.depth == 0) return;
        const ExpertPlace place = place_of(tile);
        for_each_row<S>(acc, [&](int row, int column, const RowSums<S>& sums) {
            if (place.row + row >= p.num_columns) return;
            const int num_columns = p.depth - place.column - column;  // from the first on
            const int64_t at = first_element(place) + int64_t{row} * p.depth + column;
            if (p.is_float32) {
                add_row<S>(reinterpret_cast<float2*>(static_cast<float*>(p.grad_w) + at), sums, num_columns,
                           p.accumulates);
            } else {
                add_row<S>(reinterpret_cast<uint32_t*>(static_cast<T*>(p.grad_w) + at), sums, num_columns,
                           p.accumulates);
            }
        });
    }

    __device__ __forceinline__ void store(T* staged, const ExpertTile& tile) const {
        if (not is_staged()) return;
        const ExpertPlace place = place_of(tile);
        store_words<S>(staged, p.grad_w, first_element(place), p.num_columns - place.row,
                       p.depth - place.column, p.depth);
    }
};

}  // namespace

void launch_grouped_weight_gradient(const GroupedWeightGradientParams& p, const GemmChoice& choice,
                                    cudaStream_t stream) {
    constexpr GemmStep kStep = GemmStep::kWeightGradient;
    const GemmPlan plan = plan_gemm({.step = kStep,
                                     .num_rows = p.num_rows,
                                     .num_experts = p.num_experts,
                                     .num_columns = p.num_columns,
                                     .depth = p.depth,
                                     .gathers = p.row_idx != nullptr},
                                    current_gemm_device(), choice);
    if (plan.arch == GemmArch::kSm90) return launch_grouped_weight_gradient_sm90(p, plan, stream);
    with_shape<kStep, Major::kMN, Major::kMN>(plan, p.type, [&]<typename S>() {
        if (p.row_idx != nullptr) return launch_job(plan, WeightGradient<S, true>{p}, stream);
        launch_job(plan, WeightGradient<S, false>{p}, stream);
    });
}

}  // namespace dsc
