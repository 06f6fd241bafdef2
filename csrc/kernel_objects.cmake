# Kernels compiled once and linked elsewhere. A build with nvcc leaves libdscoder_kernels.a and, by the target
# kernel_objects, a stamp that says what went into it; a build with DSCODER_KERNEL_OBJECTS=<folder of both> links that
# library in place of compiling, after comparing the stamp with its own sources and toolkit.
#
# As a script (cmake -DROOT=... -DLIBRARY=... -DSTAMP=... -P kernel_objects.cmake) it writes the stamp.

set(DSCODER_STAMP_FORMAT 1)

# sha256 over the names and contents of all that kernels are compiled from.
function(dscoder_hash_kernel_sources root out)
    file(GLOB_RECURSE files LIST_DIRECTORIES false RELATIVE "${root}"
        "${root}/csrc/*.cu" "${root}/csrc/*.cuh" "${root}/csrc/*.h" "${root}/csrc/*.cmake" "${root}/third_party/*.cmake")
    list(FILTER files EXCLUDE REGEX "^csrc/(bind|host|text)/")
    list(APPEND files CMakeLists.txt)
    list(SORT files)
    set(all "")
    foreach(file IN LISTS files)
        file(SHA256 "${root}/${file}" hash)
        string(APPEND all "${file} ${hash}\n")
    endforeach()
    string(SHA256 hash "${all}")
    set(${out} ${hash} PARENT_SCOPE)
endfunction()

if(CMAKE_SCRIPT_MODE_FILE)
    dscoder_hash_kernel_sources("${ROOT}" sources)
    file(SHA256 "${LIBRARY}" library)
    file(WRITE "${STAMP}" "{\n  \"format\": ${DSCODER_STAMP_FORMAT},\n  \"nvcc\": \"${NVCC}\",\n  \"archs\": \"${ARCHS}\",\n"
        "  \"flags\": \"${FLAGS}\",\n  \"compiler\": \"${COMPILER}\",\n  \"processor\": \"${PROCESSOR}\",\n"
        "  \"sources\": \"${sources}\",\n  \"library\": \"${library}\"\n}\n")
    return()
endif()

# The target kernel_objects of a build that compiles kernels.
function(dscoder_add_stamp nvcc_version archs)
    string(STRIP "${CMAKE_CUDA_FLAGS} ${CMAKE_CUDA_FLAGS_RELEASE}" flags)
    add_custom_target(kernel_objects VERBATIM
        COMMAND ${CMAKE_COMMAND} "-DROOT=${PROJECT_SOURCE_DIR}" "-DLIBRARY=$<TARGET_FILE:dscoder_kernels>"
            "-DSTAMP=${PROJECT_BINARY_DIR}/kernel-objects.json" "-DNVCC=${nvcc_version}" "-DARCHS=${archs}" "-DFLAGS=${flags}"
            "-DCOMPILER=${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}" "-DPROCESSOR=${CMAKE_SYSTEM_PROCESSOR}"
            -P "${PROJECT_SOURCE_DIR}/csrc/kernel_objects.cmake")
    add_dependencies(kernel_objects dscoder_kernels)
endfunction()

# Headers and the static runtime of the toolkit at hand: that of nvcc, else CUDA_HOME or CUDA_PATH.
function(dscoder_find_cuda_runtime nvcc)
    set(roots "$ENV{CUDA_HOME}" "$ENV{CUDA_PATH}")
    if(nvcc)
        execute_process(COMMAND ${nvcc} --dryrun -c x.cu OUTPUT_VARIABLE said ERROR_VARIABLE said)
        if(said MATCHES "#\\$ TOP=([^\r\n]+)")
            file(REAL_PATH "${CMAKE_MATCH_1}" root)
            list(PREPEND roots "${root}")
        endif()
    endif()
    list(FILTER roots EXCLUDE REGEX "^$")
    set(target "targets/${CMAKE_SYSTEM_PROCESSOR}-linux")
    find_path(headers cuda_runtime_api.h PATHS ${roots} PATH_SUFFIXES include ${target}/include NO_CACHE NO_DEFAULT_PATH)
    find_library(runtime cudart_static PATHS ${roots} PATH_SUFFIXES lib64 lib ${target}/lib NO_CACHE NO_DEFAULT_PATH)
    if(NOT headers OR NOT runtime)
        message(FATAL_ERROR "DSCODER_KERNEL_OBJECTS needs cuda_runtime_api.h and libcudart_static.a of a CUDA toolkit (nvcc "
            "itself may be missing); looked for below '${roots}'. Put nvcc into PATH or set CUDA_HOME, ${DSCODER_WITHOUT_CUDA}.")
    endif()
    file(STRINGS "${headers}/cuda_runtime_api.h" line REGEX "#define CUDART_VERSION +[0-9]+" LIMIT_COUNT 1)
    string(REGEX MATCH "[0-9]+$" number "${line}")
    math(EXPR major "${number} / 1000")
    math(EXPR minor "${number} % 1000 / 10")
    set(DSCODER_CUDA_HEADERS "${headers}" PARENT_SCOPE)
    set(DSCODER_CUDA_RUNTIME "${runtime}" PARENT_SCOPE)
    set(DSCODER_CUDA_RUNTIME_VERSION "${major}.${minor}" PARENT_SCOPE)
endfunction()

# Refuses objects that this machine would not have made, by what differs.
function(dscoder_check_stamp folder field got wanted hint)
    if(NOT got STREQUAL wanted)
        message(FATAL_ERROR "DSCODER_KERNEL_OBJECTS: the objects in ${folder} do not fit, by their stamp's '${field}': "
            "they have '${got}', wanted '${wanted}' (${hint}). Run `make kernel-objects` where nvcc is, on these sources.")
    endif()
endfunction()

# The target dscoder_kernels, from a folder; DSCODER_CUDA_ARCHS and DSCODER_NVCC_VERSION as its stamp has them.
macro(dscoder_link_objects folder nvcc wanted_archs)
    get_filename_component(objects "${folder}" ABSOLUTE BASE_DIR "${PROJECT_SOURCE_DIR}")
    set(library "${objects}/libdscoder_kernels.a")
    if(NOT EXISTS "${library}" OR NOT EXISTS "${objects}/kernel-objects.json")
        message(FATAL_ERROR "DSCODER_KERNEL_OBJECTS: ${objects} must hold libdscoder_kernels.a and kernel-objects.json, which "
            "`make kernel-objects` writes")
    endif()
    set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${objects}/kernel-objects.json")
    file(READ "${objects}/kernel-objects.json" stamp)
    foreach(field format nvcc archs processor compiler sources library)
        string(JSON stamp_${field} ERROR_VARIABLE missing GET "${stamp}" ${field})
    endforeach()
    dscoder_hash_kernel_sources("${PROJECT_SOURCE_DIR}" sources_hash)
    file(SHA256 "${library}" library_hash)
    dscoder_find_cuda_runtime("${nvcc}")
    string(REGEX MATCH "^[0-9]+\\.[0-9]+" stamp_release "${stamp_nvcc}")
    dscoder_check_stamp("${objects}" format "${stamp_format}" "${DSCODER_STAMP_FORMAT}" "the stamp's form")
    dscoder_check_stamp("${objects}" library "${stamp_library}" "${library_hash}" "the library is not the stamped one")
    dscoder_check_stamp("${objects}" sources "${stamp_sources}" "${sources_hash}" "the kernel sources here")
    dscoder_check_stamp("${objects}" nvcc "${stamp_release}" "${DSCODER_CUDA_RUNTIME_VERSION}" "the CUDA runtime here")
    dscoder_check_stamp("${objects}" processor "${stamp_processor}" "${CMAKE_SYSTEM_PROCESSOR}" "this machine")
    dscoder_check_stamp("${objects}" archs "${stamp_archs}" "${wanted_archs}" "DSCODER_CUDA_ARCHS")
    # What an object asks of libstdc++, the library of its own compiler's release or a later one has. Flags need no
    # look: they stand in the sources.
    string(REGEX MATCH "^[0-9]+" compiler_release "${CMAKE_CXX_COMPILER_VERSION}")
    if(NOT "${stamp_compiler}" MATCHES "^${CMAKE_CXX_COMPILER_ID} ([0-9]+)" OR CMAKE_MATCH_1 GREATER compiler_release)
        dscoder_check_stamp("${objects}" compiler "${stamp_compiler}"
            "${CMAKE_CXX_COMPILER_ID} up to ${compiler_release}" "the C++ compiler here")
    endif()
    set(DSCODER_NVCC_VERSION "${stamp_nvcc}")
    add_library(dscoder_kernels STATIC IMPORTED)
    set_target_properties(dscoder_kernels PROPERTIES IMPORTED_LOCATION "${library}")
    target_include_directories(dscoder_kernels INTERFACE csrc)
    target_include_directories(dscoder_kernels SYSTEM INTERFACE "${DSCODER_CUDA_HEADERS}")
    find_package(Threads REQUIRED)
    target_link_libraries(dscoder_kernels INTERFACE "${DSCODER_CUDA_RUNTIME}" Threads::Threads ${CMAKE_DL_LIBS} rt)
    target_compile_definitions(dscoder_kernels INTERFACE
        DSC_CUDA_ARCHS="${stamp_archs}" DSC_CUDA_VERSION="${stamp_nvcc}")
endmacro()
