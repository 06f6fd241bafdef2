// Every process of the sandbox: which there are, how to kill them, what the dead have used.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "sandbox/job.h"

namespace dsc {

struct Usage {
    uint64_t cpu_us = 0;
    uint64_t peak_bytes = 0;
};

struct Death {
    int status;       // as wait4 has it
    uint64_t cpu_us;  // its own, with those of its children that it waited for
};

// The entries of a folder of /proc that are numbers.
std::vector<pid_t> numbered_entries(const std::string& folder);

// All processes but this one. Without a namespace of our own: every descendant.
std::set<pid_t> others(const Job& job);

// Processes and threads of this process's user, as RLIMIT_NPROC counts them.
uint64_t num_threads_of_user();

// SIGKILL to every process but this one. Without a namespace of our own: to every descendant.
void kill_all(const Job& job);

// Collect dead children, adding up what they used: until no more are dead, or with `until_none` until none is
// left. The death of `main` if it was among them.
std::optional<Death> reap(Usage& usage, pid_t main, bool until_none);

}  // namespace dsc
