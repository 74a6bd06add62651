#pragma once

#include "flops.hpp"
#include "memory.hpp"
#include "probes.hpp"
#include "suite.hpp"

#include <nearfar/attention.hpp>

#include <cmath>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

// How a row is measured: the same for nearfar and its peers.
namespace bench {

/// What a row reads and writes.
template <class T>
struct Tensors {
  nearfar::Matrix<T> query, key, value, grad_out, out, grad_query, grad_key, grad_value;
};

/// Numbers of mean 0 and variance 1, always the same, that drift from row to row: tokens are alike (correlation 0.98)
/// to their neighbours and forget each other over some 50 tokens, as those of a text do. Each is roughly normal, from
/// the four 16-bit parts of a hash.
template <class T>
void fill(nearfar::Matrix<T>& matrix, Index rows, Index cols, std::uint64_t seed) {
  constexpr double likeness = 0.98;
  const double step = std::sqrt(1 - likeness * likeness);
  matrix.resize(rows, cols);
  for (Index i = 0; i < matrix.size(); ++i) {
    std::uint64_t x = (seed << 40) + static_cast<std::uint64_t>(i) * 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    x ^= x >> 31;
    const auto sum = static_cast<int>((x & 0xffff) + ((x >> 16) & 0xffff) + ((x >> 32) & 0xffff) + (x >> 48)) - 131070;
    const double fresh = sum * (1.0 / 37837.0);
    matrix.data()[i] =
        static_cast<T>(i < cols ? fresh : likeness * static_cast<double>(matrix.data()[i - cols]) + step * fresh);
  }
}

/// The same tensors for all rows, made anew when a row needs more tokens than those before it. Each is a page longer
/// than asked for: one after another and of a power of two, their rows would meet in the same memory channels, which
/// what malloc takes from the system piece by piece does not.
template <class T>
Tensors<T>& tensors(Index rows, Index cols, bool gradients = false) {
  static Tensors<T> shared;
  constexpr Index page = 4096 / Index{sizeof(T)};
  rows += (page + cols - 1) / cols;
  if (shared.query.rows() < rows || shared.query.cols() != cols) {
    shared = {};
    fill(shared.query, rows, cols, 1);
    shared.key = shared.query;  // so that like tokens attend to each other
    fill(shared.value, rows, cols, 2);
    shared.out.setZero(rows, cols);
  }
  if (gradients && shared.grad_out.rows() < rows) {
    fill(shared.grad_out, rows, cols, 3);
    for (auto* gradient : {&shared.grad_query, &shared.grad_key, &shared.grad_value}) gradient->setZero(rows, cols);
  }
  return shared;
}

template <class T>
nearfar::Inputs<T> inputs_of(const Tensors<T>& tensors, Index queries, Index keys) {
  return {nearfar::Tokens<const T>(tensors.query).middle_rows(0, queries),
          nearfar::Tokens<const T>(tensors.key).middle_rows(0, keys),
          nearfar::Tokens<const T>(tensors.value).middle_rows(0, keys)};
}

/// |out - exact| / |exact| over a sample of rows, exact softmax attention computed in double.
template <class T>
double error_to_softmax(const nearfar::Heads& heads, const nearfar::Inputs<T>& inputs, nearfar::Tokens<const T> out,
                        bool causal) {
  const Index queries = inputs.query.rows();
  const Index keys = inputs.key.rows();
  const Index samples = std::min<Index>(queries, 16);
  const double scale = 1 / std::sqrt(static_cast<double>(heads.dim));
  const nearfar::Band band(full_window(causal), queries, keys);
  double difference = 0;
  double norm = 0;
  for (Index sample = 0; sample < samples; ++sample) {
    const Index i = queries - 1 - sample * (queries / samples);
    for (Index h = 0; h < heads.query; ++h) {
      const Index shared = h / heads.group();
      const auto key = inputs.key.middle_cols(shared * heads.dim, heads.dim).matrix().topRows(band.end(i));
      const auto value =
          inputs.value.middle_cols(shared * heads.value_width(), heads.value_width()).matrix().topRows(band.end(i));
      const auto query = inputs.query.middle_cols(h * heads.dim, heads.dim).matrix().row(i);
      const auto row = out.middle_cols(h * heads.value_width(), heads.value_width()).matrix().row(i);
      Eigen::VectorXd weights = scale * (key.template cast<double>() * query.template cast<double>().transpose());
      weights = (weights.array() - weights.maxCoeff()).exp();
      const Eigen::RowVectorXd exact = weights.transpose() * value.template cast<double>() / weights.sum();
      difference += (row.template cast<double>() - exact).squaredNorm();
      norm += exact.squaredNorm();
    }
  }
  return std::sqrt(difference / norm);
}

/// Samples of what the machine can do, taken around a row.
class Machine {
 public:
  Machine(bool is_double, int threads) : is_double_(is_double), threads_(threads) { sample(); }

  void sample() {
    append(peak_, is_double_ ? peak_gflops<double>(threads_, 7) : peak_gflops<float>(threads_, 7));
    append(ordinary_, triad().gbytes_per_second(Stores::ordinary, threads_, 2));
    append(non_temporal_, triad().gbytes_per_second(Stores::non_temporal, threads_, 2));
  }

  double peak() const { return median(peak_); }
  double triad_ordinary() const { return median(ordinary_); }
  double triad_non_temporal() const { return median(non_temporal_); }

 private:
  static Triad& triad() {
    static Triad arrays;
    return arrays;
  }

  static void append(std::vector<double>& all, const std::vector<double>& more) {
    all.insert(all.end(), more.begin(), more.end());
  }

  bool is_double_;
  int threads_;
  std::vector<double> peak_, ordinary_, non_temporal_;
};

/// Times call(context) between two samples of the machine, and writes the counters that every row has. The rates are
/// those of the median call; percent_of_bandwidth is of the faster triad, as a rule that with stores past the caches:
/// an ordinary store moves a fourth number that the triad does not count; extra_bytes is the most heap that the first
/// call had in use beyond what stood before it, the scratch memory of a fresh context included. Gives the seconds of
/// the median call.
template <class T, class Call>
double measure(benchmark::State& state, const Suite& suite, int threads, const Cost& cost, Call&& call) {
  nearfar::Context context(threads);
  const PeakOfHeap heap;
  const double begin = now();
  call(context);
  const double first = now() - begin;
  const auto extra = heap.bytes();
  // What the first call took is now one block, whose pages the second call touches first: neither is timed, where that
  // does not take long.
  if (first < (suite.quick() ? 1 : 20)) call(context);

  Machine machine(std::is_same_v<T, double>, threads);
  const double seconds = suite.quick() ? 0.1 : 1;
  const double fewest = suite.quick() || first > 20 ? 1 : 3;
  const auto calls = static_cast<Index>(std::clamp(seconds / first, fewest, 10000.0));
  std::vector<double> times;
  while (state.KeepRunningBatch(calls)) {
    for (Index i = 0; i < calls; ++i) {
      const double start = now();
      call(context);
      times.push_back(now() - start);
    }
  }
  machine.sample();

  const double time = median(times);
  const double bandwidth = std::max(machine.triad_ordinary(), machine.triad_non_temporal());
  state.counters["seconds"] = time;
  state.counters["tokens_per_second"] = cost.tokens / time;
  state.counters["gflops"] = cost.flops / time * 1e-9;
  state.counters["percent_of_peak"] = 100 * cost.flops / time * 1e-9 / machine.peak();
  state.counters["gbytes_per_second"] = cost.bytes / time * 1e-9;
  state.counters["percent_of_bandwidth"] = 100 * cost.bytes / time * 1e-9 / bandwidth;
  state.counters["extra_bytes"] = static_cast<double>(extra);
  state.counters["peak_gflops"] = machine.peak();
  state.counters["triad_gbytes_per_second"] = machine.triad_ordinary();
  state.counters["triad_non_temporal_gbytes_per_second"] = machine.triad_non_temporal();
  return time;
}

/// One mechanism in one direction, ours or a peer's, to be measured at every length and number of threads.
template <class T>
struct Subject {
  using Call = std::function<void(nearfar::Context&)>;
  using Prepare = std::function<Call(const nearfar::Inputs<T>&, nearfar::Tokens<T> out)>;

  std::string family = {};
  std::string mechanism = {};
  bool causal = false;
  nearfar::Heads heads = standard_heads;
  Reach reach{};
  std::function<double(Index n)> flops = {};
  /// Makes what is timed, for one row.
  Prepare prepare = {};
  Prepare expected = {};              // makes the out that a peer must come to
  bool one_query = false;             // decoding: one query against n keys
  double tensors_moved = 4;           // query, key, value and out once each
  double tensors_moved_backward = 8;  // query, key, value, out and its gradient are read, three gradients written
  bool approximates_softmax = true;   // whether out is worth comparing with softmax's
};

/// Throws if `out` is not what the subject must come to, but for rounding.
template <class T>
void check_expected(const Subject<T>& subject, const nearfar::Inputs<T>& inputs, nearfar::Tokens<const T> out) {
  nearfar::Matrix<T> expected(out.rows(), out.cols());
  nearfar::Context context;
  subject.expected(inputs, expected)(context);
  const double difference = (out.matrix() - expected).cwiseAbs().maxCoeff();
  const double largest = expected.cwiseAbs().maxCoeff();
  if (!(difference <= 1e-4 * largest)) {
    throw std::logic_error("differs from nearfar's result by " + std::to_string(difference) +
                           ", and the largest of that is " + std::to_string(largest));
  }
}

template <class T>
void run(benchmark::State& state, const Suite& suite, const Subject<T>& subject, const Row& row) {
  const Index queries = subject.one_query ? 1 : row.n;
  Tensors<T>& data = tensors<T>(row.n, subject.heads.query_cols());
  const nearfar::Inputs<T> inputs = inputs_of(data, queries, row.n);
  const auto out = nearfar::Tokens<T>(data.out).middle_rows(0, queries);
  const double bytes = bytes_of_tensors(subject.heads, queries, row.n, sizeof(T)) * subject.tensors_moved / 4;
  const double time =
      measure<T>(state, suite, row.threads, {real(queries), subject.flops(row.n), bytes}, subject.prepare(inputs, out));
  if constexpr (std::is_same_v<T, float>) {
    if (subject.one_query) {
      const double read =
          read_gbytes_per_second({inputs.key.data(), inputs.value.data()}, row.n * inputs.key.cols(), row.threads, 15);
      state.counters["percent_of_bandwidth"] = 100 * bytes / time * 1e-9 / read;
    }
  }
  if (subject.expected && row.n <= 2048) check_expected<T>(subject, inputs, out);
  if (subject.approximates_softmax && row.n <= 8192) {
    state.counters["relative_error"] = error_to_softmax<T>(subject.heads, inputs, out, subject.causal);
  }
}

template <class T>
void add(Suite& suite, const Subject<T>& subject) {
  for (const int threads : suite.thread_counts()) {
    for (const Index n : suite.lengths(subject.reach)) {
      const Row row{subject.family, subject.mechanism, subject.causal, n, threads};
      suite.add(row, [&suite, subject, row](benchmark::State& state) { run(state, suite, subject, row); });
    }
  }
}

}  // namespace bench
