// What the library of kernels tells the extension module beside it, which has no part of torch in it.
#pragma once

#include <cstddef>

#define INFSA_EXPORT __attribute__((visibility("default")))

namespace infsa::cpu {

// The instruction set of isa.h.
INFSA_EXPORT const char* isa_name();

// Gives what the pool (pool.h) keeps back to the system: the bytes of it.
INFSA_EXPORT size_t release_memory();
// The bytes that are kept now, and the most that may be.
INFSA_EXPORT size_t kept_memory();
INFSA_EXPORT size_t most_kept_memory();

}  // namespace infsa::cpu

// Names of C, for Python's ctypes, through which no exception may go: false is a failure, and *answer what it says. The
// text lasts until the thread's next call.
extern "C" {

// Registers the kernels for the operators of a namespace, which have their schemas from Python: infsa, or the name that
// a version on the Hugging Face hub has to itself (docs/hub.md).
INFSA_EXPORT bool infsa_register(const char* name_space, const char** answer);

// What the function of infsa::cpu with this name returns, as text: for a package without the extension module.
INFSA_EXPORT bool infsa_ask(const char* function, const char** answer);
}
