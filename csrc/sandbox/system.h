// System calls whose failure ends the job: each throws, naming what failed and why.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>

namespace dsc {

// `result` is what a system call or a wrapper of libc returned.
template <typename T>
T checked(T result, std::string_view what) {
    if (result == T(-1)) throw std::runtime_error(std::string(what) + ": " + std::strerror(errno));
    return result;
}

inline void write_all(int file, std::string_view content) {
    while (not content.empty()) {
        const ssize_t num_written = write(file, content.data(), content.size());
        if (num_written < 0 and errno == EINTR) continue;
        content.remove_prefix(static_cast<size_t>(checked(num_written, "write")));
    }
}

// Up to `limit` bytes of a small file; empty if it cannot be read (a process that is gone).
inline std::string read_small(const std::string& path, size_t limit = 512) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) return {};
    std::string content(limit, '\0');
    const ssize_t size = read(file, content.data(), limit);
    close(file);
    content.resize(size > 0 ? static_cast<size_t>(size) : 0);
    return content;
}

inline std::string read_to_end(int file) {
    std::string content;
    char chunk[1 << 16];
    while (const ssize_t size = checked(read(file, chunk, sizeof chunk), "read"))
        content.append(chunk, static_cast<size_t>(size));
    return content;
}

}  // namespace dsc
