#pragma once

#include <benchmark/benchmark.h>
#include <nearfar/detail/simd.hpp>
#include <nearfar/detail/stores.hpp>

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

// What the machine can do at this moment, measured in the same process as the kernels, around each.
namespace bench {

using nearfar::Index;

inline double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline double median(std::vector<double> values) {
  if (values.empty()) return 0;
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// Runs body(thread) on `threads` threads at once, `repetitions` times, and gives the seconds that each time took, from
/// when the first thread began to when the last one ended.
template <class Body>
std::vector<double> seconds_of(int threads, int repetitions, Body&& body) {
  std::vector<double> seconds;
  std::vector<double> begin(static_cast<std::size_t>(threads)), end(begin);
  std::barrier start(threads);
  std::barrier stop(threads, [&]() noexcept {
    seconds.push_back(*std::max_element(end.begin(), end.end()) - *std::min_element(begin.begin(), begin.end()));
  });
  const auto run = [&](int thread) {
    for (int repetition = 0; repetition < repetitions; ++repetition) {
      start.arrive_and_wait();
      begin[static_cast<std::size_t>(thread)] = now();
      body(thread);
      end[static_cast<std::size_t>(thread)] = now();
      stop.arrive_and_wait();
    }
  };
  std::vector<std::jthread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(run, thread);
  run(0);
  return seconds;
}

/// The clock, in Hz, or more: 6 dependent integer operations cannot take less than 6 cycles, and take no more where
/// each overwrites what it reads (fewer only where an instruction does two of them, which can but raise the bound).
inline double clock_bound() {
  constexpr int steps = 1 << 17;
  double best = 0;
  for (int repetition = 0; repetition < 5; ++repetition) {
    volatile std::uint64_t seed = 88172645463325252u;
    const std::uint64_t term = seed;
    const std::uint64_t mask = seed;
    const double begin = now();
    std::uint64_t x = seed;
    for (int i = 0; i < steps; ++i) {
      x = (x + term) ^ mask;
      x = (x + term) ^ mask;
      x = (x + term) ^ mask;
    }
    benchmark::DoNotOptimize(x);
    best = std::max(best, 6.0 * steps / (now() - begin));
  }
  return best;
}

/// Fused multiply-adds in registers: 12 independent chains, so that neither latency nor memory holds them up. Returns
/// the flops done.
///
/// The compiler could compute this once, or outside the timed region: so the factors come from, and the sums go to,
/// places that it cannot see through, and `peak_gflops` holds the result against the clock. (A volatile variable,
/// because g++ takes DoNotOptimize of a variable in a register for leave to forget its value: denormal numbers then, at
/// a hundredth of the speed.)
template <class T>
double multiply_add() {
  using Packet = nearfar::detail::Packet<T>;
  constexpr int chains = 12;
  constexpr int steps = 50000;
  volatile T half = T(0.5);
  const T seed = half;
  const Packet factor = nearfar::detail::pset1<Packet>(seed);
  const Packet term = nearfar::detail::pset1<Packet>(seed + T(0.25));
  Packet sum[chains];
  for (int chain = 0; chain < chains; ++chain) sum[chain] = nearfar::detail::pset1<Packet>(seed + T(chain));
  for (int step = 0; step < steps; ++step) {
    for (int chain = 0; chain < chains; ++chain) {
#if defined(EIGEN_HAS_SINGLE_INSTRUCTION_MADD)
      sum[chain] = nearfar::detail::pmadd(factor, term, sum[chain]);
#else
      // A product of constants would be taken once.
      sum[chain] = nearfar::detail::pmadd(sum[chain], factor, term);
#endif
    }
  }
  for (int chain = 0; chain < chains; ++chain) benchmark::DoNotOptimize(sum[chain]);
  return 2.0 * chains * steps * nearfar::detail::lanes<T>;
}

/// The largest rate of fused multiply-adds on `threads` cores, one value a sample, in GFLOP/s. Throws if it is above
/// what two vector units a core allow at this clock, and a tenth for a clock that changed in between: then the compiler
/// has taken work out of the timed region.
template <class T>
std::vector<double> peak_gflops(int threads, int samples) {
  double flops = 0;
  std::vector<double> gflops;
  for (const double seconds : seconds_of(threads, samples, [&](int thread) {
         const double done = multiply_add<T>();
         if (thread == 0) flops = done;
       })) {
    gflops.push_back(threads * flops / seconds * 1e-9);
  }
  // A neighbour on this core slows the clock's probe as well, for seconds: only what no reading of the clock so far
  // allows is an error.
  static double clock = 0;
  const auto bound = [&] { return 4.4e-9 * nearfar::detail::lanes<T> * threads * clock; };
  for (int reading = 0; reading < 20 && median(gflops) > bound(); ++reading) clock = std::max(clock, clock_bound());
  if (median(gflops) > bound()) {
    throw std::logic_error("the probe of the peak reads " + std::to_string(median(gflops)) +
                           " GFLOP/s, but the clock allows " + std::to_string(bound()));
  }
  return gflops;
}

enum class Stores { ordinary, non_temporal };

/// The STREAM triad a = b + s c over arrays that no cache holds, in GB/s by the bytes that the program names (3 a
/// number; the line that an ordinary store first fetches is not counted).
class Triad {
 public:
  std::vector<double> gbytes_per_second(Stores stores, int threads, int samples) {
    const Index share = size / threads / 16 * 16;
    std::vector<double> rates;
    for (const double seconds : seconds_of(threads, samples, [&](int thread) { run(stores, thread * share, share); })) {
      rates.push_back(3.0 * sizeof(float) * static_cast<double>(share * threads) / seconds * 1e-9);
    }
    return rates;
  }

 private:
  static constexpr Index size = Index{12} << 20;  // 3 arrays of 48 MiB

  void run(Stores stores, Index first, Index count) {
    using nearfar::detail::lanes;
    using Packet = nearfar::detail::Packet<float>;
    float* a = a_.data() + first;
    const float* b = b_.data() + first;
    const float* c = c_.data() + first;
    const Packet factor = nearfar::detail::pset1<Packet>(3.0f);
    for (Index i = 0; i < count; i += lanes<float>) {
      const Packet sum = nearfar::detail::pmadd(factor, nearfar::detail::ploadu<Packet>(c + i),
                                                nearfar::detail::ploadu<Packet>(b + i));
      stores == Stores::ordinary ? nearfar::detail::pstoreu(a + i, sum)
                                 : nearfar::detail::store_past_caches(a + i, sum);
    }
    nearfar::detail::order_stores();
    benchmark::ClobberMemory();
  }

  Eigen::ArrayXf a_ = Eigen::ArrayXf::Zero(size);
  Eigen::ArrayXf b_ = Eigen::ArrayXf::Ones(size);
  Eigen::ArrayXf c_ = Eigen::ArrayXf::Ones(size);
};

/// One pass that only reads arrays of `count` numbers each: what a single query against many keys can hope for.
inline double read_gbytes_per_second(std::initializer_list<const float*> arrays, Index count, int threads,
                                     int samples) {
  using Packet = nearfar::detail::Packet<float>;
  constexpr Index step = 4 * nearfar::detail::lanes<float>;
  const Index share = count / threads / step * step;
  std::vector<double> rates;
  for (const double seconds : seconds_of(threads, samples, [&](int thread) {
         Packet sum[4];
         for (Packet& part : sum) part = nearfar::detail::pset1<Packet>(0.0f);
         for (const float* data : arrays) {
           for (Index i = thread * share; i < (thread + 1) * share; i += step) {
             for (int j = 0; j < 4; ++j) {
               sum[j] = nearfar::detail::padd(
                   sum[j], nearfar::detail::ploadu<Packet>(data + i + j * nearfar::detail::lanes<float>));
             }
           }
         }
         for (Packet& part : sum) benchmark::DoNotOptimize(part);
       })) {
    rates.push_back(static_cast<double>(arrays.size() * sizeof(float)) * static_cast<double>(share * threads) /
                    seconds * 1e-9);
  }
  return median(rates);
}

}  // namespace bench
