#include "memory.hpp"

#include <cerrno>
#include <cstddef>

#if !defined(__GLIBC__)
#error "The benchmark counts memory in front of glibc's malloc."
#endif

#include <malloc.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);
void __libc_free(void*);
}

namespace {

/// Asks for huge pages where a block holds some: with small ones a stream of rows waits for the page tables, and
/// whether they are given unasked is each system's choice.
void prefer_huge_pages([[maybe_unused]] void* block, [[maybe_unused]] std::int64_t size) {
#if defined(__linux__)
  constexpr std::uintptr_t page = std::uintptr_t{2} << 20;
  const auto address = reinterpret_cast<std::uintptr_t>(block);
  const std::uintptr_t first = (address + page - 1) / page * page;
  const std::uintptr_t end = (address + static_cast<std::uintptr_t>(size)) / page * page;
  if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

void* taken(void* block) {
  const auto size = static_cast<std::int64_t>(malloc_usable_size(block));
  prefer_huge_pages(block, size);
  const std::int64_t live = bench::Heap::live.fetch_add(size) + size;
  std::int64_t peak = bench::Heap::peak;
  while (live > peak && !bench::Heap::peak.compare_exchange_weak(peak, live)) {
  }
  return block;
}

void given_back(void* block) { bench::Heap::live -= static_cast<std::int64_t>(malloc_usable_size(block)); }

}  // namespace

extern "C" {

void* malloc(std::size_t size) { return taken(__libc_malloc(size)); }

void* calloc(std::size_t count, std::size_t size) { return taken(__libc_calloc(count, size)); }

void* realloc(void* block, std::size_t size) {
  const auto before = static_cast<std::int64_t>(malloc_usable_size(block));
  void* moved = __libc_realloc(block, size);
  if (moved == nullptr && size != 0) return nullptr;
  bench::Heap::live -= before;
  return taken(moved);
}

void* memalign(std::size_t alignment, std::size_t size) { return taken(__libc_memalign(alignment, size)); }

void* aligned_alloc(std::size_t alignment, std::size_t size) { return memalign(alignment, size); }

int posix_memalign(void** block, std::size_t alignment, std::size_t size) {
  void* aligned = memalign(alignment, size);
  if (aligned == nullptr) return ENOMEM;
  *block = aligned;
  return 0;
}

void free(void* block) {
  given_back(block);
  __libc_free(block);
}
}
