#pragma once

#include <nearfar/detail/simd.hpp>

#include <algorithm>
#include <type_traits>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// A matrix read one number at a time: element (r, k) stands at data[r * row_stride + k * depth_stride].
/// Either stride may be 1, so one kernel multiplies by a matrix and by its transpose, and nothing is ever transposed.
template <class T>
struct Broadcast {
  const T* data;
  Index row_stride;
  Index depth_stride;

  Broadcast rows_from(Index r) const { return {data + r * row_stride, row_stride, depth_stride}; }
};

/// The register tile: `tile_rows` rows of `Vectors` vectors each. Of three vectors as many as the registers hold beside
/// the vectors and the one broadcast number that an inner step reads; of fewer, 16 sums at most, which hide what a
/// multiply-add takes. Vectors share a broadcast: the more of them, the fewer loads a multiply-add.
template <int Vectors>
inline constexpr int tile_rows = (vector_registers >= 32 ? (Vectors < 3 ? 16 : 24) : vector_registers - 4) / Vectors;

/// Attention lays queries on panels of so many vectors, and meets keys in groups of so many: one register tile.
inline constexpr int panel_vectors = 3;
inline constexpr int group_rows = tile_rows<panel_vectors>;

/// Attention's products fetch every so many inner steps: the fewer rows a register tile has, the shorter these are.
inline constexpr Index fetch_pace = 96 / group_rows;

/// Calls visit(std::integral_constant<int, count>, first) for consecutive groups of `count` rows that cover `rows`:
/// full register tiles, but for a last one in whose place fours leave fewer rows over; fours; and what is left one by
/// one.
template <int Vectors, class Visit>
NEARFAR_INLINE void for_each_tile(Index rows, Visit&& visit) {
  constexpr int full = tile_rows<Vectors>;
  const auto takes_full = [](Index left) { return left >= full && (left - full >= 4 || left % 4 >= left - full); };
  Index r = 0;
  for (; takes_full(rows - r); r += full) visit(std::integral_constant<int, full>{}, r);
  for (; r + 4 <= rows; r += 4) visit(std::integral_constant<int, 4>{}, r);
  for (; r < rows; ++r) visit(std::integral_constant<int, 1>{}, r);
}

/// Calls visit(std::integral_constant<int, Vectors>, first) for the panels, of two vectors and at last perhaps one,
/// that cover `cols` columns, a multiple of lanes<T>.
template <class T, class Visit>
NEARFAR_INLINE void for_each_panel(Index cols, Visit&& visit) {
  Index c = 0;
  for (; c + 2 * lanes<T> <= cols; c += 2 * lanes<T>) visit(std::integral_constant<int, 2>{}, c);
  if (c < cols) visit(std::integral_constant<int, 1>{}, c);
}

/// What a product does besides, every so many of its inner steps: nothing, or fetching what will be read next (Pace).
struct Nothing {
  static constexpr Index every = Index{1} << 30;
  NEARFAR_INLINE void operator()() const {}
};

/// C += A B for one register tile: A is Rows x depth, B is depth x (Vectors * lanes<T>) with row stride b_stride. Each
/// number of A meets Vectors multiply-adds; the accumulators stay in registers from the first step to the last.
template <int Rows, int Vectors, class T, class Besides = Nothing>
NEARFAR_INLINE void multiply_add(Packet<T> (&c)[Rows][Vectors], Broadcast<T> a, const T* b, Index b_stride, Index depth,
                                 Besides besides = {}) {
  const T* column = a.data;
  for (Index k = 0; k < depth;) {
    besides();
    NEARFAR_NO_UNROLL for (const Index end = std::min(k + besides.every, depth); k < end; ++k) {
      Packet<T> vectors[Vectors];
      NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) vectors[v] = load_once<Packet<T>>(b + v * lanes<T>);
      NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
        const Packet<T> number = pset1<Packet<T>>(column[r * a.row_stride]);
        NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) c[r][v] = pmadd(number, vectors[v], c[r][v]);
      }
      column += a.depth_stride;
      b += b_stride;
    }
  }
}

/// Rows [first, first + Rows) of C = start + A B for one panel of Vectors * lanes<T> columns.
///
/// A is rows x depth, B is depth x panel with row stride b_stride; start(r, v) gives the vector of C that row r begins
/// with and finish(r, v, c) takes the result.
template <int Rows, int Vectors, class T, class Start, class Finish, class Besides>
NEARFAR_INLINE void multiply_tile(Broadcast<T> a, Index first, const T* b, Index b_stride, Index depth, Start&& start,
                                  Finish&& finish, Besides besides) {
  Packet<T> c[Rows][Vectors];
  NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
    NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) c[r][v] = start(first + r, v);
  }
  multiply_add(c, a.rows_from(first), b, b_stride, depth, besides);
  NEARFAR_UNROLL for (int r = 0; r < Rows; ++r) {
    NEARFAR_UNROLL for (int v = 0; v < Vectors; ++v) finish(first + r, v, c[r][v]);
  }
}

/// C = start + A B, as above, for any number of rows.
template <int Vectors, class T, class Start, class Finish, class Besides = Nothing>
NEARFAR_INLINE void multiply(Broadcast<T> a, Index rows, const T* b, Index b_stride, Index depth, Start&& start,
                             Finish&& finish, Besides besides = {}) {
  for_each_tile<Vectors>(rows, [&](auto tile, Index first) {
    multiply_tile<decltype(tile)::value, Vectors>(a, first, b, b_stride, depth, start, finish, besides);
  });
}

/// The same where the number of rows is a multiple of Rows: a single register tile to compile.
template <int Rows, int Vectors, class T, class Start, class Finish, class Besides = Nothing>
NEARFAR_INLINE void multiply_groups(Broadcast<T> a, Index rows, const T* b, Index b_stride, Index depth, Start&& start,
                                    Finish&& finish, Besides besides = {}) {
  for (Index first = 0; first < rows; first += Rows) {
    multiply_tile<Rows, Vectors>(a, first, b, b_stride, depth, start, finish, besides);
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
