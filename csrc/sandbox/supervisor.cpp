// The process inside the sandbox that runs the steps of a job and measures them; pid 1 under full isolation.
//
// It reads the job from stdin (job.h) and writes the report to stdout: for each step that ran, one line
// "step <exit code, or -signal> <why it was stopped, or -> <wall us> <cpu us> <peak bytes> <size> <size>",
// then as many bytes of its stdout and of its stderr; after the last, "end". Whatever fails here goes to
// stderr and leaves the report without its end: a failure of the sandbox.
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <ctime>
#include <exception>
#include <optional>
#include <string>

#include "sandbox/job.h"
#include "sandbox/processes.h"
#include "sandbox/start.h"
#include "sandbox/system.h"

namespace dsc {
namespace {

constexpr uint64_t kTickUs = 20'000;  // between looks at the memory
constexpr unsigned kFirstInherited = 3;

uint64_t now_us() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<uint64_t>(time.tv_sec) * 1'000'000 + static_cast<uint64_t>(time.tv_nsec) / 1000;
}

// A running step: what it has written, and why it was stopped.
struct Watch {
    const Step& step;
    Started process;
    int exit_file;
    std::array<std::string, 2> written = {};  // stdout, stderr
    std::array<bool, 2> is_open = {true, true};
    const char* stopped = "-";
    std::optional<int> status = std::nullopt;
    Usage usage = {};

    bool is_stopped() const { return *stopped != '-'; }

    void stop(const char* why) {
        if (not is_stopped()) stopped = why;
    }

    int stream(int i) const { return i == 0 ? process.out : process.err; }

    // One chunk; false when there is nothing more to read, or too much.
    bool read_stream(int i) {
        char chunk[1 << 16];
        const ssize_t size = read(stream(i), chunk, sizeof chunk);
        if (size <= 0) return false;
        written[i].append(chunk, static_cast<size_t>(size));
        if (written[i].size() <= step.output) return true;
        written[i].resize(step.output);
        stop("output");
        return false;
    }

    // Wait for something to happen, at most so long, and take in what did.
    void look(uint64_t limit_us) {
        std::array<pollfd, 3> files = {{{exit_file, POLLIN, 0}, {-1, POLLIN, 0}, {-1, POLLIN, 0}}};
        for (int i = 0; i < 2; ++i)
            if (is_open[i]) files[i + 1].fd = stream(i);
        const timespec limit = {static_cast<time_t>(limit_us / 1'000'000),
                                static_cast<long>(limit_us % 1'000'000 * 1000)};
        ppoll(files.data(), files.size(), &limit, nullptr);
        for (int i = 0; i < 2; ++i)
            if (files[i + 1].revents != 0) is_open[i] = read_stream(i);
        if (const auto seen = reap(usage, process.pid, false)) status = seen;
    }

    // Read what the dead have left in the pipes.
    void drain() {
        for (int i = 0; i < 2; ++i) {
            fcntl(stream(i), F_SETFL, O_NONBLOCK);
            while (read_stream(i)) continue;
        }
    }
};

// Until the program ends or must be stopped.
void follow(Watch& watch, const Job& job, uint64_t begin) {
    const uint64_t deadline = begin + watch.step.time_us;
    uint64_t next_look = begin + kTickUs;
    while (not watch.status and not watch.is_stopped()) {
        const uint64_t now = now_us();
        if (now >= deadline) {
            watch.stop("time");
        } else if (now >= next_look) {
            const uint64_t held = held_memory(job);
            watch.usage.peak_bytes = std::max(watch.usage.peak_bytes, held);
            if (held > watch.step.memory) watch.stop("memory");
            next_look = now_us() + kTickUs;
        } else {
            watch.look(std::min(deadline, next_look) - now);
        }
    }
}

// Whether the step ended well; writes its record.
bool run(const Step& step, const Job& job) {
    const uint64_t begin = now_us();
    const Started process = start(step, job);
    const int exit_file = static_cast<int>(checked(syscall(SYS_pidfd_open, process.pid, 0), "pidfd_open"));
    Watch watch = {.step = step, .process = process, .exit_file = exit_file};
    follow(watch, job, begin);
    const uint64_t wall_us = now_us() - begin;
    kill_all(job);
    const auto seen = reap(watch.usage, process.pid, true);
    watch.drain();
    for (const int file : {process.out, process.err, exit_file}) close(file);
    const int status = watch.status.value_or(seen.value_or(0));
    const int code = WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
    std::string head = "step " + std::to_string(code) + " " + watch.stopped;
    for (const uint64_t value : {wall_us, watch.usage.cpu_us, watch.usage.peak_bytes,
                                 uint64_t{watch.written[0].size()}, uint64_t{watch.written[1].size()}}) {
        head += ' ';
        head += std::to_string(value);
    }
    head += '\n';
    write_all(STDOUT_FILENO, head);
    for (const auto& text : watch.written) write_all(STDOUT_FILENO, text);
    return code == 0 and not watch.is_stopped();
}

void supervise() {
    const std::string text = read_to_end(STDIN_FILENO);
    const Job job = JobReader(text).job();
    signal(SIGPIPE, SIG_IGN);
    checked(syscall(SYS_close_range, kFirstInherited, ~0U, 0), "close_range");
    for (const auto& path : job.join) {
        const int file = checked(open(path.c_str(), O_WRONLY | O_CLOEXEC), "open " + path);
        write_all(file, "0");  // this process
        close(file);
    }
    // Other processes of the same user cannot look into this one, nor take over its descriptors.
    checked(prctl(PR_SET_DUMPABLE, 0), "prctl dumpable");
    if (not job.is_pid_1) checked(prctl(PR_SET_CHILD_SUBREAPER, 1), "prctl subreaper");
    write_files(job);
    // Of bubblewrap's doing, but lost on the way to the program's user and back.
    if (job.is_pid_1) checked(prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl pdeathsig");
    for (const auto& step : job.steps)
        if (not run(step, job)) break;
    write_all(STDOUT_FILENO, "end\n");
}

}  // namespace
}  // namespace dsc

int main() {
    try {
        dsc::supervise();
        return 0;
    } catch (const std::exception& error) {
        dsc::write_all(STDERR_FILENO, error.what());
        return 1;
    }
}
