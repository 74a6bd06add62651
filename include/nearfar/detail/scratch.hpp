#pragma once

#include <nearfar/detail/simd.hpp>
#include <nearfar/tokens.hpp>

#include <algorithm>
#include <cstddef>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Working memory taken in order and given back in reverse order, by one thread at a time.
///
/// It grows by further blocks, never moving what was taken; once everything is given back the blocks become one, so
/// that the same work done again allocates nothing.
class Scratch {
 public:
  static constexpr std::size_t alignment = 64;

  /// Gives back, at the end of a scope, what was taken within it.
  class Scope {
   public:
    explicit Scope(Scratch& scratch) : scratch_(scratch), block_(scratch.block_), used_(scratch.used_) {}
    ~Scope() { scratch_.rewind(block_, used_); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Scratch& scratch_;
    std::size_t block_;
    std::size_t used_;
  };

  Scratch() = default;
  Scratch(Scratch&&) = default;
  Scratch& operator=(Scratch&&) = default;

  /// Uninitialised room for `count` numbers, aligned to a cache line.
  template <class T>
  T* take(Index count) {
    static_assert(std::is_trivially_copyable_v<T>);
    return reinterpret_cast<T*>(take_bytes(padded(static_cast<std::size_t>(count) * sizeof(T))));
  }

  /// Holds at least `bytes` from now on. Only while nothing is taken.
  void reserve(const std::size_t bytes) {
    if (this->bytes() >= bytes) return;
    blocks_.clear();
    blocks_.emplace_back(bytes);
  }

  /// Bytes held, in use or not.
  std::size_t bytes() const {
    std::size_t total = 0;
    for (const Block& block : blocks_) total += block.size;
    return total;
  }

 private:
  // What a block has at least, and what it may have beyond the need.
  static constexpr std::size_t smallest_block = std::size_t{1} << 16;
  static constexpr std::size_t largest_reserve = std::size_t{1} << 20;

  struct Block {
    explicit Block(std::size_t bytes)
        : data(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{alignment}))), size(bytes) {}
    Block(Block&& other) noexcept : data(std::exchange(other.data, nullptr)), size(std::exchange(other.size, 0)) {}
    Block& operator=(Block&& other) noexcept {
      std::swap(data, other.data);
      std::swap(size, other.size);
      return *this;
    }
    ~Block() { ::operator delete (data, std::align_val_t{alignment}); }

    std::byte* data;
    std::size_t size;
  };

  NEARFAR_NO_INLINE std::byte* take_bytes(const std::size_t bytes) {
    while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].size) {
      ++block_;
      used_ = 0;
    }
    if (block_ == blocks_.size()) {
      blocks_.emplace_back(std::max(bytes, std::clamp(this->bytes(), smallest_block, largest_reserve)));
    }
    std::byte* start = blocks_[block_].data + used_;
    used_ += bytes;
    return start;
  }

  // One line of padding between neighbours, so that arrays of a power of two do not share their cache sets.
  static std::size_t padded(std::size_t bytes) { return (bytes + alignment - 1) / alignment * alignment + alignment; }

  NEARFAR_NO_INLINE void rewind(std::size_t block, std::size_t used) noexcept {
    block_ = block;
    used_ = used;
    if (block == 0 && used == 0 && blocks_.size() > 1) {
      const std::size_t total = bytes();
      blocks_.clear();
      // A scope ends here: what cannot be had now is asked for by the next call.
      try {
        blocks_.emplace_back(total);
      } catch (const std::bad_alloc&) {
      }
    }
  }

  std::vector<Block> blocks_;
  std::size_t block_ = 0;
  std::size_t used_ = 0;
};

/// Uninitialised rows end to end, of a thread's scratch or of the memory of a call (Work).
template <class T, class Memory>
Tokens<T> take_rows(Memory& memory, Index rows, Index cols) {
  return {memory.template take<T>(rows * cols), rows, cols, cols};
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
