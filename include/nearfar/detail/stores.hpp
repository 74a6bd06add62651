#pragma once

#include <nearfar/detail/lookahead.hpp>
#include <nearfar/detail/simd.hpp>

#include <bit>
#include <concepts>
#include <cstdint>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

/// Stores a vector past the caches, where an ordinary store first reads the line that it is going to fill: only for
/// what is larger than the caches, and not read soon. `to` must be aligned to the vector; other threads may read it
/// after order_stores().
template <class P, class T>
NEARFAR_INLINE void store_past_caches(T* to, const P& vector) {
#if defined(__clang__)
  __builtin_nontemporal_store(vector, reinterpret_cast<P*>(to));
#elif defined(__GNUC__) && defined(EIGEN_VECTORIZE_SSE2)
  // g++ has a builtin for each width and none for all. A line that comes in parts may leave the buffer that joins them
  // before it is whole, so a vector is stored at once.
#if defined(EIGEN_VECTORIZE_AVX512)
  if constexpr (sizeof(P) == 64) _mm512_stream_si512(reinterpret_cast<__m512i*>(to), std::bit_cast<__m512i>(vector));
#endif
#if defined(EIGEN_VECTORIZE_AVX)
  if constexpr (sizeof(P) == 32) _mm256_stream_si256(reinterpret_cast<__m256i*>(to), std::bit_cast<__m256i>(vector));
#endif
  if constexpr (sizeof(P) == 16) _mm_stream_si128(reinterpret_cast<__m128i*>(to), std::bit_cast<__m128i>(vector));
  static_assert(sizeof(P) == 16 || sizeof(P) == 32 || sizeof(P) == 64);
#else
  pstoreu(to, vector);
#endif
}

/// Puts stores past the caches, which x86 leaves in no order, before all stores that follow.
NEARFAR_INLINE void order_stores() {
#if defined(EIGEN_VECTORIZE_SSE)
  _mm_sfence();
#endif
}

/// What takes vectors, or numbers, to a row that will be read soon.
struct Keep {
  template <class P, class T>
  NEARFAR_INLINE void operator()(T* to, const P& numbers) const {
    pstoreu(to, numbers);
  }
};

/// What takes them to a row, of a matrix too large for the caches, that will not be read soon.
struct PastCaches {
  template <class P, class T>
  NEARFAR_INLINE void operator()(T* to, const P& numbers) const {
    if constexpr (sizeof(P) > sizeof(T)) {
      store_past_caches(to, numbers);
    } else {
      pstoreu(to, numbers);
    }
  }
};

/// Whether rows are more than a call can hope to leave in a cache for the next.
template <class T>
bool larger_than_caches(const Tokens<T>& rows) {
  constexpr Index cache_bytes = Index{16} << 20;
  return rows.rows() * rows.cols() * Index{sizeof(T)} >= cache_bytes;
}

/// Whether rows, their stride and `width` numbers of them are whole multiples of so many bytes.
template <class T>
bool aligned(const Tokens<T>& rows, Index width, Index bytes) {
  const auto whole = [bytes](Index count) { return count * Index{sizeof(T)} % bytes == 0; };
  return reinterpret_cast<std::uintptr_t>(rows.data()) % static_cast<std::uintptr_t>(bytes) == 0 &&
         whole(rows.stride()) && whole(width);
}

/// Whether rows of heads of `dim` are best stored past the caches: they would flush them, and each head, written by
/// itself, is whole cache lines. To write a part of one past the caches costs more than to read the rest.
template <class T>
bool past_caches(const Tokens<T>& rows, Index dim) {
  return larger_than_caches(rows) && aligned(rows, dim, cache_line);
}

/// The same where heads are written side by side, so that only vectors must be aligned.
template <class T>
bool rows_past_caches(const Tokens<T>& rows, Index dim) {
  return larger_than_caches(rows) && aligned(rows, dim, Index{sizeof(Packet<T>)});
}

/// The same where one vector of many rows is written before the next: it must be a cache line.
template <class T>
bool columns_past_caches(const Tokens<T>& rows, Index dim) {
  return Index{sizeof(Packet<T>)} == cache_line && past_caches(rows, dim);
}

/// Keep or PastCaches, chosen at run time: the branch costs less than compiling what stores twice.
struct KeepOrPastCaches {
  bool past = false;

  template <class P, class T>
  NEARFAR_INLINE void operator()(T* to, const P& numbers) const {
    past ? PastCaches{}(to, numbers) : Keep{}(to, numbers);
  }
};

/// Calls visit(store) with a store that goes past the caches or not, and lets what follows see what it stored.
template <std::invocable<KeepOrPastCaches> Visit>
void with_store(bool past, Visit&& visit) {
  visit(KeepOrPastCaches{past});
  if (past) order_stores();
}

/// Rows of a matrix, heads of `dim` side by side, that are written column by column. Where the matrix is larger than
/// the caches, they are put together in `room` first, for count * cols numbers: memory takes lines that lie far apart
/// slowly.
template <class T>
struct WholeRows {
  bool past;
  Tokens<T> to;
  Tokens<T> rows;  ///< to be written, then finished

  WholeRows(const Tokens<T>& matrix, Index first, Index count, Index dim, T* room)
      : past(rows_past_caches(matrix, dim)),
        to(matrix.middle_rows(first, count)),
        rows(past ? Tokens<T>(room, count, matrix.cols(), matrix.cols()) : to) {}

  /// What is written in place has to be fetched before.
  void announce(Lookahead& ahead) const {
    if (!past) ahead.add(rows);
  }

  void finish() const {
    if (!past) return;
    for (Index i = 0; i < rows.rows(); ++i) {
      for_each_packet<T>(rows.cols(), [from = rows.row(i), to_row = to.row(i)](auto by, Index c) {
        PastCaches{}(to_row + c, ploadu<typename decltype(by)::template Of<T>>(from + c));
      });
    }
    order_stores();
  }
};

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
