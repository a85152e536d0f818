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
