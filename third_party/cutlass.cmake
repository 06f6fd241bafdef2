# CUTLASS and CuTe headers, as the target `cutlass`: from CUTLASS_DIR, else from the PyPI package nvidia-cutlass in
# the building environment. Headers only, nothing of it is copied here.

set(CUTLASS_WANTED 4.2.0)

dscoder_option(CUTLASS_DIR "")
if(NOT CUTLASS_DIR)
    execute_process(
        COMMAND ${Python_EXECUTABLE} -c
            "from importlib.metadata import distribution as d; print(d('nvidia-cutlass').locate_file('cutlass_library/source'))"
        OUTPUT_VARIABLE CUTLASS_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()

set(cutlass_version_file "${CUTLASS_DIR}/include/cutlass/version.h")
if(NOT EXISTS "${cutlass_version_file}")
    message(FATAL_ERROR "There are no CUTLASS headers (looked for '${cutlass_version_file}'). Either "
        "pip install --no-deps nvidia-cutlass==${CUTLASS_WANTED}.0, or set CUTLASS_DIR to a checkout of CUTLASS "
        "${CUTLASS_WANTED}, ${DSCODER_WITHOUT_CUDA}.")
endif()
file(READ "${cutlass_version_file}" cutlass_version_text)
string(REGEX MATCH "CUTLASS_MAJOR ([0-9]+)" _ "${cutlass_version_text}")
set(cutlass_version "${CMAKE_MATCH_1}")
string(REGEX MATCH "CUTLASS_MINOR ([0-9]+)" _ "${cutlass_version_text}")
string(APPEND cutlass_version ".${CMAKE_MATCH_1}")
string(REGEX MATCH "CUTLASS_PATCH ([0-9]+)" _ "${cutlass_version_text}")
string(APPEND cutlass_version ".${CMAKE_MATCH_1}")
if(NOT cutlass_version VERSION_EQUAL CUTLASS_WANTED)
    message(WARNING "CUTLASS in ${CUTLASS_DIR} is ${cutlass_version}; dscoder is tested with ${CUTLASS_WANTED}")
endif()

add_library(cutlass INTERFACE)
target_include_directories(cutlass SYSTEM INTERFACE "${CUTLASS_DIR}/include")
