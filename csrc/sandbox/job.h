// The sandbox family: a small program that runs and measures other programs, and shares no code with the
// rest.
//
// This header holds the job as the launcher writes it (python/dscoder/sandbox/job.py): numbers are 8 bytes,
// least significant first; a text is its length and its bytes; a list is its length and its items.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace dsc {

struct SourceFile {
    std::string_view name, content;
};

struct Step {
    std::vector<std::string> argv, env;
    std::string_view input;
    uint64_t time_us;        // on the wall clock
    uint64_t cpu_seconds;    // of one process
    uint64_t memory;         // bytes, all processes together
    uint64_t address_space;  // bytes of one process; 0: unbounded
    uint64_t output;         // bytes of stdout, and of stderr
    uint64_t num_processes;
    uint64_t disk;  // bytes of one file
};

struct Job {
    std::string folder;                       // where the files go and the steps run
    std::vector<std::string> memory_folders;  // file systems that hold their files in memory
    std::vector<std::string> join;            // control groups, by the files to write "0" to
    std::string_view filter;                  // struct sock_filter[]
    uint64_t user;                            // of the program; 0: the supervisor's own
    bool is_pid_1;
    uint64_t launcher;  // the process that asked; 0: not seen from here
    std::vector<SourceFile> files;
    std::vector<Step> steps;
};

class JobReader {
  public:
    explicit JobReader(std::string_view text) : rest_(text) {}

    Job job() {
        Job found;
        found.folder = text();
        found.memory_folders = texts();
        found.join = texts();
        found.filter = text();
        found.user = number();
        found.is_pid_1 = number() != 0;
        found.launcher = number();
        for (uint64_t i = number(); i > 0; --i) {
            const auto name = text();
            found.files.push_back({name, text()});
        }
        for (uint64_t i = number(); i > 0; --i) found.steps.push_back(step());
        return found;
    }

  private:
    std::string_view take(uint64_t size) {
        if (size > rest_.size())
            throw std::runtime_error("supervisor: the job must be whole, got a part of it");
        const auto taken = rest_.substr(0, size);
        rest_.remove_prefix(size);
        return taken;
    }

    uint64_t number() {
        uint64_t value = 0;
        int shift = 0;
        for (const unsigned char byte : take(8)) {
            value |= uint64_t{byte} << shift;
            shift += 8;
        }
        return value;
    }

    std::string_view text() { return take(number()); }

    std::vector<std::string> texts() {
        std::vector<std::string> found;
        for (uint64_t i = number(); i > 0; --i) found.emplace_back(text());
        return found;
    }

    Step step() {
        Step found;
        found.argv = texts();
        found.env = texts();
        found.input = text();
        for (uint64_t* field : {&found.time_us, &found.cpu_seconds, &found.memory, &found.address_space,
                                &found.output, &found.num_processes, &found.disk})
            *field = number();
        return found;
    }

    std::string_view rest_;
};

}  // namespace dsc
