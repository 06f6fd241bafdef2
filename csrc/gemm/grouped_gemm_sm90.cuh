// The grouped products on sm_90a: persistent clusters of two blocks, one warpgroup that loads (TMA), two that
// multiply (wgmma), stores from registers.
//
// Every product here is the same kernel over a Job, which says where a tile's operands lie, which tiles there
// are, and what becomes of the sums. Experts are contiguous in the rows of x, so one tensor map over all rows
// and one over all experts' weights serve every tile. A tile's rows may run past its expert: what is read
// there (rows of the next expert, of none, or zeros past the end) makes sums in rows of their own, which
// nobody stores. Where rows are the depth, in the weight gradient, they are blanked in shared memory first.
//
// Bring-up on a GPU, one step at a time, by ProductOptions: two stages, no multicast, no skew; then all
// stages; then multicast; then skew (docs/grouped_gemm_sm90.md).
#pragma once

#include "core/overlap.h"
#include "gemm/gemm.h"
#include "gemm/grouped_gemm_epilogue_sm90.cuh"
#include "gemm/grouped_gemm_schedule_sm90.cuh"

namespace dsc {

struct TensorMaps {
    CUtensorMap a, b;  // whose lines are rows of the tile, and columns
};

struct ProductOptions {
    int num_stages;   // 2 to kStages
    bool multicasts;  // else each block loads both of its operands itself
    int skew_blocks;  // k blocks that the first warpgroup is ahead of the second; 0: none
};

struct ProductTile {
    int group, group_row, group_end;  // expert (or E: rows of none), and its rows
    int row, end_row;                 // of the result
    int column, num_k_blocks;
    bool shares_rows;
};

// ---- roles ----

template <typename S, typename Job>
__device__ __forceinline__ void load_tiles(const TensorMaps& maps, const Job& job, const GroupTable& table,
                                           RingBarriers<S::kStages>& barriers, char* ring,
                                           const ProductOptions& options) {
    const int rank = static_cast<int>(cute::block_rank_in_cluster());
    const int num_pairs = job.num_tile_pairs(table);
    RingPlace place;
    for (int idx = blockIdx.x / kCluster; idx < num_pairs; idx += gridDim.x / kCluster) {
        const ProductTile tile = job.tile_at(table, idx, rank);
        const auto a = job.a_of(maps, tile);
        const auto b = job.b_of(maps, tile);
        const bool shares_a = options.multicasts and tile.shares_rows != Job::kSwaps;
        const bool shares_b = options.multicasts and tile.shares_rows == Job::kSwaps;
        DSC_LOOP
        for (int k_block = 0; k_block < tile.num_k_blocks; ++k_block) {
            uint64_t* const full = &barriers.full[place.stage];
            EmptyBarrier::wait(&barriers.empty[place.stage], place.phase ^ 1);
            FullBarrier::arrive_and_expect_tx(full, S::kStageBytes);
            a.load(ring + place.stage * S::kBytesA, full, k_block, shares_a, rank);
            b.load(ring + S::kStages * S::kBytesA + place.stage * S::kBytesB, full, k_block, shares_b, rank);
            place.advance(options.num_stages);
        }
    }
    let_next_kernel_start();
}

enum : uint32_t { kSkewBarrier, kBlankBarrier };  // kBlankBarrier + warpgroup

template <typename S, typename Job>
__device__ __forceinline__ void multiply_tiles(const Job& job, const GroupTable& table,
                                               RingBarriers<S::kStages>& barriers, char* ring,
                                               const ProductOptions& options) {
    using cutlass::arch::NamedBarrier;
    constexpr int kBoth = kNumConsumers * kWarpgroup;
    const int rank = static_cast<int>(cute::block_rank_in_cluster());
    const int num_pairs = job.num_tile_pairs(table);
    const bool is_second = threadIdx.x >= kWarpgroup + kBoth / 2;
    bool is_skewing = options.skew_blocks > 0;
    RingPlace place;
    for (int idx = blockIdx.x / kCluster; idx < num_pairs; idx += gridDim.x / kCluster) {
        const ProductTile tile = job.tile_at(table, idx, rank);
        if (is_skewing and is_second) {
            NamedBarrier::sync(kBoth, kSkewBarrier);
            is_skewing = false;
        }
        WarpgroupSums<S> sums;
        multiply_tile<S>(sums, ring, barriers, place, options.num_stages, tile.num_k_blocks,
                         [&](int stage, int k_block) {
                             if (is_skewing and k_block == options.skew_blocks) {
                                 NamedBarrier::arrive(kBoth, kSkewBarrier);
                                 is_skewing = false;
                             }
                             job.prepare(ring, tile, stage, k_block);
                         });
        if (is_skewing) {  // a tile of few k blocks
            NamedBarrier::arrive(kBoth, kSkewBarrier);
            is_skewing = false;
        }
        job.store(sums, tile);
    }
}

template <typename S, typename Job>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kNumThreadsSm90, 1)
    grouped_product_kernel(const __grid_constant__ TensorMaps maps, const __grid_constant__ Job job,
                           const __grid_constant__ ProductOptions options) {
    extern __shared__ __align__(kRingAlignment) char ring[];
    __shared__ RingBarriers<S::kStages> barriers;
    __shared__ GroupTable table;
    static_assert(sizeof(barriers) + sizeof(table) <= kSm90StaticBytes);
    if (threadIdx.x == 0) init_barriers(barriers);
    wait_for_previous_kernel();
    job.fill(table);
    cute::cluster_arrive_relaxed();
    cute::cluster_wait();  // both blocks' barriers are there
    if (threadIdx.x < kWarpgroup) {
        cutlass::arch::warpgroup_reg_dealloc<kSm90LoadRegisters>();
        if (threadIdx.x == 0) load_tiles<S>(maps, job, table, barriers, ring, options);
    } else {
        cutlass::arch::warpgroup_reg_alloc<kSm90MultiplyRegisters>();
        multiply_tiles<S>(job, table, barriers, ring, options);
    }
    // Neither block leaves while the other may still arrive on its barriers.
    __syncwarp();
    cute::cluster_sync();
}

// ---- products over rows in expert order ----

// The tiles of a result whose rows are in expert order, kTileRows x kTileColumns each.
template <typename Job>
__device__ __forceinline__ void fill_pairs(GroupTable& table, const Job& job) {
    const int column_tiles = ceil_div(job.num_columns(), Job::kTileColumns);
    fill_groups(table, job.p.offsets, job.p.num_experts, job.p.num_rows, [&](int64_t rows) {
        return num_pairs<Job::kSwaps>(static_cast<int>(ceil_div<int64_t>(rows, Job::kTileRows)),
                                      column_tiles);
    });
}

template <typename Job>
__device__ __forceinline__ ProductTile row_tile_at(const GroupTable& table, const Job& job, int idx,
                                                   int rank) {
    const int group = find_group(table, job.p.num_experts, 1, idx);
    const auto group_row = static_cast<int>(table.first_row[group]);
    const auto group_end = static_cast<int>(table.first_row[group + 1]);
    const TilePair pair =
        pair_at<Job::kSwaps>(idx - table.first_tile[group], ceil_div(group_end - group_row, Job::kTileRows),
                             ceil_div(job.num_columns(), Job::kTileColumns), rank);
    return {.group = group,
            .group_row = group_row,
            .group_end = group_end,
            .row = group_row + pair.row_tile * Job::kTileRows,
            .end_row = group_end,
            .column = pair.column_tile * Job::kTileColumns,
            .num_k_blocks = group < job.p.num_experts ? ceil_div(job.p.depth, kTileK) : 0,
            .shares_rows = pair.shares_rows};
}

constexpr uint64_t kNormalHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
constexpr uint64_t kOnceHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
constexpr uint64_t kAgainHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_LAST);

// What the jobs over rows in expert order have in common. kColumnForm: how the weights lie; kSwaps: they are
// the lines of a, for decoding.
template <typename S, typename Params, Form kColumnForm, bool kSwaps_>
struct RowsJob {
    using T = typename S::T;
    static constexpr bool kSwaps = kSwaps_;
    static constexpr int kTileRows = kSwaps ? S::kN : S::kM;
    static constexpr int kColumnLines = kSwaps ? S::kM : S::kN;
    static constexpr int kTileColumns = kColumnForm == Form::kGateUp ? kColumnLines / 2 : kColumnLines;
    using Rows = OperandBoxes<Form::kRows, kTileRows>;
    using Columns = OperandBoxes<kColumnForm, kColumnLines>;
    Params p;

    __host__ __device__ int num_columns() const {
        if constexpr (requires { p.num_columns; })
            return p.num_columns;
        else
            return p.width;
    }
    __device__ __forceinline__ void fill(GroupTable& table) const { fill_pairs(table, *this); }
    __device__ __forceinline__ int num_tile_pairs(const GroupTable& table) const {
        return table.first_tile[p.num_experts + 1];
    }
    __device__ __forceinline__ ProductTile tile_at(const GroupTable& table, int idx, int rank) const {
        return row_tile_at(table, *this, idx, rank);
    }
    __device__ __forceinline__ auto a_of(const TensorMaps& maps, const ProductTile& tile) const {
        if constexpr (kSwaps)
            return columns_of(&maps.a, tile);
        else
            return rows_of(&maps.a, tile);
    }
    __device__ __forceinline__ auto b_of(const TensorMaps& maps, const ProductTile& tile) const {
        if constexpr (kSwaps)
            return rows_of(&maps.b, tile);
        else
            return columns_of(&maps.b, tile);
    }
    __device__ __forceinline__ void prepare(char*, const ProductTile&, int, int) const {}

  private:
    static __device__ __forceinline__ Rows rows_of(const CUtensorMap* map, const ProductTile& tile) {
        return {.map = map, .first = tile.row, .group = 0, .hint = kSwaps ? kAgainHint : kNormalHint};
    }
    static __device__ __forceinline__ Columns columns_of(const CUtensorMap* map, const ProductTile& tile) {
        return {
            .map = map, .first = tile.column, .group = tile.group, .hint = kSwaps ? kOnceHint : kNormalHint};
    }
};

// y = x @ w.T, or x @ w.
template <typename S, bool kSwaps = false>
struct ProductSm90
    : RowsJob<S, GroupedGemmParams, S::kMajorB == Major::kK ? Form::kWeights : Form::kWeightDepth, kSwaps> {
    using T = typename S::T;

    __device__ __forceinline__ void store(const WarpgroupSums<S>& sums, const ProductTile& tile) const {
        const int num_columns = this->p.num_columns;
        if constexpr (kSwaps) {
            for_each_two_lines<S>(sums, [&](int row, int line, float low, float high) {
                if (tile.row + row >= tile.end_row) return;
                T* const y = static_cast<T*>(this->p.y) + int64_t{tile.row + row} * num_columns;
                const int column = tile.column + line;
                if (column < num_columns) y[column] = rounded<T>(low);
                if (column + 8 < num_columns) y[column + 8] = rounded<T>(high);
            });
        } else {
            for_each_word<S>(sums, [&](int row, int column, const Word& word) {
                const int m = tile.row + row, n = tile.column + column;
                if (m >= tile.end_row or n >= num_columns) return;
                store_word<T>(this->p.y, int64_t{m} * num_columns + n, word);
            });
        }
    }
};

// hidden = silu(gate) * up. Lines of w come as eight of gate and eight of up in turn, so that a thread holds
// both of the same column.
template <typename S, bool kSwaps = false>
struct SwigluSm90 : RowsJob<S, GroupedSwigluParams, Form::kGateUp, kSwaps> {
    using T = typename S::T;

    __device__ __forceinline__ void store(const WarpgroupSums<S>& sums, const ProductTile& tile) const {
        if constexpr (kSwaps) {
            for_each_two_lines<S>(sums, [&](int row, int line, float gate, float up) {
                store_one(tile.row + row, tile.end_row, tile.column + line / 16 * 8 + line % 16, gate, up);
            });
        } else {
            for_each_gate_up<S>(sums, [&](int row, int column, const Word& gate, const Word& up) {
                store_words(tile.row + row, tile.end_row, tile.column + column, gate, up);
            });
        }
    }

  private:
    __device__ __forceinline__ void store_words(int m, int end_row, int f, const Word& gate,
                                                const Word& up) const {
        const auto& p = this->p;
        if (m >= end_row or f >= p.width) return;
        store_word<T>(p.hidden, int64_t{m} * p.width + f, swiglu<T>(gate, up));
        if (p.gate_up == nullptr) return;
        store_word<T>(p.gate_up, int64_t{2} * m * p.width + f, gate);
        store_word<T>(p.gate_up, (int64_t{2} * m + 1) * p.width + f, up);
    }

    __device__ __forceinline__ void store_one(int m, int end_row, int f, float gate, float up) const {
        const auto& p = this->p;
        if (m >= end_row or f >= p.width) return;
        const T gate_T = rounded<T>(gate), up_T = rounded<T>(up);
        const float kept_gate = static_cast<float>(gate_T);
        static_cast<T*>(p.hidden)[int64_t{m} * p.width + f] =
            rounded<T>(static_cast<float>(up_T) * (kept_gate * sigmoid(kept_gate)));
        if (p.gate_up == nullptr) return;
        T* const kept = static_cast<T*>(p.gate_up) + int64_t{2} * m * p.width + f;
        kept[0] = gate_T;
        kept[p.width] = up_T;
    }
};

// From grad_hidden = grad @ w, the gradients of gate and up.
template <typename S>
struct SwigluBackwardSm90 : RowsJob<S, GroupedSwigluBackwardParams, Form::kWeightDepth, false> {
    using T = typename S::T;
    struct GateUp {
        Word gate, up;
    };

    __device__ __forceinline__ void store(const WarpgroupSums<S>& sums, const ProductTile& tile) const {
        const auto& p = this->p;
        // Rows of no expert have no gate and up to read: zeros give zeros.
        const bool is_used = tile.group < p.num_experts;
        const auto is_inside = [&](int row, int column) {
            return tile.row + row < tile.end_row and tile.column + column < p.width;
        };
        const auto gate_at = [&](int row, int column) {
            return int64_t{2} * (tile.row + row) * p.width + tile.column + column;
        };
        update_each_word<S, GateUp>(
            sums,
            [&](int row, int column) {
                GateUp old{};
                if (not is_used or not is_inside(row, column)) return old;
                const int64_t at = gate_at(row, column);
                old.gate = word_at<T>(p.gate_up, at);
                old.up = word_at<T>(p.gate_up, at + p.width);
                return old;
            },
            [&](int row, int column, const Word& grad, GateUp& old) {
                swiglu_backward<T>(grad, old.gate, old.up);
                if (not is_inside(row, column)) return;
                const int64_t at = gate_at(row, column);
                store_word<T>(p.grad_gate_up, at, old.gate);
                store_word<T>(p.grad_gate_up, at + p.width, old.up);
            });
    }
};

}  // namespace dsc
