#pragma once

#include <nearfar/tokens.hpp>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

// Loops that take the time are compiled wherever they are called; what stands beside them, once.
#if defined(_MSC_VER) && !defined(__clang__)
#define NEARFAR_INLINE __forceinline
#define NEARFAR_NO_INLINE __declspec(noinline)
#else
#define NEARFAR_INLINE [[gnu::always_inline]] inline
#define NEARFAR_NO_INLINE [[gnu::noinline]]
#endif

// Whether the compiler shuffles its own vectors: clang does, and g++ from version 12 on.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define NEARFAR_SHUFFLES
#endif
#endif

// Loops over the registers of a tile must vanish at every optimisation level, or the tile lives in memory.
// And a loop whose body fills them must not be unrolled: then they no longer hold what the copies work on.
#if defined(__clang__)
#define NEARFAR_UNROLL _Pragma("clang loop unroll(full)")
#define NEARFAR_NO_UNROLL _Pragma("clang loop unroll(disable)")
#elif defined(__GNUC__)
#define NEARFAR_UNROLL _Pragma("GCC unroll 32")
#define NEARFAR_NO_UNROLL _Pragma("GCC unroll 1")
#else
#define NEARFAR_UNROLL
#define NEARFAR_NO_UNROLL
#endif

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

// The vector layer is Eigen's packet functions, which stand for every instruction set that Eigen knows. They say what
// the hardware shall do (a fused multiply-add, a vector maximum) where a compiler left to plain loops decides for
// itself.
using Eigen::internal::pabs;
using Eigen::internal::padd;
using Eigen::internal::pcmp_eq;
using Eigen::internal::pcmp_lt;
using Eigen::internal::pdiv;
using Eigen::internal::ploadu;
using Eigen::internal::plog;
using Eigen::internal::plset;
using Eigen::internal::pmadd;
using Eigen::internal::pmax;
using Eigen::internal::pmin;
using Eigen::internal::pmul;
using Eigen::internal::pnegate;
using Eigen::internal::por;
using Eigen::internal::predux;
using Eigen::internal::predux_max;
using Eigen::internal::pselect;
using Eigen::internal::pset1;
using Eigen::internal::pstoreu;
using Eigen::internal::psub;
using Eigen::internal::ptranspose;

/// The widest vector of T on the machine compiled for.
template <class T>
using Packet = typename Eigen::internal::packet_traits<T>::type;

/// How many T it holds.
template <class T>
inline constexpr int lanes = Eigen::internal::unpacket_traits<Packet<T>>::size;

/// How many vector registers there are: it bounds the tile that a microkernel can hold.
inline constexpr int vector_registers = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS;

/// How many steps cover `count`, and the smallest multiple of `step` that is not below it.
constexpr Index ceil_div(Index count, Index step) { return (count + step - 1) / step; }
constexpr Index round_up(Index count, Index step) { return ceil_div(count, step) * step; }

/// The bytes that memory moves at a time.
inline constexpr Index cache_line = 64;

/// Asks for a cache line that will be read in a while, in the second-level cache: the first has few lines to wait with.
/// It lies `bytes` from the base, maybe beyond the end of what the base points into.
NEARFAR_INLINE void prefetch_far(const void* base, Index bytes = 0) {
#if defined(__GNUC__)
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::intptr_t>(base) + bytes), 0, 2);
  // Without it g++ takes a function that does nothing else for one that does nothing, and leaves out its calls.
  __asm__ volatile("");
#else
  (void)base, (void)bytes;
#endif
}

/// In each lane x where a < b, else y. With vectors of 64 bytes Eigen's comparison fills a vector that its selection
/// compares again.
template <class P>
NEARFAR_INLINE P select_less(const P& a, const P& b, const P& x, const P& y) {
#if defined(__GNUC__)
  if constexpr (sizeof(P) == 64) {
    typedef typename Eigen::internal::unpacket_traits<P>::type Lanes __attribute__((vector_size(sizeof(P))));
    const auto less = std::bit_cast<Lanes>(a) < std::bit_cast<Lanes>(b);
    return std::bit_cast<P>(less ? std::bit_cast<Lanes>(x) : std::bit_cast<Lanes>(y));
  }
#endif
  return pselect(pcmp_lt(a, b), x, y);
}

/// Loads a vector once, for several uses: left to itself the compiler may read memory again for each of them, and a
/// load costs as much as a multiply-add.
template <class P, class T>
NEARFAR_INLINE P load_once(const T* from) {
  P packet = ploadu<P>(from);
#if defined(__GNUC__) && EIGEN_ARCH_i386_OR_x86_64
  if constexpr (sizeof(P) >= 16) __asm__("" : "+v"(packet));
#endif
  return packet;
}

/// What a loop body works on: vectors of `Width` numbers, or numbers one by one. The packet functions take either.
template <int Width>
struct By {
  template <class T>
  using Of = typename Eigen::internal::find_best_packet<T, Width>::type;
};
template <>
struct By<1> {
  template <class T>
  using Of = T;
};

/// The width of the next narrower vector of T on the machine compiled for; 1 if there is none.
template <class T, int Width>
inline constexpr int narrower =
    Eigen::internal::unpacket_traits<typename By<Width / 2>::template Of<T>>::size == Width / 2 ? Width / 2 : 1;

/// Calls body(by, c) for the numbers c .. count - 1 of a row, a packet of them at a time, which is
/// `typename decltype(by)::template Of<T>`: the widest vectors, for what is left narrower ones, and at last T.
template <class T, int Width = lanes<T>, class Body>
NEARFAR_INLINE void for_each_packet(Index count, Body&& body, Index c = 0) {
  for (; c + Width <= count; c += Width) body(By<Width>{}, c);
  if constexpr (Width > 1) {
    if (c < count) for_each_packet<T, narrower<T, Width>>(count, body, c);
  }
}

/// Calls body(by, packets, c) likewise, of `packets` packets at a time, an integral constant: blocks of `block`
/// vectors, of two, and what is left packet by packet.
template <int block, class T, class Body>
NEARFAR_INLINE void for_each_column_block(Index count, Body&& body, Index c = 0) {
  constexpr Index width = block * lanes<T>;
  for (; c + width <= count; c += width) body(By<lanes<T>>{}, std::integral_constant<int, block>{}, c);
  if constexpr (block > 2) {
    for_each_column_block<2, T>(count, body, c);
  } else {
    for_each_packet<T>(
        count, [&](auto by, Index at) { body(by, std::integral_constant<int, 1>{}, at); }, c);
  }
}

/// to[c] = f(from[c]...) for the numbers 0 .. count - 1 of rows, of which one may be `to` itself.
template <class T, class F, class... From>
NEARFAR_INLINE void combine(Index count, T* to, F&& f, const From*... from) {
  for_each_packet<T>(count, [&](auto by, Index c) {
    using V = typename decltype(by)::template Of<T>;
    pstoreu(to + c, V(f(ploadu<V>(from + c)...)));
  });
}

/// to[c] += from[c] likewise.
template <class T>
NEARFAR_INLINE void add_row(Index count, T* to, const T* from) {
  combine(
      count, to, [](const auto& a, const auto& b) { return padd(a, b); }, to, from);
}

/// Zero in the lanes of numbers that are finite, NaN in the others: `por` collects these.
template <class P>
NEARFAR_INLINE P zero_if_finite(const P& x) {
  return psub(x, x);
}

/// Whether none is NaN of what was so collected.
template <class P>
NEARFAR_INLINE bool all_finite(const P& zeros) {
  return predux(zeros) == 0;
}

#if defined(NEARFAR_SHUFFLES)
/// One step of sum_lanes: of the runs of `Run` lanes, taken `Group` at a time, a has its even ones and then b its even
/// ones; to these are added their odd ones.
template <int Run, int Group, class P, std::size_t... Lane>
NEARFAR_INLINE P fold(const P& a, const P& b, std::index_sequence<Lane...>) {
  typedef typename Eigen::internal::unpacket_traits<P>::type Lanes __attribute__((vector_size(sizeof(P))));
  constexpr auto source = [](int lane, int odd) {
    const int run = lane / Run;
    const int of_group = run % Group;
    const int of_b = of_group / (Group / 2) * static_cast<int>(sizeof...(Lane));
    return of_b + (run - of_group + of_group % (Group / 2) * 2 + odd) * Run + lane % Run;
  };
  const auto x = std::bit_cast<Lanes>(a);
  const auto y = std::bit_cast<Lanes>(b);
  return std::bit_cast<P>(__builtin_shufflevector(x, y, source(int{Lane}, 0)...) +
                          __builtin_shufflevector(x, y, source(int{Lane}, 1)...));
}

// Steps first within 128 bits, then among runs of 128 bits, four or two at a time: what one instruction shuffles,
// without a table of lanes.
template <int Count, int Run, int Step, class P>
NEARFAR_INLINE P fold_all(P* packets) {
  using T = typename Eigen::internal::unpacket_traits<P>::type;
  constexpr int width = Eigen::internal::unpacket_traits<P>::size;
  constexpr int runs = Run == 1 ? std::min(width, static_cast<int>(16 / sizeof(T))) : width / Run;
  if constexpr (Step < width) {
    NEARFAR_UNROLL for (int i = 0; i < Count; i += 2 * Step) {
      const P& other = packets[i + Step < Count ? i + Step : i];
      packets[i] = fold<Run, std::min(runs, 4)>(packets[i], other, std::make_index_sequence<width>{});
    }
    constexpr int next = 2 * Step;
    constexpr int run = next == Run * runs ? next : Run;
    return fold_all<Count, run, next>(packets);
  } else {
    return packets[0];
  }
}
#endif

/// The sums over the lanes of `Count` packets, a divisor of the number of lanes: that of packet i in the lanes i,
/// i + Count, ... Overwrites the packets.
template <int Count, class P>
NEARFAR_INLINE P sum_lanes(P* packets) {
  constexpr int width = Eigen::internal::unpacket_traits<P>::size;
  static_assert(width % Count == 0);
#if defined(NEARFAR_SHUFFLES)
  return fold_all<Count, 1, 1>(packets);
#else
  Eigen::internal::PacketBlock<P, width> block;
  for (int i = 0; i < width; ++i) block.packet[i] = packets[i % Count];
  if constexpr (width > 1) ptranspose(block);
  P sum = block.packet[0];
  for (int i = 1; i < width; ++i) sum = padd(sum, block.packet[i]);
  return sum;
#endif
}

/// Of as many packets as a packet has lanes.
template <class P>
NEARFAR_INLINE P sum_lanes(P* packets) {
  return sum_lanes<Eigen::internal::unpacket_traits<P>::size>(packets);
}

/// to[i] = the sum over the lanes of vectors[i]: several at a time, which is cheaper than one by one.
template <int Count, class P, class T>
NEARFAR_INLINE void sum_vectors(P (&vectors)[Count], T* to) {
  constexpr int width = Eigen::internal::unpacket_traits<P>::size;
  if constexpr (Count % width == 0) {
    NEARFAR_UNROLL for (int first = 0; first < Count; first += width) pstoreu(to + first, sum_lanes(vectors + first));
  } else if constexpr (Count > 1 && width % Count == 0) {
    T sums[width];
    pstoreu(sums, sum_lanes<Count>(vectors));
    std::copy_n(sums, Count, to);
  } else {
    NEARFAR_UNROLL for (int i = 0; i < Count; ++i) to[i] = predux(vectors[i]);
  }
}

/// Lane i of the result is lane i + Shift of a, the lanes taken as a ring.
template <int Shift, class P, std::size_t... Lane>
NEARFAR_INLINE P rotate(const P& a, std::index_sequence<Lane...>) {
  constexpr int width = sizeof...(Lane);
#if defined(NEARFAR_SHUFFLES)
  typedef typename Eigen::internal::unpacket_traits<P>::type Lanes __attribute__((vector_size(sizeof(P))));
  const auto x = std::bit_cast<Lanes>(a);
  return std::bit_cast<P>(__builtin_shufflevector(x, x, (int{Lane} + Shift) % width...));
#else
  typename Eigen::internal::unpacket_traits<P>::type ring[2 * width];
  pstoreu(ring, a);
  pstoreu(ring + width, a);
  return ploadu<P>(ring + Shift);
#endif
}

/// In every lane, op over the lanes whose number is the same modulo `Period`.
template <int Period, class P, class Op>
NEARFAR_INLINE P fold_across(P a, Op&& op) {
  constexpr int width = Eigen::internal::unpacket_traits<P>::size;
  if constexpr (Period >= width) {
    return a;
  } else {
    return fold_across<2 * Period>(op(a, rotate<Period>(a, std::make_index_sequence<width>{})), op);
  }
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
