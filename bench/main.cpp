#include "report.hpp"
#include "suite.hpp"

#include <malloc.h>

#include <cstdio>
#include <exception>
#include <string>
#include <vector>

int main(int count, char** arguments) try {
#ifdef NEARFAR_BENCH_OPENBLAS
  bench::choose_openblas_kernels(arguments);
#endif
  // Freed memory stays with the process: otherwise a library that takes its matrices anew at each call would be timed
  // mostly at the system's zeroing of pages. It costs nearfar nothing and helps its peers.
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, -1);

  bool quick = false;
  std::string filter;
  std::string plots;
  std::string shortest = "--benchmark_min_time=0.000001";  // measure() decides how often it calls
  std::vector<char*> rest{arguments[0], shortest.data()};
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--quick") {
      quick = true;
    } else if (argument.starts_with("--filter=")) {
      filter = argument.substr(9);
    } else if (argument.starts_with("--plots=")) {
      plots = argument.substr(8);
    } else {
      if (argument == "--help") {
        std::printf("nearfar_bench [--quick] [--filter=REGEX] [--plots=FOLDER], and Google Benchmark's own:\n");
      }
      rest.push_back(arguments[i]);
    }
  }
  int left = static_cast<int>(rest.size());
  rest.push_back(nullptr);
  benchmark::Initialize(&left, rest.data());
  if (benchmark::ReportUnrecognizedArguments(left, rest.data())) return 2;

  bench::Suite suite(quick, filter);
  for (const bool causal : {false, true}) {
    bench::add_softmax(suite, causal);
    bench::add_banded(suite, causal);
    bench::add_linear(suite, causal);
    if (!causal) bench::add_nystrom(suite);
    bench::add_fmm(suite, causal);
    bench::add_additive(suite, causal);
    bench::add_multipole(suite, causal);
  }
  bench::add_eigen(suite);
#ifdef NEARFAR_BENCH_OPENBLAS
  bench::add_openblas(suite);
#endif
#ifdef NEARFAR_BENCH_LIBTORCH
  bench::add_libtorch(suite);
#endif
  if (suite.size() == 0) {
    std::fprintf(stderr, "nearfar_bench: no row's name matches --filter=%s\n", filter.c_str());
    return 1;
  }
  bench::Report report(suite, plots);
  benchmark::RunSpecifiedBenchmarks(&report);
  return report.failed() ? 1 : 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "nearfar_bench: %s\n", error.what());
  return 1;
}
