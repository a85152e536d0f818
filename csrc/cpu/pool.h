// Big pieces of memory, kept for the next call: results and working memory of kBig bytes and more.
//
// The system's allocator gives every big piece back as soon as it is freed, and its pages are faulted in, and zeroed,
// once more at the next call: as long as a kernel takes that is bounded by memory, and in a virtual machine whose host
// takes the pages back many times as long. A kept piece goes to the next call that has a use for it. Until then its
// pages are the system's to take, should it run out of memory (MADV_FREE). INFSA_CPU_POOL_MB bounds what is kept.
#pragma once

#include <cstddef>

#include "../library.h"

namespace infsa::cpu {

constexpr size_t kBig = 4 << 20;

struct Piece {
  void* data;
  size_t bytes;
};

// Working memory of at least `bytes`, aligned to huge pages, and its return.
Piece take_memory(size_t bytes);
void give_memory(Piece piece);

}  // namespace infsa::cpu
