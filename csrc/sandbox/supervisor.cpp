// The process inside the sandbox that runs the steps of a job and measures them; pid 1 under full isolation.
//
// It reads the job from stdin (job.h) and writes the report to stdout: for each step that ran, one line
// "step <exit code, or -signal> <why it was stopped, or -> <wall us> <cpu us> <peak bytes> <size> <size>",
// then as many bytes of its stdout and of its stderr; after the last, "end". Whatever fails here goes to
// stderr and leaves the report without its end: a failure of the sandbox. Once nobody can read the report any
// more, or at a SIGTERM, it kills the program and goes.
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
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
#include "sandbox/memory.h"
#include "sandbox/processes.h"
#include "sandbox/start.h"
#include "sandbox/system.h"

namespace dsc {
namespace {

constexpr uint64_t kTickUs = 20'000;  // between looks at the memory, at least
constexpr uint64_t kRestPerLook = 9;  // times as long as the last look took, at least
constexpr unsigned kFirstInherited = 3;

uint64_t now_us() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<uint64_t>(time.tv_sec) * 1'000'000 + static_cast<uint64_t>(time.tv_nsec) / 1000;
}

// Where it shows that nobody waits for the report: its pipe, and a file of signals (-1: there is none).
struct Caller {
    int signals = -1;

    void check(const pollfd& report, const pollfd& signalled) const {
        if (report.revents != 0 or signalled.revents != 0) throw std::runtime_error("called off");
    }
};

// A running step: what it has written, and why it was stopped.
struct Watch {
    const Step& step;
    Caller caller;
    Started process;
    int exit_file;
    std::array<std::string, 2> written = {};  // stdout, stderr
    std::array<bool, 2> is_open = {true, true};
    const char* stopped = "-";
    std::optional<Death> death = std::nullopt;
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
        // Of the report, only that nobody is left to read it.
        std::array<pollfd, 5> files = {{{exit_file, POLLIN, 0},
                                        {-1, POLLIN, 0},
                                        {-1, POLLIN, 0},
                                        {STDOUT_FILENO, 0, 0},
                                        {caller.signals, POLLIN, 0}}};
        for (int i = 0; i < 2; ++i)
            if (is_open[i]) files[i + 1].fd = stream(i);
        const timespec limit = {static_cast<time_t>(limit_us / 1'000'000),
                                static_cast<long>(limit_us % 1'000'000 * 1000)};
        ppoll(files.data(), files.size(), &limit, nullptr);
        caller.check(files[3], files[4]);
        for (int i = 0; i < 2; ++i)
            if (files[i + 1].revents != 0) is_open[i] = read_stream(i);
        if (const auto seen = reap(usage, process.pid, false)) death = seen;
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
    while (not watch.death and not watch.is_stopped()) {
        const uint64_t now = now_us();
        if (now >= deadline) {
            watch.look(0);  // it may have ended in time, during a long look at the memory
            if (not watch.death) watch.stop("time");
        } else if (now >= next_look) {
            // What a process says of the pages it shares is out of date once another has died.
            const uint64_t enough = std::min(watch.usage.peak_bytes, watch.step.memory);
            uint64_t held = held_memory(job, enough);
            if (held > watch.step.memory) held = std::min(held, held_memory(job, enough));
            watch.usage.peak_bytes = std::max(watch.usage.peak_bytes, held);
            if (held > watch.step.memory) watch.stop("memory");
            const uint64_t end = now_us();
            next_look = end + std::max(kTickUs, kRestPerLook * (end - now));
        } else {
            watch.look(std::min(deadline, next_look) - now);
        }
    }
}

// A program that ignores SIGXCPU is killed by the kernel a second later, and nothing else says why.
bool is_out_of_processor_time(const Death& death, const Step& step) {
    const bool is_killed = WIFSIGNALED(death.status) and WTERMSIG(death.status) == SIGKILL;
    return is_killed and death.cpu_us >= step.cpu_seconds * 1'000'000;
}

// The record of a step that has ended.
void report(const Watch& watch, int code, uint64_t wall_us) {
    std::string head = "step " + std::to_string(code) + " " + watch.stopped;
    for (const uint64_t value : {wall_us, watch.usage.cpu_us, watch.usage.peak_bytes,
                                 uint64_t{watch.written[0].size()}, uint64_t{watch.written[1].size()}}) {
        head += ' ';
        head += std::to_string(value);
    }
    head += '\n';
    write_all(STDOUT_FILENO, head);
    for (const auto& text : watch.written) write_all(STDOUT_FILENO, text);
}

// Whether the step ended well; writes its record.
bool run(const Step& step, const Job& job, const Caller& caller, bool is_first) {
    const uint64_t begin = now_us();
    const Started process = start(step, job, is_first);
    const int exit_file = static_cast<int>(checked(syscall(SYS_pidfd_open, process.pid, 0), "pidfd_open"));
    Watch watch = {.step = step, .caller = caller, .process = process, .exit_file = exit_file};
    follow(watch, job, begin);
    const uint64_t wall_us = now_us() - begin;
    kill_all(job);
    const auto seen = reap(watch.usage, process.pid, true);
    watch.drain();
    for (const int file : {process.out, process.err, exit_file}) close(file);
    const Death death = watch.death.value_or(seen.value_or(Death{0, 0}));
    if (is_out_of_processor_time(death, step)) watch.stop("time");
    const int code = WIFSIGNALED(death.status) ? -WTERMSIG(death.status) : WEXITSTATUS(death.status);
    report(watch, code, wall_us);
    return code == 0 and not watch.is_stopped();
}

void run_steps(const Job& job, const Caller& caller) {
    for (const auto& step : job.steps)
        if (not run(step, job, caller, &step == &job.steps.front())) break;
    write_all(STDOUT_FILENO, "end\n");
}

// Die with whoever started this process.
//
// Pid 1: with bubblewrap, which asked for it already, but it was lost on the way to the program's user and
// back. Otherwise with the launcher, but only after the program, of which the kernel knows nothing.
Caller tie_to_caller(const Job& job) {
    if (job.is_pid_1) {
        checked(prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl pdeathsig");
        return {};
    }
    sigset_t ending;
    sigemptyset(&ending);
    sigaddset(&ending, SIGTERM);
    checked(sigprocmask(SIG_BLOCK, &ending, nullptr), "sigprocmask");
    const Caller caller = {.signals = checked(signalfd(-1, &ending, SFD_CLOEXEC), "signalfd")};
    checked(prctl(PR_SET_CHILD_SUBREAPER, 1), "prctl subreaper");
    checked(prctl(PR_SET_PDEATHSIG, SIGTERM), "prctl pdeathsig");
    if (getppid() != static_cast<pid_t>(job.launcher)) throw std::runtime_error("the launcher is gone");
    return caller;
}

void supervise() {
    const std::string text = read_to_end(STDIN_FILENO);
    const Job job = JobReader(text).job();
    signal(SIGPIPE, SIG_IGN);
    for (const auto& path : job.join) {
        const int file = checked(open(path.c_str(), O_WRONLY | O_CLOEXEC), "open " + path);
        write_all(file, "0");  // this process
        close(file);
    }
    checked(syscall(SYS_close_range, kFirstInherited, ~0U, 0), "close_range");
    // Other processes of the same user cannot look into this one, nor take over its descriptors.
    checked(prctl(PR_SET_DUMPABLE, 0), "prctl dumpable");
    write_files(job);
    const Caller caller = tie_to_caller(job);
    try {
        run_steps(job, caller);
    } catch (...) {
        kill_all(job);
        Usage unused;
        reap(unused, 0, true);  // so that they are dead when this process is
        throw;
    }
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
