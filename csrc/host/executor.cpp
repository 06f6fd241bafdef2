// From the free functions that intrinsics call to the one launch that is running.
#include "host/executor.h"

#include <mutex>

#include "core/check.h"
#include "host/bulk.h"
#include "host/grid.h"

namespace dsc::host {
namespace {

// CUDA's threads find themselves through names, not arguments; so must the executor's.
std::mutex g_mutex;
uint64_t g_seed = 0;
thread_local Grid* g_grid = nullptr;

Grid& running_grid(const char* what) {
    if (g_grid == nullptr) throw Fault(concat("host executor: ", what, " outside a kernel"));
    return *g_grid;
}

}  // namespace

namespace running {
uint3 thread_idx, block_idx;
dim3 block_dim, grid_dim;
}  // namespace running

void set_order(uint64_t seed) {
    const std::lock_guard lock(g_mutex);
    g_seed = seed;
}

void run_threads(const LaunchShape& shape, const std::function<void()>& thread_main) {
    if (g_grid != nullptr) throw Fault("host executor: a kernel launches a kernel");
    const std::lock_guard lock(g_mutex);
    Grid grid(shape, thread_main, g_seed);
    g_grid = &grid;
    const std::unique_ptr<Grid*, void (*)(Grid**)> leave(&g_grid, [](Grid** current) { *current = nullptr; });
    grid.run();
}

void fail(const char* what, const Place& where) {
    Grid& grid = running_grid(what);
    grid.fail(concat(to_text(grid.running()), ": ", to_text(Wait{.what = what, .where = where})));
}

Vote wait_for_block(const char* what, bool predicate, const Place& where) {
    return running_grid(what).wait_for_block({.what = what, .where = where}, predicate);
}

void wait_for_grid(const Place& where) {
    constexpr const char* kWhat = "this_grid().sync()";
    running_grid(kWhat).wait_for_grid({.what = kWhat, .where = where});
}

void wait_for_previous_kernel() {
    running_grid("wait_for_previous_kernel").running().has_waited_for_previous = true;
}

void wait_for_warp(const char* what, unsigned mask, void* frame, Complete complete, const Place& where) {
    running_grid(what).wait_for_warp({.what = what, .where = where, .mask = mask}, frame, complete);
}

int lane_idx() {
    return running_grid("lane_idx").running().rank % kWarpSize;
}

void start_copy(void* target, const void* source, bool is_valid, const Place& where) {
    Grid& grid = running_grid("cp.async");
    for (const void* const address : {static_cast<const void*>(target), source}) {
        if (reinterpret_cast<uintptr_t>(address) % Copies::kNumBytes != 0) {
            fail("cp.async: an address off its 16 bytes", where);
        }
    }
    if (not grid.is_shared(target, Copies::kNumBytes)) {
        fail("cp.async: the target is not in the block's shared memory", where);
    }
    grid.running().copies.start(target, source, is_valid);
}

void commit_copies() {
    running_grid("cp.async").running().copies.commit();
}

void wait_copies(int num_pending) {
    running_grid("cp.async").running().copies.land_all_but(num_pending);
}

namespace {

void check_bulk(const char* what, const void* shared, const void* global, uint32_t num_bytes,
                const Place& where) {
    Grid& grid = running_grid(what);
    const auto past = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | num_bytes;
    if (past % Copies::kNumBytes != 0) fail(concat(what, ": off 16 bytes").c_str(), where);
    if (num_bytes == 0) fail(concat(what, ": no bytes").c_str(), where);
    if (not grid.is_shared(shared, num_bytes)) {
        fail(concat(what, ": not in the block's shared memory").c_str(), where);
    }
}

}  // namespace

BulkCopies& running_bulk_copies() {
    return running_grid("cp.async.bulk").running().bulk_copies;
}

void start_bulk_load(void* shared, const void* global, uint32_t num_bytes, BulkBarrier* barrier,
                     const Place& where) {
    check_bulk("cp.async.bulk load", shared, global, num_bytes, where);
    running_bulk_copies().start_load(shared, global, num_bytes, barrier);
}

void wait_bulk_load(BulkBarrier* barrier, uint32_t parity, const Place& where) {
    if (running_bulk_copies().wait_load(barrier, parity)) return;
    fail("mbarrier.try_wait: nothing is under way that would end the phase", where);
}

void start_bulk_store(void* global, const void* shared, uint32_t num_bytes, const Place& where) {
    check_bulk("cp.async.bulk store", shared, global, num_bytes, where);
    running_bulk_copies().start_store(global, shared, num_bytes);
}

void yield() {
    running_grid("yield").yield();
}

uint64_t tick_clock() {
    constexpr uint64_t kTick = 1000;
    return running_grid("globaltimer").running().clock += kTick;
}

void maybe_yield() {
    if (g_grid != nullptr) g_grid->maybe_yield();
}

void* find_shared(const void* key, size_t num_bytes, size_t alignment, const char* name) {
    return running_grid(name).find_shared(key, num_bytes, alignment, name);
}

void* shared_dynamic_bytes() {
    return running_grid("shared memory").running().block->shared_dynamic.get();
}

}  // namespace dsc::host
