// Starting one step as the program's user, under its limits.
#pragma once

#include <sys/types.h>

#include "sandbox/job.h"

namespace dsc {

struct Started {
    pid_t pid;
    int out, err;  // the reading ends of its stdout and stderr
};

// Throws if the program could not be started, which is the sandbox's failure and not the program's. But what
// an earlier step had in its hands, the folder and the files in it, is the program's own: it then ends with
// status 126 and says why.
Started start(const Step& step, const Job& job, bool is_first);

// Writes the job's files, as the program's user.
void write_files(const Job& job);

}  // namespace dsc
