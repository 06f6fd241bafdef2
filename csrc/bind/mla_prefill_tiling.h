// The tiling of a plan as Python names it.
#pragma once

#include <string>

#include "attention/mla_prefill_plan.h"

namespace dsc::bind {

inline PrefillTiling prefill_tiling(const char* op, const std::string& side, int tile_rows, int block_rows,
                                    bool causal) {
    DSC_CHECK(side == "queries" or side == "keys", op, ": side must be queries or keys, got ", side);
    DSC_CHECK(tile_rows >= kPrefillFewestTileRows and block_rows > 0, op,
              ": tile_rows must be >= ", kPrefillFewestTileRows, " and block_rows > 0, got ", tile_rows,
              " and ", block_rows);
    return {.side = side == "queries" ? PrefillSide::kQueries : PrefillSide::kKeys,
            .tile_rows = tile_rows,
            .block_rows = block_rows,
            .causal = causal};
}

}  // namespace dsc::bind
