#include "pool.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace infsa::cpu {
namespace {

constexpr size_t kHugePage = 2 << 20, kMegabyte = 1 << 20;

// A gigabyte, which the gradients of 65,536 tokens of 16 heads of 64 fit into, and no more than an eighth of the
// memory.
size_t default_most() {
  size_t most = 1024 * kMegabyte;
#if defined(__linux__)
  most = std::min(most, size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE)) / 8);
#endif
  return most;
}

size_t most_by_environment() {
  const char* text = std::getenv("INFSA_CPU_POOL_MB");
  if (!text || !*text) return default_most();
  char* end;
  const double megabytes = std::strtod(text, &end);
  if (*end || !(megabytes >= 0 && megabytes < 1e9))
    throw std::invalid_argument("INFSA_CPU_POOL_MB is '" + std::string(text) +
                                "', expected the megabytes that may be kept, 0 for none");
  return static_cast<size_t>(megabytes * kMegabyte);
}

// Huge pages are asked for before the first touch: faulting a big piece in 4 KB at a time costs several times what
// writing it does (measured: 65 against 14 ms for 268 MB).
Piece new_piece(size_t bytes) {
  const Piece piece{std::aligned_alloc(kHugePage, bytes), bytes};
  if (!piece.data) return piece;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Advice only: where it is refused, the pages stay small.
  madvise(piece.data, bytes, MADV_HUGEPAGE);
#endif
  return piece;
}

class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(size_t bytes) : what_("infsa_kernels: no memory for " + std::to_string(bytes) + " bytes") {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

class Pool {
 public:
  const size_t most = most_by_environment();

  Piece take(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    if (const Piece kept = take_kept(bytes); kept.data) return kept;
    Piece piece = new_piece(bytes);
    if (!piece.data && release()) piece = new_piece(bytes);
    if (!piece.data) throw OutOfMemory(bytes);
    return piece;
  }

  void give(Piece piece) {
    std::vector<Piece> leaving;
    if (piece.bytes > most) {
      leaving.push_back(piece);
    } else {
#if defined(__linux__) && defined(MADV_FREE)
      madvise(piece.data, piece.bytes, MADV_FREE);
#endif
      const std::lock_guard<std::mutex> guard(lock_);
      kept_ += piece.bytes;
      pieces_.push_back(piece);
      auto stays = pieces_.begin();
      for (; kept_ > most; ++stays) kept_ -= stays->bytes;
      leaving.assign(pieces_.begin(), stays);
      pieces_.erase(pieces_.begin(), stays);
    }
    for (const Piece& old : leaving) std::free(old.data);
  }

  size_t release() {
    std::vector<Piece> leaving;
    {
      const std::lock_guard<std::mutex> guard(lock_);
      leaving.swap(pieces_);
      kept_ = 0;
    }
    size_t bytes = 0;
    for (const Piece& piece : leaving) bytes += piece.bytes, std::free(piece.data);
    return bytes;
  }

  size_t kept() {
    const std::lock_guard<std::mutex> guard(lock_);
    return kept_;
  }

  std::mutex& lock() { return lock_; }

 private:
  // The smallest kept piece that is big enough and not a quarter too big.
  Piece take_kept(size_t bytes) {
    const std::lock_guard<std::mutex> guard(lock_);
    auto best = pieces_.end();
    for (auto piece = pieces_.begin(); piece != pieces_.end(); ++piece) {
      if (piece->bytes < bytes || piece->bytes > bytes + bytes / 4) continue;
      if (best == pieces_.end() || piece->bytes < best->bytes) best = piece;
    }
    if (best == pieces_.end()) return {};
    const Piece found = *best;
    pieces_.erase(best);
    kept_ -= found.bytes;
    return found;
  }

  std::mutex lock_;
  std::vector<Piece> pieces_;  // the oldest first
  size_t kept_ = 0;
};

// Never destroyed: tensors may outlive everything else.
Pool& pool() {
  static Pool* const pool = [] {
    auto* made = new Pool;
#if defined(__linux__)
    // A child of fork() must not find the lock taken by a thread that it does not have.
    pthread_atfork([] { infsa::cpu::pool().lock().lock(); }, [] { infsa::cpu::pool().lock().unlock(); },
                   [] { infsa::cpu::pool().lock().unlock(); });
#endif
    return made;
  }();
  return *pool;
}

}  // namespace

Piece take_memory(size_t bytes) { return pool().take(bytes); }
void give_memory(Piece piece) { pool().give(piece); }
size_t release_memory() { return pool().release(); }
size_t kept_memory() { return pool().kept(); }
size_t most_kept_memory() { return pool().most; }

}  // namespace infsa::cpu
