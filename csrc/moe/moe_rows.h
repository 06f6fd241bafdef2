// What the kernels that move rows between token order and expert order share: how rows lie on threads, and
// which rows a token owns.
//
// A row is cut into words of 16 bytes; neighbouring threads hold neighbouring words, and every access of a
// warp is whole cache lines. Offsets into rows are 64 bits: 8192 tokens times 6 times 5120 is 503 MB already.
#pragma once

#include <algorithm>

#include "core/check.h"
#include "core/launch.h"
#include "core/math.h"
#include "core/overlap.h"
#include "core/vec.h"
#include "moe/moe.h"

namespace dsc {

constexpr int kRowMaxColumns = 320;  // threads side by side on a row: V2's 640 words are 2 x 320
constexpr int kRowMinThreads = 128;  // a block; short rows share one

// Threads are (column, token). A tile is the part of a row that a block covers.
struct RowTiles {
    int64_t num_words;  // of a row
    int num_tiles;      // of a row
    int columns, tokens;

    dim3 block() const { return dim3(static_cast<unsigned>(columns), static_cast<unsigned>(tokens)); }
    dim3 grid(int64_t num_tokens, int num_parts) const {
        return dim3(static_cast<unsigned>(ceil_div<int64_t>(num_tokens, tokens) * num_parts));
    }
};

// The fewest tiles of equal width. Each thread takes `words_per_thread` words, `columns` apart; columns are a
// multiple of `granularity`.
inline RowTiles plan_row_tiles(int64_t num_words, int words_per_thread, int granularity) {
    const int64_t num_parts = ceil_div<int64_t>(std::max<int64_t>(num_words, 1), words_per_thread);
    const int64_t num_tiles = ceil_div<int64_t>(num_parts, kRowMaxColumns);
    const auto wanted = static_cast<int>(ceil_div(num_parts, num_tiles));
    const int columns = ceil_div(wanted, granularity) * granularity;
    return {num_words, static_cast<int>(num_tiles), columns,
            columns < kRowMinThreads ? kRowMinThreads / columns : 1};
}

// Calls function.operator()<kMaxTopk>() with the smallest size of a token's row list that holds num_topk: a
// list in registers is indexed by unrolled loops alone.
template <typename Function>
void with_max_topk(int num_topk, const Function& function) {
    if (num_topk <= 2) return function.template operator()<2>();
    if (num_topk <= 4) return function.template operator()<4>();
    if (num_topk <= 6) return function.template operator()<6>();
    if (num_topk <= 8) return function.template operator()<8>();
    function.template operator()<kMoeMaxTopk>();
}

constexpr int kNoRow = -1;

// A token's rows in expert order. A dropped choice has none, nor has one whose row is outside the tensor:
// such a row is nowhere read or written.
template <int kMaxTopk>
__device__ __forceinline__ void load_rows(const int32_t* row_TK, int64_t token, int num_topk,
                                          int64_t num_rows, int (&row)[kMaxTopk]) {
    DSC_UNROLL
    for (int k = 0; k < kMaxTopk; ++k) {
        row[k] = k < num_topk ? row_TK[token * num_topk + k] : kNoRow;
    }
    DSC_UNROLL
    for (int k = 0; k < kMaxTopk; ++k) {
        if (static_cast<uint32_t>(row[k]) >= static_cast<uint64_t>(num_rows)) row[k] = kNoRow;
    }
}

// Rows that belong to an expert: those behind are unused, and the T tokens share out their zeroing.
__device__ __forceinline__ int64_t num_used_rows(const int32_t* offsets, int num_experts) {
    return max(offsets[num_experts - 1], 0);
}

__device__ __forceinline__ void zero_words(Word* row, int64_t first_word, int64_t end_word, int step) {
    for (int64_t word = first_word; word < end_word; word += step) __stcs(row + word, make_uint4(0, 0, 0, 0));
}

// ---- host ----

template <typename Params>
void check_limits(const char* op, const char* rows_name, const Params& p) {
    DSC_CHECK(p.num_topk <= kMoeMaxTopk, op, ": idx must have at most ", kMoeMaxTopk, " columns, got ",
              p.num_topk);
    const int per_word = kWordBytes / size_of(p.dtype);
    DSC_CHECK(p.width % per_word == 0, op, ": ", rows_name, " in ", name_of(p.dtype),
              " must be a multiple of ", per_word, " wide, got ", p.width);
}

template <typename Params>
int64_t words_of_row(const Params& p) {
    return p.width * size_of(p.dtype) / kWordBytes;
}

}  // namespace dsc
