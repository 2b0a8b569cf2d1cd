// Refusing what a kernel cannot do: a code for programs, and for people a sentence with what was given and what is
// allowed.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "kneebench.h"
#include "simt.h"

namespace kb {

struct Refusal {
    int code;
    char text[256];
};

inline thread_local Refusal last = {KB_OK, ""};  // of this thread, for kb_message

// Remembers the sentence and gives `code` back: return refuse(KB_SIZE, "n is %d: a multiple of 8 is needed", n);
#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
inline int refuse(int code, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(last.text, sizeof last.text, format, values);
    va_end(values);
    last.code = code;
    return code;
}

// An array that a kernel reads or writes in 16-byte pieces.
inline int check_array(const char *name, const void *array) {
    if (!array) return refuse(KB_NULL_POINTER, "%s is NULL: an array is needed", name);
    const unsigned beyond = static_cast<unsigned>(reinterpret_cast<uintptr_t>(array) % 16);
    if (beyond) return refuse(KB_ALIGNMENT, "%s begins %u bytes after a multiple of 16: 0 are allowed", name, beyond);
    return KB_OK;
}

// What kb_launch returned, as an error code of ours.
inline int launched(const char *kernel, int error) {
    if (!error) return KB_OK;
#if defined(__CUDACC__)
    const char *reason = cudaGetErrorString(static_cast<cudaError_t>(error));
#else
    const char *reason = "the emulator stopped it; stderr says where";
#endif
    return refuse(KB_LAUNCH, "%s was not launched, or an earlier kernel failed: %s", kernel, reason);
}

}  // namespace kb

// The first check that fails is the result of the function.
#define KB_TRY(check)                 \
    do {                              \
        const int code_ = (check);    \
        if (code_ != KB_OK) return code_; \
    } while (0)
