// Kernels that test the host executor, each behind a function that launches it. kernels.cu: right ones, one
// per facility; ptx_kernels.cu: the same for the instructions of sm_80. faults.cu: wrong ones, each with a
// mistake that the executor must show.
#pragma once

#include <cstdint>

namespace dsc::tests {

// ---- right ----
void block_sum(const float* x, float* sum, int num_values, int num_blocks);
void transpose(const float* x, float* y, int num_rows, int num_columns);
void histogram(const int* x, unsigned* counts, int num_values, int num_bins);
void prefix_of_blocks(const int* x, int* prefix, int num_blocks, int num_threads);
void pass_token(int* log, int num_blocks);
unsigned fresh_shared(unsigned pattern, int num_blocks);
void arrival_order(int* order, int num_blocks, int num_threads);
void votes(const int* x, int* result, int num_threads);
void half_warps(const int* x, int* result);
void coordinates(int* result, const unsigned* grid, const unsigned* block);

enum class Shuffle { kIdx, kUp, kDown, kXor };
template <typename T>
void shuffle(Shuffle kind, const T* x, T* y, int argument, int width);
void warp_queries(const int* x, unsigned* result, unsigned mask);

template <typename T>
void atomics(T* cells, T* seen, int num_threads);

void to_bfloat16(const float* x, uint16_t* y, int num_values);
void to_half(const float* x, uint16_t* y, int num_values);
void from_bfloat16(const uint16_t* x, float* y, int num_values);
void from_half(const uint16_t* x, float* y, int num_values);

// ---- instructions of sm_80 ----
void run_load_matrices(const uint16_t* matrices, uint32_t* registers, bool is_transposed);
void run_multiply_add(const uint16_t* a, const uint16_t* b, float* acc, bool is_bfloat16);
void run_quad_words(const float* tile, uint16_t* y, bool is_alternating);

enum class Copying {
    kWaited,
    kUnwaited,
    kOldestWaited,
    kUncommitted,
    kZeroFill,
    kNeighbour,
    kNeighbourUnsynced,
    kMisaligned,
    kIntoGlobal
};
void run_copies(const float* x, float* y, int num_threads, Copying kind);

// ---- the copy engine of sm_90 ----
enum class Bulk {
    kWaited,
    kLoadUnwaited,
    kLoadLeft,
    kNextPhase,
    kOverwritten,
    kStoreUnwaited,
    kReadAlone,
    kStoreLeft,
    kUncommitted,
    kMisaligned,
    kEmpty,
    kIntoGlobal
};
void run_bulk(const float* x, float* y, float* seen, int num_values, Bulk kind);

// ---- wrong ----
// What a fault reads and writes is up to it; `x` and `y` hold num_values floats each.
struct Fault {
    const char* name;
    void (*launch)(const float* x, float* y, int num_values);
};
extern const Fault kFaults[];
extern const int kNumFaults;

}  // namespace dsc::tests
