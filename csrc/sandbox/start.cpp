#include "sandbox/start.h"

#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <utility>

#include "sandbox/processes.h"
#include "sandbox/system.h"

namespace dsc {
namespace {

constexpr rlim_t kMaxOpenFiles = 256;  // bounds what lies in pipes and sockets, too
constexpr rlim_t kMaxLockedBytes = 1 << 16;
constexpr rlim_t kMaxStackBytes = 8 << 20;
constexpr int kCannotStart = 126;  // as shells have it

// A failure to start that is the program's own.
struct OwnFault : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A descriptor that reads `content` and that nobody can write to.
int open_input(std::string_view content) {
    if (content.empty()) return checked(open("/dev/null", O_RDONLY | O_CLOEXEC), "open /dev/null");
    const int file = checked(memfd_create("stdin", MFD_CLOEXEC | MFD_ALLOW_SEALING), "memfd_create");
    write_all(file, content);
    checked(lseek(file, 0, SEEK_SET), "lseek");
    checked(fcntl(file, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL), "seal");
    return file;
}

// What RLIMIT_NPROC must be for so many processes of the program. It counts all that its user runs; a user
// that nobody else has runs nothing else.
rlim_t process_limit(const Step& step, const Job& job) {
    const bool has_own_count = job.user != 0 or job.is_pid_1;
    return step.num_processes + (has_own_count ? 0 : num_threads_of_user());
}

void bound(const Step& step, rlim_t num_processes) {
    std::vector<std::pair<int, rlim_t>> limits = {
        {RLIMIT_CORE, 0},
        {RLIMIT_MSGQUEUE, 0},
        {RLIMIT_MEMLOCK, kMaxLockedBytes},
        {RLIMIT_NOFILE, kMaxOpenFiles},
        {RLIMIT_STACK, kMaxStackBytes},
        {RLIMIT_FSIZE, step.disk},
        {RLIMIT_NPROC, num_processes},
        // SIGXCPU at the soft limit says what happened; SIGKILL follows a second later for who ignores it.
        {RLIMIT_CPU, step.cpu_seconds + 1},
    };
    if (step.address_space > 0) limits.emplace_back(RLIMIT_AS, step.address_space);
    for (const auto& [number, value] : limits) {
        rlimit limit;
        checked(getrlimit(static_cast<__rlimit_resource_t>(number), &limit), "getrlimit");
        limit.rlim_max = std::min(value, limit.rlim_max);
        limit.rlim_cur = limit.rlim_max - (number == RLIMIT_CPU and limit.rlim_max > 1 ? 1 : 0);
        checked(setrlimit(static_cast<__rlimit_resource_t>(number), &limit), "setrlimit");
    }
}

void offer_to_oom_killer() {
    // Short of memory, the program goes before the supervisor. A hidden process may not write the file;
    // nobody else is alive inside who could make use of the moment.
    checked(prctl(PR_SET_DUMPABLE, 1), "prctl dumpable");
    const int file = checked(open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC), "open oom_score_adj");
    write_all(file, "1000");
    close(file);
}

// The program's user, without any of the supervisor's rights.
void become(uid_t user) {
    checked(prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0), "prctl ambient");
    if (user == 0) return;
    checked(setgroups(0, nullptr), "setgroups");
    checked(setresgid(user, user, user), "setresgid");
    checked(setresuid(user, user, user), "setresuid");
}

// Whoever kills the supervisor kills the program.
void die_with(pid_t supervisor) {
    checked(prctl(PR_SET_PDEATHSIG, SIGKILL), "prctl pdeathsig");
    if (getppid() != supervisor) throw std::runtime_error("the supervisor is gone");
}

void reset_signals() {
    for (int number = 1; number < NSIG; ++number) signal(number, SIG_DFL);  // but for those that cannot be
    sigset_t none;
    sigemptyset(&none);
    checked(sigprocmask(SIG_SETMASK, &none, nullptr), "sigprocmask");
}

void install_filter(std::string_view instructions) {
    std::vector<sock_filter> copy(instructions.size() / sizeof(sock_filter));
    std::memcpy(copy.data(), instructions.data(), copy.size() * sizeof(sock_filter));
    const sock_fprog program = {static_cast<unsigned short>(copy.size()), copy.data()};
    checked(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl no_new_privs");
    checked(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program), "prctl seccomp");
}

std::vector<char*> pointers(const std::vector<std::string>& texts) {
    std::vector<char*> found;
    for (const auto& text : texts) found.push_back(const_cast<char*>(text.c_str()));
    found.push_back(nullptr);
    return found;
}

// Whether the machine is to blame, never an earlier step: too many processes (all of the program's own are
// dead) or open files, no memory. Not EIO: a made executable that names a loader past its own end gives that.
bool is_of_machine(int error) {
    return error == EAGAIN or error == ENFILE or error == ENOMEM;
}

// `result` of a call that fails for want of what an earlier step may have broken or not made.
void checked_own(int result, bool is_own, const std::string& what) {
    if (result == 0) return;
    const std::string reason = what + ": " + std::strerror(errno);
    if (is_own and not is_of_machine(errno)) throw OwnFault(reason);
    throw std::runtime_error(reason);
}

// In the child: everything between fork and exec. Returns only by an exception.
void exec(const Step& step, const Job& job, const int (&streams)[3], bool is_first, pid_t supervisor) {
    const auto argv = pointers(step.argv), env = pointers(step.env);  // before memory is short
    const rlim_t num_processes = process_limit(step, job);
    checked(setsid(), "setsid");
    for (int i = 0; i < 3; ++i) checked(dup2(streams[i], i), "dup2");
    reset_signals();
    offer_to_oom_killer();
    checked_own(chdir(job.folder.c_str()), not is_first, "chdir " + job.folder);
    become(static_cast<uid_t>(job.user));
    if (not job.is_pid_1) die_with(supervisor);  // after the change of user, which undoes it
    bound(step, num_processes);
    install_filter(job.filter);
    const bool is_made_inside = step.argv[0].front() != '/';
    checked_own(execve(argv[0], argv.data(), env.data()), is_made_inside, "exec " + step.argv[0]);
}

struct Pipe {
    int out, in;
};

Pipe new_pipe() {
    int ends[2];
    checked(pipe2(ends, O_CLOEXEC), "pipe");
    return {ends[0], ends[1]};
}

// Every folder of `path` but the last name.
void make_parents(const std::string& path) {
    for (size_t end = path.find('/', 1); end != std::string::npos; end = path.find('/', end + 1))
        if (mkdir(path.substr(0, end).c_str(), 0755) != 0 and errno != EEXIST)
            throw std::runtime_error("mkdir " + path.substr(0, end) + ": " + std::strerror(errno));
}

}  // namespace

Started start(const Step& step, const Job& job, bool is_first) {
    const int input = open_input(step.input);
    const Pipe out = new_pipe(), err = new_pipe(), failure = new_pipe();
    const pid_t supervisor = getpid();
    const pid_t pid = checked(fork(), "fork");
    if (pid == 0) {
        try {
            exec(step, job, {input, out.in, err.in}, is_first, supervisor);
        } catch (const OwnFault& fault) {
            write_all(STDERR_FILENO, std::string("cannot start: ") + fault.what() + "\n");
            _exit(kCannotStart);
        } catch (const std::exception& error) {
            write_all(failure.in, error.what());
        }
        _exit(127);
    }
    for (const int end : {input, out.in, err.in, failure.in}) close(end);
    const std::string reason = read_to_end(failure.out);  // empty: exec has closed the other end
    close(failure.out);
    if (not reason.empty()) throw std::runtime_error("the program did not start: " + reason);
    return {pid, out.out, err.out};
}

void write_files(const Job& job) {
    umask(022);
    const bool is_given_away = job.user != 0 and job.is_pid_1;
    if (is_given_away) {  // root's rights come back below
        checked(setegid(static_cast<gid_t>(job.user)), "setegid");
        checked(seteuid(static_cast<uid_t>(job.user)), "seteuid");
    }
    make_parents(job.folder + "/");
    for (const auto& [name, content] : job.files) {
        const std::string path = job.folder + "/" + std::string(name);
        make_parents(path);
        const int flags = O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC;
        const int file = checked(open(path.c_str(), flags, 0644), "open " + path);
        write_all(file, content);
        close(file);
    }
    if (is_given_away) {
        checked(seteuid(0), "seteuid");
        checked(setegid(0), "setegid");
    }
}

}  // namespace dsc
