#include "sandbox/processes.h"

#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "sandbox/system.h"

namespace dsc {
namespace {

constexpr uint64_t kBytesPerInode = 1024;  // of the kernel's memory, for an empty file too

std::vector<pid_t> all_processes() {
    std::vector<pid_t> found;
    DIR* folder = opendir("/proc");
    if (folder == nullptr) return found;
    while (const dirent* entry = readdir(folder)) {
        const pid_t pid = static_cast<pid_t>(std::strtol(entry->d_name, nullptr, 10));
        if (pid > 0) found.push_back(pid);
    }
    closedir(folder);
    return found;
}

// 0 if the process is gone.
pid_t parent_of(pid_t pid) {
    const std::string stat = read_small("/proc/" + std::to_string(pid) + "/stat");
    const size_t after_name = stat.rfind(')');  // the name may hold anything, brackets too
    if (after_name == std::string::npos or after_name + 4 >= stat.size()) return 0;
    return static_cast<pid_t>(std::strtol(stat.c_str() + after_name + 4, nullptr, 10));
}

std::set<pid_t> descendants() {
    std::multimap<pid_t, pid_t> children;
    for (const pid_t pid : all_processes()) children.emplace(parent_of(pid), pid);
    std::set<pid_t> found;
    std::vector<pid_t> open = {getpid()};
    while (not open.empty()) {
        const auto [begin, end] = children.equal_range(open.back());
        open.pop_back();
        for (auto child = begin; child != end; ++child)
            if (found.insert(child->second).second) open.push_back(child->second);
    }
    return found;
}

std::set<pid_t> others(const Job& job) {
    if (not job.is_pid_1) return descendants();
    const auto all = all_processes();
    std::set<pid_t> found(all.begin(), all.end());
    found.erase(getpid());
    return found;
}

}  // namespace

uint64_t held_memory(const Job& job) {
    uint64_t num_pages = 0;
    for (const pid_t pid : others(job)) {
        const std::string statm = read_small("/proc/" + std::to_string(pid) + "/statm");
        char* rest = nullptr;
        std::strtoull(statm.c_str(), &rest, 10);  // address space
        const uint64_t resident = std::strtoull(rest, &rest, 10);
        const uint64_t shared = std::strtoull(rest, &rest, 10);
        num_pages += resident - std::min(shared, resident);
    }
    uint64_t held = num_pages * static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
    for (const auto& folder : job.memory_folders) {
        struct statvfs usage;
        if (statvfs(folder.c_str(), &usage) != 0) continue;
        held += (usage.f_blocks - usage.f_bfree) * usage.f_frsize;
        held += (usage.f_files - usage.f_ffree) * kBytesPerInode;
    }
    return held;
}

void kill_all(const Job& job) {
    if (job.is_pid_1) {
        kill(-1, SIGKILL);  // all of the namespace but pid 1; no fork gets past it
        return;
    }
    // First stop them all, for those that run may fork meanwhile.
    std::set<pid_t> stopped;
    for (bool is_complete = false; not is_complete;) {
        is_complete = true;
        for (const pid_t pid : descendants())
            if (stopped.insert(pid).second) {
                kill(pid, SIGSTOP);
                is_complete = false;
            }
    }
    for (const pid_t pid : stopped) kill(pid, SIGKILL);
}

std::optional<int> reap(Usage& usage, pid_t main, bool until_none) {
    std::optional<int> found;
    while (true) {
        int status = 0;
        rusage used{};
        const pid_t pid = wait4(-1, &status, until_none ? 0 : WNOHANG, &used);
        if (pid < 0 and errno == EINTR) continue;
        if (pid <= 0) return found;
        for (const timeval& time : {used.ru_utime, used.ru_stime})
            usage.cpu_us +=
                static_cast<uint64_t>(time.tv_sec) * 1'000'000 + static_cast<uint64_t>(time.tv_usec);
        usage.peak_bytes = std::max(usage.peak_bytes, static_cast<uint64_t>(used.ru_maxrss) * 1024);
        if (pid == main) found = status;
    }
}

}  // namespace dsc
