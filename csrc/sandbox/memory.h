// How much memory the processes of the sandbox hold, without help from control groups.
#pragma once

#include <cstdint>

#include "sandbox/job.h"

namespace dsc {

// Bytes held by the processes, their sockets and the file systems in memory. Where the quick sum, in which
// pages that processes share count once for each, is more than `enough`, every page counts once.
uint64_t held_memory(const Job& job, uint64_t enough);

}  // namespace dsc
