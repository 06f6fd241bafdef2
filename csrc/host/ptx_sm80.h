// core/ptx_sm80.cuh on the host executor: asynchronous copies that land as late as they may, and the warp's
// matrix instructions. What each computes is said there.
#pragma once

#include <bit>

#include "host/executor.h"
#include "host/float16.h"

#define DSC_HERE const dsc::host::Place where = dsc::host::Place::current()

namespace dsc {

inline int unhoisted(int value) {
    return value;
}

// The bytes are NaNs from here on until the thread waits for them: whoever reads too early sees it.
inline void copy_async(void* shared, const void* global, bool is_valid, DSC_HERE) {
    host::start_copy(shared, global, is_valid, where);
}

inline void commit_copies() {
    host::commit_copies();
}

template <int kNumPending>
void wait_copies() {
    host::wait_copies(kNumPending);
}

namespace host {

struct MatrixFrame {
    const uint16_t* row;  // of matrix lane / 8
    uint32_t matrix[4];
};

template <bool kIsTransposed>
void complete_load(unsigned, void* const* frames) {
    const auto row_of = [&](int matrix, int row) {
        return static_cast<const MatrixFrame*>(frames[8 * matrix + row])->row;
    };
    for (int lane = 0; lane < warpSize; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, column = 2 * (lane % 4);
            const uint32_t low = kIsTransposed ? row_of(i, column)[row] : row_of(i, row)[column];
            const uint32_t high = kIsTransposed ? row_of(i, column + 1)[row] : row_of(i, row)[column + 1];
            static_cast<MatrixFrame*>(frames[lane])->matrix[i] = low | high << 16;
        }
    }
}

template <bool kIsTransposed>
void load_matrices(const char* what, uint32_t (&matrix)[4], const void* shared_row, const Place& where) {
    if (reinterpret_cast<uintptr_t>(shared_row) % 16 != 0) fail("ldmatrix: a row off its 16 bytes", where);
    MatrixFrame frame{static_cast<const uint16_t*>(shared_row), {}};
    wait_for_warp(what, 0xffffffffu, &frame, complete_load<kIsTransposed>, where);
    for (int i = 0; i < 4; ++i) matrix[i] = frame.matrix[i];
}

struct MultiplyFrame {
    uint32_t a[4], b[2];
    float acc[4];
};

template <typename T>
void complete_multiply(unsigned, void* const* frames) {
    const auto half_of = [](uint32_t pair, int half) {
        return static_cast<float>(std::bit_cast<T>(static_cast<uint16_t>(pair >> 16 * half)));
    };
    float a[16][16], b[16][8];
    for (int lane = 0; lane < warpSize; ++lane) {
        const auto& frame = *static_cast<const MultiplyFrame*>(frames[lane]);
        for (int half = 0; half < 2; ++half) {
            const int row = lane / 4, column = 2 * (lane % 4) + half;
            for (int i = 0; i < 4; ++i)
                a[row + 8 * (i % 2)][column + 8 * (i / 2)] = half_of(frame.a[i], half);
            for (int i = 0; i < 2; ++i) b[column + 8 * i][row] = half_of(frame.b[i], half);
        }
    }
    for (int lane = 0; lane < warpSize; ++lane) {
        auto& acc = static_cast<MultiplyFrame*>(frames[lane])->acc;
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
            for (int k = 0; k < 16; ++k) acc[i] += a[row][k] * b[k][column];
        }
    }
}

}  // namespace host

inline void load_matrices(uint32_t (&matrix)[4], const void* shared_row, DSC_HERE) {
    host::load_matrices<false>("ldmatrix", matrix, shared_row, where);
}

inline void load_matrices_transposed(uint32_t (&matrix)[4], const void* shared_row, DSC_HERE) {
    host::load_matrices<true>("ldmatrix.trans", matrix, shared_row, where);
}

template <host::OneOf<__nv_bfloat16, __half> T>
void multiply_add(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, DSC_HERE) {
    host::MultiplyFrame frame{{a[0], a[1], a[2], a[3]}, {b0, b1}, {acc[0], acc[1], acc[2], acc[3]}};
    host::wait_for_warp("mma.sync", 0xffffffffu, &frame, host::complete_multiply<T>, where);
    for (int i = 0; i < 4; ++i) acc[i] = frame.acc[i];
}

}  // namespace dsc

#undef DSC_HERE
