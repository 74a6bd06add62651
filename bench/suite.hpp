#pragma once

#include "flops.hpp"

#include <benchmark/benchmark.h>

#include <functional>
#include <regex>
#include <string>
#include <utility>
#include <vector>

// Which rows the benchmark has: every mechanism at every length, direction and number of threads.
namespace bench {

/// One row; its name is family/mechanism/causal|bidirectional/n:<n>/threads:<t>.
struct Row {
  std::string family;  // forward, backward, or peer/<library>
  std::string mechanism;
  bool causal = false;
  Index n = 0;
  int threads = 1;

  std::string name() const;
};

/// The longest sequence of a mechanism in the short run and in the full one.
struct Reach {
  Index quick;
  Index full;
};

/// The problem that rows share unless their name says otherwise, ours and the peers'.
inline constexpr nearfar::Heads standard_heads{.query = 8, .key_value = 8, .dim = 64};
inline constexpr Reach softmax_reach{.quick = 16384, .full = 32768};
inline constexpr Reach long_reach{.quick = 65536, .full = Index{1} << 20};
inline constexpr nearfar::Window full_window(bool causal) {
  return causal ? nearfar::Window{nearfar::Window::unlimited, 0} : nearfar::Window{};
}
inline constexpr nearfar::Window banded_window(bool causal) {
  return causal ? nearfar::Window{255, 0} : nearfar::Window{128, 128};
}

class Suite {
 public:
  Suite(bool quick, const std::string& filter);

  bool quick() const { return quick_; }

  /// One thread, and one for each processor.
  const std::vector<int>& thread_counts() const { return thread_counts_; }

  /// Powers of two from 256 on; of four in the short run.
  std::vector<Index> lengths(Reach reach) const;

  /// Registers the row if the filter lets it through.
  void add(const Row& row, std::function<void(benchmark::State&)> body);

  std::size_t size() const { return size_; }

  /// What one has to know of the whole run to read its numbers; shown before them and after.
  void note(std::string text) { notes_.push_back(std::move(text)); }
  const std::vector<std::string>& notes() const { return notes_; }

 private:
  bool quick_;
  std::regex filter_;
  std::vector<int> thread_counts_;
  std::size_t size_ = 0;
  std::vector<std::string> notes_;
};

// Each adds its rows.
void add_softmax(Suite& suite, bool causal);
void add_banded(Suite& suite, bool causal);
void add_linear(Suite& suite, bool causal);
void add_nystrom(Suite& suite);
void add_fmm(Suite& suite, bool causal);
void add_additive(Suite& suite, bool causal);
void add_multipole(Suite& suite, bool causal);
void add_eigen(Suite& suite);
void add_openblas(Suite& suite);
void add_libtorch(Suite& suite);

/// Starts the program again if OpenBLAS has taken the machine for one without its vectors, as one older than the
/// machine does: then its kernels have a fraction of the speed that others of its own have there.
void choose_openblas_kernels(char** arguments);

}  // namespace bench
