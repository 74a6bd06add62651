#pragma once

#include <nearfar/detail/simd.hpp>

#include <array>
#include <bit>
#include <cstdint>

namespace nearfar {
inline namespace NEARFAR_VERSION_NAMESPACE {
namespace detail {

template <class T>
inline constexpr T log2_e = T(1.4426950408889634074);

template <class T>
inline constexpr T ln_2 = T(0.69314718055994530942);

/// What exp2 needs to know of a floating-point type.
template <class T>
struct Exp2;

template <>
struct Exp2<float> {
  using Bits = std::uint32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr float smallest_exponent = -127;
  /// Adding it pushes a number's fraction out of the mantissa: what is left below is the nearest integer.
  static constexpr float round_to_integer = 0x1.8p23f;
  /// (2^r - 1) / r on [-1/2, 1/2], with the least error of 2^r in units of the last place.
#if defined(EIGEN_HAS_SINGLE_INSTRUCTION_MADD)
  static constexpr std::array<float, 5> polynomial = {0.6931468289729557f, 0.24022236743264505f, 0.055508915977973236f,
                                                      0.009671782215649254f, 0.0013225737862836318f};
#else
  // Products that are rounded before they are added leave no room for the error of five coefficients.
  static constexpr std::array<float, 6> polynomial = {0.6931471824645996f,    0.24022650718688965f,
                                                      0.055503569543361664f,  0.009618083015084267f,
                                                      0.0013390863314270973f, 0.00015453163359779865f};
#endif
};

template <>
struct Exp2<double> {
  using Bits = std::uint64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr double smallest_exponent = -1023;
  static constexpr double round_to_integer = 0x1.8p52;
  /// As above.
  static constexpr std::array<double, 11> polynomial = {
      0.6931471805599453,     0.24022650695910097,   0.0555041086648216,    0.009618129107606888,
      0.0013333558146416936,  0.0001540353044173605, 1.525273382983612e-05, 1.321544258792169e-06,
      1.0178062445845774e-07, 7.072585949269223e-09, 4.4549605981865186e-10};
};

/// value * 2^n, where the low bits of `shifted` = n + round_to_integer hold n: n is added to the exponent bits.
template <class T, class P>
NEARFAR_INLINE P add_to_exponent(const P& value, const P& shifted) {
  using Bits = typename Exp2<T>::Bits;
#if defined(__GNUC__)
  typedef Bits Lanes __attribute__((vector_size(sizeof(P))));
  return std::bit_cast<P>(std::bit_cast<Lanes>(value) + (std::bit_cast<Lanes>(shifted) << Exp2<T>::mantissa_bits));
#else
  using Lanes = std::array<Bits, sizeof(P) / sizeof(Bits)>;
  Lanes bits = std::bit_cast<Lanes>(value);
  const Lanes exponent = std::bit_cast<Lanes>(shifted);
  for (std::size_t i = 0; i < bits.size(); ++i) bits[i] += exponent[i] << Exp2<T>::mantissa_bits;
  return std::bit_cast<P>(bits);
#endif
}

/// Replaces x by 2^x in every lane of `Count` packets, within 2 units in the last place where 2^x is a normal number.
///
/// -infinity gives exactly 0 and NaN gives NaN; results below the smallest normal number may be anything from 0 to it.
/// x must stay below the largest exponent (128 or 1024): a softmax never asks for more than 2^0.
/// One exponential is a chain of dependent steps: several packets go through it side by side.
template <class T, class P, int Count>
NEARFAR_INLINE void exp2(P (&x)[Count]) {
  using Traits = Exp2<T>;
  constexpr auto& c = Traits::polynomial;
  constexpr int terms = static_cast<int>(c.size());
  const P magic = pset1<P>(Traits::round_to_integer);
  // At the smallest exponent r is 0 and the polynomial exactly 1, whose exponent bits the addition turns into zero.
  const P smallest = pset1<P>(Traits::smallest_exponent);
  P shifted[Count];
  P power[Count];
  NEARFAR_UNROLL for (int i = 0; i < Count; ++i) x[i] = pmax(x[i], smallest);
  NEARFAR_UNROLL for (int i = 0; i < Count; ++i) shifted[i] = padd(x[i], magic);
  NEARFAR_UNROLL for (int i = 0; i < Count; ++i) x[i] = psub(x[i], psub(shifted[i], magic));
  NEARFAR_UNROLL for (int i = 0; i < Count; ++i) power[i] = pset1<P>(c.back());
  NEARFAR_UNROLL for (int k = terms - 2; k >= 0; --k) {
    const P coefficient = pset1<P>(c[static_cast<std::size_t>(k)]);
    NEARFAR_UNROLL for (int i = 0; i < Count; ++i) power[i] = pmadd(power[i], x[i], coefficient);
  }
  NEARFAR_UNROLL for (int i = 0; i < Count; ++i) power[i] = pmadd(power[i], x[i], pset1<P>(T(1)));
  NEARFAR_UNROLL for (int i = 0; i < Count; ++i) x[i] = add_to_exponent<T>(power[i], shifted[i]);
}

/// The same of one packet.
template <class T>
NEARFAR_INLINE Packet<T> exp2(const Packet<T>& x) {
  Packet<T> result[1] = {x};
  exp2<T>(result);
  return result[0];
}

}  // namespace detail
}  // namespace NEARFAR_VERSION_NAMESPACE
}  // namespace nearfar
