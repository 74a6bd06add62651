#pragma once

#include <nearfar/detail/simd.hpp>

#include <cstddef>
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
  // g++ has a builtin for each instruction set, and none for all: every one of x86 has the store of 16 bytes.
  __m128i parts[sizeof(P) / 16];
  pstoreu(reinterpret_cast<T*>(parts), vector);
  for (std::size_t i = 0; i < sizeof(P) / 16; ++i) _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, parts[i]);
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

/// And to a row that will not be, of a matrix too large for a cache.
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

/// Whether rows of heads of `dim` are best stored past the caches: they would flush them, and each head is whole
/// vectors, which such stores must be aligned to.
template <class T>
bool past_caches(const Tokens<T>& rows, Index dim) {
  constexpr auto vector = Index{sizeof(Packet<T>)};
  return larger_than_caches(rows) && reinterpret_cast<std::uintptr_t>(rows.data()) % vector == 0 &&
         rows.stride() * Index{sizeof(T)} % vector == 0 && dim * Index{sizeof(T)} % vector == 0;
}

/// Either of them, chosen at run time: the branch costs less than compiling what stores twice.
struct KeepOrPastCaches {
  bool past = false;

  template <class P, class T>
  NEARFAR_INLINE void operator()(T* to, const P& numbers) const {
    past ? PastCaches{}(to, numbers) : Keep{}(to, numbers);
  }
};

/// Calls visit(store) with what stores rows of heads of `dim`.
template <class T, class Visit>
void with_store(const Tokens<T>& rows, Index dim, Visit&& visit) {
  const bool past = past_caches(rows, dim);
  visit(KeepOrPastCaches{past});
  if (past) order_stores();
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
