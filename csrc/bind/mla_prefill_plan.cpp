// How prefill attention is dealt out: in every build, since it takes no kernel to tell.
#include "attention/mla_prefill_plan.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <utility>
#include <vector>

#include "bind/mla_prefill_tiling.h"

namespace py = pybind11;

namespace dsc {
namespace bind {
namespace {

std::vector<std::pair<int, int>> mla_prefill_plan_of(const std::vector<int>& cu_seqlens_q,
                                                     const std::vector<int>& cu_seqlens_k,
                                                     int64_t num_queries, int64_t num_keys,
                                                     const std::string& side, int tile_rows, int block_rows,
                                                     bool causal) {
    constexpr const char* kOp = "mla_prefill_plan_of";
    DSC_CHECK(not cu_seqlens_q.empty() and cu_seqlens_q.size() == cu_seqlens_k.size(), kOp,
              ": cu_seqlens_q and cu_seqlens_k must have as many elements, and one at the least, got ",
              cu_seqlens_q.size(), " and ", cu_seqlens_k.size());
    const PrefillTiling tiling = prefill_tiling(kOp, side, tile_rows, block_rows, causal);
    const int num_sequences = static_cast<int>(cu_seqlens_q.size()) - 1;
    const int64_t num_rows = tiling.side == PrefillSide::kQueries ? num_queries : num_keys;
    const int64_t most = most_prefill_tiles(num_rows, num_sequences, tile_rows);
    std::vector<PrefillTile> tiles(static_cast<size_t>(most));
    tiles.resize(fill_prefill_plan(cu_seqlens_q, cu_seqlens_k, num_sequences, num_queries, num_keys, tiling,
                                   most, tiles));
    std::vector<std::pair<int, int>> plan;
    for (const PrefillTile& tile : tiles) plan.emplace_back(tile.sequence, tile.block);
    return plan;
}

// (tile, head) of each block of a grid, in the order in which they start.
std::vector<std::pair<int, int>> mla_prefill_works(int num_tiles, int num_heads) {
    DSC_CHECK(num_tiles >= 0 and num_heads >= 0, "mla_prefill_works: sizes must be >= 0, got ", num_tiles,
              " and ", num_heads);
    std::vector<std::pair<int, int>> works;
    for (int i = 0; i < num_tiles * num_heads; ++i) {
        const PrefillWork work = prefill_work(i, num_tiles, num_heads);
        works.emplace_back(work.tile, work.head);
    }
    return works;
}

// What the kernel of sm_80 takes of a device with so many bytes of shared memory.
py::dict mla_prefill_sm80_plan(int width, int value_width, int shared_per_sm, int shared_per_block) {
    const PrefillSm80Plan plan = plan_prefill_sm80(width, value_width, shared_per_sm, shared_per_block);
    py::dict seen;
    seen["keys"] = plan.num_keys;
    seen["shared_bytes"] = plan.shared_bytes;
    return seen;
}

}  // namespace
}  // namespace bind

void register_mla_prefill_plan(py::module_& module) {
    module.def("mla_prefill_plan_of", bind::mla_prefill_plan_of, py::arg("cu_seqlens_q"),
               py::arg("cu_seqlens_k"), py::arg("num_queries"), py::arg("num_keys"), py::arg("side"),
               py::arg("tile_rows"), py::arg("block_rows"), py::arg("causal"));
    module.def("mla_prefill_plan_size", prefill_plan_size, py::arg("num_rows"), py::arg("num_sequences"));
    module.def("mla_prefill_class", prefill_class, py::arg("cost"));
    module.def("mla_prefill_sm80_plan", bind::mla_prefill_sm80_plan, py::arg("width"), py::arg("value_width"),
               py::arg("shared_per_sm"), py::arg("shared_per_block"));
    module.def("mla_prefill_works", bind::mla_prefill_works, py::arg("num_tiles"), py::arg("num_heads"));
}

}  // namespace dsc
