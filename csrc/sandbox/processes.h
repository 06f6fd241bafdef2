// Every process of the sandbox: how much memory they hold, how to kill them, what the dead have used.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>

#include "sandbox/job.h"

namespace dsc {

struct Usage {
    uint64_t cpu_us = 0;
    uint64_t peak_bytes = 0;
};

// Bytes that the processes hold for themselves, with what lies in the file systems in memory.
uint64_t held_memory(const Job& job);

// SIGKILL to every process but this one. Without a namespace of our own: to every descendant.
void kill_all(const Job& job);

// Collect dead children, adding up what they used: until no more are dead, or with `until_none` until none is
// left. The wait status of `main` if it was among them.
std::optional<int> reap(Usage& usage, pid_t main, bool until_none);

}  // namespace dsc
