// Bulk copies (core/bulk_sm90.cuh) as the executor plays them: right, too early, and wrong.
#include "core/bulk_sm90.cuh"
#include "core/launch.h"
#include "host_kernels.h"

namespace dsc::tests {
namespace {

// x [n] through shared memory to y [n]; seen [n]: what the thread finds at the point that `kind` is about.
__global__ void bulk_kernel(const float* x, float* y, float* seen, int num_values, Bulk kind) {
    DSC_SHARED(BulkBarrier, barrier);
    DSC_SHARED_DYNAMIC(float, tile);
    const auto num_bytes = static_cast<uint32_t>(num_values * sizeof(float));
    init_bulk_barrier(&barrier);
    const auto look = [&](const float* at) {
        for (int i = 0; i < num_values; ++i) seen[i] = at[i];
    };
    if (kind == Bulk::kEmpty) return start_bulk_load(tile, x, 0, &barrier);
    if (kind == Bulk::kMisaligned) return start_bulk_load(tile + 1, x, 16, &barrier);
    if (kind == Bulk::kIntoGlobal) return start_bulk_load(y, x, 16, &barrier);
    start_bulk_load(tile, x, num_bytes, &barrier);
    if (kind == Bulk::kLoadUnwaited) look(tile);
    if (kind == Bulk::kLoadLeft) return;
    wait_bulk_load(&barrier, 0);
    wait_bulk_load(&barrier, 0);  // over already
    if (kind == Bulk::kNextPhase) wait_bulk_load(&barrier, 1);
    start_bulk_store(y, tile, num_bytes);
    if (kind == Bulk::kStoreLeft) return;
    if (kind != Bulk::kUncommitted) commit_bulk_stores();
    if (kind == Bulk::kOverwritten) tile[0] = -1.0f;
    wait_bulk_reads<0>();
    tile[1] = -1.0f;  // read by now
    if (kind == Bulk::kStoreUnwaited) look(y);
    if (kind == Bulk::kReadAlone) return;
    wait_bulk_stores();
    if (kind == Bulk::kWaited) look(y);
}

}  // namespace

void run_bulk(const float* x, float* y, float* seen, int num_values, Bulk kind) {
    launch(bulk_kernel, 1, 1, sizeof(float) * static_cast<size_t>(num_values) + 16, nullptr, x, y, seen,
           num_values, kind);
}

}  // namespace dsc::tests
