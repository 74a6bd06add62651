#pragma once

#include <nearfar/context.hpp>
#include <nearfar/engine/microkernel.hpp>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Adds a vector to the numbers at `to`, of which there may be fewer than lanes.
template <class T>
NEARFAR_INLINE void add_numbers(T* to, Index count, const Packet<T>& sum) {
  if (count >= lanes<T>) {
    pstoreu(to, padd(ploadu<Packet<T>>(to), sum));
    return;
  }
  T numbers[lanes<T>];
  pstoreu(numbers, sum);
  for (Index i = 0; i < count; ++i) to[i] += numbers[i];
}

/// A depth x cols matrix B, laid out once for many products A B: panels of `width` columns, one after another, the last
/// filled up with zeros.
template <class T>
class PackedMatrix {
 public:
  static constexpr int vectors = 2;
  static constexpr Index width = vectors * lanes<T>;

  /// A product takes so many rows of A at once.
  static constexpr Index rows_at_once = tile_rows<vectors>;

  PackedMatrix() = default;

  /// Room for B, to be filled panel by panel.
  PackedMatrix(Work& work, Index depth, Index cols)
      : depth_(depth), cols_(cols), data_(work.take<T>(depth * round_up(cols, width))) {}

  Index cols() const { return cols_; }

  /// Fills B by columns: fill(k, c) is the number in row k and column c.
  template <class Fill>
  void pack(Work& work, Fill&& fill) {
    work.for_each(round_up(cols_, width) / width, [&](Index p, Scratch&) {
      T* to = data_ + p * width * depth_;
      for (Index k = 0; k < depth_; ++k) {
        for (Index c = p * width; c < (p + 1) * width; ++c) *to++ = c < cols_ ? fill(k, c) : T(0);
      }
    });
  }

  /// C += A B for the rows of C; those of A come in whole groups, whatever stands in the last.
  void multiply_add(Broadcast<T> a, Tokens<T> c) const {
    for (Index first = 0; first < cols_; first += width) {
      multiply_groups<rows_at_once, vectors>(
          a, c.rows(), data_ + first * depth_, width, depth_, [](Index, int) { return pset1<Packet<T>>(T(0)); },
          [&](Index r, int v, const Packet<T>& sum) {
            const Index column = first + v * lanes<T>;
            if (r < c.rows()) add_numbers(c.row(r) + column, cols_ - column, sum);
          });
    }
  }

 private:
  Index depth_ = 0;
  Index cols_ = 0;
  T* data_ = nullptr;
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
