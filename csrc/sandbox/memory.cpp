#include "sandbox/memory.h"

#include <linux/kcmp.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "sandbox/processes.h"
#include "sandbox/system.h"

namespace dsc {
namespace {

constexpr uint64_t kBytesPerInode = 1024;      // of the kernel's memory, for an empty file too
constexpr uint64_t kBytesPerSocket = 212'992;  // the kernel's default for what one may send ahead
constexpr size_t kStatusSize = 8192;           // bytes of /proc/<pid>/status that are read

// A process that has memory, by one of its living threads.
struct Holder {
    pid_t pid = 0, thread = 0;
    uint64_t own = 0, shared = 0, tables = 0;  // bytes: anonymous with swapped out, shared, page tables
};

// Bytes of the line "<name>: <number> kB"; 0 if there is none.
uint64_t kilobytes(const std::string& text, std::string_view name) {
    const size_t place = text.find("\n" + std::string(name) + ":");
    if (place == std::string::npos) return 0;
    return std::strtoull(text.c_str() + place + name.size() + 2, nullptr, 10) * 1024;
}

std::string proc_path(pid_t pid, const char* rest) {
    return "/proc/" + std::to_string(pid) + rest;
}

// Nothing if this thread has no memory: it is dead, or the process is.
std::optional<Holder> read_thread(pid_t pid, pid_t thread, const std::string& path) {
    const std::string status = read_small(path, kStatusSize);
    if (status.find("\nVmRSS:") == std::string::npos) return std::nullopt;
    return Holder{.pid = pid,
                  .thread = thread,
                  .own = kilobytes(status, "RssAnon") + kilobytes(status, "VmSwap"),
                  .shared = kilobytes(status, "RssShmem"),
                  .tables = kilobytes(status, "VmPTE")};
}

// Nothing if the process has no memory.
std::optional<Holder> read_holder(pid_t pid) {
    if (const auto found = read_thread(pid, pid, proc_path(pid, "/status"))) return found;
    // A first thread that has ended says nothing of the memory that the others go on using.
    const std::string folder = proc_path(pid, "/task");
    for (const pid_t thread : numbered_entries(folder))
        if (const auto found = read_thread(pid, thread, folder + "/" + std::to_string(thread) + "/status"))
            return found;
    return std::nullopt;
}

std::vector<Holder> holders(const Job& job) {
    std::vector<Holder> found;
    for (const pid_t pid : others(job))
        if (const auto holder = read_holder(pid)) found.push_back(*holder);
    return found;
}

// After a vfork two processes have one and the same memory.
bool is_shared_whole(pid_t a, pid_t b) {
    return syscall(SYS_kcmp, a, b, KCMP_VM, 0, 0) == 0;
}

// Each page by its share: divided by how many processes have it. As it was if the kernel does not tell.
void count_pages_once(std::vector<Holder>& found) {
    for (size_t i = 0; i < found.size(); ++i) {
        const auto end = found.begin() + static_cast<ptrdiff_t>(i);
        const auto is_same = [&](const Holder& other) {
            return is_shared_whole(other.thread, found[i].thread);
        };
        if (std::any_of(found.begin(), end, is_same)) {
            found[i].own = found[i].shared = found[i].tables = 0;
            continue;
        }
        const std::string rollup = read_small(proc_path(found[i].thread, "/smaps_rollup"), kStatusSize);
        if (rollup.empty()) {  // it has died since, or the kernel does not tell
            found[i] = read_holder(found[i].pid).value_or(Holder{});
            continue;
        }
        if (rollup.find("\nPss_Anon:") == std::string::npos) continue;
        found[i].own = kilobytes(rollup, "Pss_Anon") + kilobytes(rollup, "SwapPss");
        found[i].shared = kilobytes(rollup, "Pss_Shmem");
    }
}

uint64_t in_folders(const Job& job) {
    uint64_t held = 0;
    for (const auto& folder : job.memory_folders) {
        struct statvfs usage;
        if (statvfs(folder.c_str(), &usage) != 0) continue;
        held += (usage.f_blocks - usage.f_bfree) * usage.f_frsize;
        held += (usage.f_files - usage.f_ffree) * kBytesPerInode;
    }
    return held;
}

// At most so many bytes. Outside of a network namespace of our own the sockets are everybody's.
uint64_t in_sockets(const Job& job) {
    if (not job.is_pid_1) return 0;
    constexpr std::string_view kHead = "sockets: used ";
    const std::string text = read_small("/proc/self/net/sockstat");
    if (not text.starts_with(kHead)) return 0;
    return std::strtoull(text.c_str() + kHead.size(), nullptr, 10) * kBytesPerSocket;
}

}  // namespace

uint64_t held_memory(const Job& job, uint64_t enough) {
    std::vector<Holder> found = holders(job);
    const uint64_t in_files = in_folders(job), sent = in_sockets(job);
    const auto sum = [&] {
        uint64_t own = sent, shared = 0;
        for (const Holder& holder : found) {
            own += holder.own + holder.tables;
            shared += holder.shared;
        }
        return own + std::max(shared, in_files);  // a mapped file is in both
    };
    const uint64_t most = sum();
    if (most <= enough) return most;
    count_pages_once(found);
    return sum();
}

}  // namespace dsc
