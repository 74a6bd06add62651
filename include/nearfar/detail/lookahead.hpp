#pragma once

#include <nearfar/detail/simd.hpp>

#include <algorithm>
#include <array>
#include <cstddef>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Rows that the next piece of work will read, fetched into the cache line by line while this one computes. A burst of
/// fetches would stall, so each step, of which a product takes many, fetches four lines: a row of 64 floats.
class Lookahead {
 public:
  void clear() {
    regions_ = current_ = 0;
    rows_ = 0;
  }

  /// What steps fetch when all of this is fetched, nothing if null: rows that are needed later. It must stay where it
  /// is.
  void and_then(Lookahead* later) { later_ = later; }

  /// What comes after as many calls as there is room for is not fetched ahead: that costs time, never a result.
  template <class T>
  NEARFAR_NO_INLINE void add(const T* data, Index stride, Index rows, Index cols) {
    if (rows <= 0 || regions_ == static_cast<int>(region_.size())) return;
    region_[static_cast<std::size_t>(regions_++)] = {reinterpret_cast<const char*>(data), stride * Index{sizeof(T)},
                                                     rows, cols * Index{sizeof(T)}};
    if (rows_ == 0) open(regions_ - 1);
  }

  /// The same of rows of a matrix.
  template <class T>
  void add(const Tokens<T>& rows) {
    add(rows.data(), rows.stride(), rows.rows(), rows.cols());
  }

  /// Whether all is fetched.
  bool done() const { return rows_ == 0; }

  /// How many steps fetch everything.
  Index steps() const {
    Index count = 0;
    for (int r = 0; r < regions_; ++r) {
      const Region& region = region_[static_cast<std::size_t>(r)];
      count += region.rows * ((region.bytes - 1) / (lines_a_step * cache_line) + 1);
    }
    return count;
  }

  /// Every how many inner steps of products to take a step here, so that `inner_steps` of them fetch everything evenly.
  Index pace(Index inner_steps) const { return std::clamp<Index>(inner_steps / std::max<Index>(steps(), 1), 4, 64); }

  /// Takes a step.
  NEARFAR_INLINE void operator()() {
    Lookahead* due = this;
    while (due != nullptr && due->rows_ == 0) due = due->later_;
    if (due != nullptr) due->fetch();
  }

 private:
  NEARFAR_INLINE void fetch() {
    NEARFAR_UNROLL for (Index l = 0; l < lines_a_step; ++l) prefetch_far(data_, at_ + l * cache_line);
    at_ += lines_a_step * cache_line;
    if (at_ >= end_) {
      // Rows that begin within a line end within another.
      prefetch_far(data_, end_ - 1);
      at_ = row_ += stride_;
      end_ += stride_;
      if (--rows_ == 0 && current_ + 1 < regions_) open(current_ + 1);
    }
  }

  static constexpr Index lines_a_step = 4;
  struct Region {
    const char* data;
    Index stride;
    Index rows;
    Index bytes;
  };

  void open(int region) {
    current_ = region;
    const Region& r = region_[static_cast<std::size_t>(region)];
    data_ = r.data;
    row_ = at_ = 0;
    end_ = r.bytes;
    stride_ = r.stride;
    rows_ = r.rows;
  }

  std::array<Region, 16> region_{};
  Lookahead* later_ = nullptr;
  int regions_ = 0;
  int current_ = 0;
  const char* data_ = nullptr;
  // Bytes from there: where the row begins, what of it comes next, and where it ends.
  Index row_ = 0;
  Index at_ = 0;
  Index end_ = 0;
  Index stride_ = 0;
  Index rows_ = 0;
};

/// Takes all steps of a lookahead, evenly over so many calls.
class Spread {
 public:
  explicit Spread(const Lookahead& ahead = {}, Index calls = 1)
      : ahead_(ahead), steps_(ahead.steps()), calls_(std::max<Index>(calls, 1)) {}

  NEARFAR_INLINE void operator()() {
    for (due_ += steps_; due_ >= calls_; due_ -= calls_) ahead_();
  }

 private:
  Lookahead ahead_;
  Index steps_;
  Index calls_;
  Index due_ = 0;
};

/// Calls a lookahead, as it stands or spread, every so many inner steps of a product.
template <class Ahead>
struct Pace {
  Ahead& ahead;
  Index every;

  NEARFAR_INLINE void operator()() const { ahead(); }
};

template <class Ahead>
Pace(Ahead&, Index) -> Pace<Ahead>;

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
