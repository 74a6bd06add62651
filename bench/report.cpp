#include "report.hpp"

#include "format.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>

namespace bench {
namespace {

/// Why a row could not be measured; empty if it was. Google Benchmark 1.8 has other names for it.
template <class Run>
std::string error_of(const Run& run) {
  if constexpr (requires { run.error_occurred; }) {
    return run.error_occurred ? run.error_message : "";
  } else {
    return run.skipped ? run.skip_message : "";
  }
}

/// The row that a name names.
Row parsed(const std::string& name) {
  const auto threads = name.rfind("/threads:");
  const auto n = name.rfind("/n:", threads);
  const auto direction = name.rfind('/', n - 1);
  const auto mechanism = name.rfind('/', direction - 1);
  Row row;
  row.family = name.substr(0, mechanism);
  row.mechanism = name.substr(mechanism + 1, direction - mechanism - 1);
  row.causal = name.substr(direction + 1, n - direction - 1) == "causal";
  row.n = std::stoll(name.substr(n + 3));
  row.threads = std::stoi(name.substr(threads + 9));
  return row;
}

}  // namespace

double Result::counter(const std::string& name) const {
  const auto found = counters.find(name);
  return found == counters.end() ? std::numeric_limits<double>::quiet_NaN() : found->second;
}

bool Report::ReportContext(const Context&) {
  std::printf(
      "%zu rows on up to %d threads; each: first call counts memory, then timed calls between two samples of the "
      "machine\n\n",
      rows_, processors_);
  for (const std::string& note : notes_) std::printf("%s\n\n", note.c_str());
  return true;
}

void Report::ReportRuns(const std::vector<Run>& runs) {
  for (const Run& run : runs) {
    if (run.run_type == Run::RT_Aggregate) continue;
    Result result{parsed(run.run_name.function_name), 0, {}, error_of(run)};
    for (const auto& [name, counter] : run.counters) result.counters[name] = counter.value;
    result.seconds = result.counter("seconds");
    std::printf("[%3zu/%zu] %-58s ", results_.size() + 1, rows_, result.row.name().c_str());
    if (!result.error.empty()) {
      std::printf("failed: %s\n", result.error.c_str());
    } else {
      std::printf("%9s  %6.1f GFLOP/s %5.1f %%  %5.1f GB/s %5.1f %%  +%s\n", time_text(result.seconds).c_str(),
                  result.counter("gflops"), result.counter("percent_of_peak"), result.counter("gbytes_per_second"),
                  result.counter("percent_of_bandwidth"), bytes_text(result.counter("extra_bytes")).c_str());
    }
    std::fflush(stdout);
    results_.push_back(std::move(result));
  }
}

void Report::Finalize() {
  print_tables(results_);
  for (const std::string& note : notes_) std::printf("  %s\n", note.c_str());
  if (!plots_.empty()) write_plots(results_, plots_);
}

bool Report::failed() const {
  return std::any_of(results_.begin(), results_.end(), [](const Result& result) { return !result.error.empty(); });
}

}  // namespace bench
