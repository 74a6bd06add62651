#pragma once

#include <atomic>
#include <cstdint>

// Every byte that the benchmark's process takes from the heap is counted: memory.cpp stands in front of malloc and its
// kin, which operator new, Eigen, OpenBLAS' callers and LibTorch all end in.
namespace bench {

struct Heap {
  static inline std::atomic<std::int64_t> live{0};  // bytes taken and not given back, as the allocator rounds them
  static inline std::atomic<std::int64_t> peak{0};  // the most that `live` has been since a PeakOfHeap began
};

/// The most heap that is in use at once during its life, above what was in use when it began.
class PeakOfHeap {
 public:
  PeakOfHeap() : before_(Heap::live) { Heap::peak = before_; }
  std::int64_t bytes() const { return Heap::peak - before_; }

 private:
  std::int64_t before_;
};

}  // namespace bench
