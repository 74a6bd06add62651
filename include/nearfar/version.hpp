#pragma once

/// The version of nearfar, and the only place that states it: CMake reads these three lines.
#define NEARFAR_VERSION_MAJOR 0
#define NEARFAR_VERSION_MINOR 1
#define NEARFAR_VERSION_PATCH 0

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || defined(_M_FP_FAST)
#error "nearfar needs infinities and NaN: build without -ffast-math and -ffinite-math-only."
#endif

#if defined(min) || defined(max)
#error "nearfar needs std::min and std::max, and not macros of their names: define NOMINMAX before windows.h."
#endif

// g++ mistakes the operand that some AVX-512 intrinsics leave undefined on purpose for an uninitialised variable, and
// warns wherever Eigen's packet functions are inlined.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <Eigen/Core>
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#if !EIGEN_VERSION_AT_LEAST(3, 4, 0)
#error "nearfar needs Eigen 3.4 or later."
#endif

// Everything lives in an inline namespace named by version and instruction set, so that translation units built with
// different -march flags carry different symbols and the linker never swaps one's kernels for the other's. (The
// functions of Eigen and of the standard library carry no such name and may be swapped: all units that are linked need
// a machine that has all their instructions.)
#if defined(EIGEN_DONT_VECTORIZE) || !defined(EIGEN_VECTORIZE)
#define NEARFAR_INSTRUCTION_SET scalar
#elif defined(EIGEN_VECTORIZE_AVX512) && defined(EIGEN_VECTORIZE_AVX512DQ)
#define NEARFAR_INSTRUCTION_SET avx512
#elif defined(EIGEN_VECTORIZE_AVX512)
#define NEARFAR_INSTRUCTION_SET avx512f
#elif defined(EIGEN_VECTORIZE_AVX2) && defined(EIGEN_VECTORIZE_FMA)
#define NEARFAR_INSTRUCTION_SET avx2_fma
#elif defined(EIGEN_VECTORIZE_AVX2)
#define NEARFAR_INSTRUCTION_SET avx2
#elif defined(EIGEN_VECTORIZE_AVX) && defined(EIGEN_VECTORIZE_FMA)
#define NEARFAR_INSTRUCTION_SET avx_fma
#elif defined(EIGEN_VECTORIZE_AVX)
#define NEARFAR_INSTRUCTION_SET avx
#elif defined(EIGEN_VECTORIZE_SSE4_1)
#define NEARFAR_INSTRUCTION_SET sse4
#elif defined(EIGEN_VECTORIZE_SSE)
#define NEARFAR_INSTRUCTION_SET sse2
#elif defined(EIGEN_VECTORIZE_NEON) && defined(EIGEN_HAS_SINGLE_INSTRUCTION_MADD)
#define NEARFAR_INSTRUCTION_SET neon_fma
#elif defined(EIGEN_VECTORIZE_NEON)
#define NEARFAR_INSTRUCTION_SET neon
#else
#define NEARFAR_INSTRUCTION_SET vector
#endif

#define NEARFAR_JOIN_(major, minor, set) v##major##_##minor##_##set
#define NEARFAR_JOIN(major, minor, set) NEARFAR_JOIN_(major, minor, set)
#define NEARFAR_VERSION_NAMESPACE NEARFAR_JOIN(NEARFAR_VERSION_MAJOR, NEARFAR_VERSION_MINOR, NEARFAR_INSTRUCTION_SET)
