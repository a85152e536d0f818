// Big pieces of memory, kept for the next call: results and working memory of kBig bytes and more.
//
// The system's allocator gives every big piece back as soon as it is freed, and its pages are faulted in, and zeroed,
// once more at the next call: as long as a kernel takes that is bounded by memory, and in a virtual machine whose host
// takes the pages back many times as long. A kept piece goes to the next call that has a use for it. Until then its
// pages are the system's to take, should it run out of memory (MADV_FREE). INFSA_CPU_POOL_MB bounds what is kept.
#pragma once

#include <c10/core/Allocator.h>

#include <cstddef>

namespace infsa::cpu {

constexpr size_t kBig = 4 << 20;

struct Piece {
  void* data;
  size_t bytes;
};

// Working memory of at least `bytes`, aligned to huge pages, and its return.
Piece take_memory(size_t bytes);
void give_memory(Piece piece);

// Allocates tensors: what is big from the pool, the rest as torch does.
c10::Allocator& pooled_allocator();

// Gives what is kept back to the system: the bytes of it.
size_t release_memory();
// The bytes that are kept now, and the most that may be.
size_t kept_memory();
size_t most_kept_memory();

}  // namespace infsa::cpu
