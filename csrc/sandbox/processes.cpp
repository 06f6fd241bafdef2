#include "sandbox/processes.h"

#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>
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

constexpr size_t kStatusSize = 8192;  // bytes of /proc/<pid>/status that are read

// 0 if the process is gone.
pid_t parent_of(pid_t pid) {
    const std::string stat = read_small("/proc/" + std::to_string(pid) + "/stat");
    const size_t after_name = stat.rfind(')');  // the name may hold anything, brackets too
    if (after_name == std::string::npos or after_name + 4 >= stat.size()) return 0;
    return static_cast<pid_t>(std::strtol(stat.c_str() + after_name + 4, nullptr, 10));
}

std::set<pid_t> descendants() {
    std::multimap<pid_t, pid_t> children;
    for (const pid_t pid : numbered_entries("/proc")) children.emplace(parent_of(pid), pid);
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

}  // namespace

std::vector<pid_t> numbered_entries(const std::string& path) {
    std::vector<pid_t> found;
    DIR* folder = opendir(path.c_str());
    if (folder == nullptr) return found;
    while (const dirent* entry = readdir(folder)) {
        const pid_t number = static_cast<pid_t>(std::strtol(entry->d_name, nullptr, 10));
        if (number > 0) found.push_back(number);
    }
    closedir(folder);
    return found;
}

std::set<pid_t> others(const Job& job) {
    if (not job.is_pid_1) return descendants();
    const auto all = numbered_entries("/proc");
    std::set<pid_t> found(all.begin(), all.end());
    found.erase(getpid());
    return found;
}

uint64_t num_threads_of_user() {
    const std::string wanted = "\nUid:\t" + std::to_string(getuid()) + "\t";
    constexpr std::string_view kThreads = "\nThreads:\t";
    uint64_t found = 0;
    for (const pid_t pid : numbered_entries("/proc")) {
        const std::string status = read_small("/proc/" + std::to_string(pid) + "/status", kStatusSize);
        const size_t place = status.find(kThreads);
        if (place == std::string::npos or status.find(wanted) == std::string::npos) continue;
        found += std::strtoull(status.c_str() + place + kThreads.size(), nullptr, 10);
    }
    return found;
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

std::optional<Death> reap(Usage& usage, pid_t main, bool until_none) {
    std::optional<Death> found;
    while (true) {
        int status = 0;
        rusage used{};
        const pid_t pid = wait4(-1, &status, until_none ? 0 : WNOHANG, &used);
        if (pid < 0 and errno == EINTR) continue;
        if (pid <= 0) return found;
        uint64_t cpu_us = 0;
        for (const timeval& time : {used.ru_utime, used.ru_stime})
            cpu_us += static_cast<uint64_t>(time.tv_sec) * 1'000'000 + static_cast<uint64_t>(time.tv_usec);
        usage.cpu_us += cpu_us;
        usage.peak_bytes = std::max(usage.peak_bytes, static_cast<uint64_t>(used.ru_maxrss) * 1024);
        if (pid == main) found = Death{status, cpu_us};
    }
}

}  // namespace dsc
